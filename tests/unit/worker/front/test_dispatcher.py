"""Where accepted choices are, as values: no sockets, and time is what a test says."""

import asyncio
from typing import Any

import pytest

from pipelinejob_worker.front.dispatcher import Dispatcher, ProtocolError
from pipelinejob_worker.front.generation import Generation
from pipelinejob_worker.front.refusals import ApiError
from pipelinejob_worker.front.settings import Limits
from pipelinejob_worker.serve.wire import MAX_SECONDS, Cancel, Finished, Ready, Refused, Sampling, Stats, Submit, Token

LIMITS = Limits(requests=4, held_tokens=100, recovery_seconds=10, request_seconds=50)


class Sent(list[Submit | Cancel]):
    """What one engine has been sent."""

    def submit(self) -> Submit:
        last = self[-1]
        assert isinstance(last, Submit)
        return last


def generation(name: str = "a", deadline: float = 1000.0, **members: Any) -> Generation:
    return Generation(name, [1, 2, 3], Sampling(), 5, deadline, asyncio.Event(), **members)


def connect(dispatcher: Dispatcher, pipeline: int = 0, epoch: int = 1, now: float = 0.0) -> Sent:
    sent = Sent()
    dispatcher.ready(pipeline, Ready(epoch=epoch, vocabulary=9, context=50, deterministic=True), sent.append, now)
    return sent


def token(submit: Submit, position: int, token_id: int = 7, epoch: int = 1) -> Token:
    return Token(request_id=submit.request_id, position=position, token_id=token_id, epoch=epoch)


def stats(running: int) -> Stats:
    rest = dict.fromkeys(("queued", "batches_in_flight", "cache_blocks", "cache_blocks_used", "preemptions"), 0)
    rates = dict.fromkeys(("prompt_tokens_per_second", "tokens_per_second", "bubble_percent"), 0.0)
    return Stats(epoch=1, running=running, **rest, **rates)


@pytest.mark.parametrize("now", [47000.0101, 47000.2222, 0.1])
def test_the_longest_time_is_within_bounds_whatever_the_clock_says(now: float) -> None:
    one = generation(deadline=now + MAX_SECONDS)
    assert one.submission(now).deadline_seconds == pytest.approx(MAX_SECONDS)


def test_a_choice_waits_for_an_engine_is_submitted_and_ends() -> None:
    dispatcher, one = Dispatcher(LIMITS), generation()
    dispatcher.accept([one], 0.0)
    assert (dispatcher.waiting, dispatcher.running) == (1, 0)
    sent = connect(dispatcher, now=1.0)
    assert (dispatcher.waiting, dispatcher.running) == (0, 1)
    submit = sent.submit()
    assert (submit.prompt_token_ids, submit.deadline_seconds, submit.priority) == ([1, 2, 3], 999.0, 0)
    for position in (3, 4):
        dispatcher.heard(0, token(submit, position), 2.0)
    assert [taken.position for taken in one.take()] == [3, 4]
    dispatcher.heard(0, Finished(request_id=submit.request_id, reason="stop"), 3.0)
    assert (one.reason, dispatcher.running, one.take()) == ("stop", 0, [])


def test_an_engine_that_is_lost_gives_its_work_back_with_what_has_come() -> None:
    dispatcher, one = Dispatcher(LIMITS), generation()
    first = connect(dispatcher)
    dispatcher.accept([one], 0.0)
    dispatcher.heard(0, token(first.submit(), 3), 1.0)
    dispatcher.lost(0, 2.0)
    assert dispatcher.waiting == 1
    again = connect(dispatcher, epoch=2, now=3.0).submit()
    assert (again.emitted_token_ids, again.priority) == ([7], 1)
    assert again.request_id != first.submit().request_id
    dispatcher.heard(0, token(first.submit(), 4, epoch=2), 4.0)  # said of an attempt that is over
    dispatcher.heard(0, token(again, 4, token_id=8, epoch=2), 4.0)
    assert one.emitted == [7, 8]
    assert dispatcher.resubmissions == 1


def test_those_who_lost_their_engine_go_first() -> None:
    dispatcher = Dispatcher(LIMITS)
    connect(dispatcher)
    dispatcher.accept([generation("old")], 0.0)
    dispatcher.lost(0, 1.0)
    dispatcher.accept([generation("new")], 1.0)
    sent = connect(dispatcher, epoch=2, now=2.0)
    assert [message.request_id.split(".")[0] for message in sent] == ["old", "new"]


@pytest.mark.parametrize(("emitted", "stops", "reason"), [([7] * 5, [], "length"), ([7, 8], [8], "stop")])
def test_a_complete_choice_whose_engine_is_lost_has_ended(emitted: list[int], stops: list[int], reason: str) -> None:
    dispatcher, one = Dispatcher(LIMITS), generation(stop_token_ids=stops)
    sent = connect(dispatcher)
    dispatcher.accept([one], 0.0)
    for index, token_id in enumerate(emitted):
        dispatcher.heard(0, token(sent.submit(), 3 + index, token_id), 1.0)
    dispatcher.lost(0, 2.0)
    assert (one.reason, dispatcher.waiting) == (reason, 0)


def test_a_choice_may_not_kill_engines_for_ever() -> None:
    dispatcher, one = Dispatcher(LIMITS), generation()
    dispatcher.accept([one], 0.0)
    for epoch in range(1, 6):
        connect(dispatcher, epoch=epoch)
        dispatcher.lost(0, 0.0)
    dispatcher.heard(0, token(connect(dispatcher, epoch=6).submit(), 3, epoch=6), 0.0)  # progress
    for epoch in range(7, 22):
        dispatcher.lost(0, 0.0)
        assert not one.failure
        connect(dispatcher, epoch=epoch)
    dispatcher.lost(0, 0.0)
    assert one.failure is not None
    assert (one.failure.status, dispatcher.waiting, dispatcher.running) == (500, 0, 0)


def test_a_choice_of_whom_nobody_wants_to_know_is_cancelled() -> None:
    dispatcher, one, waiting = Dispatcher(LIMITS), generation(), generation("b")
    dispatcher.accept([waiting], 0.0)
    dispatcher.release(waiting)
    sent = connect(dispatcher)
    assert not sent
    dispatcher.accept([one], 0.0)
    submit = sent.submit()
    dispatcher.release(one)
    dispatcher.release(one)
    assert sent[1:] == [Cancel(request_id=submit.request_id)]
    dispatcher.heard(0, token(submit, 3), 1.0)
    assert (one.emitted, dispatcher.running) == ([], 0)


def test_the_wait_for_an_engine_and_the_whole_request_have_limits() -> None:
    dispatcher, one, short = Dispatcher(LIMITS), generation(), generation("b", deadline=5.0)
    dispatcher.accept([one, short], 0.0)
    dispatcher.tick(9.9)
    assert (one.failure, short.failure and short.failure.status) == (None, 504)
    dispatcher.tick(10.0)
    assert (one.failure and one.failure.status, dispatcher.waiting) == (503, 0)


def test_a_request_is_accepted_whole_or_not_at_all() -> None:
    dispatcher = Dispatcher(LIMITS)
    dispatcher.accept([generation(str(index)) for index in range(3)], 0.0)
    with pytest.raises(ApiError) as outage:
        dispatcher.accept([generation("x"), generation("y")], 0.0)
    connect(dispatcher)
    with pytest.raises(ApiError) as overload:
        dispatcher.accept([generation("x"), generation("y")], 0.0)
    assert (outage.value.status, overload.value.status, dispatcher.running) == (503, 429, 3)
    dispatcher.accept([generation("x")], 0.0)
    assert dispatcher.running == 4


def test_a_busy_engine_refuses_new_choices_but_not_those_under_way() -> None:
    dispatcher, new, old = Dispatcher(LIMITS), generation("new"), generation("old")
    sent = connect(dispatcher)

    def refuse() -> Refused:
        return Refused(
            request_id=sent.submit().request_id, reason="overloaded", message="full", retry_after_seconds=3.0
        )

    dispatcher.accept([new], 0.0)
    dispatcher.heard(0, refuse(), 0.0)
    assert new.failure is not None
    assert (new.failure.status, new.failure.headers["Retry-After"]) == (429, "3")

    dispatcher.accept([old], 0.0)
    dispatcher.lost(0, 1.0)
    sent = connect(dispatcher, now=1.0)
    dispatcher.heard(0, refuse(), 2.0)
    assert (old.failure, dispatcher.waiting) == (None, 1)
    dispatcher.tick(4.9)
    assert len(sent) == 1
    dispatcher.tick(5.0)
    assert len(sent) == 2
    dispatcher.heard(0, refuse(), 6.0)
    dispatcher.tick(11.0)
    assert old.failure is not None
    assert old.failure.status == 503


def test_the_load_of_an_engine_is_that_of_all_fronts() -> None:
    dispatcher = Dispatcher(Limits())
    sent = {pipeline: connect(dispatcher, pipeline) for pipeline in (0, 1)}
    dispatcher.heard(0, stats(running=30), 0.0)
    dispatcher.accept([generation(str(index)) for index in range(20)], 0.0)
    assert (len(sent[0]), len(sent[1])) == (0, 20)
    dispatcher.heard(1, stats(running=20), 1.0)
    assert dispatcher.engines[1].others == 0


def test_a_group_that_was_replaced_is_not_used_again() -> None:
    dispatcher = Dispatcher(LIMITS)
    connect(dispatcher, epoch=5)
    dispatcher.lost(0, 1.0)
    with pytest.raises(ProtocolError, match="epoch 4 has been replaced by 5"):
        connect(dispatcher, epoch=4)
    assert not dispatcher.engines
    connect(dispatcher, epoch=5)
    connect(dispatcher, pipeline=1, epoch=2)  # pipelines count for themselves
    assert set(dispatcher.engines) == {0, 1}


@pytest.mark.parametrize(("position", "epoch"), [(4, 1), (3, 2)])
def test_an_engine_may_not_skip_tokens_or_speak_for_a_later_group(position: int, epoch: int) -> None:
    dispatcher, one = Dispatcher(LIMITS), generation()
    sent = connect(dispatcher)
    dispatcher.accept([one], 0.0)
    with pytest.raises(ProtocolError):
        dispatcher.heard(0, token(sent.submit(), position, epoch=epoch), 1.0)
    assert one.emitted == []


def test_a_front_that_stops_tells_those_who_wait() -> None:
    dispatcher, one = Dispatcher(LIMITS), generation()
    sent = connect(dispatcher)
    dispatcher.accept([one], 0.0)
    dispatcher.give_up()
    assert one.failure is not None
    assert (one.failure.status, isinstance(sent[-1], Cancel), dispatcher.running) == (503, True, 0)
