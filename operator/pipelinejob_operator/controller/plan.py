"""The brain: from one look at a job to what must be done about it. Pure; time is an argument.

The order of the questions is the order of their weight: is it finished, may it run, has it ended, must it
end, should it stop, did a stage fail, is the gang the right one, may the next gang come; and only then: what
does the gang lack.

The present gang is *retired* by raising ``status.attempt``, and only that: it is written before anything is
deleted, so an operator that dies in between finds its intent. Pods of another attempt than the present one
are always deleted.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from pipelinejob_operator.api.status import Condition, Status
from pipelinejob_operator.build.installation import Installation
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.membership import shape_of
from pipelinejob_operator.controller import gang as gang_plan
from pipelinejob_operator.controller import ladder, serving, spares
from pipelinejob_operator.controller.actions import Action, ApplyObject, DeleteJob, DeletePod, NoteRelease
from pipelinejob_operator.controller.decision import Decision
from pipelinejob_operator.controller.observed import Gang, Observed
from pipelinejob_operator.controller.status import Draft, rfc3339
from pipelinejob_operator.controller.transitions import Notice, notices
from pipelinejob_operator.policy import acceptance, delegation, failure, lifecycle, release, restart, retention, shapes
from pipelinejob_operator.policy.facts import Failure, StagePod, parse_time
from pipelinejob_operator.policy.reasons import ConditionType, Reason, Verdict
from pipelinejob_worker.protocol import ExitCode


@dataclass(frozen=True)
class Plan:
    """What to do, what to tell, and when to look again without being woken."""

    status: Status
    actions: tuple[Action, ...] = ()
    notices: tuple[Notice, ...] = ()
    look_again_at: datetime | None = None
    irreversible: bool = False
    """Whether the plan deletes or gives up something, so that it must rest on a fresh read."""


def plan(job: Job, seen: Observed, now: datetime, installation: Installation) -> Plan:
    """Decide everything about a job at one moment."""
    if job.deleting:
        return Plan(job.status)  # its objects go with it, by their owner references
    if lifecycle.finished(job.status.conditions):
        return _after_the_end(job, seen, now, installation)
    decided = _active(Decision(job, seen, now, installation))
    decided.actions = serving.makeable(decided.actions, seen)
    decided.actions = gang_plan.asked_first(decided.actions, seen)
    if seen.source_problem:
        decided.alarms.append(now + gang_plan.SOURCE_PATIENCE)
    if job.spec.serve:
        decided.actions += serving.idle_fronts(job, seen, decided.draft, installation)
        serving.tell(job, seen, decided.draft)
        decided.alarms += serving.alarms(job, seen, decided.draft, now)
    status = decided.draft.finish()
    retired = status.attempt != job.status.attempt
    return Plan(
        status=status,
        actions=tuple(decided.actions),
        notices=tuple(notices(job.status, status)),
        look_again_at=min(decided.alarms, default=None),
        irreversible=retired
        or decided.irreversible
        or lifecycle.finished(status.conditions)
        or any(isinstance(action, DeletePod | DeleteJob) for action in decided.actions),
    )


def _active(d: Decision) -> Decision:
    """Ask what may end or stop an unfinished job; what passes all of it shall live."""
    verdict, refused = _verdict(d.job, d.seen), None
    group = d.job.status.group
    if verdict and group and d.gang.recovers and d.job.shape != shape_of(group):
        # Only the shape can have changed since it was accepted: the stages train on in the one that they have.
        refused = Verdict(verdict.reason, f"{verdict.message}; the job runs on with {shape_of(group)}")
        d.keep_shape(shape_of(group))
        verdict = _verdict(d.job, d.seen)
    job, status = d.job, d.job.status
    d.draft.gang(d.gang, serving.progress(d.seen))
    if d.seen.located:
        d.draft.located(d.seen.located)
    d.draft.last_words(d.seen.pods)
    d.draft.condition(ConditionType.SUCCEEDED, "Unknown", Reason.ACTIVE, "the job has not finished")
    if verdict:
        return _refuse(d, verdict)
    if refused:
        d.say(ConditionType.ACCEPTED, refused.reason, refused.message)
    else:
        d.draft.condition(ConditionType.ACCEPTED, "True", Reason.VALID, "the spec can run")

    if job.spec.mode != "Serve" and lifecycle.succeeded(d.gang.current, d.gang.shape.size):
        return _succeed(d)
    if (deadline := lifecycle.deadline(job.spec, status)) is not None:
        if d.now >= deadline:
            limit = job.spec.active_deadline_seconds
            message = f"active since {status.start_time} for more than activeDeadlineSeconds {limit}"
            return d.fail(Reason.DEADLINE_EXCEEDED, message)
        d.alarms.append(deadline)
    return _suspend(d) if job.spec.suspend else _live(d)


def _verdict(job: Job, seen: Observed) -> Verdict | None:
    known = shapes.known_layers([item.layers for item in job.status.stages])
    size = len(job.config().to_json().encode())
    model = job.source.model if job.source else None
    return acceptance.check(acceptance.Case(job.spec, job.template, seen.claim, size, model, known))


def _live(d: Decision) -> Decision:
    """Keep a wanted job alive: answer failures, replace the gang, or tend it."""
    job, status = d.job, d.job.status
    d.say(ConditionType.SUSPENDED, Reason.NOT_SUSPENDED, "spec.suspend is not set")
    if status.start_time is None:
        d.draft.set(start_time=rfc3339(d.now))

    if d.gang.recovers and not _gives_in(d.gang):
        return d if _next_gang_waits(d) or _hindered(d) else ladder.live(d)
    if any(pod.place.shape != job.shape for pod in d.gang.current.values()):
        d.retire()
        d.down(Reason.REPLACING, f"the gang is replaced to run {job.shape}")
        return d
    if gang_plan.opened(d.gang, status):
        if _taken_back(d):
            return d
        if finding := _first_failure(d):
            return _answer(d, finding)
    if _next_gang_waits(d):
        return d
    return _tend(d)


def _taken_back(d: Decision) -> bool:
    """Release a gang of which a stage does not get the node that was planned for it; whether that is so."""
    if not d.gang.complete(d.job.shape.size):
        return False
    timeout = timedelta(seconds=d.job.spec.placement.provision_timeout_seconds)
    verdict = release.judge(d.gang.current.values(), timeout, d.now)
    if verdict.look_again_at:
        d.alarms.append(verdict.look_again_at)
    if not verdict.pods:
        return False
    d.actions.append(NoteRelease(verdict.avoid))
    d.retire()
    d.down(Reason.REPLANNING, f"{verdict.why}; all stages are taken back and planned anew")
    return True


def _gives_in(gang: Gang) -> bool:
    """Whether an agent has ended because it lost a peer: it is too old to wait for one, so the gang goes as a whole."""
    return any(pod.ended and pod.ended.exit_code == ExitCode.PEER_LOST for pod in gang.current.values())


def _first_failure(d: Decision) -> failure.Finding | None:
    job = d.job
    look = failure.Look(
        job=job.name,
        shape=d.gang.shape,
        attempt=job.status.attempt,
        protocol=job.runs_agent,
        unready_nodes=d.seen.unready_nodes,
        now=d.now,
    )
    return failure.first(d.gang.current, look)


def _refuse(d: Decision, verdict: Verdict) -> Decision:
    """Nothing runs under a spec that is not accepted; what ran before is stopped."""
    d.say(ConditionType.ACCEPTED, verdict.reason, verdict.message)
    d.say(ConditionType.SUSPENDED, Reason.NOT_SUSPENDED, "spec.suspend is not set")
    d.down(Reason.NOT_ACCEPTED, "see the condition Accepted")
    if d.seen.claim:
        d.alarms.append(d.now + gang_plan.LONGEST_PATIENCE)  # another claim of that name may take its place
    if d.gang.current:
        d.retire()
    d.delete(d.gang.others)
    return d


def unreadable(job: Job, problem: str, now: datetime) -> Plan:
    """Refuse a spec that the models cannot read: it came past the schema of another version of the CRD."""
    draft = Draft(job, now)
    draft.condition(ConditionType.ACCEPTED, "False", Reason.INVALID_SPEC, problem)
    status = draft.finish()
    return Plan(status, notices=tuple(notices(job.status, status)))


def _succeed(d: Decision) -> Decision:
    d.draft.condition(
        ConditionType.SUCCEEDED,
        "True",
        Reason.ALL_STAGES_SUCCEEDED,
        f"all {d.job.shape.size} stages succeeded",
    )
    return d.end()


def _suspend(d: Decision) -> Decision:
    d.draft.set(start_time=None)
    if d.seen.fronts and d.seen.fronts.pods and d.gang.current:
        message = "spec.suspend is set; the fronts end the requests that they have accepted"
        d.say(ConditionType.SUSPENDED, Reason.STOPPING, message)
        d.say(ConditionType.RUNNING, Reason.STOPPING, message)
        return d
    message = "spec.suspend is set; the stage pods are on their way out" + _lost_progress(d)
    if ladder.suspend(d):
        d.say(ConditionType.SUSPENDED, Reason.STOPPING, message)
        d.say(ConditionType.RUNNING, Reason.STOPPING, message)
        return d
    if d.gang.current:
        d.retire()
    d.delete(d.gang.others)
    spares.release(d)
    if d.seen.pods or d.seen.spares:
        d.say(ConditionType.SUSPENDED, Reason.STOPPING, message)
        d.down(Reason.STOPPING, message)
    else:
        d.draft.condition(
            ConditionType.SUSPENDED, "True", Reason.SUSPENDED, "spec.suspend is set; no stage pod is left"
        )
        d.down(Reason.SUSPENDED, "spec.suspend is set")
    return d


def _lost_progress(d: Decision) -> str:
    """Warn that a job without a volume begins anew: memory goes with the pods."""
    if d.job.spec.checkpoint.volume_claim_name or not (d.job.runs_agent and d.job.spec.train):
        return ""
    return "; without spec.checkpoint.volumeClaimName nothing is saved, so a resume begins at step 0"


def _answer(d: Decision, finding: failure.Finding) -> Decision:
    """Do what a failure asks for."""
    status, first = d.job.status, finding.failure
    words = first.sentence()
    match finding.answer:
        case failure.Answer.WAIT:
            assert finding.recheck_at is not None
            d.alarms.append(finding.recheck_at)
            gang_plan.observe_placement(d)
            if finding.draining:
                d.say(ConditionType.RUNNING, Reason.DRAINING, f"the pod of {first.place} is being deleted")
            else:
                d.say(
                    ConditionType.RUNNING,
                    Reason.FAILURE_SEEN,
                    "stages lost a peer; waiting for the cause to show",
                )
            return d
        case failure.Answer.REPLACE:
            d.retire()
            d.down(
                Reason.REPLACING,
                f"{first.place} on node {first.node} was asked to leave; the gang moves on",
            )
            return d
        case failure.Answer.FAIL:
            d.draft.failed_stage(first, status.consecutive_restarts)
            return d.fail(Reason.INVALID_CONFIGURATION, words)
        case failure.Answer.RESTART:
            return _restart(d, first, words)


def _restart(d: Decision, first: Failure, words: str) -> Decision:
    status, recovery = d.job.status, d.job.spec.recovery
    times = [time for text in status.restart_times if (time := parse_time(text))]
    if not restart.allowed(times, recovery, d.now):
        d.draft.failed_stage(first, status.consecutive_restarts)
        budget = f"{recovery.max_restarts} restarts within {recovery.window_seconds} s are spent"
        return d.fail(Reason.RESTART_BUDGET_SPENT, f"{words} ({budget}; see spec.recovery)")
    in_a_row = restart.in_a_row(status.consecutive_restarts, status.first_failure, first, status.progress.step)
    d.draft.failed_stage(first, in_a_row)
    d.retire()
    # The API keeps whole seconds: the next one, so that the back-off is never shorter than it says.
    moment = d.now.replace(microsecond=0) + timedelta(seconds=bool(d.now.microsecond))
    kept = [*restart.recent(times, recovery, d.now), moment][-restart.KEPT_TIMES :]
    d.draft.set(restarts=status.restarts + 1, restart_times=[rfc3339(time) for time in kept])
    wait = restart.delay(in_a_row).seconds
    d.down(Reason.RESTARTING, f"restart {status.restarts + 1} after {wait} s, because {words}")
    return d


def _next_gang_waits(d: Decision) -> bool:
    """Whether the next gang must wait for the last one to be gone, or for the back-off to be over."""
    status = d.job.status
    d.delete(pod for pod in d.gang.others if not d.gang.recovers or pod.attempt != status.attempt)
    if d.gang.current or status.group:
        return False
    reason = Reason.RESTARTING if status.consecutive_restarts else Reason.REPLACING
    if alive := [pod for pod in d.gang.others if pod.attempt != status.attempt and not _given_up(pod, d)]:
        d.alarms += [pod.gone_by + failure.OVERDUE for pod in alive if pod.gone_by]
        _keep_or(d, reason, f"the pods of the last attempt are on their way out, such as {alive[0].name}")
        return True
    if status.restart_times and (last := parse_time(status.restart_times[-1])):
        due = last + restart.delay(status.consecutive_restarts)
        if d.now < due:
            d.alarms.append(due)
            _keep_or(d, reason, f"waiting until {rfc3339(due)} before the next attempt")
            return True
    return False


def _given_up(pod: StagePod, d: Decision) -> bool:
    """Whether a pod of the past need not be waited for: its node is dead, or its kubelet does not answer."""
    if pod.gone_by is None:
        return False
    return pod.node in d.seen.unready_nodes or d.now >= pod.gone_by + failure.OVERDUE


def _keep_or(d: Decision, reason: Reason, message: str) -> None:
    """Keep the words that told why the gang is replaced, where they still stand; else say ``message``."""
    running = _condition(d.job.status, ConditionType.RUNNING)
    if running is None or running.reason not in (Reason.RESTARTING, Reason.REPLACING, Reason.REPLANNING):
        d.down(reason, message)


def _condition(status: Status, kind: ConditionType) -> Condition | None:
    return next((item for item in status.conditions if item.type == kind), None)


def _hindered(d: Decision) -> bool:
    """Whether a gang that has not been complete yet cannot be made now."""
    if d.job.status.group or gang_plan.opened(d.gang, d.job.status) or not (hindrance := _hindrance(d)):
        return False
    d.delete(d.gang.current.values())
    d.down(*hindrance)
    return True


def _tend(d: Decision) -> Decision:
    """Bring the present gang to life, or watch it live."""
    if _hindered(d):
        return d
    if d.seen.refusal and any(pod.gate is not None for pod in d.gang.current.values()):
        d.retire()  # half of it is open: it holds what another job could use
        d.down(d.seen.refusal.reason, d.seen.refusal.message)
        return d
    if d.seen.unplaced:
        d.alarms.append(d.seen.unplaced.retry_at)
    todo = gang_plan.actions(d.job, d.gang, d.seen, d.installation)
    if d.seen.network_due and not any(isinstance(action, ApplyObject) for action in todo):
        d.actions += [ApplyObject(manifest) for manifest in gang_plan.standing(d.job, d.seen, d.installation)]
    d.actions += todo
    gang_plan.observe_placement(d)
    d.draft.condition(ConditionType.RUNNING, *gang_plan.running(d.gang, d.job.shape.size))
    return d


def _hindrance(d: Decision) -> Verdict | None:
    """What keeps the pods from being made: then none may stand, so that no half gang holds anything."""
    if d.seen.source_problem:
        return d.seen.source_problem
    if d.seen.claim_missing:
        placed = _condition(d.job.status, ConditionType.PLACED)
        since = parse_time(placed.last_transition_time) if placed else None
        d.alarms.append(d.now + gang_plan.patience(since, d.now))
        name = d.job.claim_name
        source = d.job.source
        field = f"spec.model.fromJob.name: {source.name}'s" if source else "spec.checkpoint.volumeClaimName:"
        return Verdict(
            Reason.VOLUME_CLAIM_NOT_FOUND,
            f'{field} claim "{name}" does not exist in namespace "{d.job.namespace}"; '
            "create it (the job looks again by itself), or delete the job and leave the name empty to run without "
            "checkpoints",
        )
    if verdict := delegation.hindrance(
        d.job.spec.placement, served=d.seen.scheduler_served, allowed=d.installation.schedulers
    ):
        d.alarms.append(d.now + gang_plan.LONGEST_PATIENCE)
        return verdict
    if d.seen.unfit_levels:
        d.alarms.append(d.now + gang_plan.LONGEST_PATIENCE)
        return Verdict(Reason.UNFIT_LEVELS, d.seen.unfit_levels)
    if no := d.seen.hopeless or d.seen.refusal:
        d.alarms.append(no.retry_at)
        why = gang_plan.tied(d.seen.claim, d.job.shape.size) if d.seen.hopeless else ""
        return Verdict(no.reason, no.message + why)
    return None


def _after_the_end(job: Job, seen: Observed, now: datetime, installation: Installation) -> Plan:
    """A finished job: clean up, and delete it when its time has come. Its status stays as it is."""
    if (due := retention.delete_at(job.spec, job.status)) is not None and now >= due:
        return Plan(job.status, (DeleteJob(),), irreversible=True)
    ended = retention.pods_to_delete(job.spec, seen.pods)
    deletions = tuple(DeletePod(pod) for pod in (*ended, *(spare for spare in seen.spares if not spare.terminating)))
    fronts = tuple(serving.no_fronts(job, seen, installation))
    return Plan(job.status, (*deletions, *fronts), look_again_at=due, irreversible=bool(deletions))
