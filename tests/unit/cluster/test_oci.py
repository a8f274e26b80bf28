"""Image archives that hold only what the receiver lacks."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.cluster import oci


@pytest.fixture
def image(tmp_path: Path) -> tuple[Path, str]:
    """A directory of blobs and the digest of the image in it."""
    program, blobs = tmp_path / "pause", tmp_path / "blobs"
    program.write_bytes(b"\x7fELF")
    blobs.mkdir()
    return blobs, oci.single_program(program, "amd64", blobs)


def archive(blobs: Path, manifest: str, *held: str) -> dict[str, bytes]:
    """The files of an archive."""
    target = io.BytesIO()
    oci.write_archive(blobs, manifest, "localhost/x:1", held, target)
    with tarfile.open(fileobj=io.BytesIO(target.getvalue())) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_an_image_of_one_program(image: tuple[Path, str]) -> None:
    blobs, manifest = image
    _, config, layer = oci.contents(blobs, manifest)
    files = archive(blobs, manifest)
    assert json.loads(files["index.json"])["manifests"][0] == {
        "mediaType": oci.MANIFEST,
        "digest": manifest,
        "size": len(files[f"blobs/{manifest.replace(':', '/')}"]),
        "annotations": {"io.containerd.image.name": "localhost/x:1"},
    }
    assert json.loads(files[f"blobs/{config.replace(':', '/')}"])["config"]["Entrypoint"] == ["/pause"]
    with tarfile.open(fileobj=io.BytesIO(files[f"blobs/{layer.replace(':', '/')}"])) as tar:
        assert [(member.name, member.mode) for member in tar] == [("pause", 0o755)]


def test_blobs_that_the_receiver_holds_stay_at_home(image: tuple[Path, str]) -> None:
    blobs, manifest = image
    _, config, layer = oci.contents(blobs, manifest)
    assert oci.size(blobs, manifest, [layer, manifest]) == (blobs / config.removeprefix("sha256:")).stat().st_size
    assert sorted(archive(blobs, manifest, layer, manifest)) == sorted(
        ["oci-layout", "index.json", f"blobs/{config.replace(':', '/')}"]
    )


def test_the_same_program_makes_the_same_image(image: tuple[Path, str], tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    assert oci.single_program(tmp_path / "pause", "amd64", again) == image[1]
