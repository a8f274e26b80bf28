"""The optimizer of a stage's layers, and the gradient norm over the layers of all stages."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from torch import nn

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.protocol import Optimizer


def everything(_index: int, _name: str) -> bool:
    """Ownership where there is one copy of the stage."""
    return True


class StageOptimizer:
    """AdamW (Loshchilov and Hutter 2019) or SGD with momentum over the layers of a stage.

    The weight decay of both is decoupled: before the update a matrix is multiplied by 1 - learning rate x decay, and
    the momentum sees none of it. Only matrices decay, as biases and norms should not shrink.

    Only the parameters that this copy of the stage owns are updated, have moments and are in its state (ZeRO-1): the
    states of all copies together are the whole. A parameter without a gradient is left as it is. AdamW's bias
    correction counts the updates of the optimizer, also for a parameter that had no gradient in some of them, so
    ``updates`` is all there is to restore beside the layers' states.

    Each element is computed by itself, so the bits depend neither on the split into stages nor on the owners.
    """

    updates: int
    """Calls of ``step`` since the job began, restored ones included; skipped steps are not among them."""

    def __init__(
        self,
        settings: Optimizer,
        layers: Mapping[int, nn.Module],
        owned: Callable[[int, str], bool] = everything,
    ) -> None:
        """``layers``: by global index; ``owned`` is asked for index and parameter name.

        Moments take no memory before they are needed: those of a state that is loaded come with it.
        Raises ConfigurationError for a trainable parameter that is not float32.
        """
        self.updates = 0
        self._layers = layers
        self._weight_decay = float(settings.weight_decay)
        self._owned = {(index, name): parameter for index, name, parameter in _parameters(layers) if owned(index, name)}
        self._trained = [parameter for parameter in self._owned.values() if parameter.requires_grad]
        self._moments = _moments(settings)
        self._torch = _torch_optimizer(settings, self._trained) if self._trained else None

    def step(self, learning_rate: float) -> None:
        """Update the owned parameters that have a gradient."""
        for parameter in self._trained:
            self._have_moments(parameter)
        self.updates += 1
        if self._torch is None:
            return
        for parameter in self._trained:
            if parameter.grad is None:
                self._skip(parameter)
            elif parameter.dim() >= 2:
                parameter.detach().mul_(1 - learning_rate * self._weight_decay)
        for group in self._torch.param_groups:
            group["lr"] = learning_rate
        self._torch.step()

    def zero_grad(self) -> None:
        """Free the gradients of all parameters, owned or not."""
        for layer in self._layers.values():
            layer.zero_grad(set_to_none=True)

    def layer_state(self, index: int) -> dict[str, torch.Tensor]:
        """Return ``weight.<parameter>`` and ``<moment>.<parameter>`` of a layer's owned parameters.

        They are the live tensors: copy what shall outlive the next step.
        """
        state: dict[str, torch.Tensor] = {}
        for name, parameter in self._layers[index].named_parameters():
            if (index, name) in self._owned:
                state[f"weight.{name}"] = parameter.detach()
                for moment, tensor in self._moments_of(parameter).items():
                    state[f"{moment}.{name}"] = tensor
        return state

    def load_layer_state(self, index: int, state: Mapping[str, torch.Tensor], updates: int) -> None:
        """Put back the whole state of a layer: all weights, and the moments of owned parameters.

        ``updates``: the count when it was saved. Names and shapes must be those of ``layer_shapes``.
        """
        self.updates = updates
        for name, parameter in self._layers[index].named_parameters():
            parameter.detach().copy_(state[f"weight.{name}"])
            if parameter.requires_grad and (index, name) in self._owned:
                saved = {moment: state[f"{moment}.{name}"] for moment in self._moments}
                self._set_moments(
                    parameter, {moment: torch.empty_like(parameter).copy_(saved[moment]) for moment in saved}
                )

    def layer_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of a layer's whole state: what ``layer_state`` of all copies give together."""
        return {
            f"{kind}.{name}": tuple(parameter.shape)
            for name, parameter in self._layers[index].named_parameters()
            for kind in ("weight", *(self._moments if parameter.requires_grad else ()))
        }

    def _moments_of(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Moments by our names."""
        if self._torch is None or not parameter.requires_grad:
            return {}
        self._have_moments(parameter)
        return {moment: self._torch.state[parameter][key] for moment, key in self._moments.items()}

    def _have_moments(self, parameter: nn.Parameter) -> None:
        """Begin with moments of zero, unless there are some."""
        assert self._torch is not None
        if parameter not in self._torch.state:
            self._set_moments(parameter, {name: torch.zeros_like(parameter) for name in self._moments})

    def _set_moments(self, parameter: nn.Parameter, moments: Mapping[str, torch.Tensor]) -> None:
        """Set moments by our names, as they are after ``updates`` updates."""
        assert self._torch is not None
        state = {key: moments[moment] for moment, key in self._moments.items()}
        self._torch.state[parameter] = {**state, "step": torch.tensor(float(self.updates))}

    def _skip(self, parameter: nn.Parameter) -> None:
        """Count an update in which torch will not touch the parameter."""
        assert self._torch is not None
        self._torch.state[parameter]["step"] += 1


def _moments(settings: Optimizer) -> dict[str, str]:
    """Our names of an optimizer's moments, and torch's."""
    if settings.name == "AdamW":
        return {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    return {"momentum": "momentum_buffer"} if float(settings.momentum) else {}


def _torch_optimizer(settings: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return torch's optimizer without weight decay, which ``StageOptimizer`` applies.

    One parameter after another: with ``foreach`` a single one of unusual strides sends all that are updated together
    through other kernels, so the bits would depend on the split.
    """
    rate = float(settings.learning_rate)
    if settings.name == "SGD":
        return torch.optim.SGD(parameters, rate, float(settings.momentum), foreach=False, fused=False)
    betas = (float(settings.beta1), float(settings.beta2))
    return torch.optim.AdamW(parameters, rate, betas, weight_decay=0.0, foreach=False, fused=False)


def _parameters(layers: Mapping[int, nn.Module]) -> Iterator[tuple[int, str, nn.Parameter]]:
    """Layer index, name and parameter, in the order of the layers and of their parameters."""
    for index, layer in layers.items():
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                raise ConfigurationError(
                    f"spec.model: trainable parameter {name} of layer {index} is {parameter.dtype}; allowed: "
                    "torch.float32; build it so and choose the type of matrix products with spec.train.precision"
                )
            yield index, name, parameter


def squared_gradient_norms(
    layers: Mapping[int, nn.Module], without: Collection[tuple[int, str]] = ()
) -> dict[int, list[float]]:
    """Return each layer's squared gradient norms, one a parameter in their order, in float64.

    It is 0 for a parameter without a gradient here and for those in ``without`` (layer index, name), whose gradient
    is counted elsewhere. The norms leave the device together.
    """
    norms = {
        (index, name): torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)
        for index, layer in layers.items()
        for name, parameter in layer.named_parameters()
        if parameter.grad is not None and (index, name) not in without
    }
    values = dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True)) if norms else {}
    return {
        index: [values.get((index, name), 0.0) ** 2 for name, _ in layer.named_parameters()]
        for index, layer in layers.items()
    }


class NormSlots:
    """Where the squared norms of all layers' parameters are in the vector that the ranks add up.

    Every parameter has a slot, because with several copies of a stage the sums of one layer's gradients are on
    several ranks: one partial sum a rank would be rounded differently for another number of copies. So each slot
    is zero on all ranks but one, the sum over the ranks is exact, and what is added is added here, in order.
    """

    def __init__(self, parameters: Sequence[int]) -> None:
        """``parameters``: number of parameters of every layer of the model, as ``parameter_counts`` of all stages."""
        ends = list(accumulate(parameters))
        self._slices = [slice(end - count, end) for end, count in zip(ends, parameters, strict=True)]
        self.size = ends[-1]

    def fill(self, vector: torch.Tensor, norms: Mapping[int, Sequence[float]]) -> None:
        """Write this rank's ``squared_gradient_norms`` into ``vector`` (float64, its first ``size`` elements)."""
        for index, values in norms.items():
            vector[self._slices[index]] = torch.tensor(values, dtype=torch.float64)

    def per_layer(self, values: Sequence[float]) -> list[float]:
        """Return each layer's squared norm from the sum of all ranks' vectors."""
        return [sum(values[slots]) for slots in self._slices]


def parameter_counts(layers: Mapping[int, nn.Module], total: int) -> torch.Tensor:
    """Return the number of parameters of these layers at their places among ``total``, 0 elsewhere; int64.

    Summed over the stages of one pipeline it is what ``NormSlots`` needs.
    """
    counts = torch.zeros(total, dtype=torch.int64)
    for index, layer in layers.items():
        counts[index] = sum(1 for _ in layer.parameters())
    return counts


def total_norm(squared_norms: Sequence[float]) -> float:
    """Gradient norm of the model from its layers', summed in layer order: the same for every split."""
    return math.sqrt(sum(squared_norms))


def clip(layers: Iterable[nn.Module], norm: float, limit: float) -> None:
    """Scale gradients by ``limit / norm`` if the norm is larger (Pascanu et al. 2013); 0 does not clip."""
    if 0 < limit < norm:
        scale_gradients(layers, limit / norm)


def scale_gradients(layers: Iterable[nn.Module], factor: float) -> None:
    """Multiply all gradients; with the inverse of a power of two no bit is lost."""
    for layer in layers:
        for parameter in layer.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
