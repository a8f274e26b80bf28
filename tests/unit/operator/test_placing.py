"""Whose turn it is, what they get, and what is kept for who waits."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pipelinejob_operator.build.place import Shape
from pipelinejob_operator.controller import placing
from pipelinejob_operator.controller.placing import Cluster, Decision, Outcome, Request, decide, hopeless, solve
from pipelinejob_operator.placement.fit import Demand, Node
from pipelinejob_operator.placement.planner import Infeasible, Plan
from pipelinejob_operator.placement.topology import levels

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def node(name: str, gpus: int, rack: str = "") -> Node:
    return Node(name, {"rack": rack} if rack else {}, {"gpu": gpus, "pods": 110})


def asks(job: str, stages: int, minute: int = 0, gpus: int = 1, **members: Any) -> Request:
    """A gang of a job that was made ``minute`` minutes past noon."""
    given: dict[str, Any] = {
        "shape": Shape(stages),
        "demands": (Demand((("gpu", gpus), ("pods", 1))),) * stages,
        "created": NOON + timedelta(minutes=minute),
        "levels": levels(["rack"]),
    }
    return Request(job=job, uid=job, **(given | members))


def cluster(*nodes: Node, **held: int) -> Cluster:
    """Nodes, and how many GPUs stage pods hold of each."""
    return Cluster(nodes, {name: {"gpu": count, "pods": count} for name, count in held.items()})


def turn(mine: Request, *waiting: Request, of: Cluster, known: dict[str, Outcome] | None = None) -> Decision:
    ahead = sorted((other for other in waiting if other.turn < mine.turn), key=lambda other: other.turn)
    return decide(mine, ahead, known or {}, of)


def nodes_of(decision: Decision) -> list[str]:
    assert isinstance(decision.mine.plan, Plan), decision.mine.plan
    return list(decision.mine.plan.nodes)


def why_not(decision: Decision) -> str:
    assert isinstance(decision.mine.plan, Infeasible), decision.mine.plan
    return decision.mine.plan.message


class TestTurns:
    def test_first_who_runs_and_lacks_a_stage_then_priority_then_age_then_name(self) -> None:
        lacking = asks("z", 2, 9, keep={0: "n"})
        urgent = asks("y", 2, 9, priority=1)
        old, young, twin = asks("b", 2, 0), asks("a", 2, 1), asks("c", 2, 0)
        low = asks("a", 2, 0, priority=-1)
        order = sorted([low, young, twin, old, urgent, lacking], key=lambda request: request.turn)
        assert order == [lacking, urgent, old, twin, young, low]

    def test_a_chain_is_laid_with_the_fewest_crossings(self) -> None:
        racks = cluster(node("n1", 2, "a"), node("n2", 2, "b"), node("n3", 2, "a"), node("n4", 2, "b"))
        assert nodes_of(turn(asks("job", 4), of=racks)) == ["n1", "n1", "n3", "n3"]

    def test_who_is_ahead_and_fits_has_its_nodes_already(self) -> None:
        made = turn(asks("young", 2, 1), asks("old", 2), of=cluster(node("n1", 2), node("n2", 2)))
        assert nodes_of(made) == ["n2", "n2"]
        assert isinstance(made.ahead["old"].plan, Plan)

    def test_of_two_that_want_everything_the_second_gets_nothing(self) -> None:
        made = turn(asks("second", 4, 1), asks("first", 4), of=cluster(node("n1", 2), node("n2", 2)))
        assert "0 of 4 stages fit" in why_not(made)

    def test_who_is_behind_takes_nothing_from_who_is_ahead(self) -> None:
        assert nodes_of(turn(asks("old", 4), asks("young", 4, 1), of=cluster(node("n1", 4))))


class TestReservation:
    """The large job waits for running ones to end; small ones must not take what they give back."""

    BUSY = cluster(node("n1", 1), node("n2", 0), n1=1, n2=2)

    def test_a_small_job_does_not_overtake_a_large_one_on_the_nodes_it_will_get(self) -> None:
        made = turn(asks("small", 1, 1), asks("large", 4), of=self.BUSY)
        assert made.behind == "large"
        assert made.ahead["large"].reserved == ("n1", "n1", "n2", "n2")

    def test_it_does_so_with_what_the_large_one_does_not_need(self) -> None:
        roomy = cluster(node("n1", 1), node("n2", 0), node("n3", 1), n1=1, n2=2)
        assert nodes_of(turn(asks("small", 1, 1), asks("large", 4), of=roomy)) == ["n3"]

    def test_nothing_is_reserved_for_what_the_cluster_cannot_hold(self) -> None:
        assert nodes_of(turn(asks("small", 1, 1), asks("huge", 5), of=self.BUSY)) == ["n1"]

    def test_the_first_that_waits_has_a_reservation_and_no_other(self) -> None:
        roomy = cluster(node("n1", 1), node("n2", 0), node("n3", 1), n1=1, n2=2)
        made = turn(asks("small", 1, 2), asks("large", 4), asks("next", 5, 1), of=roomy)
        assert nodes_of(made) == ["n3"]
        assert made.ahead["next"].reserved == ()

    def test_the_large_one_gets_its_nodes_when_the_last_of_them_is_free(self) -> None:
        assert nodes_of(turn(asks("large", 4), asks("small", 1, 1), of=cluster(node("n1", 2), node("n2", 2))))

    def test_a_higher_priority_goes_first_however_young(self) -> None:
        assert nodes_of(turn(asks("urgent", 1, 9, priority=10), asks("large", 4), of=self.BUSY)) == ["n1"]

    def test_who_would_not_fit_anyway_is_not_told_of_a_reservation(self) -> None:
        made = turn(asks("large too", 3, 1), asks("large", 4), of=self.BUSY)
        assert made.behind == ""
        assert "of 3 stages fit" in why_not(made)

    def test_a_reservation_stays_where_it_was_while_that_is_as_cheap(self) -> None:
        equal = cluster(node("n1", 0), node("n2", 0), node("n3", 0), n1=2, n2=2, n3=2)
        known = {"large": Outcome(Infeasible("", 0), ("n3", "n3"))}
        made = turn(asks("small", 1, 1), asks("large", 2), of=equal, known=known)
        assert made.ahead["large"].reserved == ("n3", "n3")

    def test_of_many_alike_only_one_is_planned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Fifty that wait would else be planned fifty times whenever something becomes free."""
        planned: list[str] = []

        def counted(request: Request, nodes: Sequence[Node]) -> Plan | Infeasible:
            planned.append(request.job)
            return solve(request, nodes)

        monkeypatch.setattr(placing, "solve", counted)
        many = [asks(f"job-{number}", 4, number) for number in range(50)]
        made = turn(many[-1], *many[:-1], of=self.BUSY)
        assert planned[:2] == ["job-0", "job-0"], "what is free, and for its reservation the emptied cluster"
        assert set(planned[2:]) <= {"job-49"}, "then only whether the reservation is what stands in the way"
        assert "of 4 stages fit" in why_not(made)

    def test_who_is_known_to_find_nothing_is_not_planned_again(self) -> None:
        """It would fit, so the second look is what would show."""
        known = {"large": Outcome(Infeasible("", 0))}
        made = turn(asks("small", 1, 1), asks("large", 2), of=cluster(node("n1", 2)), known=known)
        assert made.ahead["large"].plan == Infeasible("", 0)


class TestReplacement:
    def test_a_lost_stage_comes_back_beside_its_neighbours(self) -> None:
        racks = cluster(node("a1", 0, "a"), node("b1", 1, "b"), node("a2", 1, "a"), a1=1)
        made = turn(asks("job", 3, keep={0: "a1", 2: "a1"}), of=racks)
        assert nodes_of(made) == ["a1", "a2", "a1"]

    def test_it_goes_before_jobs_that_have_not_begun(self) -> None:
        lacking = asks("lacking", 2, 9, keep={0: "n1"})
        assert nodes_of(turn(lacking, asks("older", 2), of=cluster(node("n1", 0), node("n2", 2), n1=1))) == ["n1", "n2"]


class TestReplicas:
    """Two pipelines of two stages; each rack has a place on two hosts."""

    RACKS = (node("a1", 1, "a"), node("a2", 1, "a"), node("b1", 1, "b"), node("b2", 1, "b"))

    @pytest.mark.parametrize(
        ("rings", "cost", "between"),
        [(True, 2 * 1 + 2 * 10_000, 2), (False, 2 * 1, 0)],
        ids=["that train exchange gradients", "that serve do not know of each other"],
    )
    def test_are_priced_by_the_links_that_they_have(self, rings: bool, cost: int, between: int) -> None:
        found = solve(asks("tiny", 4, shape=Shape(2, 2), rings=rings), self.RACKS)
        assert isinstance(found, Plan)
        assert (found.cost, found.least) == (cost, cost)
        assert sum(item.ring for item in found.crossings) == between


class TestHopeless:
    """What the nodes could not hold even if nothing else ran."""

    @pytest.mark.parametrize(
        ("request_", "nodes", "words"),
        [
            (asks("fits", 3), [node("a", 2), node("b", 1)], ""),
            (asks("too many", 4), [node("a", 2), node("b", 1)], "3 of 4 stages fit: gpu is short by 1; 2 of 2 nodes"),
            (asks("too large", 1, gpus=3), [node("a", 2), node("b", 2)], "0 of 1 stages fit: gpu is short by 3"),
            (asks("nowhere", 1), [], "0 of 0 nodes are eligible"),
            (asks("in one rack", 2, required_level="rack"), [node("a", 1, "r"), node("b", 1, "r")], ""),
            (asks("in no rack", 2, required_level="rack"), [node("a", 1, "r"), node("b", 1, "s")], "no rack takes all"),
            (
                asks("unselected", 1, demands=(Demand((("gpu", 1),), node_selector=(("pool", "x"),)),)),
                [node("a", 1)],
                "(1 not selected by nodeSelector); change the nodes, or the pod's tolerations and selectors",
            ),
        ],
        ids=lambda value: value.job if isinstance(value, Request) else "",
    )
    def test_says_what_is_missing_and_that_waiting_does_not_help(
        self, request_: Request, nodes: list[Node], words: str
    ) -> None:
        found = hopeless(request_, nodes)
        assert bool(found) == bool(words)
        assert words in found
        assert not found or found.endswith("so no pod is made before nodes are added or changed")
