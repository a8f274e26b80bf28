"""A live copy of a collection of the API: a list, then its watch, and again from the list after any break."""

import http.client
import threading
import time

from tests.cluster.api import Api, ApiError, Object

RETRY_SECONDS = 0.5


class Reflector:
    """The objects at ``path``, kept by a thread of its own; ``changed`` is set after each change."""

    def __init__(self, api: Api, path: str, changed: threading.Event) -> None:
        self._api, self._path, self._changed = api, path, changed
        self._objects: dict[str, Object] = {}
        self._lock = threading.Lock()
        self.synchronized = False
        """Whether a first list has come."""

    def start(self) -> None:
        """Begin."""
        threading.Thread(target=self._run, name=self._path, daemon=True).start()

    def objects(self) -> list[Object]:
        """Return the objects as last seen."""
        with self._lock:
            return list(self._objects.values())

    def _run(self) -> None:
        while True:
            try:
                self._follow()
            except (ApiError, OSError, http.client.HTTPException, ValueError) as error:
                print(f"{self._path}: {error}; listing again", flush=True)
                time.sleep(RETRY_SECONDS)

    def _follow(self) -> None:
        listed = self._api.request("GET", self._path)
        with self._lock:
            self._objects = {item["metadata"]["uid"]: item for item in listed["items"]}
        self.synchronized = True
        self._changed.set()
        for event in self._api.watch(self._path, listed["metadata"]["resourceVersion"]):
            item = event["object"]
            if event["type"] == "ERROR":
                raise ApiError(item.get("code", 0), item.get("message", "the watch ended"))
            with self._lock:
                if event["type"] == "DELETED":
                    self._objects.pop(item["metadata"]["uid"], None)
                else:
                    self._objects[item["metadata"]["uid"]] = item
            self._changed.set()
