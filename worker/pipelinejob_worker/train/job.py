"""Training a job as one of its stages: check, join, resume, train, save, leave."""

import time
from collections.abc import Callable
from pathlib import Path

import structlog

from pipelinejob_worker.data import check_same_data
from pipelinejob_worker.link import AgentLink, Assignment, Joined
from pipelinejob_worker.models import LayeredModel, model_of
from pipelinejob_worker.pipeline.group import Group, joined, prepare_device
from pipelinejob_worker.pipeline.schedule import build_schedule
from pipelinejob_worker.pipeline.stage import check_compiler
from pipelinejob_worker.protocol import ExitCode, Progress
from pipelinejob_worker.state import commit
from pipelinejob_worker.state.checkpoint import CheckpointStore
from pipelinejob_worker.state.history import History
from pipelinejob_worker.state.saver import AsyncSaver
from pipelinejob_worker.train.corpus import open_corpus
from pipelinejob_worker.train.loop import StageLoop
from pipelinejob_worker.train.plan import Plan, cut
from pipelinejob_worker.train.progress import Meter
from pipelinejob_worker.train.report import Reporter, Tracer

log = structlog.get_logger()

DAMAGE_SHOWN_SECONDS = 30.0
"""How long a damaged checkpoint is told at least: the next one may be complete before the operator asks."""


class SaveError(Exception):
    """The last state could not be saved, so the job is not done."""


def run(assignment: Assignment, link: AgentLink) -> ExitCode:
    """Train until the last step or a drain; return SUCCEEDED or DRAINED.

    All that a stage can check alone is checked before it joins the group.
    Raises ConfigurationError, PeerLostError, SaveError and AgentGoneError.
    """
    config, membership = assignment.config, assignment.membership
    train = config.training
    model = model_of(config.model, documents=train.data.packing == "Documents")
    schedule = build_schedule(
        train.schedule.name,
        membership.stages,
        train.schedule.chunks_per_stage,
        train.microbatches // membership.pipelines,
    )
    check_compiler(train)
    device = prepare_device()
    store = _open_store(assignment, model)
    with joined(membership, device) as group:
        reads_data = group.stage in (schedule.stage_of[0], schedule.stage_of[-1])
        corpus = group.together(lambda: open_corpus(config, model) if reads_data else None)
        check_same_data([row[0] for row in group.gather(corpus.fingerprint if corpus else 0)])
        plan = cut(config, model, schedule, group, _profile_directory(assignment))
        log.info("joined the group", ranks=group.size, device=str(device), layers=plan.layers_of(group.stage))
        loop = StageLoop(train, model, schedule, plan.chunks, corpus=corpus, group=group)
        meter = Meter(plan.expectation(config, model, group))
        return StageJob(
            assignment, link, model=model, group=group, plan=plan, loop=loop, store=store, meter=meter
        ).run()


class StageJob:
    """A stage's loop with all that it leaves behind: checkpoints, history, progress, traces and logs."""

    def __init__(
        self,
        assignment: Assignment,
        link: AgentLink,
        *,
        model: LayeredModel,
        group: Group,
        plan: Plan,
        loop: StageLoop,
        store: CheckpointStore | None,
        meter: Meter,
    ) -> None:
        self._assignment = assignment
        self._config = assignment.config
        self._directory = Path(assignment.checkpoint_directory)
        self._link = link
        self._names = model.names
        self._group = group
        self._plan = plan
        self._loop = loop
        self._store = store
        self._meter = meter
        # The stage that computes the loss tells it.
        self._tells_loss = group.pipeline == 0 and group.stage == plan.schedule.stage_of[-1]
        self._reporter = Reporter(link, logs=self._tells_loss, every_step=store is None)
        self._tracer = Tracer(group, Path(assignment.scratch_directory) if assignment.scratch_directory else None)
        self._saver: AsyncSaver | None = None
        self._resume_problem = ""
        self._started = time.monotonic()
        self._validation: tuple[int, float] | None = None

    def run(self) -> ExitCode:
        """Resume from the newest checkpoint, if there is one, and train."""
        step = self._resume()
        history = History(self._directory, step) if self._store and self._tells_loss else None
        self._link.send(Joined(layers=self._plan.layers_of(self._group.stage)))
        self._reporter.report(self._progress(step), now=True)
        try:
            step = self._train(step, history)
        finally:
            if history:
                history.close()
        return self._end(step)

    def _train(self, step: int, history: History | None) -> int:
        """Train from ``step`` finished steps on; return how many are finished at the end."""
        total = self._config.training.steps
        leave = step == total
        while not leave:
            votes = self._saver.vote() if self._saver else []
            result = self._loop.step(step, [float(self._link.drain_requested()), self._tracer.wish(), *votes])
            stop, trace, *saver_votes = result.flags
            step += 1
            leave = stop > 0 or step == total
            self._meter.step_finished(result)
            if trace:
                self._tracer.trace(step, self._loop.engine.timeline.spans())
            if history:
                _keep(history.append, step, result.loss)
            self._validate(step, leave)
            if self._saver:
                self._saver.advance(saver_votes)
                self._save(self._saver, step, history, leave=leave)
            progress = self._progress(step)
            self._reporter.report(progress, now=leave)
            self._reporter.log_step(progress, now=leave)
        return step

    def _validate(self, step: int, leave: bool) -> None:
        if self._config.training.data.validation_percent and (
            leave or step % self._config.training.validate_every_steps == 0
        ):
            self._validation = (step, self._loop.validate())
            if self._tells_loss:
                log.info("validated", step=step, validation_loss=self._validation[1])

    def _save(self, saver: AsyncSaver, step: int, history: History | None, *, leave: bool) -> None:
        """Begin a checkpoint where one is due; before leaving, wait until it is complete."""
        if not leave and step % self._config.checkpoint.every_steps:
            return
        if leave:
            saver.finish(self._group.sum)
        layers = {self._names[index]: self._loop.optimizer.layer_state(index) for index in self._loop.layers}
        saver.begin(step, layers, self._loop.numbers(), first=history.sync if history else None)
        if leave:
            saver.finish(self._group.sum)

    def _progress(self, step: int) -> Progress:
        saver, validation = self._saver, self._validation
        recent = time.monotonic() - self._started < DAMAGE_SHOWN_SECONDS
        problem = (saver.problem if saver else "") or (self._resume_problem if recent else "")
        return self._meter.progress(step).model_copy(
            update={
                "last_checkpoint_step": saver.saved_step if saver else 0,
                "checkpoint_problem": problem,
                "checkpoint_damaged": bool(problem) and problem == self._resume_problem,
                "validation_step": validation[0] if validation else 0,
                "validation_loss": validation[1] if validation else None,
            }
        )

    def _end(self, step: int) -> ExitCode:
        saved_step = self._saver.saved_step if self._saver else 0
        if step < self._config.training.steps:
            log.info("drained", step=step, last_checkpoint_step=saved_step)
            return ExitCode.DRAINED
        if self._saver and saved_step < step:
            raise SaveError(
                f"spec.checkpoint.volumeClaimName: the state after the last step {step} could not be saved "
                f"to {self._directory}: {self._saver.problem}; allowed: a volume with space for keep + 1 checkpoints; "
                f"free space on it: the next attempt goes on from step {saved_step}"
            )
        log.info("finished", step=step)
        return ExitCode.SUCCEEDED

    def _resume(self) -> int:
        if not self._store:
            return 0
        membership, optimizer = self._assignment.membership, self._loop.optimizer
        shapes = {index: optimizer.layer_shapes(index) for index in self._loop.layers}
        resumed = commit.resume(self._store, membership, self._group.sum, self._names, shapes)
        step = resumed.step
        for index, state in resumed.layers.items():
            optimizer.load_layer_state(index, state, int(resumed.extra.get("updates", step)))
        self._loop.restore_numbers(resumed.extra)
        self._resume_problem = resumed.problem
        self._saver = AsyncSaver(self._store, membership, self._names, self._config.checkpoint.keep, resumed)
        log.info("resumed" if step else "no checkpoint: training starts at the beginning", step=step)
        return step


def _profile_directory(assignment: Assignment) -> Path | None:
    """Where measured layers are kept: on the volume, which outlives the pods, if there is one."""
    directory = assignment.checkpoint_directory or assignment.scratch_directory
    return Path(directory) / "profiles" if directory else None


def _open_store(assignment: Assignment, model: LayeredModel) -> CheckpointStore | None:
    if not assignment.checkpoint_directory:
        return None
    store = CheckpointStore(
        Path(assignment.checkpoint_directory),
        f"{model.fingerprint} seed={assignment.config.training.seed}",
        assignment.attempt,
    )
    store.check_writable(assignment.membership.rank)
    return store


def _keep(write: Callable[..., None], *arguments: object) -> None:
    """Write to the history; a full volume costs lines of it, not the training."""
    try:
        write(*arguments)
    except OSError as error:
        log.warning("history not written", error=str(error))
