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
    level = problem.levels[problem.top - 1].label if problem.top else ""
    if len({host[: problem.top] for host in problem.keep.values()}) > 1:
        return Infeasible(f"the stages that stay are in several domains of the required level {level}", 0)
    wanted = problem.shape.ranks - len(problem.keep)
    domain, fits, demand = _closest(problem, wanted)
    refused = Counter(reason for node in nodes if (reason := demand.refusal(node)) is not None)
    eligible = f"{len(nodes) - refused.total()} of {len(nodes)} nodes are eligible"
    if refused:
        eligible += f" ({', '.join(f'{count} {reason}' for reason, count in refused.most_common(3))})"
    stage = "" if problem.equal else f"stage {problem.demands.index(demand) % problem.shape.stages}: "
    if refused.total() == len(nodes):
        return Infeasible(f"{stage}{eligible}; change the nodes, or the pod's tolerations and selectors", 0)
    counted = f"{stage}{fits} of {wanted} stages fit"
    if fits == wanted:
        reason = ", but not with neighbouring stages on different hosts; free another host, or do not require it"
        return Infeasible(f"{counted}{reason}; {eligible}", fits)
    resource, short = _shortage(problem, demand, domain, wanted if problem.equal else 1)
    where = f"no {level} takes all, {domain[-1]} comes closest; " if domain else ""
    reason = f"{resource} is short by {text(resource, short)}"
    if not resource:
        reason = "no resource is short by itself, but not enough of all is free on the same nodes"
    name = domain[-1] if domain else ""
    return Infeasible(f"{counted}: {where}{reason}; {eligible}", fits, name, resource)


def _closest(problem: Problem, wanted: int) -> tuple[Path, int, Demand]:
    """The domain, of those that must hold all stages, that takes most; how many; and the demand that finds no place."""
    domains = sorted({host[: problem.top] for host in problem.keep.values() or problem.free} or {()})
    # Unequal stages: where most would fit if all were as small as the smallest.
    tree = build(problem.rooms_if_all(min))
    rooms = {item.path: item.room for item in at_depth(tree, problem.top)}
    domain = max(domains, key=lambda item: rooms.get(item, 0))
    if problem.equal:
        return domain, min(rooms.get(domain, 0), wanted), problem.demands[0]
    placed = drafts.hardest_first(problem, domain, problem.separation)
    left = [rank for rank in drafts.by_places(problem, domain) if rank not in placed]
    return domain, wanted - len(left), problem.demands[left[0]]


def _shortage(problem: Problem, demand: Demand, domain: Path, wanted: int) -> tuple[str, int]:
    """The resource of which the eligible hosts of ``domain`` have the least, and how much more is needed."""
    hosts = [problem.free[host] for host in problem.admitted[demand] if host[: len(domain)] == domain]
    room = {name: sum(max(0, available(free, name)) // count for free in hosts) for name, count in demand.requests}
    name = min(room, key=lambda name: (room[name], name))
    missing = wanted - room[name]
    return (name, missing * dict(demand.requests)[name]) if missing > 0 else ("", 0)
