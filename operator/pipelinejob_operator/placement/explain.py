"""Why stages cannot be placed: what is missing, and where it came closest. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipelinejob_operator.placement import drafts
from pipelinejob_operator.placement.fit import Demand, Node, available
from pipelinejob_operator.placement.problem import Problem
from pipelinejob_operator.placement.quantity import text
from pipelinejob_operator.placement.topology import Path
from pipelinejob_operator.placement.tree import at_depth, build


@dataclass(frozen=True, slots=True)
class Infeasible:
    """Why there is no plan, in one line.

    ``fits``: how many of the stages that are to be placed were, in the ``domain`` that took most of them (empty: the
    whole cluster). ``resource``: what ran out, or empty if no single resource did.
    """

    message: str
    fits: int
    domain: str = ""
    resource: str = ""


def explain(nodes: Sequence[Node], problem: Problem) -> Infeasible:
    """The reason why ``problem`` has no plan."""
    demand, fewest = _hardest(problem)
    wanted = problem.shape.ranks - len(problem.keep)
    if len({host[: problem.top] for host in problem.keep.values()}) > 1:
        level = problem.levels[problem.top - 1].label
        return Infeasible(f"the stages that stay are in several domains of the required level {level}", 0)
    away = Counter(reason for node in nodes if (reason := demand.refusal(node)) is not None)
    refused = ", ".join(f"{count} {reason}" for reason, count in away.most_common(3))
    eligible = f"{len(nodes) - away.total()} of {len(nodes)} nodes are eligible" + (f" ({refused})" if refused else "")
    stage = "" if problem.equal else f"stage {problem.demands.index(demand) % problem.shape.stages}: "
    if fewest == 0 and away.total() == len(nodes):
        return Infeasible(f"{stage}{eligible}; change the nodes, or the pod's tolerations and selectors", 0)
    domain, fits = _closest(problem)
    resource, short = _shortage(problem, demand, domain, wanted if problem.equal else 1)
    where = ""
    if problem.top:
        level = problem.levels[problem.top - 1].label
        where = f"no {level} takes all; {domain[-1] if domain else 'none'} comes closest; "
    if fits >= wanted:
        reason = "all fit, but not with neighbouring stages on different hosts; free another host, or do not require it"
    elif resource:
        reason = f"{resource} is short by {text(resource, short)}"
    else:
        reason = "no resource is short by itself, but not enough of all is free on the same nodes"
    message = f"{stage}{fits} of {wanted} stages fit: {where}{reason}; {eligible}"
    return Infeasible(message, fits, domain[-1] if domain else "", resource)


def _hardest(problem: Problem) -> tuple[Demand, int]:
    totals = {demand: sum(problem.rooms(demand).values()) for demand in problem.admitted}
    return min(totals.items(), key=lambda item: (item[1], problem.demands.index(item[0])))


def _closest(problem: Problem) -> tuple[Path, int]:
    """The domain that must hold all stages and takes most of them, and how many."""
    domains = {host[: problem.top] for host in problem.keep.values()} or {host[: problem.top] for host in problem.free}
    if problem.equal:
        tree = build(problem.rooms(problem.demands[0]))
        rooms = {domain.path: domain.room for domain in at_depth(tree, problem.top) if domain.path in domains}
    else:
        rooms = {domain: len(drafts.hardest_first(problem, domain, "Off")) for domain in domains}
    return max(rooms.items(), key=lambda item: (item[1], item[0]), default=((), 0))


def _shortage(problem: Problem, demand: Demand, domain: Path, wanted: int) -> tuple[str, int]:
    """The resource of which the eligible hosts of ``domain`` have the least, and how much more is needed."""
    hosts = [problem.free[host] for host in problem.admitted[demand] if host[: len(domain)] == domain]
    room = {name: sum(max(0, available(free, name)) // count for free in hosts) for name, count in demand.requests}
    name = min(room, key=lambda name: (room[name], name))
    missing = wanted - room[name]
    return (name, missing * dict(demand.requests)[name]) if missing > 0 else ("", 0)
