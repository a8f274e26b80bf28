"""A small client of the Kubernetes API: JSON in and out over the administrator's kubeconfig."""

import base64
import http.client
import json
import ssl
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.cluster import settings

Object = dict[str, Any]

JSON = "application/json"
APPLY = "application/apply-patch+yaml"
JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"
TIMEOUT_SECONDS = 10
WATCH_SECONDS = 300


class ApiError(Exception):
    """The API server refused; ``status`` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Api:
    """Requests to the API server that a kubeconfig names. Each call opens a connection of its own."""

    def __init__(self, kubeconfig: Path = settings.KUBECONFIG) -> None:
        config = json.loads(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        address = urllib.parse.urlsplit(cluster["server"])
        self._host, self._port = str(address.hostname), address.port
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self._tls = ssl.create_default_context(cadata=authority)
        with tempfile.NamedTemporaryFile() as identity:  # the ssl module reads keys from files alone
            for part in ("client-certificate-data", "client-key-data"):
                identity.write(base64.b64decode(user[part]))
            identity.flush()
            self._tls.load_cert_chain(identity.name)

    def _open(
        self, method: str, path: str, body: object, content_type: str, timeout: float
    ) -> tuple[http.client.HTTPSConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=self._tls)
        payload = None if body is None else json.dumps(body)
        connection.request(method, path, payload, {"Content-Type": content_type, "Accept": JSON})
        response = connection.getresponse()
        if response.status >= 400:
            text = response.read().decode(errors="replace")
            connection.close()
            raise ApiError(response.status, f"{method} {path}: {response.status} {text[:1000]}")
        return connection, response

    def request(self, method: str, path: str, body: object = None, content_type: str = JSON) -> Object:
        """Send one request and return the object that comes back.

        Raises:
            ApiError: the server answered 400 or more.
            OSError: there was no answer.

        """
        connection, response = self._open(method, path, body, content_type, TIMEOUT_SECONDS)
        try:
            answer: Object = json.loads(response.read() or b"{}")
        finally:
            connection.close()
        return answer

    def apply(self, path: str, body: Object) -> Object:
        """Make or change an object by server-side apply, as the test bed."""
        return self.request("PATCH", f"{path}?fieldManager=test-bed&force=true", body, APPLY)

    def watch(self, path: str, version: str) -> Iterator[Object]:
        """Yield the events of a collection after ``version``, until the server ends the watch."""
        query = f"{path}?watch=true&resourceVersion={version}&timeoutSeconds={WATCH_SECONDS}"
        connection, response = self._open("GET", query, None, JSON, WATCH_SECONDS + TIMEOUT_SECONDS)
        try:
            for line in response:
                yield json.loads(line)
        finally:
            connection.close()
