"""The programs of the cluster, built from the Go modules that ``tools/go.mod`` pins."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tests.cluster import cache, commands, progress, settings
from tests.cluster.errors import ClusterError

TOOLS = Path(__file__).parent / "tools"
STRIP = "-s -w"
_VERSION = "k8s.io/component-base/version"
_MAJOR, _MINOR, _ = settings.KUBERNETES_VERSION.split(".")
KUBERNETES_FLAGS = (
    f"{STRIP} -X {_VERSION}.gitVersion=v{settings.KUBERNETES_VERSION}"
    f" -X {_VERSION}.gitMajor={_MAJOR} -X {_VERSION}.gitMinor={_MINOR}"
)
KUBERNETES = tuple(
    f"k8s.io/kubernetes/cmd/{name}"
    for name in (
        "kube-apiserver",
        "kubectl",
        "kube-controller-manager",
        "kube-scheduler",
        "kubelet",
        "kube-proxy",
    )
)
ETCD = "go.etcd.io/etcd/server/v3"
OTHERS = (
    "github.com/coredns/coredns",
    "helm.sh/helm/v4/cmd/helm",
)
CNI_PLUGINS = tuple(
    f"github.com/containernetworking/plugins/plugins/{name}"
    for name in ("ipam/host-local", "main/bridge", "main/loopback")
)
PAUSE = "./pause"
KWOK = "sigs.k8s.io/kwok/cmd/kwok"
KWOK_STAGES = ("node/fast", "node/heartbeat-with-lease", "pod/fast")
"""How simulated nodes and pods behave, from kwok's own collection."""

KUEUE = "sigs.k8s.io/kueue/cmd/kueue"
KUEUE_CRDS, KUEUE_WEBHOOKS = "config/components/crd/bases/*.yaml", "config/components/webhook/manifests.yaml"
"""What Kueue wants in the API server, in its module."""


def go_build(module: Path, target: Path, flags: str, *packages: str, log: Path) -> None:
    """Build the main packages of a module, without cgo, into the directory ``target``."""
    if shutil.which("go") is None:
        raise ClusterError("go: no such program; install Go 1.26 or newer and put it on the PATH")
    commands.run(
        *("go", "build", "-trimpath", "-ldflags", flags, "-o", f"{target}/", *packages),
        directory=module,
        environment={"CGO_ENABLED": "0"},
        log=log,
    )


def _build(target: Path) -> None:
    log = settings.CACHE / "log" / "binaries.log"
    log.unlink(missing_ok=True)
    with progress.step("building etcd", key="etcd", usual="about 1 min"):
        go_build(TOOLS, target, KUBERNETES_FLAGS, ETCD, log=log)
        (target / "server").rename(target / "etcd")
    with progress.step(
        f"building Kubernetes {settings.KUBERNETES_VERSION}",
        key="kubernetes",
        usual="about 12 min on 2 cores",
    ):
        go_build(TOOLS, target, KUBERNETES_FLAGS, *KUBERNETES, log=log)
    with progress.step(
        "building CoreDNS, helm, pause and the CNI plugins", key="tools", usual="about 2 min on 2 cores"
    ):
        go_build(TOOLS, target, STRIP, *OTHERS, PAUSE, log=log)
        go_build(TOOLS, target / "cni", STRIP, *CNI_PLUGINS, log=log)


def ensure() -> Path:
    """Return the directory of kube-apiserver, kubectl, etcd, helm and the rest, building it if need be.

    The CNI plugins are in its subdirectory ``cni``.
    """
    recipe = repr((KUBERNETES_FLAGS, KUBERNETES, ETCD, OTHERS, CNI_PLUGINS))
    inputs = (TOOLS / "go.mod", TOOLS / "go.sum", TOOLS / "pause" / "main.go")
    return cache.ensure("binaries", cache.digest(*inputs, recipe), _build)


_SOURCE_OF = ("go", "list", "-m", "-f", "{{.Dir}}")


def _ensure_with_manifests(
    kind: str, program: str, usual: str, files: Mapping[str, Callable[[Path], Iterable[Path]]], *recipe: str
) -> Path:
    """Return the directory of a program that has a Go module of its own in ``tools``, building it if need be.

    ``files``: what lies beside it, each joined from these of the program's source. ``recipe``: what chooses them.
    """
    module = TOOLS / kind

    def build(target: Path) -> None:
        log = settings.CACHE / "log" / f"{kind}.log"
        log.unlink(missing_ok=True)
        with progress.step(f"building {kind}", key=kind, usual=usual):
            go_build(module, target, STRIP, program, log=log)
            listed = commands.run(
                "go", "list", "-m", "-f", "{{.Dir}}", program.rpartition("/cmd/")[0], directory=module
            )
            for name, choose in files.items():
                texts = [file.read_text() for file in choose(Path(listed.strip()))]
                (target / name).write_text("\n---\n".join(texts))

    return cache.ensure(kind, cache.digest(module / "go.mod", module / "go.sum", STRIP, program, *recipe), build)


def _kwok_stages(source: Path) -> list[Path]:
    files = [file for stage in KWOK_STAGES for file in sorted((source / "kustomize/stage" / stage).glob("*.yaml"))]
    return [file for file in files if file.name != "kustomization.yaml"]


def ensure_kwok() -> Path:
    """Return the directory that holds kwok, which simulates nodes, and its ``stages.yaml``, building it if need be."""
    files = {"stages.yaml": _kwok_stages}
    return _ensure_with_manifests("kwok", KWOK, "about 3 min on 2 cores", files, *KWOK_STAGES)


def ensure_kueue() -> Path:
    """Return the directory that holds kueue, its ``crds.yaml`` and ``webhooks.yaml``, building it if need be."""
    files: dict[str, Callable[[Path], Iterable[Path]]] = {
        "crds.yaml": lambda source: sorted(source.glob(KUEUE_CRDS)),
        "webhooks.yaml": lambda source: source.glob(KUEUE_WEBHOOKS),
    }
    return _ensure_with_manifests("kueue", KUEUE, "about 8 min on 2 cores", files, KUEUE_CRDS, KUEUE_WEBHOOKS)
