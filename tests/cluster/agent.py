"""The test bed's own controller: network policies, released volumes, GPUs of restarted kubelets.

Started by ``up`` as ``python3 -m tests.cluster.agent --gpus 2``; its log is agent.log in the state directory.
"""

import argparse
import http.client
import threading
import time

from tests.cluster import commands, gpus, policy, settings, volumes
from tests.cluster.api import Api, ApiError
from tests.cluster.errors import ClusterError
from tests.cluster.reflector import Reflector

READY = settings.RUN / "agent-ready"
SETTLE_SECONDS = 0.02
"""Changes come in groups; one rewriting of the rules serves those of this time."""

AGAIN_SECONDS = 2
"""When to look again without a change, for what could not be done."""

PATHS = {
    "namespaces": "/api/v1/namespaces",
    "nodes": "/api/v1/nodes",
    "pods": "/api/v1/pods",
    "policies": "/apis/networking.k8s.io/v1/networkpolicies",
    "volumes": volumes.PATH,
}


class Agent:
    """Brings the machine in line with what the reflectors show."""

    def __init__(self, api: Api, gpu_count: int) -> None:
        self._api, self._gpus = api, gpu_count
        self._changed = threading.Event()
        self._seen = {name: Reflector(api, path, self._changed) for name, path in PATHS.items()}
        self._rules = ""

    def run(self) -> None:
        """Follow the cluster until the process is ended."""
        for reflector in self._seen.values():
            reflector.start()
        while True:
            self._changed.wait(AGAIN_SECONDS)
            time.sleep(SETTLE_SECONDS)
            self._changed.clear()
            if not all(reflector.synchronized for reflector in self._seen.values()):
                continue
            self._enforce()
            try:
                self._offer_gpus()
                self._recycle()
            except (ApiError, OSError, http.client.HTTPException) as error:
                print(f"will try again: {error}", flush=True)
            READY.touch()

    def _enforce(self) -> None:
        rules, warnings = policy.render(*(self._seen[name].objects() for name in ("policies", "pods", "namespaces")))
        if rules == self._rules:
            return
        for warning in warnings:
            print(f"warning: {warning}", flush=True)
        try:
            commands.run("nft", "--file", "-", stdin=rules)
        except ClusterError as error:
            print(f"nft refused:\n{rules}\n{error}", flush=True)
            return
        self._rules = rules

    def _offer_gpus(self) -> None:
        for node in self._seen["nodes"].objects():
            if gpus.lacks(node, self._gpus):
                gpus.offer(self._api, node["metadata"]["name"], self._gpus)

    def _recycle(self) -> None:
        for volume in self._seen["volumes"].objects():
            if volumes.released(volume):
                volumes.recycle(self._api, volume)


def main() -> None:
    """Run the agent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpus", type=int, required=True)
    Agent(Api(), parser.parse_args().gpus).run()


if __name__ == "__main__":
    main()
