"""Every fault once, at a moment that changes from day to day: the losses are those of one undisturbed process."""

import datetime
import random
from collections.abc import Sequence

import pytest

from tests.e2e import kit
from tests.e2e.chaos.catalog import FAULTS, Fault, Phase, volume_of
from tests.e2e.chaos.harness import strike, undisturbed
from tests.e2e.chaos.scene import Volume, stage_a_job

TODAY = datetime.datetime.now(datetime.UTC).date()

Plan = Sequence[tuple[Fault, Phase]]


def plan_of(day: int) -> Plan:
    """Each fault with a phase: the next one on the next day, so that all pairs have had their turn after some days."""
    phases = list(Phase)
    return [(fault, phases[(day + number) % len(phases)]) for number, fault in enumerate(FAULTS)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("volume", Volume)
def test_every_fault_leaves_the_losses_as_they_are(namespace: kit.Namespace, volume: Volume) -> None:
    plan = [(fault, phase) for fault, phase in plan_of(TODAY.toordinal()) if volume_of(fault, phase) == volume]
    random.Random(TODAY.toordinal()).shuffle(plan)
    print(f"{TODAY}, {volume}: {', '.join(f'{fault.name} in {phase}' for fault, phase in plan)}")
    undisturbed(1)  # once for all jobs, while none waits for it
    with stage_a_job(namespace, volume, TODAY) as scene:
        for fault, phase in plan:
            print(strike(scene, fault, phase), flush=True)
