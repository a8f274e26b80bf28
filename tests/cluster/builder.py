"""Building images with buildah, in a storage of the cache's own."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import commands, processes, settings
from tests.cluster.errors import ClusterError

REPOSITORY_NAME = "localhost/pipelinejob"


def tag() -> str:
    """Return the tag of the project's images."""
    return os.environ.get("IMAGE_TAG", "dev")


APART_SCRIPT = """
set -eu
resolver=$(readlink -f /etc/resolv.conf)
text=$(cat "$resolver")
mount --no-mtab -t tmpfs tmpfs /var/lib
mount --no-mtab -t tmpfs tmpfs /run
case $resolver in
/run/*) mkdir -p "${resolver%/*}" && printf '%s\\n' "$text" > "$resolver" ;;
esac
exec "$@"
"""


@dataclass(frozen=True)
class Builder:
    """buildah and skopeo with a storage of their own in the cache."""

    storage: Path

    def run(self, *argv: str | Path, log: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
        """Run a program on this storage.

        It runs in a mount namespace of its own with fresh /run and /var/lib, where both keep locks and caches
        whatever their configuration says.
        """
        return commands.run(
            *("unshare", "--mount", "--propagation", "private", "sh", "-c", APART_SCRIPT, "builder", *argv),
            environment={**self.environment, **(environment or {})},
            log=log,
        )

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make buildah use this storage and no container runtime, and `down` find it."""
        return {
            "BUILDAH_ISOLATION": "chroot",
            "BUILDER": "buildah",
            **processes.marks(settings.STATE, "builder"),
            "CONTAINERS_CONF": str(self.storage / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.storage / "storage.conf"),
        }

    def prepare(self) -> None:
        """Write the configuration that keeps buildah out of /etc and the user's own storage."""
        self.storage.mkdir(parents=True, exist_ok=True)
        (self.storage / "containers.conf").write_text(f'[network]\nnetwork_config_dir = "{self.storage}/network"\n')
        (self.storage / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{self.storage}/storage"\nrunroot = "/run/containers"\n'
        )

    def has(self, image: str) -> bool:
        """Say whether the storage has an image of this name."""
        try:
            self.run("buildah", "inspect", "--type=image", image)
        except ClusterError:
            return False
        return True

    def build(self, name: str, base_image: str) -> None:
        """Build an image of the project, or of a directory of its own; unchanged layers come from the storage."""
        log = settings.CACHE / "log" / f"image-{Path(name).name}.log"
        log.unlink(missing_ok=True)
        chosen = {"BASE": base_image} if base_image else {}
        self.run(
            settings.REPOSITORY / "images" / "build.sh",
            name,
            environment={**chosen, "IMAGE_REPOSITORY": REPOSITORY_NAME, "IMAGE_TAG": tag()},
            log=log,
        )

    def push(self, image: str, layout: Path) -> str:
        """Write an image into an OCI layout that may hold blobs already; return the manifest's digest."""
        # Uncompressed layers keep the digest under which the seed has them, so they are not copied again.
        self.run(
            *("skopeo", "copy", "--quiet", "--dest-oci-accept-uncompressed-layers"),
            *(f"containers-storage:{image}", f"oci:{layout}:image"),
        )
        index = json.loads((layout / "index.json").read_text())
        digest: str = index["manifests"][0]["digest"]
        return digest
