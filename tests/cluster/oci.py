"""Image archives in the OCI layout, cut down to the blobs that the receiver lacks."""

import hashlib
import io
import json
import tarfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
NAME_ANNOTATION = "io.containerd.image.name"


def _blob(blobs: Path, digest: str) -> Path:
    return blobs / digest.removeprefix("sha256:")


def store(blobs: Path, data: bytes) -> str:
    """Write a blob into a directory of blobs and return its digest."""
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return f"sha256:{digest}"


def single_program(program: Path, architecture: str, blobs: Path) -> str:
    """Make an image that holds one static program as its entry point; return the manifest's digest."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        entry = tarfile.TarInfo(program.name)
        entry.size, entry.mode = program.stat().st_size, 0o755
        with program.open("rb") as source:
            tar.addfile(entry, source)
    layer_digest = store(blobs, layer.getvalue())
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {"Entrypoint": [f"/{program.name}"], "User": "65532:65532"},
        "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
    }

    def descriptor(kind: str, digest: str) -> dict[str, Any]:
        return {"mediaType": kind, "digest": digest, "size": _blob(blobs, digest).stat().st_size}

    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": descriptor(CONFIG, store(blobs, json.dumps(config).encode())),
        "layers": [descriptor(LAYER, layer_digest)],
    }
    return store(blobs, json.dumps(manifest).encode())


def contents(blobs: Path, manifest: str) -> list[str]:
    """Return the digests of an image's blobs: manifest, configuration, layers."""
    read = json.loads(_blob(blobs, manifest).read_text())
    return [manifest, read["config"]["digest"], *(layer["digest"] for layer in read["layers"])]


def size(blobs: Path, manifest: str, held: Collection[str]) -> int:
    """Return the bytes of an image's blobs that a receiver lacks which holds the blobs ``held``."""
    return sum(_blob(blobs, digest).stat().st_size for digest in contents(blobs, manifest) if digest not in held)


def write_archive(blobs: Path, manifest: str, name: str, held: Collection[str], target: IO[bytes]) -> None:
    """Write an image as an archive for a receiver that holds the blobs ``held`` already.

    containerd takes blobs that an archive lacks from its own content store, so a change of the last layer costs
    that layer alone.
    """
    entry = {
        "mediaType": MANIFEST,
        "digest": manifest,
        "size": _blob(blobs, manifest).stat().st_size,
        "annotations": {NAME_ANNOTATION: name},
    }
    index = {"schemaVersion": 2, "manifests": [entry]}
    with tarfile.open(fileobj=target, mode="w|") as tar:

        def add(path: str, data: bytes) -> None:
            header = tarfile.TarInfo(path)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))

        add("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
        add("index.json", json.dumps(index).encode())
        for digest in dict.fromkeys(contents(blobs, manifest)):
            if digest not in held:
                algorithm, _, text = digest.partition(":")
                tar.add(_blob(blobs, digest), arcname=f"blobs/{algorithm}/{text}")
