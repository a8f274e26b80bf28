"""The API server: dead, or with other feature gates, and with it what must have the same ones."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tests.cluster import control_plane, controllers, lifecycle
from tests.cluster.control_plane import ControlPlane


@contextmanager
def stopped_api_server() -> Iterator[None]:
    """Kill the API server."""
    plane = lifecycle.control_plane()
    plane.api_server.stop(signal.SIGKILL)
    try:
        yield
    finally:
        plane.api_server.start()


@contextmanager
def feature_gates(**gates: bool) -> Iterator[None]:
    """Restart the API server with other feature gates, and as it was afterwards."""
    plane = lifecycle.control_plane()
    before = plane.configuration.feature_gates
    plane.reconfigure(feature_gates={**before, **gates})
    control_plane.save_configuration(plane.configuration, lifecycle.configuration_file())
    try:
        yield
    finally:
        plane.reconfigure(feature_gates=before)
        control_plane.save_configuration(plane.configuration, lifecycle.configuration_file())


@contextmanager
def gangs() -> Iterator[None]:
    """Restart API server, scheduler and controller manager with the gang API, and without it afterwards."""
    plane = lifecycle.control_plane()
    before = plane.configuration
    gates = {**before.feature_gates, "GenericWorkload": True}
    versions = (*before.runtime_config, "scheduling.k8s.io/v1beta1=true")
    _reconfigure(plane, feature_gates=gates, runtime_config=versions)
    try:
        yield
    finally:
        _reconfigure(plane, feature_gates=before.feature_gates, runtime_config=before.runtime_config)


def _reconfigure(plane: ControlPlane, **changes: object) -> None:
    plane.reconfigure(**changes)
    control_plane.save_configuration(plane.configuration, lifecycle.configuration_file())
    fast = lifecycle.running().simulated > 0
    for program in (controllers.scheduler(plane, fast=fast), controllers.controller_manager(plane, fast=fast)):
        program.stop(signal.SIGKILL)
        program.start()
