"""A job whose agents recover by themselves: what the operator adds to that, one look at a time. Pure.

What must not be done twice is first written into the status, and done at the next look: a failure is counted and its
stage's ``replacement`` raised, then the pod is made; the group of the next epoch is written, then the memberships. So
an operator that dies in between finds its intent, and what the agents do meanwhile needs no operator.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

from pipelinejob_operator.api.status import StageStatus
from pipelinejob_operator.build.delegation import KUEUE_QUEUE
from pipelinejob_operator.build.place import Place
from pipelinejob_operator.controller import crew, spares
from pipelinejob_operator.controller import gang as gang_plan
from pipelinejob_operator.controller import group as group_plan
from pipelinejob_operator.controller.actions import NoteRelease
from pipelinejob_operator.controller.decision import Decision
from pipelinejob_operator.controller.observed import Key, key_of
from pipelinejob_operator.controller.progress import last_recovery, protected, protection
from pipelinejob_operator.controller.status import rfc3339
from pipelinejob_operator.policy import avoidance, recovery, release, restart
from pipelinejob_operator.policy.facts import Failure, parse_time
from pipelinejob_operator.policy.reasons import ConditionType, Reason
from pipelinejob_operator.policy.recovery import Rung, Setback


def live(d: Decision) -> Decision:
    """Answer failures, then bring the group to what is wanted: pods, places, memberships, spares."""
    told(d)
    group = d.job.status.group
    if group and group.stopping_since:
        d.retire()
        d.down(Reason.REPLACING, "the stages stopped for spec.suspend, which has been taken back; they start anew")
        return d
    if found := _setbacks(d):
        return _answer(d, found)
    if group and _whole(d) and d.gang.shape != d.job.shape:
        d.retire()
        d.down(Reason.REPLACING, f"the gang is replaced to run {d.job.shape}")
        return d
    if group_plan.change(d):
        return d
    crew.fill(d)
    group_plan.tell(d)
    spares.tend(d)
    d.delete(d.gang.others)
    crew.observe(d)
    return d


def told(d: Decision) -> None:
    """Copy what the agents tell of recovery."""
    window = timedelta(seconds=d.job.spec.recovery.window_seconds)
    d.draft.set(avoided_nodes=avoidance.unexpired(d.job.status.avoided_nodes, d.now, window))
    if agent := d.seen.agent:
        d.draft.set(last_recovery=last_recovery(agent) or d.job.status.last_recovery)
        if d.job.spec.mode == "Train":  # what serves has no state to protect: fronts hold the requests
            d.draft.set(protection=protection(agent))
            d.draft.condition(ConditionType.PROTECTED, *protected(agent))


def look(d: Decision) -> recovery.Look:
    """What the ladder is climbed by, beside the pods."""
    agent = d.seen.agent
    return recovery.Look(
        now=d.now,
        unready_nodes=d.seen.unready_nodes,
        node_conditions=d.seen.node_conditions,
        group_runs=d.seen.agent_fresh and agent is not None and agent.state == "Running",
        rules=d.job.spec.recovery.rules,
    )


def _whole(d: Decision) -> bool:
    """Whether pods come and go as one gang only: Kueue admits no single ones to it."""
    return gang_plan.delegate(d.job, d.seen, d.installation) is KUEUE_QUEUE


def _setbacks(d: Decision) -> list[Setback]:
    """What is wrong with a stage, and not answered yet."""
    if not (d.job.status.group or gang_plan.opened(d.gang, d.job.status)):
        return []
    before, at = _before(d), look(d)
    members = [(place, d.gang.current.get(place.rank)) for place in d.gang.shape.places()]
    found = [one for place, pod in members if (one := recovery.setback(place, pod, before[key_of(place)], at))]
    joiners = [
        one for place, pod in d.gang.joining.items() if (one := recovery.setback(place, pod, before[key_of(place)], at))
    ]
    # A pod that has not trained yet costs nobody anything, unless it says that it never will.
    found += [one if one.rung is Rung.FAIL else _uncounted(one) for one in joiners]
    return [*found, *_of_records(d, at)] or _unplaced(d)


def _unplaced(d: Decision) -> list[Setback]:
    """Pods that do not get the nodes that were planned for them: they are planned anew, alone or with a whole gang."""
    timeout = timedelta(seconds=d.job.spec.placement.provision_timeout_seconds)
    pods = [*d.gang.current.values(), *(pod for pod in d.gang.joining.values() if pod)]
    verdict = release.judge(pods, timeout, d.now)
    if verdict.look_again_at:
        d.alarms.append(verdict.look_again_at)
    if verdict.pods:
        d.actions.append(NoteRelease(verdict.avoid))
    return [
        Setback(
            Rung.POD,
            Failure(pod.place, pod.node, pod.name, 0, Reason.REPLANNING, verdict.why),
            d.now,
            counts=False,
        )
        for pod in verdict.pods
    ]


def _uncounted(one: Setback) -> Setback:
    return replace(one, counts=False, fence=False)


def _of_records(d: Decision, at: recovery.Look) -> list[Setback]:
    if d.seen.agent is None:
        return []
    before = _before(d)
    places = {place.rank: (place, before[key_of(place)].pod, before[key_of(place)]) for place in d.gang.shape.places()}
    # With one pipeline a rank is a stage in any shape; else only the records of this epoch can be told apart.
    told = d.seen.agent.failures
    records = [item for item in told if d.gang.shape.pipelines == 1 or item.epoch == d.job.status.epoch]
    return list(recovery.of_records(records, places, at))


def _before(d: Decision) -> dict[Key, StageStatus]:
    """What the status said of each place before this look."""
    known = {(item.pipeline, item.index): item for item in d.job.status.stages}
    places: list[Place] = [*d.gang.shape.places(), *d.gang.joining]
    fresh = {key_of(place): StageStatus(index=place.stage, pipeline=place.pipeline) for place in places}
    return fresh | known


def _answer(d: Decision, found: Sequence[Setback]) -> Decision:
    """Write down what is wrong and what answers it; the next look does it."""
    status, spec = d.job.status, d.job.spec.recovery
    one = recovery.first(found)
    counted = [item for item in found if item.counts]
    if one.rung is Rung.FAIL:
        return _fail(d, one)
    times = [time for text in status.restart_times if (time := parse_time(text))]
    if counted and not restart.allowed(times, spec, d.now):
        d.draft.failed_stage(recovery.first(counted).failure, status.consecutive_restarts)
        budget = f"{spec.max_restarts} restarts within {spec.window_seconds} s are spent"
        words = recovery.first(counted).failure.sentence()
        return d.fail(Reason.RESTART_BUDGET_SPENT, f"{words} ({budget}; see spec.recovery)")
    stamp = rfc3339(d.now.replace(microsecond=0) + timedelta(seconds=bool(d.now.microsecond)))
    d.draft.set(stages=_marked(d, found, stamp))
    if counted:
        kept = [*(rfc3339(time) for time in restart.recent(times, spec, d.now)), stamp][-restart.KEPT_TIMES :]
        d.draft.set(restarts=status.restarts + 1, restart_times=kept)
        d.draft.first_failure(recovery.first(counted).failure)
        _note_nodes(d, counted, stamp)
    elif told := [item for item in found if item.rung is Rung.PROCESS]:
        d.draft.first_failure(recovery.first(told).failure)
    replaced = [item for item in found if item.rung is Rung.POD]
    if not replaced:
        crew.observe(d)
        return d
    d.irreversible = True
    if _whole(d) or any(pod.succeeded for pod in d.gang.current.values()):
        # Those that have ended take part in nothing any more, so a single stage has nobody to go on with.
        d.retire()
        d.down(Reason.RESTARTING, f"the gang starts anew, because {one.failure.sentence()}")
        return d
    if any(item.fence for item in replaced):
        group_plan.fence(d)
    crew.observe_placement(d)
    if members := [item for item in replaced if item.failure.place not in d.gang.joining]:
        d.say(ConditionType.RUNNING, *_words(recovery.first(members)))
    return d


def _fail(d: Decision, one: Setback) -> Decision:
    """End the job. An agent that gives up only counts: what the job failed of is the failure that was told before."""
    first, last = d.job.status.first_failure, one.failure
    known = first is not None and (first.stage, first.pipeline) == (last.place.stage, last.place.pipeline)
    if first and known and one.final is Reason.RESTART_BUDGET_SPENT:
        return d.fail(one.final, f"{first.sentence()} ({last.message}; see spec.recovery)")
    d.draft.failed_stage(last, d.job.status.consecutive_restarts)
    return d.fail(one.final, last.sentence())


def _words(one: Setback) -> tuple[Reason, str]:
    if one.counts:
        return Reason.RECOVERING, f"{one.failure.place} gets a new pod, because {one.failure.sentence()}"
    return Reason.MOVING, f"{one.failure.place} moves to another pod: {one.failure.message}"


def _marked(d: Decision, found: Sequence[Setback], stamp: str) -> list[StageStatus]:
    """Count every failure for its stage, and raise the number of the pods that are to be replaced."""
    by_key: dict[Key, list[Setback]] = {}
    for item in found:
        by_key.setdefault(key_of(item.failure.place), []).append(item)
    pods = {key_of(pod.place): pod for pod in (*d.gang.current.values(), *filter(None, d.gang.joining.values()))}
    before = _before(d)
    marked = []
    for stage in d.draft.stages:
        key = (stage.pipeline, stage.index)
        change: dict[str, object] = {}
        for item in by_key.get(key, ()):
            change["restarts"] = stage.restarts + sum(other.counts for other in by_key[key])
            if item.recorded:
                change["last_failure_time"] = item.at.isoformat(timespec="microseconds").replace("+00:00", "Z")
            elif item.rung is Rung.CONTAINER:
                change["container_restarts"] = pods[key].container_restarts
        if any(item.rung is Rung.POD for item in by_key.get(key, ())):
            change |= {
                "replacement": max(stage.replacement, before[key].replacement) + 1,
                "replacement_time": stamp,
                "replacement_step": d.job.status.progress.step,
                "quick_replacements": recovery.in_succession(before[key], d.job.status.progress.step, d.now),
                "container_restarts": 0,
                "pod": "",
                "node": "",
                "state": "Pending",
            }
        marked.append(stage.model_copy(update=change))
    return marked


def _note_nodes(d: Decision, counted: Sequence[Setback], stamp: str) -> None:
    """Remember where it failed, so that nodes which fail again and again are avoided."""
    nodes = sorted({item.failure.node for item in counted if item.failure.node})
    window = timedelta(seconds=d.job.spec.recovery.window_seconds)
    d.draft.set(avoided_nodes=avoidance.noted(d.job.status.avoided_nodes, nodes, stamp, window))


def suspend(d: Decision) -> bool:
    """Let the stages stop together with a checkpoint; whether their pods must still be left alone for that."""
    group = d.job.status.group
    if group is None or not d.gang.recovers:
        return False
    if group.stopping_since is None:
        group_plan.stop(d)
        return True
    due = parse_time(group.stopping_since)
    assert due is not None
    due += STOPPING
    alive = [pod for pod in d.gang.current.values() if not pod.over]
    if not alive or d.now >= due:
        return False
    d.alarms.append(due)
    group_plan.tell(d)
    return True


STOPPING = timedelta(seconds=30)
"""How long the stages may take to finish their step and save it, before their pods are deleted."""
