"""The API server as dicts in and dicts out, over ``kubernetes.aio``.

Its generated models are left aside on purpose: they refuse values that a newer API server may send. Every
write of the operator passes ``may_write``, so that a replica that lost its lease cannot write by accident.
"""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.config.config_exception import ConfigException

from pipelinejob_operator.api.v1alpha1 import API_VERSION, PLURAL
from pipelinejob_operator.build.names import FIELD_MANAGER

Manifest = dict[str, Any]

REQUEST_SECONDS = 30.0
PAGE = 500

BAD_REQUEST, FORBIDDEN, NOT_FOUND, CONFLICT, UNPROCESSABLE = 400, 403, 404, 409, 422


class Resource(NamedTuple):
    """A kind of object in the API's paths."""

    prefix: str
    plural: str


JOBS = Resource(f"/apis/{API_VERSION}", PLURAL)
PODS = Resource("/api/v1", "pods")
SERVICES = Resource("/api/v1", "services")
CLAIMS = Resource("/api/v1", "persistentvolumeclaims")
VOLUMES = Resource("/api/v1", "persistentvolumes")
NODES = Resource("/api/v1", "nodes")
EVENTS = Resource("/api/v1", "events")
DEPLOYMENTS = Resource("/apis/apps/v1", "deployments")
NETWORK_POLICIES = Resource("/apis/networking.k8s.io/v1", "networkpolicies")
DEVICE_CLASSES = Resource("/apis/resource.k8s.io/v1", "deviceclasses")
LEASES = Resource("/apis/coordination.k8s.io/v1", "leases")


class ApiError(Exception):
    """The API server said no."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code, self.reason, self.message = code, reason, message


class Kubernetes:
    """A connection to the API server.

    Every method raises ``ApiError`` for an answer of 400 and above (but see ``get``), and aiohttp's
    ``ClientError`` or ``TimeoutError`` when there is no answer. Nothing is retried here: the queue does that.
    """

    def __init__(self, api: client.ApiClient, may_write: Callable[[], None]) -> None:
        self._api = api
        self._may_write = may_write

    @classmethod
    async def connect(cls, may_write: Callable[[], None]) -> "Kubernetes":
        """Log in with the pod's service account, or else with ``KUBECONFIG``.

        ``may_write`` is called before each write of the operator and raises where writing is not allowed.
        """
        settings = client.Configuration()
        try:
            config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
        except ConfigException:
            await config.load_kube_config(client_configuration=settings)  # type: ignore[no-untyped-call]
        return cls(client.ApiClient(settings), may_write)

    async def close(self) -> None:
        """Close all connections."""
        await self._api.close()  # type: ignore[no-untyped-call]

    async def get(self, resource: Resource, namespace: str, name: str) -> Manifest | None:
        """Read one object; None where there is none."""
        try:
            return await self._send("GET", _path(resource, namespace, name))
        except ApiError as error:
            if error.code == NOT_FOUND:
                return None
            raise

    async def resources(self, api: str) -> frozenset[str]:
        """Plural names of what a group and version serves, such as ``apps/v1``; none where it is not served."""
        try:
            found = await self._send("GET", f"/apis/{api}")
        except ApiError as error:
            if error.code == NOT_FOUND:
                return frozenset()
            raise
        return frozenset(item["name"] for item in found["resources"])

    async def pages(
        self, resource: Resource, namespace: str, labels: str = ""
    ) -> AsyncIterator[tuple[list[Manifest], int]]:
        """List objects page by page, all as of one moment, with that moment's resource version."""
        query = [("limit", str(PAGE)), *([("labelSelector", labels)] if labels else [])]
        more: list[tuple[str, str]] = []
        while True:
            page = await self._send("GET", _path(resource, namespace), query=query + more)
            yield page["items"], int(page["metadata"]["resourceVersion"])
            if not (token := page["metadata"].get("continue")):
                return
            more = [("continue", token)]

    async def create(self, resource: Resource, manifest: Manifest) -> Manifest:
        """Create an object."""
        self._may_write()
        return await self._send("POST", _path(resource, manifest["metadata"]["namespace"]), manifest)

    async def rehearse(self, resource: Resource, manifest: Manifest) -> Manifest:
        """Return an object as it would be created, with all that admission adds; nothing is."""
        path = _path(resource, manifest["metadata"]["namespace"])
        return await self._send("POST", path, manifest, query=[("dryRun", "All")])

    async def apply(self, resource: Resource, manifest: Manifest, manager: str = FIELD_MANAGER) -> Manifest:
        """Create or update an object by server-side apply; what another ``manager`` has said of it stays."""
        self._may_write()
        meta = manifest["metadata"]
        return await self._send(
            "PATCH",
            _path(resource, meta["namespace"], meta["name"]),
            manifest,
            content_type="application/apply-patch+yaml",
            query=[("fieldManager", manager), ("force", "true")],
        )

    async def json_patch(
        self, resource: Resource, namespace: str, name: str, operations: list[Manifest], subresource: str = ""
    ) -> Manifest:
        """Patch an object by RFC 6902; a failed ``test`` raises ``ApiError`` 422."""
        self._may_write()
        path = _path(resource, namespace, name) + (f"/{subresource}" if subresource else "")
        return await self._send("PATCH", path, operations, content_type="application/json-patch+json")

    async def delete(self, resource: Resource, namespace: str, name: str, uid: str) -> Manifest | None:
        """Delete the object with this UID; None where it is gone, 409 where another has taken its name."""
        self._may_write()
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": uid},
            "propagationPolicy": "Background",
        }
        try:
            return await self._send("DELETE", _path(resource, namespace, name), options)
        except ApiError as error:
            if error.code == NOT_FOUND:
                return None
            raise

    async def create_lease(self, lease: Manifest) -> Manifest:
        """Create a lease; this is how one earns the right to write."""
        return await self._send("POST", _path(LEASES, lease["metadata"]["namespace"]), lease)

    async def replace_lease(self, lease: Manifest) -> Manifest:
        """Replace a lease, if it is still as we read it (409 otherwise)."""
        meta = lease["metadata"]
        return await self._send("PUT", _path(LEASES, meta["namespace"], meta["name"]), lease)

    async def _send(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: list[tuple[str, str]] | None = None,
        content_type: str = "application/json",
    ) -> Manifest:
        # BearerToken must be named, or an in-cluster request goes out without its token.
        request = await self._api.param_serialize(
            method,
            path,
            query_params=list(query or ()),
            header_params={"Accept": "application/json", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        answer = await self._api.call_api(*request, _request_timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS))
        text: bytes = await answer.read()  # type: ignore[no-untyped-call]
        if answer.status >= 400:
            raise _error(answer.status, text)
        result: Manifest = json.loads(text)
        return result


def _path(resource: Resource, namespace: str, name: str = "") -> str:
    inside = f"/namespaces/{namespace}" if namespace else ""
    return f"{resource.prefix}{inside}/{resource.plural}" + (f"/{name}" if name else "")


def _error(code: int, text: bytes) -> ApiError:
    try:
        status = json.loads(text)
        return ApiError(code, status.get("reason", ""), status.get("message", ""))
    except ValueError:
        return ApiError(code, "", text[:512].decode(errors="replace"))
