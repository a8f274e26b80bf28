"""The API server: dead, or with other feature gates."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tests.cluster import control_plane, lifecycle


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
