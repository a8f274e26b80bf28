"""Draws one measured step of every schedule as an SVG picture for the documentation: ``make pictures``."""

import sys
from collections.abc import Sequence
from pathlib import Path

from pipelinejob_worker.pipeline.group import Group
from pipelinejob_worker.pipeline.schedule import bubble_limit
from pipelinejob_worker.pipeline.timeline import BUSY, Activity, Span
from pipelinejob_worker.pipeline.trace import gather_spans
from tools.bench import schedules
from tools.bench.stages import run_stages

DIRECTORY = Path("docs/images")
STAGES, MICROBATCHES = 4, 8
ROW, WIDTH, LEFT, TOP = 26, 920, 62, 34
COLORS = {
    Activity.FORWARD: ("#9ecae1", "#4292c6"),
    Activity.BACKWARD: ("#a1d99b", "#41ab5d"),
    Activity.WEIGHT: ("#fdd0a2", "#fd8d3c"),
}
"""Of the first chunk of a stage, and of later ones."""


def measure(group: Group) -> list[list[list[Span]]]:
    """Return the spans of all stages, for each schedule, of its second step."""
    measured = []
    for name, chunks in schedules.SCHEDULES:
        loop, train = schedules.sleeping_loop(group, name, chunks, MICROBATCHES)
        for step in range(train.steps):
            loop.step(step)
        measured.append(gather_spans(group, loop.engine.timeline.spans()))
    return measured


def picture(title: str, stages: Sequence[Sequence[Span]]) -> str:
    """Draw a step: one row a stage, one box a pass with the number of its microbatch."""
    begin = min(span.start for spans in stages for span in spans if span.activity in BUSY)
    end = max(span.end for spans in stages for span in spans if span.activity in BUSY)
    scale = WIDTH / (end - begin)
    height = TOP + ROW * len(stages) + 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 8} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="100%" height="100%" fill="white"/><text x="6" y="20" font-size="14">{title}</text>',
    ]
    for stage, spans in enumerate(stages):
        top = TOP + ROW * stage
        parts.append(f'<text x="6" y="{top + 16}">stage {stage}</text>')
        parts.append(f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{ROW - 3}" fill="#eeeeee"/>')
        parts += [
            _box(span, (span.start - begin) * scale, scale, top, len(stages)) for span in spans if span.activity in BUSY
        ]
    legend = (("forward", "#9ecae1"), ("backward", "#a1d99b"), ("weights' part", "#fdd0a2"), ("idle", "#eeeeee"))
    for place, (text, color) in enumerate(legend):
        left, top = LEFT + 130 * place, TOP + ROW * len(stages) + 8
        parts.append(f'<rect x="{left}" y="{top}" width="12" height="12" fill="{color}"/>')
        parts.append(f'<text x="{left + 17}" y="{top + 10}">{text}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _box(span: Span, offset: float, scale: float, top: int, stages: int) -> str:
    width = (span.end - span.start) * scale
    color = COLORS[span.activity][span.chunk >= stages]
    left = LEFT + offset
    box = f'<rect x="{left:.1f}" y="{top}" width="{max(width - 0.6, 0.4):.1f}" height="{ROW - 3}" fill="{color}"/>'
    if width < 9:
        return box
    return f'{box}<text x="{left + width / 2:.1f}" y="{top + 15}" text-anchor="middle">{span.microbatch}</text>'


def idle(stages: Sequence[Sequence[Span]]) -> float:
    """Return the idle share between the first pass and the last."""
    passes = [[span for span in spans if span.activity in BUSY] for spans in stages]
    begin, end = min(s[0].start for s in passes), max(s[-1].end for s in passes)
    return 1 - sum(span.end - span.start for spans in passes for span in spans) / (len(stages) * (end - begin))


def main() -> None:
    """Draw all; the argument is the length of a part of a pass in milliseconds, 50 by default."""
    schedules.UNIT_SECONDS = float(sys.argv[1]) / 1000 if len(sys.argv) > 1 else 0.05
    DIRECTORY.mkdir(exist_ok=True)
    for (name, chunks), stages in zip(schedules.SCHEDULES, run_stages(STAGES, measure)[0], strict=True):
        limit = bubble_limit(name, STAGES, chunks, MICROBATCHES)
        title = (
            f"{name}, {chunks} chunk{'s' * (chunks > 1)} a stage: measured idle {100 * idle(stages):.0f} %, "
            f"limit {100 * limit:.0f} %"
        )
        (DIRECTORY / f"schedule-{name}-{chunks}.svg").write_text(picture(title, stages))


if __name__ == "__main__":
    main()
