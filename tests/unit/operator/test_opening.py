"""Opening a gate: one patch that pins the pod, in the only ways in which the API server lets a gated pod change."""

from datetime import UTC, datetime
from typing import Any

import pytest

from pipelinejob_operator.build.opening import Opened, opening, pinned
from pipelinejob_operator.placement.pods import node_of

AT = datetime(2026, 1, 1, 12, tzinfo=UTC)
NODE = {"key": "metadata.name", "operator": "In", "values": ["node-2"]}
GPU = {"key": "gpu", "operator": "Exists"}
RACK = {"key": "rack", "operator": "In", "values": ["a"]}
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


def pod(**spec: Any) -> dict[str, Any]:
    gates = [{"name": "team/quota"}, {"name": "pipelinejob.dev/gang"}]
    return {"metadata": {"name": "tiny-s0-a0", "uid": "u"}, "spec": {"schedulingGates": gates, **spec}}


def affinity(*terms: dict[str, Any]) -> dict[str, Any]:
    return {"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": list(terms)}}}


def test_the_gate_that_is_removed_is_ours_and_the_pod_is_the_one_that_was_seen() -> None:
    made = opening(pod(), Opened(at=AT, node="node-2"))
    assert made.name == "tiny-s0-a0"
    assert made.operations == (
        {"op": "test", "path": "/metadata/uid", "value": "u"},
        {"op": "test", "path": "/spec/schedulingGates/1/name", "value": "pipelinejob.dev/gang"},
        {
            "op": "add",
            "path": "/metadata/annotations/pipelinejob.dev~1opened",
            "value": '{"at":"2026-01-01T12:00:00Z","node":"node-2"}',
        },
        {"op": "add", "path": "/spec/affinity", "value": affinity({"matchFields": [NODE]})},
        {"op": "remove", "path": "/spec/schedulingGates/1"},
    )


def test_a_pod_that_is_not_planned_is_not_pinned() -> None:
    made = opening(pod(), Opened(at=AT, why="Provision"))
    assert [item["path"] for item in made.operations if item["op"] == "add"] == [
        "/metadata/annotations/pipelinejob.dev~1opened"
    ]


@pytest.mark.parametrize(
    ("given", "terms"),
    [
        ({}, [{"matchFields": [NODE]}]),
        (affinity({"matchExpressions": [GPU]}), [{"matchExpressions": [GPU], "matchFields": [NODE]}]),
        (
            affinity({"matchExpressions": [GPU]}, {"matchExpressions": [RACK]}),
            [{"matchExpressions": [GPU], "matchFields": [NODE]}, {"matchExpressions": [RACK], "matchFields": [NODE]}],
        ),
        (affinity({"matchFields": [NODE]}), [{"matchFields": [NODE, NODE]}]),
        # A term without requirements matches no node; the API server lets nothing be added to it.
        (affinity({}, {"matchExpressions": [GPU]}), [{}, {"matchExpressions": [GPU], "matchFields": [NODE]}]),
    ],
)
def test_each_of_the_users_terms_grows_narrower(given: dict[str, Any], terms: list[dict[str, Any]]) -> None:
    made = pinned(given, "node-2")
    assert made["nodeAffinity"][REQUIRED]["nodeSelectorTerms"] == terms
    assert node_of({"spec": {"affinity": made}}) == "node-2", "a pinned pod holds room before it is bound"


def test_all_else_of_the_users_affinity_stays() -> None:
    given = {
        "podAffinity": {"x": "y"},
        "nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": ["z"]},
    }
    made = pinned(given, "node-2")
    assert made["podAffinity"] == {"x": "y"}
    assert made["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"] == ["z"]


@pytest.mark.parametrize("text", [None, "", "no json", "[]", '{"node":"n"}', '{"at":"soon"}'])
def test_a_note_that_is_not_there_or_spoilt_says_nothing(text: str | None) -> None:
    assert Opened.read(text) is None


def test_a_note_is_read_as_it_was_written() -> None:
    note = Opened(at=AT, node="node-1")
    assert Opened.read(note.model_dump_json(exclude_defaults=True)) == note
