"""When a checkpoint counts: every rank concludes it from the sum of the votes, with nothing but that."""

import errno

import pytest

from pipelinejob_worker.state.commit import DONE, PENDING, Agreement, Phase

FULL, READ_ONLY = -float(errno.ENOSPC), -float(errno.EROFS)


def writing(stages: int = 3, pipelines: int = 1, saved_step: int = 50) -> Agreement:
    return Agreement(stages, pipelines, saved_step=saved_step, problem="an earlier one").begin(100)


def test_a_checkpoint_counts_when_all_have_written_and_the_first_has_completed_it() -> None:
    agreement = writing()
    for total in ([PENDING, PENDING, PENDING], [DONE, PENDING, DONE]):
        agreement = agreement.after(total)
        assert agreement.phase is Phase.WRITING
    agreement = agreement.after([DONE, DONE, DONE])
    assert (agreement.phase, agreement.saved_step) == (Phase.PUBLISHING, 50)
    agreement = agreement.after([PENDING, PENDING, PENDING])
    assert (agreement.phase, agreement.problem) == (Phase.PUBLISHING, "an earlier one")
    agreement = agreement.after([DONE, PENDING, PENDING])
    assert (agreement.phase, agreement.saved_step, agreement.problem) == (Phase.IDLE, 100, "")


def test_a_failure_is_known_when_all_have_ended_writing_and_what_was_written_is_deleted() -> None:
    agreement = writing().after([DONE, FULL, PENDING])
    assert (agreement.phase, agreement.problem) == (Phase.WRITING, "an earlier one"), "a rank may still be writing"
    agreement = agreement.after([DONE, FULL, DONE])
    assert agreement.phase is Phase.DISCARDING
    assert agreement.problem == (
        "the checkpoint of step 100 was not written: stage 1: No space left on device; the newest is of step 50"
    )
    assert agreement.after([PENDING] * 3) == agreement
    for deleted in (DONE, FULL):
        assert agreement.after([deleted, PENDING, PENDING]).phase is Phase.IDLE
        assert agreement.after([deleted, PENDING, PENDING]).problem == agreement.problem
        assert agreement.after([deleted, PENDING, PENDING]).saved_step == 50


def test_a_checkpoint_that_could_not_be_completed_does_not_count() -> None:
    agreement = writing(saved_step=0).after([DONE] * 3).after([READ_ONLY, PENDING, PENDING])
    assert (agreement.phase, agreement.saved_step) == (Phase.IDLE, 0)
    assert agreement.problem == (
        "the checkpoint of step 100 was not completed: stage 0: Read-only file system; there is none yet"
    )


@pytest.mark.parametrize(
    ("stages", "pipelines", "total", "causes"),
    [
        (2, 1, [FULL, READ_ONLY], "stage 0: No space left on device; stage 1: Read-only file system"),
        (2, 2, [DONE, DONE, DONE, FULL], "stage 1 of pipeline 1: No space left on device"),
        (
            64,
            1,
            [FULL] * 64,
            "stage 0: No space left on device; stage 1: No space left on device; "
            "stage 2: No space left on device; and 61 more",
        ),
    ],
)
def test_a_problem_names_who_failed_and_why(stages: int, pipelines: int, total: list[float], causes: str) -> None:
    problem = writing(stages, pipelines).after(total).problem
    assert problem == f"the checkpoint of step 100 was not written: {causes}; the newest is of step 50"


def test_nothing_happens_without_a_checkpoint_in_flight() -> None:
    agreement = Agreement(2, 1, saved_step=50)
    assert agreement.after([PENDING, PENDING]) == agreement


def test_only_one_checkpoint_is_in_flight() -> None:
    with pytest.raises(AssertionError, match="step 100 is in flight"):
        writing().begin(150)
