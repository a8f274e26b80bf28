"""A stage's snapshots in its agent's memory: taken after steps, and where a recovered stage goes on from."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import structlog
import torch

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.link import AgentLink, Part, Valid
from pipelinejob_worker.pipeline.group import Group
from pipelinejob_worker.protocol import ProtectionStatus, WorkerConfig
from pipelinejob_worker.recovery.pieces import Piece, complete_layers
from pipelinejob_worker.recovery.protection import interval
from pipelinejob_worker.recovery.pulse import Doing, Pulse
from pipelinejob_worker.recovery.session import Session
from pipelinejob_worker.recovery.slots import SlotStore
from pipelinejob_worker.recovery.tensors import Snapshots, load
from pipelinejob_worker.state.layout import Tensors
from pipelinejob_worker.train.loop import StageLoop

log = structlog.get_logger()

FIRST_MEASURE_STEPS, MEASURE_STEPS = 4, 32
"""After how many steps of an incarnation, doubled up to the second number and then as often as that, the interval
between snapshots is found out anew: the first steps are the slow ones, and with them snapshots seem cheap."""

_NUMBERS = "numbers."

State = Mapping[Piece, Tensors]


def measures_after(steps: int) -> bool:
    """Whether the interval is found out anew after so many steps of an incarnation."""
    return steps % MEASURE_STEPS == 0 or (steps >= FIRST_MEASURE_STEPS and steps.bit_count() == 1)


class Guarding:
    """The snapshots of one stage in one incarnation. All ranks call every method at the same step."""

    def __init__(
        self,
        config: WorkerConfig,
        part: Part,
        link: AgentLink,
        pulse: Pulse,
        *,
        group: Group,
        loop: StageLoop,
        layers: int,
    ) -> None:
        """``layers``: number of layers of the model. Collective over all ranks."""
        self._link = link
        self._group = group
        self._loop = loop
        self._store = SlotStore(Path(part.directory), config.job_uid, part.memory_bytes)
        self._pinned = config.recovery.snapshot_every_steps
        self._steps = 0
        self._step_seconds: list[float] = []
        self._snapshots: Snapshots | None = None
        self._session: Session[State] | None = None
        self._part = part
        self._pulse = pulse
        self._layers = layers
        self.problem = ""
        """Why there are no snapshots, empty if there are."""

    def restore(self, step: int) -> None:
        """Go on from the plan's ``step``: wait until the agent has this rank's pieces, and load them.

        Raises SlotMissingError and SlotDamagedError, which make the next attempt take another holder.
        """
        self._link.wait_fetched(lambda: self._pulse.move(Doing.WAITING))
        self._group.computing()
        held = [each.piece for each in self._store.held() if each.step == step and not each.copied]
        shares = complete_layers(held)
        numbers: dict[str, float] = {}
        optimizer = self._loop.optimizer
        for layer in self._loop.layers:
            state: dict[str, torch.Tensor] = {}
            for share in range(shares.get(layer, 1)):
                state |= load(self._store, Piece(layer, share, shares.get(layer, 1)), step)
            numbers |= {key: state.pop(key).item() for key in list(state) if key.startswith(_NUMBERS)}
            optimizer.load_layer_state(layer, state, int(numbers[f"{_NUMBERS}updates"]))
        self._loop.restore_numbers({key.removeprefix(_NUMBERS): value for key, value in numbers.items()})
        self._link.send(Valid(step=step))

    def begin(self, restored: int | None) -> None:
        """Take snapshots from now on, unless a rank has no room for them; collective.

        ``restored``: the step that ``restore`` has loaded.
        """
        try:
            self._snapshots = Snapshots(
                self._store, self._part.incarnation, self._layers, self._state(), self._note_valid
            )
        except ConfigurationError as error:
            self.problem = str(error)
        fits = [row[0] for row in self._group.gather(int(self._snapshots is not None))]
        if all(fits):
            assert self._snapshots
            self._session = Session(
                self._snapshots, restored=restored, interval=self._pinned or 1, wait_guarded=self._wait_guarded
            )
            return
        self.problem = (
            self.problem or f"spec.recovery: the snapshots of rank {fits.index(0)} do not fit into its memory"
        )
        log.warning("training goes on without snapshots", problem=self.problem)
        self.close()

    @property
    def protects(self) -> bool:
        """Whether there are snapshots; the same on all ranks."""
        return self._session is not None

    def ballot(self, step: int) -> tuple[float, ...]:
        """What to vote in the vote that computes ``step``; the weights may change afterwards."""
        return self._session.ballot(step) if self._session else ()

    def after_update(self, step: int, votes: Sequence[float], *, wanted: bool) -> None:
        """Take a snapshot of the state after ``step`` steps, if it is due or ``wanted``, and the vote allows it."""
        if self._session:
            not_own, not_guarded = votes
            self._session.after_update(step, not_own, not_guarded, self._state(), wanted=wanted)

    def holds(self, step: int) -> bool:
        """Whether every rank keeps, or is about to keep, the state after ``step`` steps; the same on all ranks."""
        return self._session is not None and self._session.protection.snapshot == step

    def measure(self, seconds: float) -> None:
        """Note how long a step took, and now and then choose how often to take snapshots; collective then."""
        if self._session is None or self._snapshots is None:
            return
        self._steps += 1
        self._step_seconds = [*self._step_seconds, seconds][-MEASURE_STEPS:]
        if not self._pinned and measures_after(self._steps):
            mine = (min(self._step_seconds), self._snapshots.seconds, self._link.copy_seconds)
            rows = self._group.gather(*(int(1e6 * value) for value in mine))
            steps, snapshots, copies = ([value / 1e6 for value in column] for column in zip(*rows, strict=True))
            chosen = interval(steps, snapshots, copies)
            self._session.protection = replace(self._session.protection, interval=chosen)

    def status(self, step: int, saved_step: int) -> ProtectionStatus:
        """How well the state after ``step`` steps is kept; ``saved_step``: that of the newest checkpoint."""
        if self._session is None or self._snapshots is None:
            return ProtectionStatus(at_risk_steps=step - saved_step, problem=self.problem)
        protection = self._session.protection
        share = None
        if self._step_seconds:
            share = 100 * self._snapshots.seconds / (protection.interval * max(min(self._step_seconds), 1e-9))
        return ProtectionStatus(
            step=protection.snapshot or 0,
            guarded_step=protection.guarded or 0,
            interval_steps=protection.interval,
            at_risk_steps=step - max(protection.guarded or 0, saved_step),
            cost_percent=share,
            problem="the copies are late: snapshots are in this pod only" if protection.unprotected else "",
        )

    def wait(self) -> None:
        """Wait until the newest snapshot is complete."""
        if self._snapshots:
            self._snapshots.wait()

    def close(self) -> None:
        """End the thread, after the snapshot that it takes."""
        if self._snapshots:
            self._snapshots.close()

    def _state(self) -> State:
        """The live tensors of this rank's share of its layers, each with what must be known beside them."""
        numbers = {
            f"{_NUMBERS}{key}": torch.tensor(value, dtype=torch.float64) for key, value in self._loop.numbers().items()
        }
        group = self._group
        return {
            Piece(layer, group.pipeline, group.pipelines): self._loop.optimizer.layer_state(layer) | numbers
            for layer in self._loop.layers
        }

    def _note_valid(self, step: int) -> None:
        self._link.send(Valid(step=step))

    def _wait_guarded(self, step: int, seconds: float) -> bool:
        return self._link.wait_guarded(step, seconds, lambda: self._pulse.must_leave)
