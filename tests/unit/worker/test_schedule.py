"""The schedules as values: complete, in the right order, as good as theory allows, and free of deadlock."""

import pytest

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.pipeline.routes import routes
from pipelinejob_worker.pipeline.schedule import (
    Action,
    Pass,
    Schedule,
    bubble_limit,
    build_schedule,
    forward_schedule,
)
from pipelinejob_worker.pipeline.simulation import simulate
from pipelinejob_worker.protocol import ScheduleName

NAMES: list[tuple[ScheduleName, int]] = [
    ("GPipe", 1),
    ("1F1B", 1),
    ("LoopedBFS", 1),
    ("LoopedBFS", 3),
    ("Interleaved1F1B", 2),
    ("Interleaved1F1B", 4),
    ("InterleavedZeroBubble", 1),
    ("InterleavedZeroBubble", 2),
    ("ZBVZeroBubble", 2),
    ("DualPipeV", 2),
]
SIZES = [(1, 2), (2, 4), (3, 6), (4, 8), (4, 16), (8, 16), (8, 32)]


def equal_parts(action: Action) -> float:
    """Forward, input part and weight part take the same time."""
    return 2.0 if action.kind == Pass.BACKWARD else 1.0


@pytest.mark.parametrize(("name", "chunks"), NAMES)
@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_every_pass_is_run_once_and_gradients_are_added_in_the_order_of_the_microbatches(
    name: ScheduleName, chunks: int, stages: int, microbatches: int
) -> None:
    schedule = build_schedule(name, stages, chunks, microbatches)
    for stage, order in enumerate(schedule.orders):
        assert len(set(order)) == len(order)
        for chunk in schedule.chunks_of(stage):
            forwards = [action.microbatch for action in order if action[::2] == (Pass.FORWARD, chunk)]
            added = [a.microbatch for a in order if a.chunk == chunk and a.kind in (Pass.BACKWARD, Pass.WEIGHT)]
            sent_back = [a.microbatch for a in order if a.chunk == chunk and a.kind in (Pass.BACKWARD, Pass.INPUT)]
            assert forwards == added == sent_back == list(range(microbatches))


@pytest.mark.parametrize(("name", "chunks"), NAMES)
@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_the_bubble_is_the_theoretical_limit(name: ScheduleName, chunks: int, stages: int, microbatches: int) -> None:
    schedule = build_schedule(name, stages, chunks, microbatches)
    limit = bubble_limit(name, stages, chunks, microbatches)
    assert simulate(schedule, equal_parts).bubble == pytest.approx(limit, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "chunks", "limit"),
    [
        ("GPipe", 1, 0.273),
        ("1F1B", 1, 0.273),
        ("LoopedBFS", 2, 0.158),
        ("Interleaved1F1B", 2, 0.158),
        ("Interleaved1F1B", 4, 0.086),
        ("InterleavedZeroBubble", 1, 0.111),
        ("InterleavedZeroBubble", 2, 0.059),
        ("ZBVZeroBubble", 2, 0.059),
        ("DualPipeV", 2, 0.059),
    ],
)
def test_limits_of_four_stages_and_eight_microbatches(name: ScheduleName, chunks: int, limit: float) -> None:
    assert bubble_limit(name, 4, chunks, 8) == pytest.approx(limit, abs=5e-4)


def test_activations_held_at_a_time() -> None:
    def held(name: ScheduleName, chunks: int) -> list[float]:
        schedule = build_schedule(name, 4, chunks, 8)
        return [schedule.live_microbatches(stage) / chunks for stage in range(4)]

    assert held("GPipe", 1) == [8, 8, 8, 8]
    assert held("1F1B", 1) == [4, 3, 2, 1]
    assert held("Interleaved1F1B", 2) == [5.5, 4.5, 3.5, 2.5]
    assert held("InterleavedZeroBubble", 2) == [4, 4, 4, 4]
    assert held("ZBVZeroBubble", 2) == held("DualPipeV", 2) == [4.5, 4.5, 4.5, 4.5]


@pytest.mark.parametrize("microbatches", [1, 2, 3, 5, 7, 11])
def test_schedules_that_take_any_number_of_microbatches(microbatches: int) -> None:
    for stages in range(1, 7):
        for name, chunks in (("GPipe", 1), ("LoopedBFS", 2), ("ZBVZeroBubble", 2)):
            assert simulate(build_schedule(name, stages, chunks, microbatches), equal_parts).seconds > 0


@pytest.mark.parametrize(
    ("name", "stages", "chunks", "microbatches", "message"),
    [
        ("1F1B", 4, 1, 3, r"microbatches: 3 a pipeline is too few for schedule 1F1B on 4 stages; allowed: 4 or more"),
        ("DualPipeV", 4, 2, 7, "too few for schedule DualPipeV on 4 stages; allowed: 8 or more"),
        ("Interleaved1F1B", 4, 2, 6, "6 a pipeline is not a multiple of the 4 stages"),
        ("InterleavedZeroBubble", 4, 1, 6, "not a multiple of the 4 stages"),
        ("GPipe", 4, 2, 8, "chunksPerStage: 2 does not fit schedule GPipe; allowed: 1"),
        ("ZBVZeroBubble", 4, 1, 8, "chunksPerStage: 1 does not fit schedule ZBVZeroBubble; allowed: 2"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_is_allowed(
    name: ScheduleName, stages: int, chunks: int, microbatches: int, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_schedule(name, stages, chunks, microbatches)


@pytest.mark.parametrize(("name", "chunks"), NAMES)
def test_a_validation_visits_the_chunks_where_they_are(name: ScheduleName, chunks: int) -> None:
    training = build_schedule(name, 4, chunks, 8)
    schedule = forward_schedule(training, 8)
    assert schedule.stage_of == training.stage_of
    assert all(action.kind == Pass.FORWARD for order in schedule.orders for action in order)
    assert sum(len(order) for order in schedule.orders) == 8 * len(schedule.stage_of)
    if name not in ("ZBVZeroBubble", "DualPipeV"):  # on the V, stage 0 waits until the first microbatch is back up
        assert simulate(schedule, equal_parts).bubble == pytest.approx(3 / (8 * chunks + 3))


def test_orders_that_wait_for_each_other_are_found() -> None:
    forward, backward = Action(Pass.FORWARD, 0, 0), Action(Pass.BACKWARD, 0, 0)
    crossed = Schedule("GPipe", (0,), ((backward, forward),))
    with pytest.raises(ValueError, match=r"orders of stages \[0\] wait for each other"):
        simulate(crossed, equal_parts)


@pytest.mark.parametrize(("name", "chunks"), NAMES)
def test_both_ends_of_every_link_expect_the_same_messages_in_the_same_order(name: ScheduleName, chunks: int) -> None:
    schedule = build_schedule(name, 4, chunks, 8)
    all_routes = [routes(schedule, stage) for stage in range(4)]
    for receiver, route in enumerate(all_routes):
        for sender, needing in route.incoming.items():
            sent = [action for action, peer in all_routes[sender].sends.items() if peer == receiver]
            assert len(sent) == len(needing)
            for made, used in zip(sent, needing, strict=True):
                towards = 1 if made.kind == Pass.FORWARD else -1
                assert (used.microbatch, used.chunk) == (made.microbatch, made.chunk + towards)
                assert (used.kind == Pass.FORWARD) == (made.kind == Pass.FORWARD)
                assert route.receives[used] == sender


@pytest.mark.parametrize(("name", "chunks"), NAMES)
def test_a_message_acknowledges_only_what_its_sender_has_used_before(name: ScheduleName, chunks: int) -> None:
    schedule = build_schedule(name, 4, chunks, 8)
    all_routes = [routes(schedule, stage) for stage in range(4)]
    for stage, route in enumerate(all_routes):
        for peer, needing in route.incoming.items():
            sent = [action for action, to in route.sends.items() if to == peer]
            counts = [route.acknowledges[action] for action in needing]
            assert counts == sorted(counts)
            assert counts[-1] <= len(sent)
            order = schedule.orders[peer]
            makers = [action for action, to in all_routes[peer].sends.items() if to == stage]
            users = [action for action, source in all_routes[peer].receives.items() if source == stage]
            for maker, count in zip(makers, counts, strict=True):
                assert sum(order.index(user) <= order.index(maker) for user in users) == count
