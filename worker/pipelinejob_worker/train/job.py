"""Training a job as one of its stages: check, join, resume, train, save, leave."""

import gc
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import structlog

from pipelinejob_worker.data import Corpus, check_same_data
from pipelinejob_worker.link import AgentLink, Assignment, Divided, Joined, Part
from pipelinejob_worker.models import LayeredModel, model_of
from pipelinejob_worker.pipeline.engine import Built
from pipelinejob_worker.pipeline.group import Group, Meeting, joined, prepare_device
from pipelinejob_worker.pipeline.schedule import Schedule, build_schedule
from pipelinejob_worker.pipeline.stage import check_compiler
from pipelinejob_worker.protocol import ExitCode, Membership, Progress, WorkerConfig
from pipelinejob_worker.recovery.pulse import Doing, Pulse
from pipelinejob_worker.state import commit
from pipelinejob_worker.state.checkpoint import CheckpointStore
from pipelinejob_worker.state.commit import Resumed
from pipelinejob_worker.state.history import History
from pipelinejob_worker.state.saver import AsyncSaver
from pipelinejob_worker.train.corpus import open_corpus
from pipelinejob_worker.train.loop import StageLoop
from pipelinejob_worker.train.plan import Plan, cut
from pipelinejob_worker.train.progress import Meter
from pipelinejob_worker.train.protect import Guarding
from pipelinejob_worker.train.report import Reporter, Tracer

log = structlog.get_logger()

DAMAGE_SHOWN_SECONDS = 30.0
"""How long a damaged checkpoint is told at least: the next one may be complete before the operator asks."""


class SaveError(Exception):
    """The last state could not be saved, so the job is not done."""


class Trainer:
    """A job in this process: what outlives the group that it is trained in."""

    def __init__(self, config: WorkerConfig) -> None:
        """Check all that a stage can check alone. Raises ConfigurationError."""
        self._config = config
        self._model = model_of(config.model, documents=config.training.data.packing == "Documents")
        check_compiler(config.training)
        self._device = prepare_device()
        self._corpus: Corpus | None = None
        self._built: Built | None = None

    def run(self, assignment: Assignment, link: AgentLink, pulse: Pulse | None = None) -> ExitCode:
        """Train in one group until the last step or a drain; return SUCCEEDED or DRAINED.

        ``pulse``: where the agents recover by themselves. Raises ConfigurationError, PeerLostError, LeaveError,
        SaveError and AgentGoneError.
        """
        config, membership, part, model = self._config, assignment.membership, assignment.part, self._model
        train = config.training
        schedule = build_schedule(
            train.schedule.name,
            membership.stages,
            train.schedule.chunks_per_stage,
            train.microbatches // membership.pipelines,
        )
        store = _open_store(assignment, model)
        with joined(membership, self._device, _meeting(membership, part, link, pulse)) as group:
            self._open_corpus(group, schedule)
            if part and part.cut and part.cut.stage_of == schedule.stage_of:
                plan = Plan.kept(part.cut, schedule)
            else:
                plan = cut(config, model, schedule, group, _profile_directory(assignment))
            if part:
                link.send(Divided(cut=plan.cut(group)))
            log.info("joined the group", ranks=group.size, device=str(group.device), layers=plan.layers_of(group.stage))
            built = self._build(group, plan, keep=part is not None and part.step is not None)
            loop = StageLoop(
                train, model, schedule, plan.chunks, corpus=self._read(group, plan), group=group, built=built
            )
            guarding = None
            if part:
                assert pulse
                guarding = Guarding(config, part, link, pulse, group=group, loop=loop, layers=len(model.names))
            meter = Meter(plan.expectation(config, model, group))
            return StageJob(
                assignment,
                link,
                model=model,
                group=group,
                plan=plan,
                loop=loop,
                store=store,
                meter=meter,
                guarding=guarding,
            ).run()

    def _open_corpus(self, group: Group, schedule: Schedule) -> None:
        """Open the data where they are read and are not open yet, and see that all ranks have the same; collective."""
        reads_data = group.stage in (schedule.stage_of[0], schedule.stage_of[-1])
        self._corpus = group.together(
            lambda: self._corpus or (open_corpus(self._config, self._model) if reads_data else None)
        )
        check_same_data([row[0] for row in group.gather(self._corpus.fingerprint if self._corpus else 0)])

    def _read(self, group: Group, plan: Plan) -> Corpus | None:
        return self._corpus if plan.reads_data(group.stage) else None

    def _build(self, group: Group, plan: Plan, *, keep: bool) -> Built:
        """Build this stage's layers; with ``keep`` only if they are not there yet, for a state that is restored.

        Collective over all ranks.
        """
        if not (keep and self._built and self._built.fits(plan.schedule, plan.chunks, group.stage)):
            self._built = None
        gc.collect()  # layers that are wrapped are cycles: what is not needed any more, before others take its memory
        self._built = group.together(lambda: self._built or self._new(group, plan))
        return self._built

    def _new(self, group: Group, plan: Plan) -> Built:
        train = self._config.training
        return Built(self._model, train, plan.schedule, plan.chunks, stage=group.stage, device=group.device)


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
        guarding: Guarding | None = None,
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
        self._guarding = guarding
        # The stage that computes the loss tells it.
        self._tells_loss = group.pipeline == 0 and group.stage == plan.schedule.stage_of[-1]
        self._reporter = Reporter(link, logs=self._tells_loss, every_step=store is None)
        self._tracer = Tracer(group, Path(assignment.scratch_directory) if assignment.scratch_directory else None)
        self._saver: AsyncSaver | None = None
        self._history: History | None = None
        self._resume_problem = ""
        self._started = time.monotonic()
        self._validation: tuple[int, float] | None = None

    def run(self) -> ExitCode:
        """Go on from the agents' snapshots or from the newest checkpoint, if there are any, and train."""
        try:
            step = self._resume()
            problem = self._guarding.problem if self._guarding else ""
            self._link.send(Joined(layers=self._plan.layers_of(self._group.stage), problem=problem))
            self._report(step, now=True)
            try:
                step = self._train(step)
                if self._saver and self._saver.saved_step < step == self._config.training.steps:
                    self._save(self._saver, step, leave=True)  # it ended between the last step and its save
            finally:
                if self._history:
                    self._history.close()
            return self._end(step)
        finally:
            if self._guarding:
                self._guarding.close()

    def _train(self, step: int) -> int:
        """Train from ``step`` finished steps on; return how many are finished at the end."""
        total, resumed = self._config.training.steps, step
        leave = step == total
        while not leave:
            drain = self._link.drain_requested()
            mine = [float(drain is not None), float(drain is not None and drain.checkpoint), self._tracer.wish()]
            result = self._loop.step(step, partial(self._flags, step + 1, mine))
            step += 1
            stop, save, trace, *votes = result.flags
            votes = self._take_snapshot(step, votes, wanted=stop > 0)
            leave = step == total or (stop > 0 and self._may_leave(step))
            self._meter.step_finished(result)
            if trace:
                self._tracer.trace(step, self._loop.engine.timeline.spans())
            if self._store and self._tells_loss:
                self._keep_loss(step, result.loss)
            if step == total or not leave or not self._guarding:
                self._validate(step, leave)
            if self._saver:
                self._saver.advance(votes)
                if step == total or save > 0 or not leave:
                    self._save(self._saver, step, leave=leave)
            progress = self._report(step, now=leave or step == resumed + 1)
            self._reporter.log_step(progress, now=leave)
            if self._guarding:
                self._guarding.measure(result.seconds)
        if self._guarding:
            self._guarding.wait()
        return step

    def _flags(self, step: int, mine: Sequence[float]) -> list[float]:
        """What this rank puts into the vote that computes ``step``, beside gradients and losses."""
        snapshots = self._guarding.ballot(step) if self._guarding else ()
        return [*mine, *snapshots, *(self._saver.vote() if self._saver else ())]

    def _take_snapshot(self, step: int, votes: list[float], *, wanted: bool) -> list[float]:
        """Take a snapshot after ``step`` if the votes allow it; return those that are not about snapshots."""
        if not self._guarding or not self._guarding.protects:
            return votes
        self._guarding.after_update(step, votes[:2], wanted=wanted)
        return votes[2:]

    def _may_leave(self, step: int) -> bool:
        """Whether nothing is lost by leaving after ``step``: its snapshot is being taken, or none ever is."""
        return not self._guarding or not self._guarding.protects or self._guarding.holds(step)

    def _report(self, step: int, *, now: bool) -> Progress:
        progress = self._progress(step)
        saved = progress.last_checkpoint_step
        self._reporter.report(progress, self._guarding.status(step, saved) if self._guarding else None, now=now)
        return progress

    def _validate(self, step: int, leave: bool) -> None:
        if self._config.training.data.validation_percent and (
            leave or step % self._config.training.validate_every_steps == 0
        ):
            self._validation = (step, self._loop.validate())
            if self._tells_loss:
                log.info("validated", step=step, validation_loss=self._validation[1])

    def _keep_loss(self, step: int, loss: float) -> None:
        """Write to the history; a full volume costs lines of it, not the training."""
        try:
            self._history = self._history or History(self._directory, step - 1)
            self._history.append(step, loss)
        except OSError as error:
            log.warning("history not written", error=str(error))

    def _save(self, saver: AsyncSaver, step: int, *, leave: bool) -> None:
        """Begin a checkpoint where one is due; before leaving, wait until it is complete."""
        if not leave and step % self._config.checkpoint.every_steps:
            return
        if leave:
            saver.finish(self._group.sum)
        layers = {self._names[index]: self._loop.optimizer.layer_state(index) for index in self._loop.layers}
        saver.begin(step, layers, self._loop.numbers(), first=self._history.sync if self._history else None)
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
        """Put back the newest state there is; return how many steps are finished."""
        restored = self._assignment.part.step if self._assignment.part else None
        if restored is not None and self._guarding:
            self._guarding.restore(restored)
            resumed = Resumed(step=restored)
            saved = (
                commit.resume_beside(self._store, self._assignment.membership, self._group.sum) if self._store else None
            )
        else:
            resumed = saved = self._read_checkpoint()
        if self._store:
            assert saved
            self._resume_problem = saved.problem
            self._saver = AsyncSaver(
                self._store, self._assignment.membership, self._names, self._config.checkpoint.keep, saved
            )
        if self._guarding:
            self._guarding.begin(restored)
        step = resumed.step
        from_memory = {"source": "snapshots"} if restored is not None else {}
        log.info("resumed" if step else "no checkpoint: training starts at the beginning", step=step, **from_memory)
        return step

    def _read_checkpoint(self) -> Resumed:
        """Load the newest checkpoint, if there is one; collective."""
        if not self._store:
            return Resumed()
        optimizer = self._loop.optimizer
        shapes = {index: optimizer.layer_shapes(index) for index in self._loop.layers}
        resumed = commit.resume(self._store, self._assignment.membership, self._group.sum, self._names, shapes)
        for index, state in resumed.layers.items():
            optimizer.load_layer_state(index, state, int(resumed.extra.get("updates", resumed.step)))
        self._loop.restore_numbers(resumed.extra)
        return resumed


def _meeting(membership: Membership, part: Part | None, link: AgentLink, pulse: Pulse | None) -> Meeting | None:
    if not part or not pulse:
        return None
    pulse.move(Doing.WAITING)
    listener = link.take_listener() if membership.rank == 0 else None
    return Meeting(f"incarnation-{part.incarnation}", part.rendezvous_port, listener, pulse)


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
    if not assignment.part or assignment.part.step is None:
        # A state that is in memory is worth more than the volume, which may have filled since the job began.
        store.check_writable(assignment.membership.rank)
    return store
