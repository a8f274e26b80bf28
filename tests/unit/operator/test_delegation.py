"""Delegated jobs: what each scheduler is shown, which one is used, and what is said when it is not there."""

from typing import Any

import pytest

from pipelinejob_operator.api.placement import Placement
from pipelinejob_operator.build.delegation import (
    AFFINITY,
    DELEGATES,
    KUEUE_FINALIZER,
    KUEUE_QUEUE,
    POD_GROUP,
    SCHEDULER_PLUGINS,
    VOLCANO,
    Delegate,
    group,
)
from pipelinejob_operator.build.installation import Installation
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.pods import stage_pod
from pipelinejob_operator.controller.observed import Observed
from pipelinejob_operator.controller.plan import Plan, plan
from pipelinejob_operator.policy.delegation import chosen
from pipelinejob_operator.policy.facts import StagePod
from tests.unit.operator.builders import (
    INSTALLATION,
    NOW,
    decide,
    ended,
    gated,
    job,
    kinds,
    leaving,
    message,
    pod,
    seconds,
    told,
)

HIGH = {"spec": {"priorityClassName": "high"}}


def delegated(to: str = "Auto", queue: str = "", template: dict[str, Any] | None = None, **placement: Any) -> Job:
    spec = {"strategy": "Delegated", "delegated": {"to": to, "queueName": queue}, **placement}
    return job(placement=spec, **({"template": template} if template else {}))


def built(delegate: Delegate, rank: int = 1, **given: Any) -> dict[str, Any]:
    some = delegated(delegate.name, **given)
    return stage_pod(some, some.shape.places()[rank], INSTALLATION, share_host=False, delegate=delegate)


def spec_of(delegate: Delegate, **given: Any) -> dict[str, Any]:
    made = group(delegated(delegate.name, **given), delegate)
    assert made is not None
    spec: dict[str, Any] = made["spec"]
    return spec


class TestObjects:
    @pytest.mark.parametrize(
        ("delegate", "version"),
        [
            (POD_GROUP, "scheduling.k8s.io/v1beta1"),
            (VOLCANO, "scheduling.volcano.sh/v1beta1"),
            (SCHEDULER_PLUGINS, "scheduling.x-k8s.io/v1alpha1"),
        ],
    )
    def test_the_gang_is_a_pod_group_that_goes_with_the_job(self, delegate: Delegate, version: str) -> None:
        made = group(delegated(delegate.name), delegate)
        assert made is not None
        assert (made["apiVersion"], made["kind"]) == (version, "PodGroup")
        assert (made["metadata"]["name"], made["metadata"]["namespace"]) == ("tiny", "team")
        assert [owner["uid"] for owner in made["metadata"]["ownerReferences"]] == ["job-uid"]

    @pytest.mark.parametrize("delegate", [AFFINITY, KUEUE_QUEUE])
    def test_there_is_none_where_pods_alone_are_the_gang(self, delegate: Delegate) -> None:
        assert group(delegated(delegate.name, queue="team-a"), delegate) is None

    def test_kube_scheduler_binds_and_preempts_all_or_none_at_the_pods_priority(self) -> None:
        assert spec_of(POD_GROUP) == {"schedulingPolicy": {"gang": {"minCount": 3}}, "disruptionMode": {"all": {}}}
        assert spec_of(POD_GROUP, template=HIGH)["priorityClassName"] == "high"

    def test_volcano_knows_the_queue_and_the_priority(self) -> None:
        assert spec_of(VOLCANO) == {"minMember": 3}
        assert spec_of(VOLCANO, queue="team-a", template=HIGH) == {
            "minMember": 3,
            "queue": "team-a",
            "priorityClassName": "high",
        }

    def test_scheduler_plugins_reads_the_priority_from_the_pods(self) -> None:
        assert spec_of(SCHEDULER_PLUGINS, template=HIGH) == {"minMember": 3}


class TestPods:
    def test_kube_scheduler_finds_the_group_in_the_spec(self) -> None:
        spec = built(POD_GROUP)["spec"]
        assert spec["schedulingGroup"] == {"podGroupName": "tiny"}
        assert "schedulerName" not in spec

    def test_volcano_finds_it_in_an_annotation(self) -> None:
        made = built(VOLCANO)
        assert made["metadata"]["annotations"]["scheduling.k8s.io/group-name"] == "tiny"
        assert made["spec"]["schedulerName"] == "volcano"

    def test_scheduler_plugins_finds_it_in_a_label(self) -> None:
        made = built(SCHEDULER_PLUGINS)
        assert made["metadata"]["labels"]["scheduling.x-k8s.io/pod-group"] == "tiny"
        assert made["spec"]["schedulerName"] == "scheduler-plugins-scheduler"

    def test_a_scheduler_of_another_name_is_the_templates_to_say(self) -> None:
        given = {"spec": {"schedulerName": "volcano-gpu"}}
        assert built(VOLCANO, template=given)["spec"]["schedulerName"] == "volcano-gpu"

    def test_kueue_sees_a_group_of_each_attempt_in_the_order_of_ranks(self) -> None:
        meta = built(KUEUE_QUEUE, rank=2, queue="team-a")["metadata"]
        kueue = {key: value for key, value in meta["labels"].items() if "kueue" in key}
        assert kueue == {
            "kueue.x-k8s.io/queue-name": "team-a",
            "kueue.x-k8s.io/pod-group-name": "tiny-a0",
            "kueue.x-k8s.io/pod-group-pod-index": "2",
        }
        kueue = {key: value for key, value in meta["annotations"].items() if "kueue" in key}
        assert kueue == {
            "kueue.x-k8s.io/pod-group-total-count": "3",
            "kueue.x-k8s.io/retriable-in-group": "false",
        }

    def test_all_pods_of_a_group_of_kueue_ask_for_the_same(self) -> None:
        """Kueue tells roles apart by these members, and takes at most eight of them."""
        members = ("nodeSelector", "affinity", "tolerations", "priority", "topologySpreadConstraints", "resourceClaims")
        first, last = (built(KUEUE_QUEUE, rank=rank, queue="team-a")["spec"] for rank in (0, 2))
        assert [first.get(name) for name in members] == [last.get(name) for name in members]

    @pytest.mark.parametrize(
        ("placement", "annotation"),
        [
            ({}, None),
            ({"topologyLevels": ["zone", "rack"]}, ("podset-preferred-topology", "rack")),
            (
                {"topologyLevels": ["zone", "rack"], "requiredLevel": "zone"},
                ("podset-required-topology", "zone"),
            ),
        ],
    )
    def test_kueue_is_told_the_levels_that_the_job_names(
        self, placement: dict[str, Any], annotation: tuple[str, str] | None
    ) -> None:
        annotations = built(KUEUE_QUEUE, queue="team-a", **placement)["metadata"]["annotations"]
        found = [(key.partition("/")[2], value) for key, value in annotations.items() if "topology" in key]
        assert found == ([annotation] if annotation else [])

    @pytest.mark.parametrize("delegate", [AFFINITY, POD_GROUP, VOLCANO, SCHEDULER_PLUGINS])
    def test_the_others_draw_neighbours_together_and_keep_to_one_domain_of_the_required_level(
        self, delegate: Delegate
    ) -> None:
        rules = built(delegate, requiredLevel="rack")["spec"]["affinity"]["podAffinity"]
        assert len(rules["preferredDuringSchedulingIgnoredDuringExecution"]) == 2
        (term,) = rules["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["topologyKey"] == "rack"
        assert term["labelSelector"]["matchLabels"] == {
            "pipelinejob.dev/job-uid": "job-uid",
            "pipelinejob.dev/attempt": "0",
        }

    def test_all_of_them_wait_until_every_pod_exists(self) -> None:
        for delegate in DELEGATES.values():
            assert built(delegate, queue="team-a")["spec"]["schedulingGates"] == [{"name": "pipelinejob.dev/gang"}]


@pytest.mark.parametrize(
    ("to", "served", "allowed", "found"),
    [
        ("Auto", True, ("PodGroup",), POD_GROUP),
        ("Auto", True, (), AFFINITY),
        ("Auto", False, ("PodGroup",), AFFINITY),
        ("Affinity", False, (), AFFINITY),
        ("PodGroup", False, (), POD_GROUP),
        ("Kueue", True, (), KUEUE_QUEUE),
    ],
)
def test_which_scheduler_is_used(to: str, served: bool, allowed: tuple[str, ...], found: Delegate) -> None:
    placement = Placement.model_validate({"strategy": "Delegated", "delegated": {"to": to, "queueName": "a"}})
    assert chosen(placement, served=served, allowed=allowed) is found
    assert chosen(Placement(), served=served, allowed=allowed) is None


def decided(some: Job, *pods: StagePod, served: bool = True, allowed: tuple[str, ...] = ()) -> Plan:
    installation = Installation(worker_image="worker:1", schedulers=allowed)
    return plan(some, Observed(pods=pods, scheduler_served=served, network_due=False), NOW, installation)


class TestPlan:
    def test_the_pod_group_stands_before_the_pods(self) -> None:
        made = decided(delegated("PodGroup"), allowed=("PodGroup",))
        assert kinds(made) == ["ApplyObject"] * 3 + ["CreatePod"] * 3
        assert made.actions[2].manifest["kind"] == "PodGroup"  # type: ignore[union-attr]
        assert made.actions[3].manifest["spec"]["schedulingGroup"] == {"podGroupName": "tiny"}  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        ("to", "queue", "words"),
        [
            ("Affinity", "", "kube-scheduler places them one by one, neighbours drawn together by affinity"),
            (
                "PodGroup",
                "",
                "kube-scheduler places all or none, as PodGroup tiny (scheduling.k8s.io/v1beta1)",
            ),
            ("Kueue", "team-a", "Kueue admits them as one pod group of LocalQueue team-a"),
            (
                "Volcano",
                "team-a",
                "Volcano places all or none, as PodGroup tiny (scheduling.volcano.sh/v1beta1) in queue team-a",
            ),
            (
                "SchedulerPlugins",
                "",
                "scheduler-plugins places all or none, as PodGroup tiny (scheduling.x-k8s.io/v1alpha1)",
            ),
        ],
    )
    def test_the_condition_says_which_scheduler_places_the_stages(self, to: str, queue: str, words: str) -> None:
        made = decided(
            delegated(to, queue), pod(0), pod(1), pod(2), allowed=("PodGroup", "Volcano", "SchedulerPlugins")
        )
        assert message(made, "Placed") == f"all 3 stages have a node; {words}"

    @pytest.mark.parametrize(
        ("to", "needs", "cure"),
        [
            ("PodGroup", "podgroups of scheduling.k8s.io/v1beta1", "feature gate GenericWorkload"),
            ("Kueue", "localqueues of kueue.x-k8s.io/v1beta2 or kueue.x-k8s.io/v1beta1", "install Kueue"),
            ("Volcano", "podgroups of scheduling.volcano.sh/v1beta1", "install Volcano"),
            ("SchedulerPlugins", "podgroups of scheduling.x-k8s.io/v1alpha1", "install scheduler-plugins"),
        ],
    )
    def test_a_scheduler_that_is_not_there_is_waited_for_with_no_pod(self, to: str, needs: str, cure: str) -> None:
        made = decided(delegated(to, "team-a" if to == "Kueue" else ""), served=False)
        assert told(made)["Placed"] == ("False", "SchedulerMissing")
        text = message(made, "Placed")
        assert text.startswith(
            f"spec.placement.delegated.to: {to} needs {needs}, which the API server does not serve; "
        )
        assert cure in text
        assert made.actions == ()
        assert made.look_again_at == NOW + seconds(60)

    def test_a_scheduler_whose_objects_the_operator_may_not_write_is_named_with_the_charts_value(self) -> None:
        made = decided(delegated("Volcano"))
        assert told(made)["Placed"] == ("False", "SchedulerNotAllowed")
        assert message(made, "Placed") == (
            "spec.placement.delegated.to: Volcano needs rights to podgroups of scheduling.volcano.sh/v1beta1, which "
            "the operator does not have; add Volcano to the chart's value schedulers, or delegate to another"
        )
        assert made.actions == ()

    def test_stages_behind_anothers_gate_are_held_and_the_gate_is_named(self) -> None:
        held = {"held": ("kueue.x-k8s.io/admission",), "gate": None}
        pods = [pod(stage, node="", address="", scheduled=False, ready=False, **held) for stage in range(3)]
        made = decided(delegated("Kueue", "team-a"), *pods)
        assert told(made)["Placed"] == ("False", "Held")
        assert message(made, "Placed") == (
            "3 of 3 stages wait behind the scheduling gate kueue.x-k8s.io/admission; Kueue admits them as one pod "
            "group of LocalQueue team-a"
        )


class TestKueuesFinalizer:
    @pytest.mark.parametrize(
        "over",
        [
            leaving(gated(0, finalizers=(KUEUE_FINALIZER,))),
            leaving(ended(0, 79, finalizers=("other", KUEUE_FINALIZER))),
        ],
        ids=["never scheduled", "ended"],
    )
    def test_a_pod_of_the_past_that_is_over_is_let_go(self, over: StagePod) -> None:
        made = decide(job(suspend=True), over)
        assert "ReleasePod" not in kinds(made)  # the attempt is retired first
        retired = decide(job(made.status, suspend=True), over)
        assert kinds(retired) == ["ReleasePod"]
        assert retired.actions[0].finalizer == KUEUE_FINALIZER  # type: ignore[union-attr]

    def test_a_pod_that_still_runs_keeps_it(self) -> None:
        running = leaving(pod(0, finalizers=(KUEUE_FINALIZER,)))
        first = decide(job(suspend=True), running)
        assert kinds(decide(job(first.status, suspend=True), running)) == []

    def test_finalizers_of_others_are_theirs(self) -> None:
        over = leaving(ended(0, 79, finalizers=("other",)))
        first = decide(job(suspend=True), over)
        assert kinds(decide(job(first.status, suspend=True), over)) == []
