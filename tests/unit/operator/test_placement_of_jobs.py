"""What a job does while it waits for nodes, and what its status shows of where it is."""

from datetime import timedelta
from typing import Any

from pipelinejob_operator.build.installation import Installation
from pipelinejob_operator.build.opening import Opened
from pipelinejob_operator.build.place import Shape
from pipelinejob_operator.controller.actions import AskRoom, OpenGate, PlaceGang
from pipelinejob_operator.controller.located import Located, locate
from pipelinejob_operator.controller.observed import Refusal, Unplaced
from pipelinejob_operator.placement.fit import Node
from pipelinejob_operator.placement.topology import levels
from pipelinejob_operator.policy.facts import Claim, StagePod
from pipelinejob_operator.policy.reasons import Reason
from tests.unit.operator.builders import (
    INSTALLATION,
    NOW,
    THREE,
    decide,
    gated,
    job,
    kinds,
    message,
    pod,
    running_job,
    seconds,
    told,
)

GATED = tuple(gated(stage) for stage in range(3))
WAITS = Unplaced(Reason.NO_PLAN, "2 of 3 stages fit: gpu is short by 1", NOW + seconds(30), 7)


def noted(stage: int, node: str, why: str = "", **facts: Any) -> StagePod:
    return pod(stage, node=node, opened=Opened(at=NOW, node="" if why else node, why=why), **facts)


class TestWaiting:
    def test_all_pods_of_a_gang_get_their_nodes_in_one_go(self) -> None:
        assert decide(job(), *GATED, plans=True).actions == (PlaceGang(),)

    def test_none_is_placed_before_all_exist(self) -> None:
        assert kinds(decide(job(), *GATED[:2], plans=True)).count("PlaceGang") == 0

    def test_pods_of_a_living_gang_that_wait_behind_their_gate_are_placed_too(self) -> None:
        made = decide(running_job(), pod(0), gated(1), pod(2), plans=True)
        assert made.actions == (PlaceGang(),)

    def test_a_gang_that_finds_no_nodes_says_why_and_is_looked_at_again(self) -> None:
        made = decide(job(), *GATED, plans=True, unplaced=WAITS)
        assert made.actions == ()
        assert told(made)["Placed"] == ("False", "NoPlanFits")
        assert message(made, "Placed") == "2 of 3 stages fit: gpu is short by 1"
        assert made.look_again_at == NOW + seconds(30)
        assert made.status.summary.state == "Pending"

    def test_with_a_claim_for_one_node_the_message_says_what_that_means(self) -> None:
        claim = Claim("saves", frozenset({"ReadWriteOnce"}))
        some = job(checkpoint={"volumeClaimName": "saves"})
        made = decide(some, *GATED, plans=True, unplaced=WAITS, claim=claim)
        assert 'claim "saves" is ReadWriteOnce, so all 3 stages must share one node' in message(made, "Placed")

    def test_delegated_jobs_are_let_go_unplanned(self) -> None:
        made = decide(job(placement={"strategy": "Delegated"}), *GATED, plans=True)
        assert made.actions == tuple(OpenGate(item) for item in GATED)

    def test_an_operator_that_cannot_see_the_nodes_lets_them_go_and_says_so(self) -> None:
        assert decide(job(), *GATED).actions == tuple(OpenGate(item) for item in GATED)
        made = decide(job(), pod(0), pod(1), pod(2))
        assert told(made)["Placed"] == ("True", "AllStagesPlaced")
        assert "the operator is installed for one namespace, so it cannot see the nodes" in message(made, "Placed")

    def test_before_the_first_pod_is_made_it_is_asked_whether_the_nodes_could_hold_them_all(self) -> None:
        for some in (job(), job(recovery={"strategy": "Ladder"})):
            made = decide(some, plans=True, room_unknown=True)
            (asked,) = made.actions
            assert isinstance(asked, AskRoom)
            assert len(asked.manifests) == 3
            assert kinds(decide(some, plans=True)).count("CreatePod") == 3, "the answer was yes"

    def test_what_no_empty_cluster_could_hold_makes_no_pods_and_is_asked_again(self) -> None:
        for some in (job(), job(recovery={"strategy": "Ladder"})):
            made = decide(some, plans=True, hopeless=WAITS)
            assert made.actions == ()
            assert told(made)["Placed"] == ("False", "NoPlanFits")
            assert message(made, "Placed") == WAITS.message
            assert made.look_again_at == WAITS.retry_at

    def test_a_claim_of_one_node_is_named_where_no_node_could_hold_all(self) -> None:
        claim = Claim("saves", frozenset({"ReadWriteOnce"}))
        made = decide(job(checkpoint={"volumeClaimName": "saves"}), plans=True, hopeless=WAITS, claim=claim)
        assert made.actions == ()
        assert 'claim "saves" is ReadWriteOnce, so all 3 stages must share one node' in message(made, "Placed")

    def test_levels_that_no_node_has_make_no_pods(self) -> None:
        words = "spec.placement.topologyLevels: Invalid value: no node has the label rack"
        made = decide(job(), plans=True, unfit_levels=words)
        assert made.actions == ()
        assert told(made)["Placed"] == ("False", "UnfitTopologyLevels")
        assert message(made, "Placed") == words
        assert made.look_again_at == NOW + seconds(60)

    def test_a_refused_gate_of_a_gang_that_is_open_in_part_releases_all_of_it(self) -> None:
        no = Refusal(Reason.POD_REFUSED, "opening pod tiny-s1-a0 was refused", 1, NOW + seconds(4))
        made = decide(job(), noted(0, "n"), gated(1), gated(2), plans=True, refusal=no)
        assert (made.actions, made.status.attempt, made.status.restarts) == ((), 1, 0)
        assert told(made)["Placed"] == ("False", "PodRefused")


class TestProvisioning:
    def test_it_is_shown_with_its_limit_and_looked_at_when_that_is_over(self) -> None:
        waiting = [noted(stage, "", "Provision", scheduled=False, ready=False, membership="") for stage in range(3)]
        made = decide(
            job(placement={"whenInfeasible": "Provision", "provisionTimeoutSeconds": 60}), *waiting, plans=True
        )
        assert told(made)["Placed"] == ("False", "Provisioning")
        assert message(made, "Placed") == (
            "0 of 3 stages have a node; the others wait for nodes to be provisioned, at most 60 s"
        )
        assert made.look_again_at == NOW + seconds(60)

    def test_devices_that_only_the_scheduler_counts_are_left_to_it(self) -> None:
        made = decide(job(), *(noted(stage, "n", "DynamicResources") for stage in range(3)), plans=True)
        assert "a DeviceClass stands behind the devices" in message(made, "Placed")


class TestStatus:
    NODES = tuple(Node(name, {"zone": "z", "rack": rack}, {}) for name, rack in (("n1", "a"), ("n2", "a"), ("n3", "b")))

    def located(self, *pods: StagePod) -> Located:
        gang = {item.place.rank: item for item in pods}
        return locate(job(), THREE, gang, self.NODES, levels(["zone", "rack"]))

    def test_it_shows_domains_and_crossings(self) -> None:
        pods = [noted(0, "n1"), noted(1, "n2"), noted(2, "n3")]
        made = decide(job(), *pods, plans=True, located=self.located(*pods))
        shown = made.status.placement
        assert shown.strategy == "Planned"
        assert [(item.level, item.count) for item in shown.crossings] == [
            ("zone", 0),
            ("rack", 1),
            ("kubernetes.io/hostname", 1),
        ]
        assert shown.cost == "10001"
        assert [item.domains for item in made.status.stages] == [["z", "a"], ["z", "a"], ["z", "b"]]
        assert made.status.summary.crossings == "0/1/1"

    def test_links_between_pipelines_count_where_these_talk_to_each_other(self) -> None:
        two = Shape(2, 2)
        names = ["n1", "n2", "n3", "n3"]
        gang = {rank: noted(rank % 2, name, pipeline=rank // 2, shape=two) for rank, name in enumerate(names)}
        serves = job(stages=2, pipelines=2, mode="Serve", serve={}, train=None)
        for some, between, cost in ((job(stages=2, pipelines=2), 2, "20001"), (serves, 0, "1")):
            shown = locate(some, two, gang, self.NODES, levels(["zone", "rack"])).status
            assert [item.count for item in shown.crossings] == [0, 0, 1]
            assert sum(item.between_pipelines for item in shown.crossings) == between
            assert shown.cost == cost

    def test_it_tells_plans_from_luck(self) -> None:
        planned, chosen = noted(0, "n1"), noted(1, "n2", "Provision")
        assert self.located(planned, noted(1, "n2"), noted(2, "n3")).status.strategy == "Planned"
        assert self.located(planned, chosen, noted(2, "n3")).status.strategy == "PartlyPlanned"
        assert self.located(pod(0, node="n1"), chosen, pod(2, node="n3")).status.strategy == "Unplanned"

    def test_a_stage_without_a_node_has_no_domains(self) -> None:
        pods = [noted(0, "n1"), noted(1, "n2"), noted(2, "n3")]
        first = decide(job(), *pods, plans=True, located=self.located(*pods))
        made = decide(job(first.status), *pods[:2], now=NOW + timedelta(seconds=1), plans=True)
        assert [item.domains for item in made.status.stages] == [["z", "a"], ["z", "a"], []]


def test_an_installation_names_no_levels_unless_it_is_told() -> None:
    assert Installation("worker:1") == Installation("worker:1", topology_levels=())
    assert INSTALLATION.topology_levels == ()
