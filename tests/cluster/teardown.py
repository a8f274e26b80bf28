"""Taking everything down, whatever of it there is: after a regular stop, a crash or an interrupt."""

import shutil
import subprocess
from pathlib import Path

from tests.cluster import cgroups, network, processes, settings

PLACES = (settings.STATE, settings.RUN)


def _end_processes() -> None:
    """Kill all: nodes' containers by their control groups, programs and their shims by the mark they carry."""
    processes.kill_all(lambda: [*processes.marked(settings.STATE), *cgroups.processes()])


def mounts() -> list[str]:
    """Return the mounts on the host in our places, innermost first."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    places = (*PLACES, settings.CACHE)
    ours = [point for point in points if any(Path(point).is_relative_to(place) for place in places)]
    return sorted(ours, key=len, reverse=True)


def down() -> None:
    """Leave no process, mount, link, route, rule, control group, kernel setting or file of the cluster."""
    _end_processes()
    for point in mounts():
        subprocess.run(["umount", "--lazy", point], check=True)
    network.down()
    cgroups.remove()
    for place in PLACES:
        if place.exists():
            shutil.rmtree(place)
