"""Kueue beside the control plane: it admits pods that carry the label of one of its queues."""

import base64
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import binaries, commands, lifecycle, settings
from tests.cluster.api import MERGE_PATCH, Api, ApiError, Object
from tests.cluster.control_plane import LOOPBACK, ControlPlane, answers
from tests.cluster.processes import Program

API = "/apis/kueue.x-k8s.io/v1beta2"
WEBHOOKS = ("mpod", "vpod", "mworkload", "vworkload", "mclusterqueue", "vclusterqueue", "mresourceflavor")
"""Those of what is used here; the others are for kinds that this cluster has not."""

EXEMPT = ("kube-system", "kueue-system")
"""Namespaces whose pods Kueue must not touch, by its own rules."""

_IN_ITS_OWN_ETC = """
mount -t tmpfs tmpfs /etc
mkdir -p /etc/kueue/metrics
ln -s "$1" /etc/kueue/metrics/certs
shift
exec "$@"
"""
"""Kueue looks for the certificate of its metrics, which nobody reads here, in this place alone."""


@contextmanager
def running() -> Iterator[None]:
    """Run Kueue on the cluster of this machine; afterwards neither it nor anything of its kinds is left."""
    plane, api = lifecycle.control_plane(), Api()
    built, program = binaries.ensure_kueue(), _program(plane)
    crds = _documents(built / "crds.yaml")
    hooks = [_reachable(plane, each) for each in _documents(built / "webhooks.yaml")]
    for crd in crds:
        api.apply(_crd_path(crd), crd)
    try:
        commands.wait_until("Kueue's kinds are served", lambda: all(_listed(api, crd) is not None for crd in crds))
        program.start()
        for hook in hooks:
            api.apply(_hook_path(hook), hook)
        yield
    finally:
        for hook in hooks:
            _delete(api, _hook_path(hook))
        program.stop(signal.SIGKILL)
        for crd in crds:
            _delete_kind(api, crd)


def _program(plane: ControlPlane) -> Program:
    """Return Kueue, which admits pods; its webhooks are served with a certificate of the cluster's authority."""
    home = plane.home / "kueue"
    home.mkdir(exist_ok=True)
    certificate, key = plane.authority.sign("kueue", "kueue", addresses=(f"IP:{LOOPBACK}",))
    for name, file in (("tls.crt", certificate), ("tls.key", key)):
        (home / name).write_bytes(file.read_bytes())
    health = f"{LOOPBACK}:{settings.KUEUE_HEALTH_PORT}"
    config = home / "config.json"
    config.write_text(json.dumps(_configuration(home, health)))
    argv: tuple[str | Path, ...] = (
        *("unshare", "--mount", "--propagation", "private", "sh", "-ec", _IN_ITS_OWN_ETC, "sh", home),
        binaries.ensure_kueue() / "kueue",
        f"--config={config}",
        f"--kubeconfig={plane.kubeconfig}",
        "--feature-gates=VisibilityOnDemand=false",
    )
    return Program(plane.home, "kueue", argv, lambda: answers(f"http://{health}/readyz"))


def _configuration(home: Path, health: str) -> Object:
    selector = {"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": list(EXEMPT)}
    return {
        "apiVersion": "config.kueue.x-k8s.io/v1beta2",
        "kind": "Configuration",
        "namespace": "kueue-system",
        "health": {"healthProbeBindAddress": health},
        "metrics": {"bindAddress": "0"},
        "webhook": {"host": LOOPBACK, "port": settings.KUEUE_WEBHOOK_PORT, "certDir": str(home)},
        "internalCertManagement": {"enable": False},
        "leaderElection": {"leaderElect": False},
        "managedJobsNamespaceSelector": {"matchExpressions": [selector]},
        "integrations": {"frameworks": ["pod"]},
        "resources": {"excludeResourcePrefixes": ["cpu", "memory", "ephemeral-storage"]},  # quotas are of GPUs
    }


def _reachable(plane: ControlPlane, configuration: Object) -> Object:
    """Keep the webhooks that are used, and have them asked at the address of this machine."""
    authority = base64.b64encode(plane.authority.certificate.read_bytes()).decode()
    configuration["webhooks"] = [hook for hook in configuration["webhooks"] if hook["name"].split(".")[0] in WEBHOOKS]
    configuration["metadata"]["name"] = f"kueue-{configuration['metadata']['name']}"
    for hook in configuration["webhooks"]:
        path = hook["clientConfig"]["service"]["path"]
        hook["clientConfig"] = {"url": f"https://{LOOPBACK}:{settings.KUEUE_WEBHOOK_PORT}{path}", "caBundle": authority}
    return configuration


def _delete_kind(api: Api, crd: Object) -> None:
    """Delete a kind and its objects, whose finalizers nobody takes off any more."""
    plural = crd["spec"]["names"]["plural"]
    for item in _listed(api, crd) or []:
        meta = item["metadata"]
        where = f"namespaces/{meta['namespace']}/" if meta.get("namespace") else ""
        path = f"{API}/{where}{plural}/{meta['name']}"
        if meta.get("finalizers"):
            api.request("PATCH", path, {"metadata": {"finalizers": None}}, MERGE_PATCH)
        _delete(api, path)
    _delete(api, _crd_path(crd))


def _listed(api: Api, crd: Object) -> list[Object] | None:
    """Return the objects of a kind, None while it is not served yet."""
    try:
        items: list[Object] = api.request("GET", f"{API}/{crd['spec']['names']['plural']}")["items"]
    except ApiError as error:
        if error.status in (404, 429):
            return None
        raise
    return items


def _delete(api: Api, path: str) -> None:
    try:
        api.request("DELETE", path)
    except ApiError as error:
        if error.status != 404:  # it was never made, or went with its last finalizer
            raise


def _crd_path(crd: Object) -> str:
    return f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{crd['metadata']['name']}"


def _hook_path(hook: Object) -> str:
    return f"/apis/admissionregistration.k8s.io/v1/{hook['kind'].lower()}s/{hook['metadata']['name']}"


def _documents(file: Path) -> list[Any]:
    return [document for document in yaml.safe_load_all(file.read_text()) if document]
