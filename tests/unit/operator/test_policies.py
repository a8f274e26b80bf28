"""The rules, one table each."""

from datetime import datetime, timedelta
from typing import Any, ClassVar

import pytest

from pipelinejob_operator.api.status import FirstFailure
from pipelinejob_operator.api.v1alpha1 import Recovery, Spec
from pipelinejob_operator.build.place import Place, Shape
from pipelinejob_operator.policy import acceptance, failure, restart
from pipelinejob_operator.policy.facts import Claim, Ended, Failure, Manifest, StagePod
from pipelinejob_operator.policy.reasons import ConditionType, Reason
from pipelinejob_worker.protocol import ExitCode, Termination
from tests.unit.operator.builders import NOW, ended, leaving, manifest, place, pod, seconds

PEER_LOST, DRAINED, CONFIGURATION = ExitCode.PEER_LOST, ExitCode.DRAINED, ExitCode.CONFIGURATION


def accept(template: dict[str, Any] | None = None, claim: Claim | None = None, **spec: Any) -> str:
    """Reason and message of a refusal, empty where the case is accepted."""
    case = acceptance.Case(Spec.model_validate(manifest(**spec)["spec"]), template or {}, claim, 1000)
    verdict = acceptance.check(case)
    return f"{verdict.reason}: {verdict.message}" if verdict else ""


class TestAcceptance:
    @pytest.mark.parametrize(("stages", "refused"), [(3, False), (10, False), (11, True)])
    def test_every_stage_needs_a_layer_or_the_embedding_or_the_head(self, stages: int, refused: bool) -> None:
        assert accept(stages=stages).startswith("TooFewLayers: spec.stages: 11 stages") == refused

    @pytest.mark.parametrize(
        ("stages", "chunks", "words"), [(5, 2, ""), (6, 2, "at most 5 stages"), (2, 12, "at most 10")]
    )
    def test_every_chunk_of_every_stage_needs_one(self, stages: int, chunks: int, words: str) -> None:
        train = manifest()["spec"]["train"] | {"schedule": {"name": "LoopedBFS", "chunksPerStage": chunks}}
        refused = accept(stages=stages, train=train)
        if words:
            assert refused.startswith(f"TooFewLayers: spec.stages: {stages} stages of {chunks} chunks")
            assert f"allowed: {words}" in refused
        else:
            assert refused == ""

    @pytest.mark.parametrize(
        "model", [{"huggingFace": {"path": "gpt2", "context": 32}}, {"module": {"function": "m:f"}}]
    )
    def test_of_other_models_the_worker_counts_the_layers(self, model: dict[str, Any]) -> None:
        assert accept(stages=100, model=model) == ""

    @pytest.mark.parametrize(("last", "refused"), [(9, False), (10, True)])
    def test_the_last_boundary_leaves_a_layer_to_the_last_stage(self, last: int, refused: bool) -> None:
        found = accept(partition={"strategy": "Manual", "boundaries": [2, last]})
        assert found.startswith(f"InvalidSpec: spec.partition.boundaries: {last} is past the last of 10") == refused

    @pytest.mark.parametrize(
        ("pod_spec", "word"),
        [
            ({"restartPolicy": "Always"}, "restartPolicy: cannot be set"),
            ({"hostname": "a"}, "hostname: cannot be set"),
            ({"subdomain": "a"}, "subdomain: cannot be set"),
            ({"nodeName": "a"}, "nodeName: cannot be set"),
            ({"volumes": [{"name": "pipelinejob-info"}]}, "volumes: the name pipelinejob-info"),
            ({"initContainers": [{"name": "worker"}]}, "initContainers: the name worker"),
            ({"containers": [{"name": "worker"}, {"name": "worker"}]}, "containers: two are named worker"),
            (
                {"containers": [{"name": "worker", "volumeMounts": [{"mountPath": "/checkpoint/"}]}]},
                "mount path /checkpoint/",
            ),
            ({"schedulingGates": [{"name": "pipelinejob.dev/gang"}]}, "schedulingGates: pipelinejob.dev/gang"),
        ],
    )
    def test_the_template_leaves_to_the_operator_what_is_its(self, pod_spec: dict[str, object], word: str) -> None:
        refused = accept({"spec": pod_spec})
        assert refused.startswith("InvalidTemplate: spec.template.spec.")
        assert word in refused

    @pytest.mark.parametrize(
        "pod_spec",
        [
            {"restartPolicy": "Never"},
            {"nodeSelector": {"a": "b"}, "tolerations": [{"operator": "Exists"}]},
            {"containers": [{"name": "worker", "volumeMounts": [{"mountPath": "/tmp", "name": "big"}]}]},
            {"containers": [{"name": "sidecar", "volumeMounts": [{"mountPath": "/checkpoint", "name": "x"}]}]},
        ],
    )
    def test_all_else_is_the_users(self, pod_spec: dict[str, object]) -> None:
        assert accept({"spec": pod_spec}) == ""

    @pytest.mark.parametrize(
        ("mode", "stages", "pipelines", "refused"),
        [
            ("ReadWriteOncePod", 3, 1, True),
            ("ReadWriteOncePod", 1, 1, False),
            ("ReadWriteOncePod", 1, 2, True),
            ("ReadWriteOnce", 3, 1, False),
            ("ReadWriteMany", 3, 1, False),
        ],
    )
    def test_a_claim_for_one_pod_serves_one_stage(self, mode: str, stages: int, pipelines: int, refused: bool) -> None:
        found = accept(claim=Claim("saves", frozenset({mode})), stages=stages, pipelines=pipelines)
        assert found.startswith("ClaimAccessMode: ") == refused

    def test_the_configuration_must_fit_into_an_annotation(self) -> None:
        spec = Spec.model_validate(manifest()["spec"])
        verdict = acceptance.check(acceptance.Case(spec, {}, None, 131_073))
        assert verdict is not None
        assert "131073 bytes" in verdict.message


def find(
    *pods: StagePod, now: datetime = NOW, protocol: bool = True, unready: frozenset[str] = frozenset()
) -> failure.Finding | None:
    look = failure.Look("tiny", pods[0].place.shape, 0, protocol, unready, now)
    return failure.first({item.place.rank: item for item in pods}, look)


class TestFailure:
    def test_a_gang_in_which_nothing_failed(self) -> None:
        assert find(pod(0), pod(1), ended(2, 0)) is None

    def test_the_one_that_failed_is_the_cause_and_not_those_that_lost_it(self) -> None:
        early = NOW - seconds(2)
        found = find(ended(0, PEER_LOST, at=early), ended(1, 1), ended(2, PEER_LOST, at=early))
        assert found is not None
        assert (found.answer, found.failure.place.stage) == (failure.Answer.RESTART, 1)

    def test_of_two_failures_the_earlier_is_the_cause(self) -> None:
        found = find(ended(0, 1, at=NOW), pod(1), ended(2, 1, at=NOW - seconds(1)))
        assert found is not None
        assert found.failure.place.stage == 2

    def test_of_two_failures_in_the_same_second_the_earlier_stage_is_named(self) -> None:
        found = find(pod(0), ended(1, 1), ended(2, 1))
        assert found is not None
        assert found.failure.place.stage == 1

    def test_a_failure_in_another_pipeline_is_named_with_its_place(self) -> None:
        two = Shape(2, 2)
        found = find(
            ended(0, PEER_LOST, shape=two),
            ended(1, PEER_LOST, shape=two),
            ended(0, 1, pipeline=1, shape=two),
            pod(1, pipeline=1, shape=two),
        )
        assert found is not None
        assert (
            found.failure.sentence()
            == "stage 0 of pipeline 1 (pod tiny-p1-s0-a0) on node node-2 failed with exit code 1 (Error)"
        )

    def test_a_missing_pod_of_another_pipeline_is_lost(self) -> None:
        two = Shape(1, 2)
        found = find(pod(0, shape=two))
        assert found is not None
        assert (found.failure.pod, found.failure.place) == ("tiny-p1-s0-a0", place(0, 1, two))

    def test_an_unfit_configuration_beats_every_other_failure(self) -> None:
        found = find(ended(0, 1, at=NOW - seconds(9)), ended(1, CONFIGURATION), pod(2))
        assert found is not None
        assert (found.answer, found.failure.place.stage) == (failure.Answer.FAIL, 1)

    def test_without_a_cause_it_waits_ten_seconds_for_one(self) -> None:
        victims = [ended(0, PEER_LOST), ended(1, PEER_LOST), pod(2)]
        found = find(*victims, now=NOW + seconds(9))
        assert found is not None
        assert (found.answer, found.recheck_at) == (failure.Answer.WAIT, NOW + seconds(10))
        found = find(*victims, now=NOW + seconds(10))
        assert found is not None
        assert (found.answer, found.failure.place.stage, found.failure.reason) == (
            failure.Answer.RESTART,
            2,
            "PeerLost",
        )

    def test_when_all_lost_each_other_the_first_to_notice_is_named(self) -> None:
        pods = [ended(0, PEER_LOST), ended(1, PEER_LOST, at=NOW - seconds(3)), ended(2, PEER_LOST)]
        found = find(*pods, now=NOW + seconds(10))
        assert found is not None
        assert (found.failure.place.stage, found.failure.exit_code) == (1, 75)
        assert "network" in found.failure.message

    def test_a_silent_stage_on_a_dead_node_is_not_waited_for(self) -> None:
        found = find(ended(0, PEER_LOST), pod(1), pod(2), unready=frozenset({"node-2"}))
        assert found is not None
        assert (found.answer, found.failure.place.stage, found.failure.reason) == (failure.Answer.RESTART, 2, "PodLost")

    def test_a_dead_node_alone_is_no_failure_because_its_pods_may_well_work_on(self) -> None:
        assert find(pod(0), pod(1), pod(2), unready=frozenset({"node-2"})) is None

    def test_a_missing_pod_is_lost(self) -> None:
        found = find(pod(0), pod(2))
        assert found is not None
        assert (found.answer, found.failure.place.stage, found.failure.reason) == (failure.Answer.RESTART, 1, "PodLost")

    def test_an_evicted_pod_is_lost(self) -> None:
        gone = pod(1, phase="Failed", ready=False, reason="Evicted", message="The node was low on memory")
        found = find(pod(0), gone, pod(2))
        assert found is not None
        assert (found.failure.reason, found.failure.message) == ("PodLost", "The node was low on memory")

    def test_a_pod_that_others_delete_is_given_the_time_to_drain(self) -> None:
        found = find(pod(0), leaving(pod(1)), pod(2))
        assert found is not None
        assert (found.answer, found.draining, found.recheck_at) == (failure.Answer.WAIT, True, NOW + seconds(40))

    def test_a_pod_that_outstays_its_grace_period_is_lost(self) -> None:
        found = find(pod(0), leaving(pod(1)), pod(2), now=NOW + seconds(40))
        assert found is not None
        assert (found.answer, found.failure.message) == (failure.Answer.RESTART, "node node-1 does not answer")

    def test_a_terminating_pod_on_a_dead_node_is_lost_at_once(self) -> None:
        found = find(pod(0), leaving(pod(1)), pod(2), unready=frozenset({"node-1"}))
        assert found is not None
        assert found.answer is failure.Answer.RESTART

    def test_a_drain_is_no_failure_even_when_the_drained_pod_is_gone(self) -> None:
        found = find(ended(0, DRAINED, at=NOW - seconds(1)), ended(2, DRAINED, at=NOW - seconds(1)))
        assert found is not None
        assert found.answer is failure.Answer.REPLACE

    def test_a_preempted_pod_that_was_killed_names_who_took_it(self) -> None:
        found = find(pod(0), ended(1, 137, disruption="PreemptionByScheduler"), pod(2))
        assert found is not None
        assert (found.failure.reason, found.failure.exit_code) == ("PodLost", 137)
        assert "PreemptionByScheduler" in found.failure.message

    @pytest.mark.parametrize("code", [PEER_LOST, DRAINED, CONFIGURATION])
    def test_without_our_agent_every_exit_code_but_0_is_a_failure(self, code: int) -> None:
        found = find(pod(0), ended(1, code), pod(2), protocol=False)
        assert found is not None
        assert (found.answer, found.failure.exit_code) == (failure.Answer.RESTART, code)


class TestRestart:
    @pytest.mark.parametrize(
        ("ages", "allowed"),
        [([], True), ([10], True), ([10, 20], False), ([10, 4000], True), ([3600, 10], True), ([3599, 10], False)],
    )
    def test_only_restarts_within_the_window_count(self, ages: list[int], allowed: bool) -> None:
        times = [NOW - seconds(age) for age in ages]
        assert restart.allowed(times, Recovery(max_restarts=2, window_seconds=3600), NOW) == allowed

    @pytest.mark.parametrize(("row", "wait"), [(0, 0), (1, 1), (2, 2), (3, 4), (4, 8), (6, 32), (7, 60), (10**6, 60)])
    def test_the_back_off_doubles_up_to_a_minute(self, row: int, wait: int) -> None:
        assert restart.delay(row) == timedelta(seconds=wait)

    @pytest.mark.parametrize(
        ("previous_step", "step", "reached", "row"),
        [(None, 0, 0, 4), (5, 5, 0, 4), (5, 4, 5, 4), (5, 6, 0, 1), (5, 0, 6, 1)],
    )
    def test_progress_past_the_last_failure_starts_the_row_anew(
        self, previous_step: int | None, step: int, reached: int, row: int
    ) -> None:
        previous = None if previous_step is None else FirstFailure(stage=0, step=previous_step)
        failed = Failure(place(0), "node-0", "tiny-s0-a0", 1, "Error", step=step)
        assert restart.in_a_row(3, previous, failed, reached) == row


class TestEnded:
    def test_an_agents_last_words_are_read(self) -> None:
        told = Termination(
            stage=1, exit_code=1, reason="WorkerFailed", message="loss is NaN", step=7, log_tail=["a", "b"]
        )
        state = {"exitCode": 1, "reason": "Error", "message": told.to_json(), "finishedAt": "2026-01-01T12:00:00Z"}
        assert Ended.read(state) == Ended(1, NOW, "WorkerFailed", "loss is NaN", 7, ("a", "b"))

    def test_of_an_oom_kill_only_the_kubelet_knows(self) -> None:
        told = Termination(stage=1, exit_code=137, reason="WorkerFailed").to_json()
        assert Ended.read({"exitCode": 137, "reason": "OOMKilled", "message": told}).reason == "OOMKilled"

    @pytest.mark.parametrize("text", ["Traceback\n\nValueError: x\n", "[1, 2]", "{}", "3"])
    def test_anything_else_is_the_end_of_the_log(self, text: str) -> None:
        found = Ended.read({"exitCode": 1, "reason": "Error", "message": text})
        assert found.reason == "Error"
        assert found.log_tail == tuple(line for line in text.splitlines() if line)

    def test_a_hostile_log_is_cut(self) -> None:
        found = Ended.read({"exitCode": 1, "message": "\n".join(["x" * 5000] * 100)})
        assert len(found.log_tail) == 32
        assert max(map(len, found.log_tail)) == 1024


class TestActive:
    """A finished job's pods keep their logs; those that may still hold a GPU go."""

    ENDED: ClassVar = {"state": {"terminated": {"exitCode": 0}}}
    RUNS: ClassVar = {"state": {"running": {}}}

    @pytest.mark.parametrize(
        ("phase", "containers", "sidecars", "active"),
        [
            ("Running", [RUNS], [], True),
            ("Running", [ENDED], [], False),  # its phase becomes Succeeded within seconds
            ("Running", [ENDED, RUNS], [], True),
            ("Running", [ENDED], [RUNS], True),
            ("Pending", [], [], True),
            ("Pending", [{"state": {"waiting": {"reason": "ImagePullBackOff"}}}], [], True),
            ("Succeeded", [ENDED], [], False),
            ("Failed", [], [], False),
        ],
    )
    def test_containers_say_it_before_the_phase(
        self, phase: str, containers: list[Manifest], sidecars: list[Manifest], active: bool
    ) -> None:
        labels = {"pipelinejob.dev/stage": "0", "pipelinejob.dev/stages": "1", "pipelinejob.dev/attempt": "0"}
        named = [{"name": f"c{number}", **status} for number, status in enumerate(containers)]
        status = {"phase": phase, "containerStatuses": named, "initContainerStatuses": sidecars}
        some = {"metadata": {"name": "tiny-s0-a0", "uid": "u", "labels": labels}, "status": status}
        assert StagePod.read(some).active is active


class TestPlace:
    LABELS: ClassVar = {"pipelinejob.dev/stage": "1", "pipelinejob.dev/stages": "3", "pipelinejob.dev/attempt": "0"}

    def read(self, **labels: str) -> Place:
        found = self.LABELS | {f"pipelinejob.dev/{name}": value for name, value in labels.items()}
        return StagePod.read({"metadata": {"name": "tiny-s1-a0", "uid": "u", "labels": found}}).place

    def test_labels_tell_it(self) -> None:
        assert self.read(pipeline="1", pipelines="2") == place(1, 1, Shape(3, 2))

    def test_pods_of_an_operator_that_knew_one_pipeline_are_of_that_one(self) -> None:
        assert self.read() == place(1)

    def test_ranks_go_down_one_pipeline_after_the_other(self) -> None:
        assert [(item.pipeline, item.stage) for item in Shape(2, 2).places()] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert [item.rank for item in Shape(2, 2).places()] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [ConditionType, Reason])
def test_every_condition_and_reason_says_what_it_means(kind: type[ConditionType] | type[Reason]) -> None:
    for member in kind:
        assert member.__doc__, member
        assert member.__doc__.endswith("."), member
        assert member.value.isalnum()
        assert member.value[0].isupper()
