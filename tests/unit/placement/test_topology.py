"""Levels from labels, and where nodes stand in the tree."""

import pytest

from pipelinejob_operator.placement.fit import Node
from pipelinejob_operator.placement.topology import TopologyError, choose_labels, detect, levels, path

HOST = "kubernetes.io/hostname"
ZONE = "topology.kubernetes.io/zone"


def nodes(*label_sets):
    return [Node(f"n{number}", labels, {}) for number, labels in enumerate(label_sets)]


def test_the_host_is_the_last_level_given_or_not() -> None:
    assert [level.label for level in levels(["zone", "rack"])] == ["zone", "rack", HOST]
    assert levels(["zone", "rack", HOST]) == levels(["zone", "rack"])


def test_by_default_one_crossing_outweighs_all_that_are_possible_below() -> None:
    weights = [level.weight for level in levels(["zone", "rack"])]
    assert weights == [100_000_000, 10_000, 1]


@pytest.mark.parametrize(
    ("labels", "weights", "message"),
    [
        (["rack", "zone", "rack"], [], "Duplicate value: rack; give each level once"),
        ([HOST, "numa"], [], "numa is narrower than a host"),
        (["zone"], [1], "one whole number a level"),
        (["zone"], [1, 2], "none larger than the one before"),
        (["zone"], [1, 0], "the last at least 1"),
        (["zone"], [1 << 128, 1], "Invalid value"),
    ],
)
def test_levels_that_make_no_tree_are_refused(labels, weights, message) -> None:
    with pytest.raises(TopologyError, match=message):
        levels(labels, weights)


def test_a_node_without_a_label_is_a_domain_of_its_own_there() -> None:
    tree = levels(["zone", "rack"])
    one, other = nodes({"rack": "r1"}, {"rack": "r1"})
    assert path(one, tree) == ("(n0)", "r1", "n0")
    assert path(other, tree) == ("(n1)", "r1", "n1")
    assert path(Node("n2", {"zone": "z"}, {}), tree) == ("z", "(n2)", "n2")


def test_the_jobs_levels_come_before_the_installations_and_those_before_what_is_detected() -> None:
    labelled = nodes({"mine": "a", "theirs": "b", ZONE: "z"})
    assert choose_labels(["mine"], ["theirs"], labelled) == ("mine",)
    assert choose_labels([], ["theirs"], labelled) == ("theirs",)
    assert choose_labels([], [], labelled) == (ZONE,)
    assert choose_labels([HOST], ["theirs"], labelled) == (HOST,)


def test_a_level_that_no_node_has_is_refused_with_those_there_are() -> None:
    with pytest.raises(TopologyError, match=rf"topologyLevels: Invalid value: no node has the label rack; .*{ZONE}"):
        choose_labels(["rack"], [], nodes({ZONE: "z"}))


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([], ()),
        ([HOST, "example.com/team"], ()),
        ([ZONE, "topology.kubernetes.io/region"], ("topology.kubernetes.io/region", ZONE)),
        (
            [f"topology.k8s.aws/network-node-layer-{layer}" for layer in (3, 1, 2)] + [ZONE],
            (ZONE, *(f"topology.k8s.aws/network-node-layer-{layer}" for layer in (1, 2, 3))),
        ),
        (
            ["cloud.google.com/gce-topology-host", "cloud.google.com/gce-topology-block"],
            ("cloud.google.com/gce-topology-block", "cloud.google.com/gce-topology-host"),
        ),
        (
            ["oci.oraclecloud.com/rdma.local_block_id", "oci.oraclecloud.com/rdma.hpc_island_id"],
            ("oci.oraclecloud.com/rdma.hpc_island_id", "oci.oraclecloud.com/rdma.local_block_id"),
        ),
        (
            ["accelerator.topograph.run/domain", *(f"fabric.topograph.run/tier-{tier}" for tier in (0, 10, 2))],
            (*(f"fabric.topograph.run/tier-{tier}" for tier in (10, 2, 0)), "accelerator.topograph.run/domain"),
        ),
        (
            [f"network.topology.nvidia.com/{name}" for name in ("accelerator", "leaf", "spine")],
            tuple(f"network.topology.nvidia.com/{name}" for name in ("spine", "leaf", "accelerator")),
        ),
    ],
)
def test_known_labels_are_levels_from_the_widest_to_the_narrowest(labels, found) -> None:
    assert detect(nodes(dict.fromkeys(labels, "x"))) == found


def test_of_two_fabrics_the_one_that_most_nodes_have_counts() -> None:
    google, oracle = "cloud.google.com/gce-topology-block", "oci.oraclecloud.com/rdma.network_block_id"
    assert detect(nodes({google: "a"}, {oracle: "b"}, {oracle: "c"})) == (oracle,)
