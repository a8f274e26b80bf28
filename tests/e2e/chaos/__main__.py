"""Long random runs: ``make chaos SEED=7 MINUTES=30``. Every fault in every phase, in an order that the seed decides."""

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence

from tests.e2e import kit
from tests.e2e.chaos.catalog import FAULTS, Fault, Phase, volume_of
from tests.e2e.chaos.harness import Outcome, strike
from tests.e2e.chaos.scene import Volume, stage_a_job
from tests.e2e.conftest import TEXT, install_anew

FAULTS_OF_A_JOB = 12
"""After so many another job begins, so that none trains on for hours."""

Pair = tuple[Fault, Phase]


def matrix(names: Sequence[str]) -> list[Pair]:
    """Return all faults with all phases that a job can have there; ``names``: only these faults, empty for all."""
    return [(fault, phase) for fault in FAULTS for phase in Phase if not names or fault.name in names]


def jobs(pairs: Sequence[Pair], rng: random.Random) -> Iterator[tuple[Volume, list[Pair]]]:
    """Yield what to do with one job after another, for ever: rounds of all pairs, each in another order."""
    while True:
        shuffled = rng.sample(pairs, len(pairs))
        parts = []
        for volume in Volume:
            of_volume = [pair for pair in shuffled if volume_of(*pair) == volume]
            starts = range(0, len(of_volume), FAULTS_OF_A_JOB)
            parts += [(volume, of_volume[start : start + FAULTS_OF_A_JOB]) for start in starts]
        yield from rng.sample(parts, len(parts))


def run(seed: int, minutes: float, names: Sequence[str]) -> list[Outcome]:
    """Strike until the time is over; the first thing that does not hold ends it."""
    end, rng, outcomes = time.monotonic() + 60 * minutes, random.Random(seed), []
    for number, (volume, pairs) in enumerate(jobs(matrix(names), rng)):
        if time.monotonic() > end:
            break
        with kit.namespace(f"chaos-{number}") as namespace:
            namespace.text("text", TEXT)
            print(f"\njob {number} {volume}", flush=True)
            with stage_a_job(namespace, volume, f"{seed}-{number}") as scene:
                for fault, phase in pairs:
                    if time.monotonic() > end:
                        break
                    print(f"{time.strftime('%X')} {fault.name} in {phase} ...", flush=True)
                    outcomes.append(strike(scene, fault, phase))
                    print(f"         {outcomes[-1]}", flush=True)
    return outcomes


def main() -> int:
    """Run, and say with which seed to repeat it."""
    parser = argparse.ArgumentParser(prog="make chaos")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--fault", action="append", default=[], choices=[fault.name for fault in FAULTS])
    chosen = parser.parse_args()
    print(f"SEED={chosen.seed} MINUTES={chosen.minutes:g}", flush=True)
    install_anew()
    try:
        outcomes = run(chosen.seed, chosen.minutes, chosen.fault)
    except AssertionError as error:
        print(f"\nFAILED with SEED={chosen.seed}: {error}", flush=True)
        return 1
    print(f"\n{len(outcomes)} faults, every loss as undisturbed; slowest {max(o.seconds for o in outcomes):.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
