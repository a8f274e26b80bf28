"""Data-parallel copies of a stage: each parameter's gradients are summed, and it is updated, by one copy, its owner.

This is ZeRO stage 1 (Rajbhandari et al. 2020) by whole parameters. The owner adds the copies' gradients in the order
of the copies, so the bits are defined for any number of them and do not depend on a collective's algorithm.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import distributed, nn

Parameter = tuple[int, str]
"""A parameter of the model: global index of its layer, and its name there."""


def owners(sizes: Mapping[Parameter, int], copies: int, pinned: Collection[Parameter] = ()) -> dict[Parameter, int]:
    """Return the copy that owns each parameter of a stage; ``sizes``: elements that it updates.

    The largest first, each to the copy that has least so far (Graham 1969): the fullest copy has at most 4/3 of
    the best possible. ``pinned`` parameters belong to copy 0.
    """
    loads = [0] * copies
    owner: dict[Parameter, int] = {}
    for parameter in sorted(sizes, key=lambda parameter: (parameter not in pinned, -sizes[parameter], parameter)):
        copy = 0 if parameter in pinned else min(range(copies), key=loads.__getitem__)
        owner[parameter] = copy
        loads[copy] += sizes[parameter]
    return owner


@dataclass(frozen=True)
class _Reduction:
    """The gradients of one layer on their way to the owners."""

    works: list[distributed.Work]
    sent: list[torch.Tensor]
    """Must live, unchanged, until ``works`` are done."""

    gradients: list[torch.Tensor]
    """Of the parameters owned here, packed, from every copy in their order; empty if none is owned here."""

    parameters: Sequence[nn.Parameter]


class Replicas:
    """This copy of a stage among the others.

    All copies run the same schedule, so all call every method in the same order, as NCCL needs it. An object is
    of no use after an error of the group.
    """

    def __init__(
        self,
        layers: Mapping[int, nn.Module],
        group: distributed.ProcessGroup | None,
        pinned: Collection[Parameter] = (),
    ) -> None:
        """``group``: the copies of this stage in their order, or None for a single one."""
        self._group = group
        self._copy, self._copies = (group.rank(), group.size()) if group else (0, 1)
        parameters = {
            (index, name): parameter for index, layer in layers.items() for name, parameter in layer.named_parameters()
        }
        sizes = {key: p.numel() if p.requires_grad else 0 for key, p in parameters.items()}
        self._owners = owners(sizes, self._copies, pinned)
        self._shares: dict[int, dict[int, list[nn.Parameter]]] = {index: {} for index in layers}
        """Layer -> owner -> trainable parameters."""
        for (index, name), parameter in parameters.items():
            if parameter.requires_grad:
                self._shares[index].setdefault(self._owners[index, name], []).append(parameter)
        self._reductions: dict[int, _Reduction] = {}

    def owned(self, index: int, name: str) -> bool:
        """Whether this copy updates parameter ``name`` of layer ``index``, and saves it."""
        return self._owners[index, name] == self._copy

    def start(self, index: int) -> None:
        """Send the gradients of a layer to their owners, once its last backward pass of the step is done.

        They are packed and taken from the parameters; the transfer goes on beside the passes of other layers.
        """
        if self._group is None:
            return
        operations: list[distributed.P2POp] = []
        sent: list[torch.Tensor] = []
        received: list[torch.Tensor] = []
        for owner, parameters in self._shares[index].items():
            packed = _pack_gradients(parameters)
            if owner == self._copy:
                received = [packed if copy == owner else torch.empty_like(packed) for copy in range(self._copies)]
                operations += [self._receive(received[copy], copy, index) for copy in self._others()]
            else:
                sent.append(packed)
                operations.append(self._send(packed, owner, index))
        self._reductions[index] = _Reduction(
            _begin(operations), sent, received, self._shares[index].get(self._copy, ())
        )

    def finish(self) -> None:
        """Wait for what was started for all layers; owned parameters then have the sums as gradients, others none.

        A parameter that had a gradient on no copy has none afterwards; on some copies only, it was zero on the others.
        """
        if self._group is None:
            return
        assert self._reductions.keys() == self._shares.keys(), "a layer's gradients were not sent"
        sums: list[tuple[Sequence[nn.Parameter], torch.Tensor]] = []
        for reduction in self._reductions.values():
            for work in reduction.works:
                work.wait()
            if reduction.gradients:
                total = reduction.gradients[0]
                for gradients in reduction.gradients[1:]:
                    total += gradients
                sums.append((reduction.parameters, total))
        self._reductions.clear()
        _unpack_gradients(sums)

    def publish(self) -> None:
        """Give every copy the parameters as their owners have updated them."""
        if self._group is None:
            return
        operations: list[distributed.P2POp] = []
        received: list[tuple[list[nn.Parameter], torch.Tensor]] = []
        for index, shares in self._shares.items():
            for owner, parameters in shares.items():
                if owner == self._copy:
                    packed = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
                    operations += [self._send(packed, copy, index) for copy in self._others()]
                else:
                    packed = torch.empty(sum(p.numel() for p in parameters), device=parameters[0].device)
                    operations.append(self._receive(packed, owner, index))
                    received.append((parameters, packed))
        for work in _begin(operations):
            work.wait()
        for parameters, packed in received:
            for parameter, part in _parts(parameters, packed):
                with torch.no_grad():
                    parameter.copy_(part)

    def _others(self) -> Iterator[int]:
        return (copy for copy in range(self._copies) if copy != self._copy)

    def _send(self, tensor: torch.Tensor, copy: int, tag: int) -> distributed.P2POp:
        return distributed.P2POp(distributed.isend, tensor, group=self._group, tag=tag, group_peer=copy)

    def _receive(self, tensor: torch.Tensor, copy: int, tag: int) -> distributed.P2POp:
        return distributed.P2POp(distributed.irecv, tensor, group=self._group, tag=tag, group_peer=copy)


def _begin(operations: list[distributed.P2POp]) -> list[distributed.Work]:
    return distributed.batch_isend_irecv(operations) if operations else []


def _pack_gradients(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Move the gradients into one vector, followed by a 1 for each that is there and a 0 for each that is not."""
    gradients = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in parameters]
    present = [float(p.grad is not None) for p in parameters]
    packed = torch.cat([*gradients, gradients[0].new_tensor(present)])
    for parameter in parameters:
        parameter.grad = None
    return packed


def _unpack_gradients(sums: Sequence[tuple[Sequence[nn.Parameter], torch.Tensor]]) -> None:
    """Set the gradients to views of the sums of what ``_pack_gradients`` gave; one transfer tells which are there."""
    if not sums:
        return
    counts = iter(torch.cat([total[-len(parameters) :] for parameters, total in sums]).tolist())
    for parameters, total in sums:
        for parameter, part in _parts(parameters, total):
            parameter.grad = part if next(counts) else None


def _parts(parameters: Sequence[nn.Parameter], packed: torch.Tensor) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Each parameter with its view of a packed vector."""
    start = 0
    for parameter in parameters:
        yield parameter, packed[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
