"""The search for the best contiguous split of layers into chunks, exact on integers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement, pairwise

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Cuts = tuple[int, ...]

WORK_LIMIT = 1_000_000_000
"""Pairs of states that a search compares before it settles for the best split so far: some seconds. A count and not a
time, because every stage searches for itself and all must find the same split."""

_CLIMB_LIMIT = 10_000  # splits that the climb to the first one looks at
_SHARINGS = 30  # times that shares are corrected for the first split
_SWEEP_WORK = 20_000  # pairs that could be compared in the time that a sweep takes at least, a stage and round
_STATE_WORK = 10  # the same for making a state
_STATES_LIMIT = 1 << 20  # of states made at once
_BLOCK = 1 << 17  # pairs compared at once: few enough for the processor's cache
_NEVER = np.iinfo(np.int64).max
_ROUNDING = 1e-11  # of the weight of all layers: far above the errors of its sums, far below one unit of cost


@dataclass(frozen=True)
class Problem:
    """What a split costs each stage, and how large it makes it.

    ``stage_of``: the stage of each chunk. As many chunks in a row as there are stages form a round: they visit each
    stage once, all upwards (looped) or downwards (the way back of a V).
    ``costs`` ``[stages, layers]``: what a layer adds to the cost of each stage, 0 or more; the dearest stage counts.
    ``sizes`` ``[stages, layers]`` and ``limits`` ``[stages]``: what a layer adds to the size of each stage, 0 or more,
    and the largest that it may have.
    """

    stage_of: Sequence[int]
    costs: Integers
    sizes: Integers
    limits: Integers

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.costs)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.costs.shape[1])

    @cached_property
    def cost_before(self) -> Integers:
        """``[stages, layers + 1]``: cost of all layers before each."""
        return _before(self.costs)

    @cached_property
    def size_before(self) -> Integers:
        """``[stages, layers + 1]``: size of all layers before each."""
        return _before(self.sizes)

    def chunk_costs(self, cuts: Cuts) -> Integers:
        """Cost of each chunk, ``[chunks]``."""
        return self._of_chunks(cuts, self.cost_before)

    def stage_costs(self, cuts: Cuts) -> Integers:
        """Cost of each stage, ``[stages]``."""
        return self._of_stages(self.chunk_costs(cuts))

    def stage_sizes(self, cuts: Cuts) -> Integers:
        """Size of each stage, ``[stages]``."""
        return self._of_stages(self._of_chunks(cuts, self.size_before))

    def dearest(self, cuts: Cuts) -> int:
        """Cost of the dearest stage."""
        return int(self.stage_costs(cuts).max())

    def fits(self, cuts: Cuts) -> bool:
        """Whether no stage is larger than it may be."""
        return bool((self.stage_sizes(cuts) <= self.limits).all())

    def _of_chunks(self, cuts: Cuts, before: Integers) -> Integers:
        stages, ends = np.asarray(self.stage_of), np.asarray(cuts)
        sums: Integers = before[stages, ends[1:]] - before[stages, ends[:-1]]
        return sums

    def _of_stages(self, of_chunks: Integers) -> Integers:
        sums = np.zeros(self.stages, dtype=np.int64)
        np.add.at(sums, np.asarray(self.stage_of), of_chunks)
        return sums


@dataclass(frozen=True)
class Found:
    """A split and what is proven of it.

    ``cuts``: first layer of every chunk, then the number of layers. ``bound``: no split has a cheaper dearest stage;
    it is the cost of this one's when that is the best.
    """

    cuts: Cuts
    bound: int


class _WorkLimitReachedError(Exception):
    pass


@dataclass(frozen=True)
class _Caps:
    """The most that a stage and a chunk may cost, and which of the two a sweep minimises."""

    stage: int
    chunk: int
    minimise_chunk: bool


@dataclass(frozen=True)
class _States:
    """How far each round can have come after some stages, and the least that the dearest so far then costs.

    ``fronts`` ``[rounds, states]``: layers; ``values`` ``[states]``.
    """

    fronts: Integers
    values: Integers


class Search:
    """Finds the split whose dearest stage is cheapest; of equal ones, that whose dearest chunk is.

    One chunk a stage is the linear partition problem. With more, let the boundaries between the rounds be fixed and
    let stage after stage take its piece of all rounds at once. How far each round has come is then a state, a stage's
    cost depends on the states before and after it, and the dearest stage of a path through the states is minimised by
    dynamic programming. All boundaries between rounds are tried: O(stages * layers ** (3 * rounds - 1)) at worst.

    Few states are worth a look: the stages so far and the stages to come must be able to take what they would have
    to without one above a cap. The cap rises from a lower bound in steps; a step that finds nothing proves a higher
    bound, and the first that finds a split finds the best.
    """

    def __init__(self, problem: Problem, work_limit: int = WORK_LIMIT) -> None:
        self._problem = problem
        self._work_left = work_limit
        stages = problem.stages
        rounds = [list(problem.stage_of[first : first + stages]) for first in range(0, len(problem.stage_of), stages)]
        upwards = list(range(stages))
        if any(stages_of_round not in (upwards, upwards[::-1]) for stages_of_round in rounds):
            raise ValueError(f"chunks on stages {list(problem.stage_of)} do not visit all stages up or down in turn")
        self._signs = np.array([1 if stages_of_round == upwards else -1 for stages_of_round in rounds])
        # A measure for all stages together: with a rate for each, a layer weighs at most rate * cost on any of them.
        # So what stages hold of which none costs more than a cap weighs at most the cap times the sum of their rates.
        self._rates = 1 / np.maximum(problem.costs.sum(axis=1), 1)
        self._weights = (problem.costs * self._rates[:, None]).min(axis=0)
        self._weight_before = np.concatenate([[0.0], np.cumsum(self._weights)])
        self._rate_before = np.concatenate([[0.0], np.cumsum(self._rates)])
        self._best: Cuts = ()

    def run(self, first: Cuts) -> Found:
        """Return the best split, or the best found within the limit of work; ``first`` is any that fits."""
        self._best = first
        bound = self._lower_bound()
        try:
            for cap in _widening(bound, self._problem.dearest(first)):
                if self._minimise(_Caps(cap, cap, minimise_chunk=False), bound):
                    break
                bound = cap + 1
            bound = self._problem.dearest(self._best)
            largest = int(self._problem.chunk_costs(self._best).max())
            if len(self._signs) == 1 or largest > self._dearest_layer(with_others=False):
                self._minimise(_Caps(bound, largest, minimise_chunk=True), self._dearest_layer(with_others=False))
        except _WorkLimitReachedError:
            pass
        return Found(self._best, bound)

    def _minimise(self, caps: _Caps, bound: int) -> bool:
        """Keep the best split within ``caps``, if there is one; cheaper than ``bound`` is none."""
        improved = False
        for bounds in self._round_bounds():
            swept = self._sweep(bounds, caps)
            if swept is None:
                continue
            value, self._best = swept
            improved = True
            if value <= bound:
                break
            stage = caps.stage if caps.minimise_chunk else value - 1
            caps = _Caps(stage, value - 1, caps.minimise_chunk)
        return improved

    def _round_bounds(self) -> Iterator[Cuts]:
        """Every way to cut the layers into rounds of at least one layer a stage, the latest cuts first."""
        stages, layers = self._problem.stages, self._problem.layers
        rounds = len(self._signs)
        for spare in combinations_with_replacement(range(layers - rounds * stages, -1, -1), rounds - 1):
            yield (0, *(stages * (place + 1) + more for place, more in enumerate(reversed(spare))), layers)

    def _sweep(self, bounds: Cuts, caps: _Caps) -> tuple[int, Cuts] | None:
        """Minimise with rounds between ``bounds``: the value and the latest cuts that have it; None above the caps."""
        starts = np.where(self._signs > 0, bounds[:-1], bounds[1:])
        old = _States(starts[:, None], np.zeros(1, dtype=np.int64))
        trail = [old]
        for stage in range(self._problem.stages):
            fronts = self._fronts(bounds, stage + 1, caps)
            self._spend(_SWEEP_WORK * len(bounds) + old.values.size * fronts.shape[1])
            values = np.full(fronts.shape[1], _NEVER)
            rows = max(1, _BLOCK // max(1, fronts.shape[1]))
            for row in range(0, old.values.size, rows):
                some = _States(old.fronts[:, row : row + rows], old.values[row : row + rows])
                np.minimum(values, self._values(stage, some, fronts, caps).min(axis=0), out=values)
            reached = values < _NEVER
            if not reached.any():
                return None
            old = _States(fronts[:, reached], values[reached])
            trail.append(old)
        return int(old.values[0]), self._trace(trail, caps)

    def _fronts(self, bounds: Cuts, passed: int, caps: _Caps) -> Integers:
        """Where the rounds can be after ``passed`` stages, ``[rounds, states]``."""
        left = self._problem.stages - passed
        taken_rate, left_rate = self._rate_before[passed], self._rate_before[-1] - self._rate_before[passed]
        fronts = []
        for sign, (start, end) in zip(self._signs, pairwise(bounds), strict=True):
            taken = np.arange(passed if left else end - start, end - start - left + 1)
            front = start + taken if sign > 0 else end - taken
            before = self._weight_before[front] - self._weight_before[start]
            after = self._weight_before[end] - self._weight_before[front]
            taken_weight, left_weight = (before, after) if sign > 0 else (after, before)
            fronts.append(
                front[
                    (taken_weight <= caps.chunk * taken_rate + _ROUNDING)
                    & (left_weight <= caps.chunk * left_rate + _ROUNDING)
                ]
            )
        count = math.prod(front.size for front in fronts)
        if count > _STATES_LIMIT:
            raise _WorkLimitReachedError
        self._spend(_STATE_WORK * count)
        states = np.stack(np.meshgrid(*fronts, indexing="ij")).reshape(len(fronts), -1)
        starts = np.where(self._signs > 0, bounds[:-1], bounds[1:])
        moved = self._weight_before[states] - self._weight_before[starts][:, None]
        weight = (self._signs[:, None] * moved).sum(axis=0)
        kept: Integers = states[
            :,
            (weight <= caps.stage * taken_rate + _ROUNDING)
            & (self._weight_before[-1] - weight <= caps.stage * left_rate + _ROUNDING),
        ]
        return kept

    def _values(self, stage: int, old: _States, fronts: Integers, caps: _Caps) -> Integers:
        """The value of each state of ``fronts`` when it follows each of ``old``, ``[old, fronts]``."""
        signs = self._signs[:, None]
        limit = self._problem.limits[stage]
        costs, old_costs = (signs * self._problem.cost_before[stage][layers] for layers in (fronts, old.fronts))
        values = _pairs(costs.sum(axis=0), old_costs.sum(axis=0))
        allowed = values <= caps.stage
        if limit < self._problem.sizes[stage].sum():
            sizes, old_sizes = (signs * self._problem.size_before[stage][layers] for layers in (fronts, old.fronts))
            allowed &= _pairs(sizes.sum(axis=0), old_sizes.sum(axis=0)) <= limit
        for new, passed in zip(signs * fronts, signs * old.fronts, strict=True):
            allowed &= new[None, :] > passed[:, None]
        if caps.minimise_chunk:
            values = np.max([_pairs(new, passed) for new, passed in zip(costs, old_costs, strict=True)], axis=0)
            allowed &= values <= caps.chunk
        np.maximum(values, old.values[:, None], out=values)
        values[~allowed] = _NEVER
        return values

    def _trace(self, trail: Sequence[_States], caps: _Caps) -> Cuts:
        """Go back from the last state, each time to the latest that does not raise the value."""
        best = trail[-1].values[0]
        front = trail[-1].fronts[:, :1]
        cuts = set(front[:, 0].tolist())
        for stage in reversed(range(len(trail) - 1)):
            old = trail[stage]
            (good,) = np.nonzero(self._values(stage, old, front, caps)[:, 0] <= best)
            latest = good[np.lexsort(old.fronts[:, good])[-1]]  # of the last round, then of the one before, ...
            front = old.fronts[:, latest : latest + 1]
            cuts |= set(front[:, 0].tolist())
        return tuple(sorted(cuts))

    def _dearest_layer(self, *, with_others: bool) -> int:
        """Cost of the dearest layer in the chunk where it is cheapest, as no chunk is empty.

        ``with_others``: with what the other chunks of the same stage cost at least.
        """
        stage_of = np.asarray(self._problem.stage_of)
        chunks, layers = len(stage_of), self._problem.layers
        costs = self._problem.costs[stage_of]
        spare = layers - chunks
        others = np.zeros(chunks, np.int64)
        if with_others:
            least = np.array([costs[chunk, chunk : chunk + spare + 1].min() for chunk in range(chunks)])
            of_stage = np.zeros(self._problem.stages, np.int64)
            np.add.at(of_stage, stage_of, least)
            others = of_stage[stage_of] - least
        return max(
            int((costs[first : layer + 1, layer] + others[first : layer + 1]).min())
            for layer, first in ((layer, max(0, layer - spare)) for layer in range(layers))
        )

    def _lower_bound(self) -> int:
        """The most that the dearest stage must cost by its share, by its dearest layer, and by the count of layers.

        By count: a stage holds only so many of the k dearest layers, beside the first or last if that is its own.
        """
        problem = self._problem
        share = math.ceil(self._weight_before[-1] / self._rate_before[-1] - _ROUNDING / self._rate_before[-1])
        low, high = max(share, self._dearest_layer(with_others=True)), problem.dearest(self._best)
        known = np.zeros((problem.stages, 1), np.int64)
        for layer, chunk in {0: 0, problem.layers - 1: -1}.items():
            known[problem.stage_of[chunk]] += problem.costs[problem.stage_of[chunk], layer]
        inner = np.arange(1, problem.layers - 1)
        dearest_first = inner[np.argsort(-self._weights[inner], kind="stable")]
        cheapest = np.minimum.accumulate(problem.costs[:, dearest_first], axis=1)
        while low < high:
            cap = (low + high) // 2
            held = np.where(cheapest > 0, np.maximum(cap - known, 0) // np.maximum(cheapest, 1), problem.layers)
            enough = (held.sum(axis=0) > np.arange(inner.size)).all()
            low, high = (low, cap) if enough else (cap + 1, high)
        return int(low)

    def _spend(self, work: int) -> None:
        self._work_left -= work
        if self._work_left < 0:
            raise _WorkLimitReachedError


def proportional(problem: Problem) -> Cuts:
    """Give each chunk its share of the layers by cost; stages that cost too much then get a smaller share, and so on.

    Returns the best of these.
    """
    stage_of = np.asarray(problem.stage_of)
    before = np.concatenate([[0.0], np.cumsum(problem.costs.mean(axis=0))])
    shares = 1 / np.maximum(problem.costs.sum(axis=1), 1)
    splits = []
    for _ in range(_SHARINGS):
        targets = np.cumsum(shares[stage_of])
        splits.append(_nearest(before, targets / targets[-1] * before[-1]))
        costs = np.maximum(problem.stage_costs(splits[-1]), 1)
        shares = shares * np.sqrt(costs.max() / costs)
    return min(splits, key=lambda cuts: _score(problem, cuts))


def _nearest(before: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]) -> Cuts:
    """Cuts where the sums ``before`` come nearest to ``targets``, with no chunk empty."""
    layers, chunks = len(before) - 1, len(targets)
    cuts = [0]
    for chunk, target in enumerate(targets[:-1], start=1):
        nearest = int(np.abs(before - target).argmin())
        cuts.append(min(max(nearest, cuts[-1] + 1), layers - chunks + chunk))
    return (*cuts, layers)


def climb(problem: Problem, cuts: Cuts) -> Cuts:
    """Improve ``cuts``, which fit: move a layer from the dearest stage to another chunk, as long as that helps."""
    left = _CLIMB_LIMIT
    best, score = cuts, _score(problem, cuts)
    improved = True
    while improved and left > 0:
        improved = False
        dearest = int(problem.stage_costs(best).argmax())
        for moved in _moves(problem, best, dearest):
            left -= 1
            new = _score(problem, moved)
            if new < score and problem.fits(moved):
                best, score, improved = moved, new, True
    return best


def _moves(problem: Problem, cuts: Cuts, stage: int) -> Iterator[Cuts]:
    """All splits in which one layer less is in a chunk of ``stage`` and one more in another chunk.

    The chunks between the two keep their number of layers and shift by one.
    """
    chunks = len(problem.stage_of)
    for giver in range(chunks):
        if problem.stage_of[giver] != stage or cuts[giver + 1] - cuts[giver] == 1:
            continue
        for taker in range(chunks):
            shifted, by = (range(giver + 1, taker + 1), -1) if giver < taker else (range(taker + 1, giver + 1), 1)
            if shifted:
                yield tuple(cut + by if place in shifted else cut for place, cut in enumerate(cuts))


def _score(problem: Problem, cuts: Cuts) -> tuple[float, float]:
    costs = problem.stage_costs(cuts).astype(float)
    return float(costs.max()), float((costs**2).sum())


def _widening(bound: int, known: int) -> list[int]:
    """Caps from ``bound`` to just below what is ``known`` to be possible, the last steps the widest."""
    gap = known - bound
    return sorted({bound + gap // 16, bound + gap // 4, known - 1} | {bound}) if gap > 0 else []


def _before(amounts: Integers) -> Integers:
    sums: Integers = np.concatenate([np.zeros((len(amounts), 1), np.int64), amounts.cumsum(axis=1)], axis=1)
    return sums


def _pairs(new: Integers, old: Integers) -> Integers:
    differences: Integers = new[None, :] - old[:, None]
    return differences
