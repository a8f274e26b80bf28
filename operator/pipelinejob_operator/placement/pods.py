"""What a pod takes of a node, and of which node. Pure.

The rules are kube-scheduler's: KEP-753 for init containers and sidecars, KEP-2837 for resources of the whole pod,
KEP-1287 for pods that are resized in place, KEP-688 for the overhead of a runtime class.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pipelinejob_operator.placement.quantity import amount

PODS = "pods"
PORT_PREFIX = "hostPort/"
"""A port of the host is counted as a resource of which each node has one."""

Manifest = Mapping[str, Any]
Amounts = Mapping[str, int]

_WHOLE_POD = ("cpu", "memory")
_HUGE_PAGES = "hugepages-"
_NAME_FIELD = "metadata.name"


def requests(pod: Manifest) -> dict[str, int]:
    """What ``pod`` takes of its node, one of ``pods`` and its host ports included.

    A resource with a limit and no request asks for its limit, as the API server would have written it. A port takes
    its number on all of the host's addresses, which refuses more than the scheduler would.
    """
    spec, status = pod.get("spec") or {}, pod.get("status") or {}
    total = _aggregate(spec, _asked)
    states = {item["name"]: item for key in _STATUSES for item in status.get(key) or []}
    if any("allocatedResources" in item or "resources" in item for item in states.values()):
        infeasible = any(
            item.get("type") == "PodResizePending" and item.get("reason") == "Infeasible"
            for item in status.get("conditions") or []
        )
        given = _aggregate(spec, lambda container: _allocated(container, states, infeasible))
        used = _aggregate(spec, lambda container: _actuated(container, states, infeasible))
        total = _most(given, used) if infeasible else _most(total, given, used)
    whole = _asked(spec)
    total.update({name: count for name, count in whole.items() if _for_whole_pods(name)})
    total = Counter(total)
    total.update(_amounts(spec.get("overhead") or {}))
    total[PODS] = 1
    for name in _host_ports(spec):
        total[name] = 1
    return {name: count for name, count in total.items() if count > 0}


def holds_room(pod: Manifest) -> bool:
    """Whether ``pod`` takes room: until it has ended, also while it is being deleted."""
    return (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")


def node_of(pod: Manifest) -> str | None:
    """The node that ``pod`` is bound to, nominated for, or pinned to by its node affinity."""
    spec = pod.get("spec") or {}
    name = spec.get("nodeName") or (pod.get("status") or {}).get("nominatedNodeName") or _pinned_to(spec)
    return str(name) if name else None


_STATUSES = ("containerStatuses", "initContainerStatuses")


def _pinned_to(spec: Manifest) -> str | None:
    required = ((spec.get("affinity") or {}).get("nodeAffinity") or {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    ) or {}
    terms = [term for term in required.get("nodeSelectorTerms") or [] if any(term.values())]
    names = {_only_name(term) for term in terms}  # a term without a requirement matches no node
    return names.pop() if len(names) == 1 else None


def _only_name(term: Manifest) -> str | None:
    for field in term.get("matchFields") or []:
        if (field["key"], field["operator"], len(field.get("values") or [])) == (_NAME_FIELD, "In", 1):
            return str(field["values"][0])
    return None


def _aggregate(spec: Manifest, ask: Callable[[Manifest], Amounts]) -> dict[str, int]:
    """All containers at once, or the init container that needs most beside the sidecars started before it."""
    together: Counter[str] = Counter()
    for container in spec.get("containers") or []:
        together.update(ask(container))
    sidecars: Counter[str] = Counter()
    peak: dict[str, int] = {}
    for container in spec.get("initContainers") or []:
        if container.get("restartPolicy") == "Always":
            together.update(ask(container))
            sidecars.update(ask(container))
            peak = _most(peak, sidecars)
        else:
            peak = _most(peak, sidecars + Counter(ask(container)))
    return _most(together, peak)


def _asked(container: Manifest) -> dict[str, int]:
    resources = container.get("resources") or {}
    return _amounts({**(resources.get("limits") or {}), **(resources.get("requests") or {})})


def _allocated(container: Manifest, states: Mapping[str, Manifest], infeasible: bool) -> dict[str, int]:
    allocated = states.get(container["name"], {}).get("allocatedResources")
    if allocated is not None:
        return _amounts(allocated)
    return {} if infeasible else _asked(container)


def _actuated(container: Manifest, states: Mapping[str, Manifest], infeasible: bool) -> dict[str, int]:
    actuated = (states.get(container["name"], {}).get("resources") or {}).get("requests")
    return _amounts(actuated) if actuated is not None else _allocated(container, states, infeasible)


def _amounts(quantities: Mapping[str, str | int | float]) -> dict[str, int]:
    return {name: amount(name, quantity) for name, quantity in quantities.items()}


def _most(*lists: Amounts) -> dict[str, int]:
    names = {name for amounts in lists for name in amounts}
    return {name: max(amounts.get(name, 0) for amounts in lists) for name in names}


def _for_whole_pods(resource: str) -> bool:
    return resource in _WHOLE_POD or resource.startswith(_HUGE_PAGES)


def _host_ports(spec: Manifest) -> Iterable[str]:
    sidecars = [item for item in spec.get("initContainers") or [] if item.get("restartPolicy") == "Always"]
    for container in [*(spec.get("containers") or []), *sidecars]:
        for port in container.get("ports") or []:
            number = port.get("hostPort") or (port["containerPort"] if spec.get("hostNetwork") else 0)
            if number:
                yield f"{PORT_PREFIX}{port.get('protocol', 'TCP')}/{number}"
