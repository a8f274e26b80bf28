"""The judge of the chaos tests finds what is wrong; and its judgement of what was not disturbed is that all is well."""

from pipelinejob_worker.protocol import AgentState, AgentStatus, Progress
from tests.e2e.chaos.lives import Lives, Loss
from tests.e2e.chaos.verdict import first_step_after, repeated_steps, told_losses, wrong_lives, wrong_losses
from tests.e2e.chaos.watch import Incarnation, Pod, Sighting

POD = Pod("train-s0-a0", "uid-0", "node-1", "10.244.1.2")
LOSSES = [0.5, 0.25, 0.125, 0.1]
FIRST = Incarnation(1, 1)


def seen(step: int, attempt: int = 1, *, at: float = 0.0, loss: float | None = None, state: AgentState = "Running"):
    loss = loss if loss is not None or step == 0 else LOSSES[step - 1]
    progress = Progress(step=step, total_steps=100, loss=loss)
    status = AgentStatus(job_uid="job", stage=0, epoch=1, incarnation_attempt=attempt, state=state, progress=progress)
    return Sighting(at or float(step), POD, status)


def judge(*sightings: Sighting) -> list[str]:
    return wrong_losses(told_losses(sightings), LOSSES)


def test_losses_as_undisturbed_are_right_also_of_steps_that_were_computed_again() -> None:
    assert judge(seen(0), seen(1), seen(2), seen(1, 2), seen(2, 2), seen(3, 2)) == []


def test_one_other_bit_is_found() -> None:
    other = LOSSES[1] + 2**-54
    assert other != LOSSES[1]
    (wrong,) = judge(seen(1), seen(2, loss=other), seen(3))
    assert wrong == f"step 2: {[other.hex()]}, undisturbed {LOSSES[1].hex()}"


def test_a_step_that_had_two_losses_is_found_though_one_was_right() -> None:
    (wrong,) = judge(seen(1), seen(2), seen(2, 2, loss=0.3), seen(3, 2))
    assert wrong.startswith("step 2: ")


def test_a_step_that_nobody_told_of_is_found() -> None:
    assert judge(seen(1), seen(3)) == ["step 2: no agent has told its loss"]


def test_steps_that_were_computed_again_are_counted() -> None:
    assert repeated_steps([seen(1), seen(2), seen(2, 2), seen(3, 2)], FIRST) == 0
    assert repeated_steps([seen(1), seen(2), seen(3), seen(1, 2), seen(2, 2)], FIRST) == 2
    assert repeated_steps([seen(1), seen(2)], FIRST) == 0, "nothing happened"


def test_what_an_agent_still_tells_of_before_is_not_taken_for_the_step_that_was_resumed() -> None:
    waiting = seen(0, 2, state="Starting")
    assert repeated_steps([seen(3), waiting, seen(3, 2), seen(4, 2)], FIRST) == 0


def test_the_next_step_is_the_first_that_another_incarnation_has_finished() -> None:
    told = [seen(2, at=10.0), seen(3, at=11.0), seen(2, 2, at=12.0), seen(3, 2, at=13.0)]
    assert first_step_after(told, FIRST) == 13.0
    assert first_step_after(told[:3], FIRST) is None


LIVES = Lives("uid", agent=(10, 100), worker=(12, 120))


def test_a_survivor_that_has_got_another_process_is_found() -> None:
    other = LIVES._replace(worker=(13, 130))
    assert wrong_lives({0: LIVES}, {0: other}, {}) == ["stage 0: WORKER has ended, should have: NOTHING"]
    assert wrong_lives({0: LIVES}, {0: LIVES}, {}) == []


def test_a_fault_that_has_not_struck_is_found() -> None:
    assert wrong_lives({0: LIVES}, {0: LIVES}, {"uid": Loss.POD}) == ["stage 0: NOTHING has ended, should have: POD"]


def test_what_was_lost_is_told_by_the_outermost_that_changed() -> None:
    assert LIVES.lost(Lives("other", (20, 200), (22, 220))) == Loss.POD
    assert LIVES.lost(Lives("uid", (20, 200), (22, 220))) == Loss.AGENT
    assert LIVES.lost(Lives("uid", (10, 200), (12, 220))) == Loss.AGENT, "another process has got the same id"
    assert LIVES.lost(Lives("uid", (10, 100), None)) == Loss.WORKER
