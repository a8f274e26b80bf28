"""Stages that know only the next one's address find each other, and tell each other what all must know."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelinejob_worker.serve.hop import Bounds, HopError, Returned
from pipelinejob_worker.serve.ring import Circle, Departure, Member, form
from tests.unit.worker.serve.group import members

BOUNDS = Bounds(stages=5, batch_tokens=64, width=8, blocks=100)


class Meeting:
    """Stages that form a ring, each in a thread."""

    def __init__(self, stages: int, seconds: float = 20.0) -> None:
        self.listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(stages)]
        self.addresses = [listener.getsockname() for listener in self.listeners]
        self.deadline = time.monotonic() + seconds
        self.departures = [Departure() for _ in range(stages)]
        self.found: dict[int, Circle | HopError] = {}

    def begin(self, present: Sequence[int], epoch: int = 2, models: dict[int, str] | None = None) -> None:
        def meet(member: Member) -> None:
            stage, model = member.stage, (models or {}).get(member.stage, "model")
            try:
                self.found[stage] = form(member, self.listeners[stage], model, self.deadline, self.departures[stage])
            except HopError as error:
                self.found[stage] = error

        each = members(epoch, self.addresses)
        self._threads = [threading.Thread(target=meet, args=(each[stage],)) for stage in present]
        for thread in self._threads:
            thread.start()

    def end(self) -> dict[int, Circle | HopError]:
        for thread in self._threads:
            thread.join()
        return self.found

    def circles(self) -> list[Circle]:
        """All stages, which must have met."""
        self.begin(range(len(self.addresses)))
        self.end()
        found = [self.found[stage] for stage in range(len(self.addresses))]
        assert [type(one) for one in found] == [Circle] * len(found), found
        return found  # type: ignore[return-value]

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()
        for circle in self.found.values():
            if isinstance(circle, Circle):
                circle.close()


def each(circles: Sequence[Circle], call: Callable[[Circle], object]) -> list[object]:
    """What the call gives on all stages, which make it at once; an error instead where it fails."""

    def caught(circle: Circle) -> object:
        try:
            return call(circle)
        except HopError as error:
            return error

    with ThreadPoolExecutor(len(circles)) as pool:
        return list(pool.map(caught, circles))


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_all_stages_hear_what_each_says_and_then_pass_batches_on(stages: int) -> None:
    meeting = Meeting(stages)
    circles = meeting.circles()
    for seconds in (5.0, 6.0):  # as often as they like
        said = [{"stage": stage, "text": "x" * 100_000 * stage} for stage in range(stages)]
        heard = each(circles, lambda circle: circle.exchange(said[circle.member.stage], seconds))  # noqa: B023
        assert heard == [said] * stages
    rings = [circle.ring(BOUNDS) for circle in circles]
    for stage, ring in enumerate(rings if stages > 1 else []):
        after = rings[(stage + 1) % stages]
        assert ring.after
        assert after.before
        ring.after.send(Returned(1 << 40, stage, (), ()))
        assert after.before.receive() == Returned(1 << 40, stage, (), ())
    meeting.close()


def test_the_loss_of_a_stage_ends_an_exchange_on_all() -> None:
    meeting = Meeting(4)
    circles = meeting.circles()

    def say(circle: Circle) -> object:
        if circle.member.stage == 2:
            circle.close()
            return None
        try:
            return circle.exchange({}, 30.0)
        except HopError:
            circle.close()  # as a stage does that leaves
            raise

    assert [type(found) for found in each(circles, say)] == [HopError, HopError, type(None), HopError]
    meeting.close()


def test_the_order_to_leave_frees_a_stage_that_waits_for_others() -> None:
    meeting = Meeting(3)
    meeting.begin([0, 1])  # stage 2 does not come
    while not meeting.departures[1]._connections:  # stage 0 has come to stage 1
        time.sleep(0.01)
    meeting.departures[0].order()
    meeting.departures[1].order()
    assert {type(found) for found in meeting.end().values()} == {HopError}
    meeting.close()

    meeting = Meeting(2)
    circles = meeting.circles()
    threading.Timer(0.1, meeting.departures[1].order).start()
    (found,) = each(circles[1:], lambda circle: circle.exchange({}, 30.0))  # stage 0 says nothing
    assert isinstance(found, HopError)
    meeting.close()


def test_strangers_and_stages_of_another_epoch_are_passed_over() -> None:
    meeting = Meeting(2)
    late = json.dumps({"epoch": 1, "stage": 0, "fingerprint": "model"}).encode()
    sent = [struct.pack("<I", len(late)) + late, struct.pack("<I", 2) + b"[]", b"GET / HTTP/1.1\r\n", b""]
    strangers = [socket.create_connection(meeting.addresses[1]) for _ in sent]
    for stranger, content in zip(strangers, sent, strict=True):
        stranger.sendall(content)
    strangers[3].close()
    meeting.circles()
    for stranger in strangers:
        stranger.close()
    meeting.close()


def test_a_stage_that_comes_while_its_neighbour_is_in_another_epoch_asks_again() -> None:
    meeting = Meeting(2, seconds=1.0)
    meeting.begin([0], epoch=3)
    first = meeting._threads
    meeting.begin([1], epoch=2)
    meeting._threads += first
    assert {type(found) for found in meeting.end().values()} == {HopError}
    meeting.close()

    meeting = Meeting(2)
    meeting.begin([0], epoch=3)
    first = meeting._threads
    meeting.begin([1], epoch=2)
    time.sleep(0.1)  # stage 0 is turned away
    meeting.departures[1].order()
    for thread in meeting._threads:
        thread.join()
    meeting.departures[1] = Departure()
    meeting.begin([1], epoch=3)
    meeting._threads += first
    assert [type(found) for found in meeting.end().values()] == [Circle, Circle]
    meeting.close()


def test_stages_with_different_models_do_not_form_a_group() -> None:
    meeting = Meeting(3, seconds=0.5)
    meeting.begin(range(3), models={2: "other"})
    found = meeting.end()
    assert type(found[0]) is HopError  # without it nothing runs
    assert "a neighbour serves 'model' and stage 2 'other'" in str(found[2])
    assert "a neighbour serves 'other' and stage 1 'model'" in str(found[1])
    meeting.close()


def test_a_stage_that_does_not_come_is_named_by_its_address() -> None:
    meeting = Meeting(3, seconds=0.3)
    meeting.listeners[1].close()
    meeting.begin([0])
    error = meeting.end()[0]
    assert "127.0.0.1:" in str(error)
    meeting.close()
