"""What pods take of nodes, and which nodes they may run on: the rules of kube-scheduler."""

from fractions import Fraction

import pytest

from pipelinejob_operator.placement.fit import demand
from pipelinejob_operator.placement.pods import node_of, requests
from pipelinejob_operator.placement.quantity import amount, text
from pipelinejob_operator.placement.topology import read_nodes

GI = 1024**3


def container(name="c", limits=None, ports=None, restart=None, **asked):
    found = {"name": name, "resources": {"requests": asked, "limits": limits or {}}, "ports": ports or []}
    return found | ({"restartPolicy": restart} if restart else {})


def pod(*containers, status=None, **spec):
    return {"spec": {"containers": list(containers), **spec}, "status": status or {}}


def node(name="n", labels=None, taints=(), unschedulable=False, deleting=False, **allocatable):
    metadata = {"name": name, "labels": labels or {}} | (
        {"deletionTimestamp": "2026-01-01T00:00:00Z"} if deleting else {}
    )
    spec = {"taints": list(taints)} | ({"unschedulable": True} if unschedulable else {})
    return {"metadata": metadata, "spec": spec, "status": {"allocatable": {"pods": "110", **allocatable}}}


def affinity(*terms):
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": list(terms)}}}


def expression(key, operator, *values):
    return {"key": key, "operator": operator, "values": list(values)}


@pytest.mark.parametrize(
    ("resource", "quantity", "units"),
    [
        ("cpu", "250m", 250),
        ("cpu", "1.5", 1500),
        ("cpu", 2, 2000),
        ("cpu", "100u", 1),
        ("memory", "1Gi", GI),
        ("memory", "128974848", 128974848),
        ("memory", "129e6", 129_000_000),
        ("memory", "1.5G", 1_500_000_000),
        ("memory", "400m", 1),
        ("nvidia.com/gpu", "8", 8),
        ("memory", "1E", 10**18),
        ("memory", "1E3", 1000),
        ("memory", ".5Ki", 512),
    ],
)
def test_quantities_are_whole_numbers_rounded_up(resource, quantity, units) -> None:
    assert amount(resource, quantity) == units


@pytest.mark.parametrize("quantity", ["", "one", "1 Gi", "1gi", "0x1", "1e", "--1", "1e9999"])
def test_what_is_no_quantity_is_refused_with_its_name(quantity) -> None:
    with pytest.raises(ValueError, match=r"memory: Invalid value: .* is no quantity; allowed: for instance"):
        amount("memory", quantity)


@pytest.mark.parametrize(
    ("resource", "count", "words"),
    [
        ("cpu", 1500, "1500m"),
        ("cpu", 3000, "3"),
        ("gpu", 3, "3"),
        ("memory", 64 * GI, "64Gi"),
        ("memory", 20 * 1024**2, "20Mi"),
    ],
)
def test_amounts_are_written_as_people_write_them(resource, count, words) -> None:
    assert text(resource, count) == words
    assert amount(resource, words) == Fraction(count)


def test_a_pod_takes_the_sum_of_its_containers_and_one_place() -> None:
    assert requests(pod(container(cpu="1", gpu="2"), container(cpu="500m"))) == {"cpu": 1500, "gpu": 2, "pods": 1}


def test_a_limit_stands_in_for_a_request_that_is_not_there() -> None:
    assert requests(pod(container(cpu="1", limits={"cpu": "2", "gpu": "1"}))) == {"cpu": 1000, "gpu": 1, "pods": 1}


def test_the_largest_init_container_counts_if_it_needs_more_than_all_that_run_after_it() -> None:
    init = [container(cpu="3"), container(cpu="2", gpu="1")]
    assert requests(pod(container(cpu="1"), initContainers=init)) == {"cpu": 3000, "gpu": 1, "pods": 1}


def test_sidecars_run_on_and_count_beside_the_init_containers_after_them_only() -> None:
    sidecar = container(cpu="1", restart="Always")
    before, after = container(cpu="4"), container(cpu="3500m")
    assert requests(pod(container(cpu="2"), initContainers=[sidecar]))["cpu"] == 3000
    assert requests(pod(container(cpu="2"), initContainers=[before, sidecar]))["cpu"] == 4000
    assert requests(pod(container(cpu="2"), initContainers=[sidecar, after]))["cpu"] == 4500


def test_overhead_is_added_and_resources_of_the_whole_pod_replace_those_of_its_containers() -> None:
    whole = {"requests": {"cpu": "1", "hugepages-2Mi": "4Mi"}, "limits": {"memory": "2Gi"}}
    found = requests(pod(container(cpu="3", gpu="1"), resources=whole, overhead={"cpu": "250m", "memory": "1Gi"}))
    assert found == {"cpu": 1250, "gpu": 1, "hugepages-2Mi": 4 * 1024**2, "memory": 3 * GI, "pods": 1}


@pytest.mark.parametrize(
    ("allocated", "used", "conditions", "cpu"),
    [
        ("1", "1", [], 2000),  # grows: the new request is reserved before it is given
        ("3", "3", [], 3000),  # shrinks: the old one is held until it is given back
        ("1", "4", [], 4000),
        ("1", "1", [{"type": "PodResizePending", "reason": "Infeasible"}], 1000),
        ("1", "1", [{"type": "PodResizePending", "reason": "Deferred"}], 2000),
    ],
)
def test_a_pod_that_is_resized_takes_the_most_of_what_it_asks_has_and_uses(allocated, used, conditions, cpu) -> None:
    state = {"name": "c", "allocatedResources": {"cpu": allocated}, "resources": {"requests": {"cpu": used}}}
    status = {"containerStatuses": [state], "conditions": conditions}
    assert requests(pod(container(cpu="2"), status=status))["cpu"] == cpu


def test_host_ports_are_taken_once_a_node() -> None:
    web = pod(container(ports=[{"containerPort": 80, "hostPort": 8080}, {"containerPort": 81}]), nodeName="n")
    other = pod(container(ports=[{"containerPort": 53, "protocol": "UDP"}]), hostNetwork=True)
    assert requests(web) == {"hostPort/TCP/8080": 1, "pods": 1}
    assert requests(other) == {"hostPort/UDP/53": 1, "pods": 1}
    (busy,), (idle,) = read_nodes([node()], [web]), read_nodes([node()], [])
    assert demand(web).room(busy.free) == 0
    assert demand(web).room(idle.free) == 1
    assert demand(other).room(busy.free) == 1


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (pod(nodeName="bound"), "bound"),
        (pod(status={"nominatedNodeName": "nominated"}), "nominated"),
        (pod(affinity=affinity({"matchFields": [expression("metadata.name", "In", "pinned")]})), "pinned"),
        (pod(affinity=affinity({"matchFields": [expression("metadata.name", "In", "a", "b")]})), None),
        (pod(affinity=affinity(*({"matchFields": [expression("metadata.name", "In", name)]} for name in "ab"))), None),
        (pod(affinity=affinity({"matchExpressions": [expression("zone", "In", "a")]})), None),
        (pod(), None),
    ],
)
def test_a_pod_holds_room_on_the_node_it_is_bound_nominated_or_pinned_to(found, name) -> None:
    assert node_of(found) == name


def test_free_is_allocatable_less_all_pods_that_have_not_ended() -> None:
    here = {"nodeName": "n"}
    pods = [
        pod(container(cpu="1", gpu="1"), **here),
        pod(container(cpu="2"), status={"nominatedNodeName": "n"}),
        pod(container(gpu="1"), affinity=affinity({"matchFields": [expression("metadata.name", "In", "n")]})),
        {**pod(container(cpu="4"), **here), "metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}},
        pod(container(cpu="50"), status={"phase": "Succeeded"}, **here),
        pod(container(cpu="50"), status={"phase": "Failed"}, **here),
        pod(container(cpu="50"), nodeName="another"),
        pod(container(cpu="50")),
    ]
    (found,) = read_nodes([node(cpu="16", gpu="4", memory="1Gi")], pods)
    assert found.free == {"cpu": 9000, "gpu": 2, "memory": GI, "pods": 106}


def test_pods_that_are_about_to_move_give_their_room_back() -> None:
    pods = [{**pod(container(cpu="1"), nodeName="n"), "metadata": {"name": name}} for name in ("mine", "theirs")]
    (found,) = read_nodes([node(cpu="4")], pods, counts=lambda item: item["metadata"]["name"] != "mine")
    assert found.free["cpu"] == 3000


@pytest.mark.parametrize(
    ("toleration", "tolerated"),
    [
        (None, False),
        ({"key": "team", "operator": "Equal", "value": "ml", "effect": "NoSchedule"}, True),
        ({"key": "team", "value": "ml"}, True),
        ({"key": "team", "value": "web"}, False),
        ({"key": "team", "operator": "Exists"}, True),
        ({"key": "team", "operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "other", "operator": "Exists"}, False),
        ({"operator": "Exists"}, True),
        ({"key": "team", "operator": "Lt", "value": "ml"}, False),
    ],
)
def test_a_taint_keeps_away_what_does_not_tolerate_it(toleration, tolerated) -> None:
    (found,) = read_nodes([node(taints=[{"key": "team", "value": "ml", "effect": "NoSchedule"}])], [])
    asked = demand(pod(container(), tolerations=[toleration] if toleration else []))
    assert asked.refusal(found) == (None if tolerated else "tainted team=ml:NoSchedule")


def test_a_taint_that_only_discourages_keeps_nothing_away() -> None:
    (found,) = read_nodes([node(taints=[{"key": "slow", "effect": "PreferNoSchedule"}])], [])
    assert demand(pod(container())).refusal(found) is None


def test_a_cordoned_node_takes_only_pods_that_tolerate_it_and_a_leaving_one_none() -> None:
    cordoned, leaving = read_nodes([node("a", unschedulable=True), node("b", deleting=True)], [])
    everywhere = demand(pod(container(), tolerations=[{"operator": "Exists"}]))
    assert demand(pod(container())).refusal(cordoned) == "cordoned"
    assert everywhere.refusal(cordoned) is None
    assert everywhere.refusal(leaving) == "being deleted"


@pytest.mark.parametrize(
    ("requirement", "matches"),
    [
        (expression("rack", "In", "r1", "r2"), True),
        (expression("rack", "In", "r2"), False),
        (expression("none", "In", "r2"), False),
        (expression("rack", "NotIn", "r2"), True),
        (expression("rack", "NotIn", "r1"), False),
        (expression("none", "NotIn", "r1"), True),
        (expression("rack", "Exists"), True),
        (expression("none", "Exists"), False),
        (expression("none", "DoesNotExist"), True),
        (expression("rack", "DoesNotExist"), False),
        (expression("gpus", "Gt", "7"), True),
        (expression("gpus", "Gt", "8"), False),
        (expression("gpus", "Lt", "9"), True),
        (expression("gpus", "Lt", "8"), False),
        (expression("rack", "Gt", "0"), False),
        (expression("none", "Lt", "9"), False),
    ],
)
def test_node_affinity_has_all_operators(requirement, matches) -> None:
    (found,) = read_nodes([node(labels={"rack": "r1", "gpus": "8"})], [])
    asked = demand(pod(container(), affinity=affinity({"matchExpressions": [requirement]})))
    assert (asked.refusal(found) is None) == matches


def test_terms_are_alternatives_and_the_parts_of_a_term_are_not() -> None:
    (found,) = read_nodes([node("n", labels={"a": "1"})], [])
    yes, no = expression("a", "In", "1"), expression("a", "In", "2")
    name, another = expression("metadata.name", "In", "n"), expression("metadata.name", "NotIn", "n")

    def allowed(*terms) -> bool:
        return demand(pod(container(), affinity=affinity(*terms))).refusal(found) is None

    assert allowed({"matchExpressions": [no]}, {"matchExpressions": [yes]})
    assert not allowed({"matchExpressions": [no, yes]})
    assert allowed({"matchExpressions": [yes], "matchFields": [name]})
    assert not allowed({"matchExpressions": [yes], "matchFields": [another]})
    assert not allowed({})
    assert not allowed()


def test_node_selector_affinity_and_the_volumes_must_all_agree() -> None:
    (found,) = read_nodes([node(labels={"a": "1", "zone": "z"})], [])
    here = {"nodeSelectorTerms": [{"matchExpressions": [expression("zone", "In", "z")]}]}
    there = {"nodeSelectorTerms": [{"matchExpressions": [expression("zone", "In", "y")]}]}
    assert demand(pod(container(), nodeSelector={"a": "1"}), [here]).refusal(found) is None
    assert demand(pod(container(), nodeSelector={"a": "2"}), [here]).refusal(found) == "not selected by nodeSelector"
    assert demand(pod(container()), [here, there]).refusal(found) == "not selected by node affinity"


def test_an_operator_that_kubernetes_does_not_have_is_named() -> None:
    (found,) = read_nodes([node()], [])
    asked = demand(pod(container(), affinity=affinity({"matchExpressions": [expression("a", "Near", "b")]})))
    with pytest.raises(ValueError, match=r"operator 'Near' of a; allowed: In, NotIn"):
        asked.refusal(found)


def test_stages_are_equal_if_their_pods_ask_for_the_same() -> None:
    one, other = pod(container(cpu="1")), pod(container("other", cpu="1000m"))
    assert demand(one) == demand(other)
    assert demand(one) != demand(pod(container(cpu="1"), nodeSelector={"a": "1"}))
