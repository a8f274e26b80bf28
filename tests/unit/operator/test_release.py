"""When pods are taken back because they will not all get their nodes, and which node is left out afterwards."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from pipelinejob_operator.build.opening import Opened
from pipelinejob_operator.controller.actions import NoteRelease
from pipelinejob_operator.policy import release
from pipelinejob_operator.policy.facts import StagePod
from tests.unit.operator.builders import NOW, decide, job, leaving, message, pod, seconds, told

TIMEOUT = timedelta(seconds=600)
REFUSED = {"phase": "Failed", "reason": "OutOfcpu", "message": "Pod was rejected: Node didn't have enough resource"}


def pinned(stage: int, **facts: Any) -> StagePod:
    """A pod whose gate was opened at noon, on its planned node and not begun."""
    note = Opened(at=NOW, node=f"node-{stage}")
    return pod(stage, **({"opened": note, "membership": "", "ready": False, "started": False} | facts))


def unbound(stage: int, **facts: Any) -> StagePod:
    return pinned(stage, **({"scheduled": False, "node": "", "address": ""} | facts))


def judge(*pods: StagePod, after: float = 0) -> release.Release:
    return release.judge(pods, TIMEOUT, NOW + seconds(after))


def test_a_gang_whose_pods_find_their_nodes_is_left_alone() -> None:
    assert judge(pinned(0), pinned(1)) == release.Release()


def test_a_pod_that_the_scheduler_refuses_on_its_node_for_ten_seconds_releases_the_gang() -> None:
    gang = (pinned(0), unbound(1, unschedulable="1 Insufficient cpu"))
    assert judge(*gang, after=9) == release.Release(look_again_at=NOW + seconds(10))
    verdict = judge(*gang, after=10)
    assert (verdict.pods, verdict.avoid) == (gang, "node-1")
    assert verdict.why == "kube-scheduler refuses stage 1 on node-1: 1 Insufficient cpu"


def test_a_scheduler_that_has_not_answered_is_waited_for() -> None:
    assert judge(pinned(0), unbound(1), after=3600) == release.Release()


def test_where_the_scheduler_preempts_the_victims_may_take_their_time_to_leave() -> None:
    stuck = unbound(1, unschedulable="preempting", nominated="node-1")
    assert judge(pinned(0), stuck, after=119).pods == ()
    assert len(judge(pinned(0), stuck, after=120).pods) == 2


def test_a_pod_that_its_kubelet_refuses_releases_the_gang_at_once() -> None:
    verdict = judge(pinned(0), pinned(1, **REFUSED))
    assert (len(verdict.pods), verdict.avoid) == (2, "node-1")
    assert "the kubelet of node-1 refused stage 1: OutOfcpu: Pod was rejected" in verdict.why


def test_a_pod_that_is_preempted_before_it_began_releases_the_gang() -> None:
    gone = leaving(pinned(1, disruption="PreemptionByScheduler"))
    assert len(judge(pinned(0), gone).pods) == 2


def test_a_stage_that_is_preempted_later_is_a_failure_and_not_a_matter_of_placement() -> None:
    gone = leaving(pinned(1, disruption="PreemptionByScheduler", membership="{}"))
    assert judge(pinned(0, membership="{}"), gone).pods == ()


def test_of_a_gang_that_has_begun_only_the_pod_without_a_place_is_taken_back() -> None:
    stuck = unbound(1, unschedulable="no room")
    assert judge(pinned(0, membership="{}"), stuck, after=10).pods == (stuck,)


def test_provisioned_pods_are_taken_back_when_their_time_is_over() -> None:
    note = Opened(at=NOW, why="Provision")
    gang = (pinned(0, opened=note), unbound(1, opened=note, unschedulable="no room"))
    assert judge(*gang, after=599).look_again_at == NOW + TIMEOUT
    verdict = judge(*gang, after=600)
    assert (verdict.pods, verdict.avoid) == (gang, "")


def test_of_a_gang_that_has_begun_only_the_stage_that_is_provisioned_for_is_taken_back() -> None:
    lacking = unbound(1, opened=Opened(at=NOW, why="Provision"), unschedulable="no room")
    assert judge(pinned(0, membership="{}"), lacking, after=600).pods == (lacking,)


@pytest.mark.parametrize("facts", [{"phase": "Failed", "reason": "Evicted", "message": "The node was low on memory"}])
def test_other_failures_are_not_its_business(facts: dict[str, Any]) -> None:
    assert judge(pinned(0), pinned(1, **facts)).pods == ()


def test_the_release_costs_no_restart_and_the_next_gang_is_planned_without_that_node() -> None:
    made = decide(job(), pinned(0), pinned(1, **REFUSED), pinned(2), plans=True)
    assert made.actions == (NoteRelease("node-1"),)
    assert (made.status.attempt, made.status.restarts, made.status.first_failure) == (1, 0, None)
    assert told(made)["Placed"] == ("False", "Replanning")
    assert "the kubelet of node-1 refused stage 1" in message(made, "Placed")
    assert made.irreversible


def test_a_pod_of_an_earlier_operator_has_no_note_and_is_left_to_the_scheduler() -> None:
    old = replace(unbound(1, unschedulable="no room"), opened=None)
    assert judge(pinned(0), old, after=3600) == release.Release()
