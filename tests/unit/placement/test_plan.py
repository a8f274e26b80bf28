"""What a plan says, and why there is none."""

from random import Random

import pytest

from pipelinejob_operator.placement.fit import UNSCHEDULABLE, Demand, Node, Taint
from pipelinejob_operator.placement.links import Crossings, Shape
from pipelinejob_operator.placement.planner import Infeasible, Plan, plan
from pipelinejob_operator.placement.render import draw
from pipelinejob_operator.placement.topology import TopologyError, levels
from tests.unit.placement.trees import SMALL, random_cluster

HOST = "kubernetes.io/hostname"
LEVELS = levels(["zone", "rack"])


def host(name: str, gpus: int, **more) -> Node:
    """A host named zone-rack-number."""
    zone, rack, _ = name.split("-")
    return Node(name, {"zone": zone, "rack": f"{zone}-{rack}"}, {"gpu": gpus, "pods": 110, "cpu": 8000}, **more)


def hosts(**gpus: int) -> list[Node]:
    return [host(name.replace("_", "-"), count) for name, count in gpus.items()]


def planned(nodes, stages, **options) -> Plan:
    found = plan(nodes, LEVELS, [SMALL] * stages, **options)
    assert isinstance(found, Plan)
    return found


def refused(nodes, demands, **options) -> Infeasible:
    found = plan(nodes, LEVELS, demands, **options)
    assert isinstance(found, Infeasible)
    return found


def test_a_plan_counts_its_crossings_and_says_that_none_is_cheaper() -> None:
    found = planned(hosts(a_1_1=2, a_1_2=1, a_2_1=2, b_1_1=4), 5)
    assert found.nodes == ("a-1-1", "a-1-1", "a-1-2", "a-2-1", "a-2-1")
    assert found.crossings == (Crossings("zone", 0, 0), Crossings("rack", 1, 0), Crossings(HOST, 1, 0))
    assert found.cost == found.least == 10_001
    assert found.message == (
        "5 stages on 3 nodes; links that cross zone 0, rack 1, kubernetes.io/hostname 1; no plan costs less"
    )


def test_given_weights_decide_what_is_near() -> None:
    nodes = hosts(a_1_1=1, a_1_2=1, a_1_3=1, a_1_4=1, b_1_1=2, b_2_1=2)
    assert len(set(planned(nodes, 4).nodes)) == 4
    alike = plan(nodes, levels(["zone", "rack"], [2, 2, 2]), [SMALL] * 4)
    assert isinstance(alike, Plan)
    assert set(alike.nodes) == {"b-1-1", "b-2-1"}


def test_among_equal_plans_large_domains_stay_whole_for_others() -> None:
    assert set(planned(hosts(a_1_1=8, a_2_1=2, a_3_1=4), 2).nodes) == {"a-2-1"}
    assert set(planned(hosts(a_1_1=8, a_1_2=8, a_1_3=3, a_1_4=2), 10).nodes) == {"a-1-1", "a-1-4"}


def test_a_plan_is_a_function_of_values_whatever_their_order() -> None:
    random = Random(1)
    for _ in range(100):
        cluster, stages = random_cluster(random), random.randint(1, 6)
        nodes = list(cluster.nodes)
        first = plan(nodes, cluster.levels, [SMALL] * stages)
        random.shuffle(nodes)
        assert plan(nodes, cluster.levels, [SMALL] * stages) == first


def test_equal_stages_of_several_pipelines_are_near_each_other_where_chains_allow_it() -> None:
    found = planned(hosts(a_1_1=4, a_1_2=4), 8, pipelines=2)
    assert found.crossings[-1] == Crossings(HOST, 2, 0)
    assert found.cost == 2
    assert found.message == (
        "8 stages on 2 nodes; links that cross zone 0, rack 0, kubernetes.io/hostname 2; no plan costs less"
    )
    assert planned(hosts(a_1_1=3, a_1_2=3, a_2_1=6), 12, pipelines=4).message == (
        "12 stages on 3 nodes; links of chains+rings that cross zone 0+0, rack 0+6, kubernetes.io/hostname 0+3; "
        "cost 60003, at least 30002"
    )


def test_what_may_stay_stays_and_what_moves_is_told() -> None:
    nodes = hosts(a_1_1=2, a_1_2=2, a_1_3=2, a_1_4=2)
    current = {0: "a-1-4", 1: "a-1-4", 2: "a-1-2", 4: "a-1-1", 5: "a-1-1"}
    found = planned(nodes, 6, current=current)
    assert found.nodes == ("a-1-4", "a-1-4", "a-1-2", "a-1-2", "a-1-1", "a-1-1")
    assert found.moved == ()
    assert "move" not in found.message
    elsewhere = planned(hosts(a_1_1=2, b_1_1=2), 2, current={0: "a-1-1", 1: "b-1-1"})
    assert len(elsewhere.moved) == 1
    assert elsewhere.message.endswith("; 1 stages move")


def test_of_the_cheapest_plans_the_one_that_keeps_most_stages_is_taken() -> None:
    nodes = hosts(a_1_1=2, a_1_2=2, a_2_1=2, a_2_2=2)
    found = planned(nodes, 4, current={0: "a-2-1", 1: "a-2-1", 2: "a-1-1"})
    assert found.nodes == ("a-2-1", "a-2-1", "a-2-2", "a-2-2")
    assert found.moved == (2,)


def test_the_chain_runs_through_its_hosts_in_the_order_of_the_stages_there() -> None:
    nodes = hosts(a_1_1=2, a_1_2=2, a_2_1=2, a_2_2=2, b_1_1=1)
    before = ("a-2-2", "a-2-2", "a-2-1", "a-2-1", "a-1-2", "a-1-2", "a-1-1")
    found = planned(nodes, 8, current={**dict(enumerate(before)), 7: "b-1-1"})
    assert found.nodes == (*before, "a-1-1")
    assert found.moved == (7,)


def test_a_new_host_enters_the_chain_where_most_stages_keep_theirs() -> None:
    nodes = hosts(a_1_1=1, a_1_2=2, a_1_3=1, b_1_1=2)
    found = planned(nodes, 4, current={0: "a-1-1", 1: "b-1-1", 2: "b-1-1", 3: "a-1-3"})
    assert found.nodes == ("a-1-1", "a-1-2", "a-1-2", "a-1-3")


def test_a_node_that_is_gone_or_refuses_holds_nothing() -> None:
    cordoned = host("a-1-1", 4, taints=(Taint(UNSCHEDULABLE, "", "NoSchedule"),))
    found = planned([cordoned, host("a-1-2", 4)], 2, current={0: "a-1-1", 1: "gone"})
    assert found.nodes == ("a-1-2", "a-1-2")
    assert found.moved == ()


def test_a_chain_that_becomes_shorter_forgets_where_its_last_stages_were() -> None:
    nodes = hosts(a_1_1=1, a_1_2=1, a_1_3=1, a_1_4=1)
    found = planned(nodes, 2, current={rank: f"a-1-{rank + 1}" for rank in range(4)})
    assert (found.nodes, found.moved) == (("a-1-1", "a-1-2"), ())


def test_a_lost_stage_is_placed_near_its_neighbours_and_they_stay() -> None:
    nodes = hosts(a_1_1=0, a_1_2=0, a_1_3=1, b_1_1=8)
    found = planned(nodes, 3, keep={0: "a-1-1", 2: "a-1-2"})
    assert found.nodes == ("a-1-1", "a-1-3", "a-1-2")
    assert found.least is None


def test_copies_share_a_host_only_if_preferred_and_there_is_no_other_way() -> None:
    assert planned(hosts(a_1_1=4, a_2_1=4), 4).shared == 3
    assert planned(hosts(a_1_1=4, a_2_1=4), 4, separation="Preferred").nodes == ("a-1-1", "a-2-1", "a-1-1", "a-2-1")
    assert planned(hosts(a_1_1=4), 4, separation="Preferred").shared == 3
    message = refused(hosts(a_1_1=4), [SMALL] * 4, separation="Required").message
    assert message == (
        "4 of 4 stages fit, but not with neighbouring stages on different hosts; free another host, or do not require "
        "it; 1 of 1 nodes are eligible"
    )


def test_too_little_of_a_resource_is_named_with_how_much_is_missing() -> None:
    found = refused(hosts(a_1_1=2, a_1_2=1), [SMALL] * 5)
    assert (found.fits, found.resource) == (3, "gpu")
    assert found.message == "3 of 5 stages fit: gpu is short by 2; 2 of 2 nodes are eligible"


def test_a_resource_that_no_node_has_is_named() -> None:
    demand = Demand((("nvidia.com/gpu", 1), ("pods", 1)))
    found = refused(hosts(a_1_1=2), [demand] * 2)
    assert found.message == "0 of 2 stages fit: nvidia.com/gpu is short by 2; 1 of 1 nodes are eligible"


def test_resources_that_are_free_on_different_nodes_are_told() -> None:
    demand = Demand((("cpu", 4000), ("gpu", 1), ("pods", 1)))
    nodes = [*hosts(a_1_1=0, a_1_2=0), Node("a-1-3", {}, {"gpu": 8, "cpu": 0, "pods": 110})]
    found = refused(nodes, [demand] * 2)
    assert found.resource == ""
    assert "no resource is short by itself, but not enough of all is free on the same nodes" in found.message


def test_the_required_level_says_which_domain_came_closest() -> None:
    found = refused(hosts(a_1_1=2, a_2_1=3, b_1_1=1), [SMALL] * 5, required_level="rack")
    assert (found.domain, found.fits) == ("a-2", 3)
    assert found.message == (
        "3 of 5 stages fit: no rack takes all, a-2 comes closest; gpu is short by 2; 3 of 3 nodes are eligible"
    )
    assert planned(hosts(a_1_1=2, a_2_1=3, b_1_1=1), 5, required_level="zone").cost == 10_000


def test_refused_nodes_are_counted_by_reason() -> None:
    cordon, taint = Taint(UNSCHEDULABLE, "", "NoSchedule"), Taint("team", "web", "NoSchedule")
    nodes = [host("a-1-1", 8, taints=(cordon,)), host("a-1-2", 8, taints=(taint,)), host("a-1-3", 8, taints=(taint,))]
    found = refused(nodes, [SMALL] * 2)
    assert found.message == (
        "0 of 3 nodes are eligible (2 tainted team=web:NoSchedule, 1 cordoned); change the nodes, or the pod's "
        "tolerations and selectors"
    )


def test_the_stage_that_fits_nowhere_is_named() -> None:
    head = Demand((("cpu", 64000), ("gpu", 1), ("pods", 1)))
    found = refused(hosts(a_1_1=2, a_1_2=2), [SMALL, SMALL, head])
    assert found.message.startswith("stage 2: 2 of 3 stages fit: cpu is short by 64; ")


def test_no_nodes_at_all_is_an_answer_too() -> None:
    assert refused([], [SMALL]).message.startswith("0 of 0 nodes are eligible")


def test_stages_that_stay_in_two_domains_of_the_required_level_are_told() -> None:
    nodes = hosts(a_1_1=2, b_1_1=2)
    found = refused(nodes, [SMALL] * 3, required_level="zone", keep={0: "a-1-1", 1: "b-1-1"})
    assert found.message == "the stages that stay are in several domains of the required level zone"


def test_bad_input_names_the_field_and_what_is_allowed() -> None:
    nodes = hosts(a_1_1=2)
    with pytest.raises(TopologyError, match=rf"requiredLevel: Unsupported value: 'row'; allowed: zone, rack, {HOST}"):
        plan(nodes, LEVELS, [SMALL], required_level="row")
    with pytest.raises(ValueError, match="3 demands do not make 2 pipelines"):
        plan(nodes, LEVELS, [SMALL] * 3, pipelines=2)
    with pytest.raises(ValueError, match="rank 1 is to stay on node gone"):
        plan(nodes, LEVELS, [SMALL] * 2, keep={1: "gone"})


def test_the_chain_is_drawn_over_the_tree() -> None:
    nodes = hosts(a_1_1=2, a_1_2=1, a_2_1=2, b_1_1=1)
    assert draw(nodes, LEVELS, planned(nodes, 6).nodes, Shape(6)) == "\n".join(
        [
            "zone > rack > kubernetes.io/hostname",
            "├─ a",
            "│  ├─ a-1",
            "│  │  ├─ a-1-1  stages 0-1",
            "│  │  └─ a-1-2  stages 2",
            "│  └─ a-2",
            "│     └─ a-2-1  stages 3-4",
            "└─ b",
            "   └─ b-1",
            "      └─ b-1-1  stages 5",
            "",
            "a-1-1[0-1] - a-1-2[2] -- a-2-1[3-4] --- b-1-1[5]",
            "",
            "zone                    weight 100000000  crossed 1",
            "rack                    weight 10000  crossed 1",
            "kubernetes.io/hostname  weight 1  crossed 1",
            "cost 100010001",
        ]
    )


def test_pipelines_are_drawn_one_a_line_with_the_rings_between_them() -> None:
    nodes = hosts(a_1_1=2, a_1_2=2)
    drawn = draw(nodes, LEVELS, ["a-1-1", "a-1-2", "a-1-1", "a-1-2"], Shape(2, 2))
    assert "      ├─ a-1-1  stages 0/0, 1/0" in drawn
    assert "pipeline 0: a-1-1[0] - a-1-2[1]\npipeline 1: a-1-1[0] - a-1-2[1]" in drawn
    assert "kubernetes.io/hostname  weight 1  crossed 2  between pipelines 0" in drawn
