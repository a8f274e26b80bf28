"""The watch of the chaos tests waits for what agents tell, and not for ever."""

import threading

import pytest

from tests.e2e import kit
from tests.e2e.chaos.watch import Watch
from tests.unit.chaos.test_verdict import seen


def test_it_gives_up_in_time_though_agents_go_on_telling() -> None:
    watch, over = Watch("namespace", "job"), threading.Event()

    def tell() -> None:
        step = 0
        while not over.is_set():
            watch._note(seen(step := step % 4 + 1))

    teller = threading.Thread(target=tell)
    teller.start()
    try:
        with pytest.raises(kit.Timeout, match="not within 0 s: the impossible"):
            watch.wait("the impossible", lambda: False, seconds=0.3)
        assert watch.wait("step 4", lambda: watch.last_step() == 4, seconds=10)
    finally:
        over.set()
        teller.join()


def test_what_ends_it_is_told_to_who_waits() -> None:
    watch = Watch("namespace", "job")
    watch._broken = ValueError("an agent told nonsense")
    with pytest.raises(AssertionError, match="the watch has ended: an agent told nonsense"):
        watch.wait("anything", lambda: False, seconds=10)
