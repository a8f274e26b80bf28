"""Training a job as one of its stages: check, join, resume, train, save, leave."""

import time
from collections.abc import Callable
from pathlib import Path

import structlog

from pipelinejob_worker.link import AgentLink, Assignment, Joined
from pipelinejob_worker.models import LayeredModel, model_of
from pipelinejob_worker.pipeline.group import Group, joined, prepare_device
from pipelinejob_worker.pipeline.partition import describe, partition
from pipelinejob_worker.pipeline.schedule import bubble_limit, check_schedule
from pipelinejob_worker.protocol import ExitCode
from pipelinejob_worker.state import commit
from pipelinejob_worker.state.checkpoint import CheckpointStore
from pipelinejob_worker.state.history import History
from pipelinejob_worker.train.data import Corpus, check_same_data
from pipelinejob_worker.train.loop import StageLoop
from pipelinejob_worker.train.optimizer import layer_shapes, layer_state, load_layer_state
from pipelinejob_worker.train.progress import Meter
from pipelinejob_worker.train.report import Reporter

log = structlog.get_logger()


class SaveError(Exception):
    """The last state could not be saved, so the job is not done."""


def run(assignment: Assignment, link: AgentLink) -> ExitCode:
    """Train until the last step or a drain; return SUCCEEDED or DRAINED.

    All that a stage can check alone is checked before it joins the group.
    Raises ConfigurationError, PeerLostError, SaveError and AgentGoneError.
    """
    train, membership = assignment.config.train, assignment.membership
    model = model_of(assignment.config.model)
    stages = partition(model.costs, membership.stages)
    check_schedule(train.schedule.name, membership.stages, train.microbatches)
    device = prepare_device()
    reads_data = membership.stage in (0, membership.stages - 1)
    corpus = Corpus(train, model.context) if reads_data else None
    store = _open_store(assignment, model)
    with joined(membership, device) as group:
        log.info("joined the group", stages=group.stages, device=str(device), layers=describe(stages[group.stage]))
        check_same_data([row[0] for row in group.gather(corpus.fingerprint if corpus else 0)])
        loop = StageLoop(train, model, stages[group.stage], corpus, group)
        meter = Meter(
            train.steps,
            train.global_batch_size * model.context,
            stages,
            bubble_limit(group.stages, train.microbatches),
        )
        return StageJob(assignment, link, model=model, group=group, loop=loop, store=store, meter=meter).run()


class StageJob:
    """A stage's loop with all that it leaves behind: checkpoints, history, progress and logs."""

    def __init__(
        self,
        assignment: Assignment,
        link: AgentLink,
        *,
        model: LayeredModel,
        group: Group,
        loop: StageLoop,
        store: CheckpointStore | None,
        meter: Meter,
    ) -> None:
        self._config = assignment.config
        self._directory = Path(assignment.checkpoint_directory)
        self._link = link
        self._names = model.names
        self._group = group
        self._loop = loop
        self._layers = dict(zip(loop.module.indices, loop.module.layers, strict=True))
        self._store = store
        self._meter = meter
        self._reporter = Reporter(link, logs=group.last, every_step=store is None)
        self._saved_step = 0

    def run(self) -> ExitCode:
        """Resume from the newest checkpoint, if there is one, and train."""
        step = self._resume()
        history = History(self._directory, step) if self._store and self._group.last else None
        self._link.send(Joined(layers=describe(self._loop.module.indices)))
        self._reporter.report(self._meter.progress(step, None, self._saved_step), now=True)
        try:
            step = self._train(step, history)
        finally:
            if history:
                history.close()
        return self._end(step)

    def _train(self, step: int, history: History | None) -> int:
        """Train from ``step`` finished steps on; return how many are finished at the end."""
        total, every = self._config.train.steps, self._config.checkpoint.every_steps
        leave = step == total
        while not leave:
            result = self._loop.step(step, self._link.drain_requested())
            step += 1
            leave = result.stop or step == total
            self._meter.step_finished(result.seconds, result.busy_seconds)
            if history:
                _keep(history.append, step, result.loss)
            if self._store and (leave or step % every == 0):
                if history:
                    _keep(history.sync)
                self._save(self._store, step)
            progress = self._meter.progress(step, result.loss, self._saved_step)
            self._reporter.report(progress, now=leave)
            self._reporter.log_step(progress, now=leave)
        return step

    def _end(self, step: int) -> ExitCode:
        if step < self._config.train.steps:
            log.info("drained", step=step, last_checkpoint_step=self._saved_step)
            return ExitCode.DRAINED
        if self._store and self._saved_step < step:
            raise SaveError(
                f"spec.checkpoint.volumeClaimName: the state after the last step {step} could not be saved "
                f"to {self._directory}; allowed: a volume with space for keep + 1 checkpoints; free space on "
                f"it: the next attempt goes on from step {self._saved_step}"
            )
        log.info("finished", step=step)
        return ExitCode.SUCCEEDED

    def _resume(self) -> int:
        if not self._store:
            return 0
        shapes = {index: layer_shapes(layer) for index, layer in self._layers.items()}
        step, states = commit.resume(self._group, self._store, self._names, shapes)
        for index, state in states.items():
            load_layer_state(self._layers[index], self._loop.optimizer, state, step)
        self._saved_step = step
        log.info("resumed" if step else "no checkpoint: training starts at the beginning", step=step)
        return step

    def _save(self, store: CheckpointStore, step: int) -> None:
        started = time.monotonic()
        if commit.save(
            self._group,
            store,
            step,
            names=self._names,
            mine=self._loop.module.indices,
            state_of=lambda index: layer_state(self._layers[index], self._loop.optimizer),
            keep=self._config.checkpoint.keep,
        ):
            self._saved_step = step
            log.info("checkpoint saved", step=step, seconds=round(time.monotonic() - started, 3))


def _open_store(assignment: Assignment, model: LayeredModel) -> CheckpointStore | None:
    if not assignment.checkpoint_directory:
        return None
    store = CheckpointStore(
        Path(assignment.checkpoint_directory),
        f"{model.fingerprint} seed={assignment.config.train.seed}",
        assignment.attempt,
    )
    store.check_writable(assignment.membership.stage)
    return store


def _keep(write: Callable[..., None], *arguments: object) -> None:
    """Write to the history; a full volume costs lines of it, not the training."""
    try:
        write(*arguments)
    except OSError as error:
        log.warning("history not written", error=str(error))
