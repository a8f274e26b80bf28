"""Tied weights: two parameters of two layers that are one weight.

Both ends keep a copy and compute a gradient of their own. Once a step, last, each end gets the sum, so both make the
same update and stay equal in every bit, whether they are on one rank or on two.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import distributed, nn

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models import Tie
from pipelinejob_worker.pipeline.replicas import Parameter


class TiedGradients:
    """The tied weights that have an end on this rank.

    With several copies of a stage, the tied parameters must be owned by copy 0 on both stages (``tied_parameters``
    pinned); the other copies have nothing to sum and do not call ``sum``.
    """

    def __init__(
        self,
        ties: Sequence[Tie],
        layers: Mapping[int, nn.Module],
        rank_of: Callable[[int], int],
        group: distributed.ProcessGroup | None = None,
    ) -> None:
        """``layers``: those of this rank. ``rank_of``: rank in ``group`` that has a layer, in pipeline 0.

        Raises ConfigurationError if two ties share an end: a weight has two copies at most.
        """
        if len(tied_parameters(ties)) < 2 * len(ties):
            raise ConfigurationError(
                f"spec.model: the model's ties {', '.join(map(str, ties))} name a parameter twice; allowed: two ends "
                "for each weight; tie no third layer to it"
            )
        self._ties = [tie for tie in ties if tie.first_layer in layers or tie.last_layer in layers]
        self._layers = layers
        self._rank_of = rank_of
        self._group = group

    def sum(self) -> None:
        """Give both ends of every tie the sum of their two gradients; it has the same bits in either order.

        Collective of the ranks that hold an end. An end without a gradient counts as zero; a weight that is not
        trained has none.
        """
        here = {tie: self._parameters(tie) for tie in self._ties}
        trained = {tie: ours for tie, ours in here.items() if all(end.requires_grad for end in ours.values())}
        for ours in trained.values():
            for end in ours.values():
                end.grad = torch.zeros_like(end) if end.grad is None else end.grad
        received = self._exchange({tie: ours for tie, ours in trained.items() if len(ours) == 1})
        for tie, ours in trained.items():
            first, last = (ours[end].grad if end in ours else received[tie] for end in _ends(tie))
            assert first is not None
            assert last is not None
            total = first + last
            for end in ours.values():
                end.grad = total.clone()

    def _parameters(self, tie: Tie) -> dict[Parameter, nn.Parameter]:
        """The ends that this rank has."""
        return {
            (index, name): self._layers[index].get_parameter(name)
            for index, name in _ends(tie)
            if index in self._layers
        }

    def _exchange(self, ours: Mapping[Tie, Mapping[Parameter, nn.Parameter]]) -> dict[Tie, torch.Tensor]:
        """Send the gradient of the one end here to the rank of the other, and return the other's."""
        received: dict[Tie, torch.Tensor] = {}
        operations = []
        for tag, (tie, here) in enumerate(ours.items(), start=1):  # 0 is that of hidden states
            ((mine, parameter),) = here.items()
            assert parameter.grad is not None
            received[tie] = torch.empty_like(parameter.grad)
            (other,) = (index for index, name in _ends(tie) if (index, name) != mine)
            peer = self._rank_of(other)
            operations += [
                distributed.P2POp(distributed.isend, parameter.grad, group=self._group, tag=tag, group_peer=peer),
                distributed.P2POp(distributed.irecv, received[tie], group=self._group, tag=tag, group_peer=peer),
            ]
        for work in distributed.batch_isend_irecv(operations) if operations else ():
            work.wait()
        return received


def tied_parameters(ties: Sequence[Tie]) -> frozenset[Parameter]:
    """Both ends of all ties: what copy 0 of a stage must own."""
    return frozenset(end for tie in ties for end in _ends(tie))


def counted_elsewhere(ties: Sequence[Tie]) -> frozenset[Parameter]:
    """The last ends, whose gradients the norm does not count: they are those of the first ends."""
    return frozenset((tie.last_layer, tie.last_parameter) for tie in ties)


def _ends(tie: Tie) -> tuple[Parameter, Parameter]:
    return (tie.first_layer, tie.first_parameter), (tie.last_layer, tie.last_parameter)
