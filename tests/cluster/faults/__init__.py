"""What can go wrong in the test bed's cluster, for end-to-end tests: nodes, pods, processes, links, disks.

What lasts is a context manager: inside it holds, afterwards all is well again. What happens is a function.

    with faults.dead_node("node-2"): ...
    with faults.drained_node("node-2"): ...
    with faults.feature_gates(RestartAllContainersOnContainerExits=False): ...
    with faults.gangs(): ...
    with faults.cut("10.244.1.2", "10.244.2.2"): ...
    with faults.slow("10.244.1.2", "10.244.2.2", "10mbit"): ...
    with faults.small_volume("shared-3", "2m") as volume: volume.resize("8m")
    with faults.stopped(stage_processes(uid).worker): ...
    faults.out_of_memory(uid)
"""

from tests.cluster.faults.api_server import feature_gates, gangs, stopped_api_server
from tests.cluster.faults.containers import (
    Process,
    StageProcesses,
    kill_container,
    kill_sandbox,
    out_of_memory,
    stage_processes,
    stopped,
)
from tests.cluster.faults.disks import SmallVolume, small_volume
from tests.cluster.faults.links import cut, interface_of, slow
from tests.cluster.faults.nodes import dead_node, drained_node, node, silent_kubelet

__all__ = [
    "Process",
    "SmallVolume",
    "StageProcesses",
    "cut",
    "dead_node",
    "drained_node",
    "feature_gates",
    "gangs",
    "interface_of",
    "kill_container",
    "kill_sandbox",
    "node",
    "out_of_memory",
    "silent_kubelet",
    "slow",
    "small_volume",
    "stage_processes",
    "stopped",
    "stopped_api_server",
]
