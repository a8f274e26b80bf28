"""Drawing tokens from logits: a function of the logits, the parameters, the seed and the position, and nothing else."""

from collections.abc import Sequence

import torch

from pipelinejob_worker.models.randomness import mix
from pipelinejob_worker.serve.batch import Drawn
from pipelinejob_worker.serve.wire import Sampling

_WORD = 1 << 64


def draw(logits: torch.Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> list[Drawn]:
    """Draw one token from each row of ``logits`` ``[rows, vocabulary]``.

    ``positions``: of the tokens that are drawn, in their requests. Of equal logits the lower token id comes first.
    """
    largest, likeliest = (values.tolist() for values in logits.max(dim=-1))
    return [
        _draw_row(row, sampling, position, best) if -torch.inf < most < torch.inf else Drawn(None)
        for row, sampling, position, most, best in zip(logits, samplings, positions, largest, likeliest, strict=True)
    ]


def _draw_row(logits: torch.Tensor, sampling: Sampling, position: int, best: int) -> Drawn:
    token = best if sampling.temperature == 0 else _sample(logits.double(), sampling, position)
    if not (sampling.logprobs or sampling.top_logprobs):
        return Drawn(token)
    logprobs = logits.double().log_softmax(0)
    count = min(sampling.top_logprobs, logits.numel())
    order = torch.sort(logprobs, descending=True, stable=True).indices[:count].tolist() if count else []
    named = ((index, float(logprobs[index])) for index in order)
    return Drawn(token, float(logprobs[token]), tuple(one for one in named if one[1] > -torch.inf))


def _sample(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    """Invert the distribution function at a random number; top-k cuts before top-p, and both keep at least one.

    Without a cut tokens stay in the order of their ids, so nothing is sorted.
    """
    scaled = (logits - logits.max()) / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1:
        return _invert(scaled.exp().cumsum(0), sampling, position)
    ordered, ids = torch.sort(scaled, descending=True, stable=True)
    if sampling.top_k:
        ordered = ordered[: sampling.top_k]
    cumulated = ordered.exp().cumsum(0)
    if sampling.top_p < 1:
        kept = int(torch.searchsorted(cumulated, sampling.top_p * cumulated[-1])) + 1
        cumulated = cumulated[:kept]
    return int(ids[_invert(cumulated, sampling, position)])


def _invert(cumulated: torch.Tensor, sampling: Sampling, position: int) -> int:
    place = torch.searchsorted(cumulated, uniform(sampling.seed, position) * cumulated[-1], right=True)
    return min(int(place), cumulated.numel() - 1)


def uniform(seed: int, position: int) -> float:
    """Return a number of [0, 1) that depends on its arguments alone."""
    return (mix(seed % _WORD, position) >> 10) * 2.0**-53
