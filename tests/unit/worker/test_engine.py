"""Forward and backward passes of all stages: gradients as of one process, bit by bit, and what goes wrong in words."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipelinejob_worker.data import Batch
from pipelinejob_worker.models import LayeredModel, model_of
from pipelinejob_worker.models.randomness import mix
from pipelinejob_worker.pipeline.engine import Engine
from pipelinejob_worker.pipeline.group import joined
from pipelinejob_worker.pipeline.partition import even
from pipelinejob_worker.pipeline.schedule import SPLITS_BACKWARD, build_schedule
from pipelinejob_worker.pipeline.timeline import Activity, Span
from pipelinejob_worker.pipeline.trace import chrome_trace, gather_spans
from pipelinejob_worker.protocol import Data, Membership, Model, Preset, Schedule, ScheduleName, Train
from tests.unit.worker import forked
from tests.unit.worker.test_schedule import NAMES

MODEL = Model(preset=Preset(name="gpt", layers=14, width=16, heads=2, context=8, dropout="0.1"))
STEP, DIVISOR = 5, 100.0


def batch(microbatch: int) -> Batch:
    generator = torch.Generator().manual_seed(microbatch)
    tokens = torch.randint(0, 256, (2, 9), generator=generator)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)


def settings(name: ScheduleName, chunks: int, microbatches: int) -> Train:
    return Train(
        data=Data(files=["none"]),
        steps=1,
        global_batch_size=2 * microbatches,
        microbatches=microbatches,
        schedule=Schedule(name=name, chunks_per_stage=chunks),
    )


def on_every_stage(stages: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call ``work(engine-less group, *arguments)`` on all stages of a pipeline; the answers in stage order."""
    port = forked.free_port()
    memberships = [
        Membership(epoch=1, action="Run", stage=s, stages=stages, master_address="127.0.0.1", master_port=port)
        for s in range(stages)
    ]
    return forked.call_all([(_in_group, membership, work, arguments) for membership in memberships])


def _in_group(membership: Membership, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    with joined(membership, torch.device("cpu")) as group:
        return work(group, *arguments)


def engine_of(group: Any, model: LayeredModel, name: ScheduleName, chunks: int, microbatches: int) -> Engine:
    schedule = build_schedule(name, group.stages, chunks, microbatches)
    parts = even(len(model.names), group.stages * chunks)
    engine = Engine(model, settings(name, chunks, microbatches), schedule, parts, group)
    engine.loss_divisor = DIVISOR
    engine.timeline.begin_step()
    return engine


def run_step(group: Any, name: ScheduleName, chunks: int, microbatches: int) -> dict[str, Any]:
    engine = engine_of(group, model_of(MODEL), name, chunks, microbatches)
    validation = engine.evaluate(batch)
    assert all(p.grad is None for layer in engine.layers.values() for p in layer.parameters())
    done: list[int] = []
    losses = engine.forward_and_backward(STEP, batch, done.append)
    return {
        "gradients": _gradients(engine.layers),
        "losses": losses,
        "validation": validation,
        "done": done,
        "chunks": list(engine.layers_of),
        "spans": gather_spans(group, engine.timeline.spans()) if name == "ZBVZeroBubble" else None,
    }


def one_process(microbatches: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = model_of(MODEL)
    layers = model.build(range(len(model.names)), 0).layers
    positions = torch.arange(8).expand(2, 8)
    losses: dict[bool, list[float]] = {}
    for training in (False, True):
        losses[training] = []
        for microbatch in range(microbatches):
            hidden = batch(microbatch).tokens
            for index, layer in layers.items():
                layer.train(training)
                torch.manual_seed(mix(0, STEP, microbatch, index))
                hidden = layer(hidden, positions)
            loss = model.loss(hidden, batch(microbatch).targets) / DIVISOR
            losses[training].append(loss.item())
            if training:
                loss.backward()
    return {"gradients": _gradients(layers), "losses": losses[True], "validation": losses[False]}


def _gradients(layers: Any) -> dict[tuple[int, str], Any]:
    return {
        (index, name): parameter.grad.numpy().tobytes()
        for index, layer in layers.items()
        for name, parameter in layer.named_parameters()
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return forked.call(one_process, 8)


@pytest.mark.parametrize(("name", "chunks"), NAMES)
@pytest.mark.parametrize("stages", [2, 4])
def test_gradients_and_losses_are_those_of_one_process(
    name: ScheduleName, chunks: int, stages: int, expected: dict[str, Any]
) -> None:
    answers = on_every_stage(stages, run_step, name, chunks, 8)
    gradients = {key: value for answer in answers for key, value in answer["gradients"].items()}
    assert gradients == expected["gradients"]
    last = build_schedule(name, stages, chunks, 8).stage_of[-1]
    for stage, answer in enumerate(answers):
        assert answer["losses"] == (expected["losses"] if stage == last else [])
        assert answer["validation"] == (expected["validation"] if stage == last else [])
        assert sorted(answer["done"]) == answer["chunks"], "each chunk's gradients are announced once"


def test_a_trace_shows_every_pass_of_every_stage() -> None:
    answers = on_every_stage(2, run_step, "ZBVZeroBubble", 2, 4)
    assert answers[0]["spans"] == answers[1]["spans"]
    trace = chrome_trace(answers[0]["spans"], stages=2, step=3)
    passes = [event for event in trace["traceEvents"] if event["ph"] == "X" and "chunk" in event["args"]]
    places = {(0, 0), (1, 1), (1, 2), (0, 3)}
    for activity, there in (
        (Activity.FORWARD, places),
        (Activity.BACKWARD, places),
        (Activity.WEIGHT, places - {(0, 0)}),  # the first chunk's backward pass is not split
    ):
        shown = {(e["tid"], e["args"]["chunk"], e["args"]["microbatch"]) for e in passes if e["cat"] == activity}
        assert len(shown) == 4 * len(there)
        assert {(stage, chunk) for stage, chunk, _ in shown} == there
    assert all(event["dur"] >= 0 for event in passes)
    assert trace["otherData"] == {"step": 3, "stages": 2}


def test_clocks_of_a_trace_are_aligned_at_the_vote() -> None:
    def spans(vote: float) -> list[Span]:
        return [Span(Activity.FORWARD, 0, 0, 0.0, 0.5), Span(Activity.WAITING, -1, -1, 0.5, vote)]

    events = [e for e in chrome_trace([spans(1.0), spans(3.0)], stages=2, step=1)["traceEvents"] if e["ph"] == "X"]
    assert [event["ts"] for event in events] == [2e6, 2.5e6, 0, 0.5e6]
    assert all(event["ts"] + event["dur"] == 3e6 for event in events if event["name"] == "waiting")


def test_which_schedules_split_their_backward_passes() -> None:
    for name, chunks in NAMES:
        kinds = {action.kind for order in build_schedule(name, 2, chunks, 4).orders for action in order}
        assert ("W" in kinds) == (name in SPLITS_BACKWARD)


class Shrinking(torch.nn.Module):
    """A layer that passes on less in one microbatch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, hidden: torch.Tensor, _positions: torch.Tensor) -> torch.Tensor:
        wide = hidden[..., None].expand(-1, -1, 16) if hidden.dim() == 2 else hidden
        return wide[:, :-1] * self.weight if hidden.flatten()[0] == batch(2).tokens[0, 0] else wide * self.weight


def run_shrinking(group: Any) -> str:
    model = model_of(MODEL)
    build = model.build

    def build_shrinking(indices: range, seed: int) -> Any:
        chunk = build(indices, seed)
        for index in chunk.layers:
            if index == 0:
                chunk.layers[index].forward = Shrinking().forward
        return chunk

    model.build = build_shrinking
    try:
        engine_of(group, model, "1F1B", 1, 4).forward_and_backward(STEP, batch, lambda _: None)
    except Exception as error:  # noqa: BLE001 - the test looks at it
        return f"{type(error).__name__}: {error}"
    return "trained"


def test_a_hidden_state_of_another_shape_is_refused_before_it_is_sent() -> None:
    first, last = on_every_stage(2, run_shrinking)
    assert first.startswith("ConfigurationError: spec.model: chunk 0 passes on torch.float32 [2, 7, 16]; allowed: ")
    assert "torch.float32 [2, 8, 16] in every microbatch" in first
    assert last != "trained"
