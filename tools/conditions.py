"""The reference page of conditions, reasons and states, made from the enums that the operator uses. Pure."""

from pipelinejob_operator.controller.transitions import GOOD, QUIET
from pipelinejob_operator.policy.reasons import ConditionType, Reason

CONDITIONS = """\
# Conditions, reasons and states

Generated from `policy/reasons.py` by `make generate`; do not edit. A condition's message names the stage, the value
and the cure; this page says what its words mean.

## Conditions

All but `Available`, `Checkpointed` and `Protected` are there from the operator's first visit on. `observedGeneration`
tells which version of the spec each answers, `lastTransitionTime` when its status last changed. There is no phase:
ask a condition.

```sh
kubectl wait --for=condition=Succeeded pj/tiny-gpt --timeout=10m
kubectl get pj tiny-gpt -o jsonpath='{{range .status.conditions[*]}}{{.type}}={{.status}} {{.reason}}{{"\\n"}}{{end}}'
```

| condition | meaning |
|---|---|
{conditions}

## Reasons

The third column is the type of the Event that is published when a condition takes this reason, if there is one.

| reason | meaning and cure | Event |
|---|---|---|
{reasons}

## States

The column STATE of `kubectl get pj` is one word made from the conditions, for people only. The first that applies:

| state | when |
|---|---|
| `Succeeded` | `Succeeded` is `True` |
| `Failed` | `Succeeded` is `False` |
| `Suspended` | `Suspended` is `True` |
| `Rescaling` | `Running` has the reason `Rescaling` |
| `Running` | `Running` is `True` |
| `Recovering` | `Running` is `False` because of `Recovering` or `Moving` |
| `Refused` | `Accepted` is `False` |
| `Stopping` | `Running` is `False` because of `Stopping` |
| `Restarting` | `Running` is `False` because of `Restarting`, `Replacing`, `FailureSeen` or `Draining` |
| `Starting` | `Placed` is `True` |
| `Pending` | nothing of the above |
"""


def page() -> str:
    """Render the page of all conditions and reasons; raises ValueError for one that has no meaning."""
    return CONDITIONS.format(
        conditions="\n".join(f"| `{kind}` | {_meaning(kind)} |" for kind in ConditionType),
        reasons="\n".join(f"| `{reason}` | {_meaning(reason)} | {_event(reason)} |" for reason in Reason),
    )


def _meaning(member: ConditionType | Reason) -> str:
    if not member.__doc__:
        raise ValueError(f"policy/reasons.py: {member} has no meaning; allowed: a sentence as its second value")
    return member.__doc__.replace("|", "\\|")


def _event(reason: Reason) -> str:
    if reason in QUIET:
        return ""
    return "Normal" if reason in GOOD else "Warning"
