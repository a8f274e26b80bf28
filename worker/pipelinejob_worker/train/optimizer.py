"""AdamW over the layers of a stage, and the gradient norm over the layers of all stages."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from pipelinejob_worker.protocol import Optimizer


def build_optimizer(settings: Optimizer, layers: Iterable[nn.Module]) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); only matrices decay, as biases and norms should not shrink."""
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": float(settings.weight_decay)},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=float(settings.learning_rate),
    )


def squared_gradient_norm(layer: nn.Module) -> float:
    """Sum of the squares of a layer's gradients, in float64, in the order of its parameters."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in layer.parameters() if p.grad is not None]
    return sum(float(norm) ** 2 for norm in norms)


def total_norm(squared_norms: Sequence[float]) -> float:
    """Gradient norm of the model from its layers', summed in layer order: the same for every split."""
    return math.sqrt(sum(squared_norms))


def clip(layers: Iterable[nn.Module], norm: float, limit: float) -> None:
    """Scale gradients by ``limit / norm`` if the norm is larger (Pascanu et al. 2013); 0 does not clip."""
    if not 0 < limit < norm:
        return
    for layer in layers:
        for parameter in layer.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(limit / norm)


def layer_state(layer: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """Weights and moments of a layer, on the CPU: ``weight.<parameter>``, ``exp_avg.<parameter>``, ..."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in layer.named_parameters():
        moments = optimizer.state[parameter]
        state[f"weight.{name}"] = parameter.detach().cpu()
        for moment in _MOMENTS:
            state[f"{moment}.{name}"] = moments[moment].cpu()
    return state


def load_layer_state(layer: nn.Module, optimizer: torch.optim.AdamW, state: dict[str, torch.Tensor], step: int) -> None:
    """Put back what ``layer_state`` gave after ``step`` steps; names and shapes must be the layer's."""
    for name, parameter in layer.named_parameters():
        with torch.no_grad():
            parameter.copy_(state[f"weight.{name}"])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            **{moment: state[f"{moment}.{name}"].to(parameter.device) for moment in _MOMENTS},
        }


def layer_shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what ``layer_state`` gives, without an optimizer step having been made."""
    return {
        f"{kind}.{name}": tuple(parameter.shape)
        for name, parameter in layer.named_parameters()
        for kind in ("weight", *_MOMENTS)
    }


_MOMENTS = ("exp_avg", "exp_avg_sq")
