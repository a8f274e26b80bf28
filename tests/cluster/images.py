"""The project's images: built with buildah when their inputs changed, kept in a seed that new nodes are cloned from.

The seed is a containerd root in the cache. The large layers are imported into it once; after a change of the
sources only the thin last layer is, into the seed and into nodes that run.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster import base, binaries, cache, commands, oci, processes, progress, settings
from tests.cluster.builder import REPOSITORY_NAME, Builder, tag
from tests.cluster.errors import ClusterError
from tests.cluster.node import PAUSE_IMAGE, Node
from tests.cluster.processes import Program

NAMES = ("operator", "worker")
INPUTS = {
    "operator": (
        "operator/pipelinejob_operator",
        "worker/pipelinejob_worker/__init__.py",
        "worker/pipelinejob_worker/protocol",
    ),
    "worker": ("worker/pipelinejob_worker",),
}
SEED_FORMAT = "2"
MOST_LOADED_BYTES = 2**30
SEED_PROGRAM = "containerd-seed"
CONTENT = "io.containerd.content.v1.content/blobs/sha256"

Loaded = dict[str, dict[str, str]]
"""Image name to its ``key`` (hash of its inputs) and the digest of its ``manifest``."""


def seed() -> Path:
    """Return where the seed is: its containerd root and ``images.json``, which says what is in it."""
    return cache.path("seed", SEED_FORMAT)


def read_loaded(directory: Path) -> Loaded:
    """Return what a directory's ``images.json`` says."""
    file = directory / "images.json"
    loaded: Loaded = json.loads(file.read_text()) if file.exists() else {}
    return loaded


def _write_loaded(directory: Path, loaded: Loaded) -> None:
    partial = directory / "images.partial"
    partial.write_text(json.dumps(loaded, indent=1))
    partial.rename(directory / "images.json")


def _sources(name: str) -> Iterator[Path]:
    for item in INPUTS[name]:
        path = settings.REPOSITORY / item
        found = [path] if path.is_file() else sorted(path.rglob("*"))
        yield from (file for file in found if file.is_file() and "__pycache__" not in file.parts)


def key_of(name: str) -> str:
    """Return the hash of all that goes into an image."""
    recipe = [
        settings.REPOSITORY / "images" / "build.sh",
        settings.REPOSITORY / "images" / name / "Containerfile",
        settings.REPOSITORY / "locks" / f"{name}.txt",
    ]
    sources = [part for file in _sources(name) for part in (str(file.relative_to(settings.REPOSITORY)), file)]
    return cache.digest(base.key(), *recipe, *sources)


@contextmanager
def _seed_containerd() -> Iterator[Path]:
    """Run a containerd on the seed, without its Kubernetes part; yield its socket."""
    run = settings.RUN / "seed"
    processes.stop(settings.STATE, SEED_PROGRAM)  # of an interrupted run
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    config, socket = run / "containerd.toml", run / "containerd.sock"
    config.write_text(
        f"""version = 2
root = "{seed()}/root"
state = "{run}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
  address = "{socket}"
"""
    )
    argv = ("unshare", "--mount", "--propagation", "private", "containerd", "--config", config)
    program = Program(settings.STATE, SEED_PROGRAM, argv, lambda: commands.succeeds(*ctr(socket), "image", "ls"))
    program.start()
    try:
        yield socket
    finally:
        program.stop()
        shutil.rmtree(run)


def ctr(socket: Path) -> tuple[str | Path, ...]:
    """Return the command that speaks to a containerd about the images that Kubernetes sees."""
    return ("ctr", "--address", socket, "--namespace", "k8s.io")


def held_blobs(socket: Path) -> frozenset[str]:
    """Return the digests of the blobs that a containerd has."""
    return frozenset(commands.run(*ctr(socket), "content", "ls", "--quiet").split())


def import_image(socket: Path, blobs: Path, manifest: str, name: str) -> None:
    """Import an image into a containerd, sending only the blobs that it lacks. Raises ClusterError.

    containerd's garbage collector may remove a layer of an image that was replaced just as this one is built upon it.
    What it has removed is missing when the import is tried again.
    """
    said = _import_once(socket, blobs, manifest, name)
    if "does not exist" in said:
        said = _import_once(socket, blobs, manifest, name)
    if said:
        raise ClusterError(f"importing {name} into {socket}: {said}")


def _import_once(socket: Path, blobs: Path, manifest: str, name: str) -> str:
    """Return why the import failed, nothing if it did not."""
    held = held_blobs(socket)
    command = [str(word) for word in (*ctr(socket), "image", "import", "-")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with process.stdin as target:
                oci.write_archive(blobs, manifest, name, held, target)
        except BrokenPipeError:
            pass  # it says why below
        said = process.stdout.read().decode(errors="replace")
    return f"ctr ended with {process.returncode}: {said.strip()}" if process.returncode else ""


@contextmanager
def _exported(builder: Builder, image: str) -> Iterator[tuple[Path, str]]:
    """Write an image's blobs beside those of the seed; yield their directory and the manifest's digest."""
    with tempfile.TemporaryDirectory(dir=settings.CACHE) as work:
        layout = Path(work) / "layout"
        blobs = layout / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        for blob in (seed() / "root" / CONTENT).glob("*"):
            os.link(blob, blobs / blob.name)  # buildah writes only what is not there
        yield blobs, builder.push(image, layout)


def _seed_project_image(builder: Builder, socket: Path, image: str) -> str:
    with _exported(builder, image) as (blobs, manifest):
        import_image(socket, blobs, manifest, image)
    return manifest


def add(directory: str, nodes: Iterable[Node]) -> str:
    """Build the image of a directory, on top of the worker's, bring it to nodes that run, and return its name."""
    image = f"{REPOSITORY_NAME}/{Path(directory).name}:{tag()}"
    ensure_seed()
    with cache.locked("seed"):
        builder = Builder(settings.CACHE / "containers")
        builder.prepare()
        if not builder.has(f"{REPOSITORY_NAME}/worker:{tag()}"):
            builder.build("worker", base.ensure(builder))
        builder.build(directory, "")
        with _exported(builder, image) as (blobs, manifest):
            for node in nodes:
                import_image(node.socket, blobs, manifest, image)
    return image


def _seed_pause(socket: Path, programs: Path) -> str:
    architecture = commands.run("go", "env", "GOARCH").strip()
    with tempfile.TemporaryDirectory(dir=settings.CACHE) as work:
        manifest = oci.single_program(programs / "pause", architecture, Path(work))
        import_image(socket, Path(work), manifest, PAUSE_IMAGE)
    return manifest


def wanted() -> Loaded:
    """Return the images that nodes shall have, with the hash of their inputs."""
    return {f"{REPOSITORY_NAME}/{name}:{tag()}": {"name": name, "key": key_of(name)} for name in NAMES}


def _drop(socket: Path, loaded: Loaded) -> None:
    """Remove images of other tags from the seed: they would keep large layers of former lock files alive."""
    for image in loaded.keys() - wanted().keys() - {PAUSE_IMAGE}:
        commands.run(*ctr(socket), "image", "rm", "--sync", image)
        del loaded[image]


def ensure_seed() -> Path:
    """Build what changed, import it into the seed, and return the seed."""
    programs = binaries.ensure()
    with cache.locked("seed"):
        loaded = read_loaded(seed())
        stale = {image: entry for image, entry in wanted().items() if loaded.get(image, {}).get("key") != entry["key"]}
        pause_key = cache.digest(programs / "pause")
        pause_stale = loaded.get(PAUSE_IMAGE, {}).get("key") != pause_key
        if not stale and not pause_stale:
            return seed()
        builder = Builder(settings.CACHE / "containers")
        builder.prepare()
        base_image = base.ensure(builder) if stale else ""
        for image, entry in stale.items():
            with progress.step(f"building image {image}", key=f"image-{entry['name']}", usual="worker: about 3 min"):
                builder.build(entry["name"], base_image)
        (seed() / "root").mkdir(parents=True, exist_ok=True)
        with _seed_containerd() as socket:
            if pause_stale:
                loaded[PAUSE_IMAGE] = {"key": pause_key, "manifest": _seed_pause(socket, programs)}
            for image, entry in stale.items():
                with progress.step(f"importing {image}", key=f"import-{entry['name']}", usual="worker: about 2 min"):
                    manifest = _seed_project_image(builder, socket, image)
                loaded[image] = {"key": entry["key"], "manifest": manifest}
            _drop(socket, loaded)
        _write_loaded(seed(), loaded)
    return seed()


def load(node: Node) -> None:
    """Bring a node that runs up to the seed.

    Raises:
        ClusterError: the dependencies of an image changed: each node would get a copy of gigabytes.

    """
    has, blobs = read_loaded(node.directory), seed() / "root" / CONTENT
    current = read_loaded(seed())
    for image, entry in current.items():
        if has.get(image, {}).get("manifest") != entry["manifest"]:
            size = oci.size(blobs, entry["manifest"], held_blobs(node.socket))
            if size > MOST_LOADED_BYTES:
                raise ClusterError(
                    f"the dependencies of {image} changed: {size / 2**30:.1f} GiB would be copied to every node;"
                    " `make cluster-down cluster-up` makes nodes that share them"
                )
            with progress.step(f"{node.name}: loading {image}"):
                import_image(node.socket, blobs, entry["manifest"], image)
    _write_loaded(node.directory, {**has, **current})
