"""The ladder, as tables: what ends, who answers it, and what it counts as."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from pipelinejob_operator.api.recovery import Rule
from pipelinejob_operator.api.recovery_status import AvoidedNode
from pipelinejob_operator.api.status import StageStatus
from pipelinejob_operator.api.v1alpha1 import Spec
from pipelinejob_operator.build.place import Shape
from pipelinejob_operator.policy import avoidance, recovery, rules, shapes
from pipelinejob_operator.policy.facts import StagePod
from pipelinejob_operator.policy.reasons import Reason
from pipelinejob_operator.policy.recovery import Look, Rung
from pipelinejob_operator.runtime.cache import trim
from pipelinejob_worker.protocol import ExitCode, FailureRecord
from tests.unit.operator.builders import NOW, ended, leaving, manifest, place, pod, seconds

WAS = StageStatus(index=1, pod="tiny-s1-a0", node="node-1")
UNBORN = StageStatus(index=1)


def of(some: StagePod | None, before: StageStatus = WAS, **look: Any) -> tuple[str, str, bool, bool] | None:
    """Rung, reason, whether it counts, and whether the epoch must end."""
    found = recovery.setback(place(1), some, before, Look(now=NOW, **look))
    return found and (found.rung.name, found.failure.reason, found.counts, found.fence)


@pytest.mark.parametrize(("grace", "without"), [(0, True), (30, False)])
def test_the_cache_keeps_whether_a_deletion_leaves_time(grace: int, without: bool) -> None:
    labels = {"pipelinejob.dev/stage": "1", "pipelinejob.dev/stages": "2", "pipelinejob.dev/attempt": "0"}
    deletion = {"deletionTimestamp": "2026-01-01T12:00:00Z", "deletionGracePeriodSeconds": grace}
    read = StagePod.read(trim({"metadata": {"name": "tiny-s1-a0", "uid": "u", "labels": labels, **deletion}}))
    assert (read.terminating, read.without_grace) == (True, without)


DEAD = frozenset({"node-1"})


@pytest.mark.parametrize(
    ("some", "look", "wanted"),
    [
        pytest.param(pod(1), {}, None, id="a pod that is well"),
        pytest.param(ended(1, 0), {}, None, id="a stage that has succeeded"),
        pytest.param(None, {}, ("POD", "PodLost", True, True), id="a pod that is gone at once may live on unseen"),
        pytest.param(
            replace(leaving(pod(1)), without_grace=True),
            {},
            ("POD", "PodLost", True, True),
            id="a pod that is deleted at once is lost, also while a list still has it",
        ),
        pytest.param(leaving(pod(1)), {}, ("POD", "Deleted", False, False), id="a deleted pod hands over"),
        pytest.param(
            replace(leaving(ended(1, ExitCode.DRAINED)), without_grace=True),
            {},
            ("POD", "Deleted", False, False),
            id="a pod that has handed over, and which its kubelet removes",
        ),
        pytest.param(
            leaving(pod(1, disruption="EvictionByEvictionAPI")),
            {},
            ("POD", "EvictionByEvictionAPI", False, False),
            id="a drained node",
        ),
        pytest.param(
            leaving(pod(1, disruption="PreemptionByScheduler")),
            {},
            ("POD", "PreemptionByScheduler", False, False),
            id="a preempted pod",
        ),
        pytest.param(ended(1, ExitCode.DRAINED), {}, ("POD", "Deleted", False, False), id="a pod that has handed over"),
        pytest.param(
            leaving(ended(1, 137)), {}, ("POD", "Deleted", False, False), id="a deleted pod that was not done in time"
        ),
        pytest.param(
            ended(1, 137, reason="OOMKilled"),
            {},
            ("POD", "OOMKilled", True, False),
            id="a container that nobody starts again in place",
        ),
        pytest.param(
            ended(1, 137, restarting=True, phase="Running"), {}, None, id="a container that is being started again"
        ),
        pytest.param(
            pod(1, container_restarts=1), {}, ("CONTAINER", "ContainerLost", True, False), id="one that was started"
        ),
        pytest.param(
            pod(1, phase="Failed", reason="Evicted", ready=False),
            {},
            ("POD", "Evicted", True, False),
            id="a pod that the kubelet evicted",
        ),
        pytest.param(
            pod(1, phase="Failed", reason="UnexpectedAdmissionError", ready=False),
            {},
            ("POD", "UnexpectedAdmissionError", True, False),
            id="a pod that the kubelet did not admit",
        ),
        pytest.param(
            pod(1, ready=False), {"unready_nodes": DEAD}, ("POD", "NodeLost", True, True), id="a node that is gone"
        ),
        pytest.param(
            leaving(pod(1)), {"unready_nodes": DEAD}, ("POD", "NodeLost", True, True), id="a pod that the taint deletes"
        ),
        pytest.param(
            pod(1, ready=False),
            {"unready_nodes": DEAD, "group_runs": True},
            None,
            id="a kubelet that is silent while the stages make steps",
        ),
        pytest.param(
            pod(1),
            {"unready_nodes": frozenset({"node-2"})},
            None,
            id="another stage's node",
        ),
        pytest.param(ended(1, ExitCode.CONFIGURATION), {}, ("FAIL", "Error", True, False), id="no try can help"),
        pytest.param(ended(1, ExitCode.BUDGET_SPENT), {}, ("FAIL", "Error", True, False), id="the agent has given up"),
    ],
)
def test_what_ends_and_who_answers(some: StagePod | None, look: dict[str, Any], wanted: object) -> None:
    assert of(some, **look) == wanted


def test_a_pod_that_the_status_does_not_name_is_still_to_be_made() -> None:
    assert of(None, UNBORN) is None


@pytest.mark.parametrize(
    ("code", "final"),
    [
        (ExitCode.CONFIGURATION, Reason.INVALID_CONFIGURATION),
        (ExitCode.BUDGET_SPENT, Reason.RESTART_BUDGET_SPENT),
    ],
)
def test_a_final_end_says_why_the_job_fails(code: ExitCode, final: Reason) -> None:
    found = recovery.setback(place(1), ended(1, code), WAS, Look(now=NOW))
    assert found is not None
    assert found.final is final


def record(at: float = 0.0, rank: int = 1, **told: Any) -> FailureRecord:
    return FailureRecord(rank=rank, at=NOW.timestamp() + at, **{"reason": "Signal", "exit_code": 139, **told})


def of_records(*records: FailureRecord, before: StageStatus = WAS, **look: Any) -> list[recovery.Setback]:
    return list(recovery.of_records(records, {1: (place(1), "tiny-s1-a0", before)}, Look(now=NOW, **look)))


class TestProcesses:
    def test_what_the_agents_answered_is_counted_and_told(self) -> None:
        (found,) = of_records(record(step=7, node="node-1", log_tail=("a",), message="killed by SIGSEGV"))
        assert (found.rung, found.counts, found.failure.step) == (Rung.PROCESS, True, 7)
        assert found.failure.sentence() == (
            "stage 1 (pod tiny-s1-a0) on node node-1 failed with exit code 139 (Signal): killed by SIGSEGV; last log "
            "lines: a"
        )

    def test_what_has_been_counted_is_not_counted_again(self) -> None:
        counted = WAS.model_copy(update={"last_failure_time": "2026-01-01T12:00:00.500000Z"})
        assert [found.at for found in of_records(record(0.5), record(0.500001), before=counted)] == [
            NOW + seconds(0.500001)
        ]

    def test_the_end_of_a_container_is_told_but_was_counted_by_the_kubelets_word(self) -> None:
        (found,) = of_records(record(reason="OOMKilled", exit_code=137))
        assert (found.rung, found.counts) == (Rung.PROCESS, False)

    @pytest.mark.parametrize("code", [ExitCode.CONFIGURATION, ExitCode.BUDGET_SPENT])
    def test_what_is_final_is_no_restart(self, code: ExitCode) -> None:
        assert of_records(record(exit_code=code, reason="Configuration")) == []

    def test_a_rank_that_the_group_does_not_have_is_left_out(self) -> None:
        assert of_records(record(rank=9)) == []


def rule(action: str = "FailJob", **on: Any) -> Rule:
    return Rule.model_validate({"name": "some", "action": action, **on})


class TestRules:
    @pytest.mark.parametrize(
        ("on", "matches"),
        [
            ({"onExitCodes": [1, 139]}, True),
            ({"onExitCodes": [1]}, False),
            ({"onSignals": ["SIGSEGV"]}, True),
            ({"onSignals": ["SIGKILL"]}, False),
            ({"onReasons": ["Signal"]}, True),
            ({"onReasons": ["Signal"], "onExitCodes": [1]}, False),
            ({"onReasons": ["Signal"], "onExitCodes": [139]}, True),
            ({"onNodeConditions": ["GpuUnhealthy"]}, False),
        ],
    )
    def test_every_list_that_is_set_must_hold_its_part(self, on: dict[str, Any], matches: bool) -> None:
        (found,) = of_records(record(), rules=[rule(**on)])
        assert (found.rung is Rung.FAIL) == matches

    @pytest.mark.parametrize(
        ("action", "rung", "counts"),
        [
            ("Ignore", Rung.PROCESS, False),
            ("Restart", Rung.PROCESS, True),
            ("ReplacePod", Rung.POD, True),
            ("FailJob", Rung.FAIL, True),
        ],
    )
    def test_the_action_changes_the_answer(self, action: str, rung: Rung, counts: bool) -> None:
        (found,) = of_records(record(), rules=[rule(action, onSignals=["SIGSEGV"])])
        assert (found.rung, found.counts) == (rung, counts)

    def test_the_first_rule_counts(self) -> None:
        both = [rule("Ignore", onExitCodes=[139]), rule("FailJob", onExitCodes=[139])]
        (found,) = of_records(record(), rules=both)
        assert found.rung is Rung.PROCESS

    def test_no_rule_speaks_about_a_pod_that_was_asked_to_leave(self) -> None:
        deleted = rule("FailJob", onReasons=["Deleted"])
        assert of(leaving(pod(1)), rules=[deleted]) == ("POD", "Deleted", False, False)

    def test_a_sick_node_loses_the_stage_before_it_fails(self) -> None:
        sick = {"node-1": frozenset({"Ready", "GpuUnhealthy"})}
        moves = [rule("ReplacePod", onNodeConditions=["GpuUnhealthy"])]
        assert of(pod(1), rules=moves, node_conditions=sick) == ("POD", "GpuUnhealthy", True, False)
        assert of(pod(1), rules=[rule("FailJob", onNodeConditions=["GpuUnhealthy"])], node_conditions=sick) == (
            "FAIL",
            "GpuUnhealthy",
            True,
            False,
        )

    @pytest.mark.parametrize(("code", "name"), [(139, "SIGSEGV"), (137, "SIGKILL"), (1, ""), (0, ""), (255, "")])
    def test_a_signals_name_follows_from_the_exit_code(self, code: int, name: str) -> None:
        assert rules.signal_name(code) == name


class TestBackOff:
    def stage(self, quick: int, ago: float) -> StageStatus:
        then = (NOW - seconds(ago)).isoformat().replace("+00:00", "Z")
        return StageStatus(index=1, replacement_time=then, replacement_step=7, quick_replacements=quick)

    def test_the_first_new_pod_waits_for_nothing(self) -> None:
        assert recovery.in_succession(UNBORN, 7, NOW) == 0
        assert recovery.delay(0) == timedelta(0)

    def test_those_that_follow_quickly_wait_ever_longer(self) -> None:
        assert recovery.in_succession(self.stage(0, ago=5), 7, NOW) == 1
        assert recovery.in_succession(self.stage(3, ago=60), 7, NOW) == 4
        assert [recovery.delay(number).seconds for number in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]

    def test_a_pod_with_which_the_job_has_made_a_step_was_of_use(self) -> None:
        assert recovery.in_succession(self.stage(3, ago=5), 8, NOW) == 0

    def test_a_pod_that_has_lived_for_a_while_begins_anew(self) -> None:
        assert recovery.in_succession(self.stage(3, ago=64), 7, NOW) == 0


class TestHandOver:
    @pytest.mark.parametrize(
        ("some", "leaves"),
        [
            (leaving(pod(1)), True),
            (leaving(ended(1, ExitCode.DRAINED)), False),
            (leaving(pod(1, node="node-9")), False),
            (leaving(pod(1, started=False)), False),
            (pod(1), True),
        ],
        ids=["leaves", "has left", "on a dead node", "never began", "is about to be deleted"],
    )
    def test_a_successor_waits_while_the_older_pod_may_hand_over(self, some: StagePod, leaves: bool) -> None:
        assert recovery.still_leaving(some, frozenset({"node-9"}), NOW) == leaves

    def test_but_not_for_ever(self) -> None:
        assert recovery.still_leaving(leaving(pod(1)), frozenset(), NOW + seconds(39.9))
        assert not recovery.still_leaving(leaving(pod(1)), frozenset(), NOW + seconds(40))


class TestAvoidance:
    HOUR = timedelta(hours=1)
    STAMP = "2026-01-01T12:00:00Z"

    def test_a_node_is_avoided_after_the_second_failure(self) -> None:
        once = avoidance.noted([], ["node-1", "node-2"], self.STAMP, self.HOUR)
        assert avoidance.avoided(once) == []
        twice = avoidance.noted(once, ["node-1"], self.STAMP, self.HOUR)
        assert avoidance.avoided(twice) == ["node-1"]

    def test_what_lies_longer_back_than_the_window_is_forgotten(self) -> None:
        old = AvoidedNode(name="node-1", failures=5, last_failure_time="2026-01-01T11:00:00Z")
        assert avoidance.noted([old], ["node-2"], self.STAMP, self.HOUR) == [
            AvoidedNode(name="node-2", failures=1, last_failure_time=self.STAMP)
        ]
        assert avoidance.unexpired([old], NOW - seconds(1), self.HOUR) == [old]
        assert avoidance.unexpired([old], NOW, self.HOUR) == []


def spec(**members: Any) -> Spec:
    return Spec.model_validate(manifest(**members)["spec"])


def train(**members: Any) -> dict[str, Any]:
    base: dict[str, Any] = manifest()["spec"]["train"]
    return base | members


class TestShapes:
    @pytest.mark.parametrize(
        ("members", "shape", "word"),
        [
            ({}, Shape(3), ""),
            ({}, Shape(5), "needs 5 microbatches"),
            ({"train": train(schedule={"name": "GPipe"})}, Shape(10), ""),
            ({"train": train(schedule={"name": "GPipe"})}, Shape(11), "the model has 10 layers"),
            ({}, Shape(2, 3), "cannot be shared equally by 3 pipelines"),
            ({"train": train(schedule={"name": "DualPipeV", "chunksPerStage": 2})}, Shape(3), "needs 6 microbatches"),
            (
                {"train": train(schedule={"name": "Interleaved1F1B", "chunksPerStage": 2})},
                Shape(3),
                "needs a multiple of the 3 stages",
            ),
            (
                {"partition": {"strategy": "Manual", "boundaries": [3, 6]}},
                Shape(2),
                "for another number of stages than 2",
            ),
        ],
    )
    def test_what_schedule_and_model_cannot_do_is_said(self, members: dict[str, Any], shape: Shape, word: str) -> None:
        problem = shapes.problem(spec(**members), shape)
        assert (word in problem) if word else problem == ""

    @pytest.mark.parametrize(
        ("elasticity", "pods", "wanted"),
        [
            ({}, 3, None),
            ({"minStages": 1}, 3, Shape(3)),
            ({"minStages": 1}, 2, Shape(2)),
            ({"minStages": 2}, 1, None),
            ({"minStages": 4}, 3, None),
        ],
    )
    def test_a_job_shrinks_to_as_many_stages_as_there_is_room_for(
        self, elasticity: dict[str, int], pods: int, wanted: Shape | None
    ) -> None:
        assert shapes.fewer(spec(stages=4, elasticity=elasticity), Shape(4), pods) == wanted

    def test_it_skips_what_the_schedule_cannot_do(self) -> None:
        interleaved = train(schedule={"name": "Interleaved1F1B", "chunksPerStage": 2})
        some = spec(stages=4, train=interleaved, elasticity={"minStages": 1})
        assert shapes.fewer(some, Shape(4), 3) == Shape(2), "4 microbatches are no multiple of 3 stages"

    def test_all_pipelines_shrink_together(self) -> None:
        some = spec(stages=3, pipelines=2, elasticity={"minStages": 1}, train=train(microbatches=8))
        assert shapes.fewer(some, Shape(3, 2), 5) == Shape(2, 2)

    def test_the_stages_tell_how_many_layers_a_model_has(self) -> None:
        assert shapes.known_layers(["0-2,9-11", "3-5,12", ""]) == 13
        assert shapes.known_layers([]) == 0
