"""A step of all stages as a picture: the trace that Perfetto and chrome://tracing open.

Format: Google's Trace Event Format, complete events (``ph: X``), times in microseconds.
"""

from collections.abc import Sequence
from typing import Any

import torch

from pipelinejob_worker.pipeline.group import Group
from pipelinejob_worker.pipeline.timeline import NOWHERE, Activity, Span

_ACTIVITIES = tuple(Activity)
_COLORS = {
    Activity.FORWARD: "thread_state_running",
    Activity.BACKWARD: "rail_animation",
    Activity.WEIGHT: "rail_idle",
    Activity.WAITING: "grey",
    Activity.SENDING: "thread_state_iowait",
    Activity.UPDATE: "rail_response",
}


def gather_spans(group: Group, spans: Sequence[Span]) -> list[list[Span]]:
    """Return the spans of every rank; collective."""
    longest = max(row[0] for row in group.gather(len(spans)))
    table = torch.zeros(group.size, longest, 6, dtype=torch.float64)
    for row, span in enumerate(spans):
        table[group.rank, row] = torch.tensor([1.0, _ACTIVITIES.index(span.activity), *span[1:]], dtype=torch.float64)
    return [
        [Span(_ACTIVITIES[int(kind)], int(m), int(c), start, end) for there, kind, m, c, start, end in rank if there]
        for rank in group.sum(table).tolist()
    ]


def chrome_trace(ranks: Sequence[Sequence[Span]], stages: int, step: int) -> dict[str, Any]:
    """Return the trace of one step: one process for each pipeline, one thread for each stage.

    All ranks leave the step's vote at the same time, up to a message's travel: that is how their clocks are aligned.
    """
    events: list[dict[str, Any]] = []
    votes = [_vote_end(spans) for spans in ranks]
    for rank, spans in enumerate(ranks):
        late = max(votes) - votes[rank]
        pipeline, stage = divmod(rank, stages)
        place = {"pid": pipeline, "tid": stage}
        events += [
            {"name": "process_name", "ph": "M", **place, "args": {"name": f"pipeline {pipeline}"}},
            {"name": "thread_name", "ph": "M", **place, "args": {"name": f"stage {stage}"}},
            *({"ph": "X", **place, **_event(span, late)} for span in spans),
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"step": step, "stages": stages}}


def _vote_end(spans: Sequence[Span]) -> float:
    return max((span.end for span in spans if span.activity == Activity.WAITING and span.chunk == NOWHERE), default=0.0)


def _event(span: Span, late: float) -> dict[str, Any]:
    belongs = span.microbatch >= 0
    return {
        "name": f"{span.activity} {span.microbatch}" if belongs else str(span.activity),
        "cat": str(span.activity),
        "cname": _COLORS[span.activity],
        "ts": round(1e6 * (span.start + late), 3),
        "dur": round(1e6 * (span.end - span.start), 3),
        "args": {"microbatch": span.microbatch, "chunk": span.chunk} if belongs else {},
    }
