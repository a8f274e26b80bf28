"""Workers serve what their configuration says, and go on with what they have loaded when one of them is lost."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from pipelinejob_worker.models import model_of
from pipelinejob_worker.protocol import Model, WorkerConfig
from pipelinejob_worker.serve.wire import Sampling, Submit
from pipelinejob_worker.state.checkpoint import read_layer, read_manifest
from tests.unit.worker.decoders import MODERN, save
from tests.unit.worker.forked import run_to_end
from tests.unit.worker.jobs import job
from tests.unit.worker.serve.group import Answers, Front
from tests.unit.worker.serve.workers import Pods, layers_of, pods, serve_config

PRESET = {"preset": {"name": "gpt", "layers": 4, "width": 32, "heads": 4, "context": 64}}
EVEN = {"strategy": "Even"}
PROMPTS = [[1, 2, 3], list(range(20)), [5]]
NEW_TOKENS = 30


def submits(**sampling: Any) -> list[Submit]:
    return [
        Submit(
            request_id=f"{number}",
            prompt_token_ids=prompt,
            max_tokens=NEW_TOKENS,
            sampling=Sampling(**{"temperature": 0} | sampling),
        )
        for number, prompt in enumerate(PROMPTS)
    ]


def tokens_of(running: Pods) -> list[list[int]]:
    front = running.front()
    front.send(*submits())
    found = [answer.ids for _, answer in sorted(front.finish().items())]
    front.close()
    return found


def greedy(config: WorkerConfig, checkpoint: Path | None = None) -> list[list[int]]:
    """What one process computes without a cache, with the weights of a checkpoint if there is one."""
    model = model_of(config.model)
    chunk = model.build(range(len(model.names)), seed=0).eval()
    if checkpoint:
        manifest = read_manifest(checkpoint)
        for index, layer in chunk.layers.items():
            state = read_layer(checkpoint, manifest, model.names[index])
            for name, parameter in layer.named_parameters():
                parameter.data.copy_(state[f"weight.{name}"])
    found = []
    with torch.no_grad():
        for prompt in PROMPTS:
            tokens = list(prompt)
            for _ in range(NEW_TOKENS):
                logits = chunk(torch.tensor([tokens]), torch.arange(len(tokens))[None])[0, -1]
                tokens.append(int(logits.argmax()))
            found.append(tokens[len(prompt) :])
    return found


def test_stages_take_the_cut_of_the_specification_and_serve_the_whole_model() -> None:
    config = serve_config(PRESET, partition={"strategy": "Manual", "boundaries": [2, 5]})
    with pods(config, 3) as running:
        assert layers_of(running.form()) == ["0-1", "2-4", "5-5"]
        assert tokens_of(running) == greedy(config)
        told = running.workers[0].told()
        assert [stage.layers for stage in told.stages] == ["0-1", "2-4", "5-5"]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    return directory


@pytest.mark.parametrize("kind", ["preset", "Hugging Face"])
def test_the_newest_checkpoint_of_another_job_is_served(kind: str, tmp_path: Path, checkpoints: Path) -> None:
    trained = job(tmp_path, steps=6, every_steps=3, context=64, partition="Even")
    if kind == "Hugging Face":
        save(LlamaConfig(**MODERN | {"vocab_size": 256}, tie_word_embeddings=True), tmp_path / "model")
        model = {"huggingFace": {"path": str(tmp_path / "model"), "context": 64}}
        trained = trained.model_copy(update={"model": Model.model_validate(model)})
    assert run_to_end(trained, 2, tmp_path, checkpoints) == [0, 0]
    source = {"job": trained.job, "seed": trained.training.seed}
    config = serve_config(json.loads(trained.model.to_json()), source=source, partition=EVEN)
    with pods(config, 2, checkpoints) as running:
        layers_of(running.form())
        found = tokens_of(running)
    assert found == greedy(config, checkpoints / "step-000000006")
    assert found != greedy(config, checkpoints / "step-000000003")
    assert found != greedy(config)

    pinned = config.model_copy(update={"source": config.source.model_copy(update={"step": 3})})  # type: ignore[union-attr]
    with pods(pinned, 2, checkpoints) as running:
        layers_of(running.form())
        assert tokens_of(running) == greedy(config, checkpoints / "step-000000003")


def test_a_source_that_cannot_be_served_is_named(tmp_path: Path, checkpoints: Path) -> None:
    def refusals(seed: int) -> set[str]:
        config = serve_config(PRESET, source={"job": "trained", "seed": seed}, partition=EVEN)
        with pods(config, 2, checkpoints) as running:
            return {problem for what, problem in running.form() if what == "failed"}

    assert "'trained' cannot be served: it has no complete checkpoint yet" in refusals(7).pop()
    trained = job(tmp_path, steps=1, context=64, partition="Even")
    assert run_to_end(trained, 1, tmp_path, checkpoints) == [0]
    assert refusals(7) == set()
    assert "context=64 dropout=0.0 seed=7', not of 'gpt" in refusals(8).pop()
    head = checkpoints / "step-000000001" / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-1])
    assert "its checkpoint of step 1 is damaged" in refusals(7).pop()


def until_tokens(front: Front, count: int) -> None:
    while sum(len(mine.tokens) for mine in front.answers.values()) < count:
        assert front.take()


def rest_of(front: Front) -> dict[str, Answers]:
    while front.unfinished() and front.take():
        pass
    front.close()
    return front.answers


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_after_a_loss_only_the_new_stage_loads_and_requests_go_on_with_the_same_bits(lost: int) -> None:
    requests = submits(temperature=1.0, logprobs=True, top_logprobs=5)
    with pods(serve_config(PRESET), 3) as running:  # Balanced: another measurement may give another cut
        cut = layers_of(running.form())
        undisturbed = running.front()
        undisturbed.send(*requests)
        expected = {name: answer.bits for name, answer in undisturbed.finish().items()}
        undisturbed.close()

        front = running.front()
        front.send(*requests)
        until_tokens(front, 20)
        running.workers[lost].kill()
        begun = rest_of(front)
        assert front.unfinished()
        assert {worker.hear()[0] for stage, worker in enumerate(running.workers) if stage != lost} == {"lost"}

        running.replace(lost)
        assert layers_of(running.form()) == cut, "who comes anew takes the place of who has gone"
        again = running.front()
        assert again.ready.epoch > front.ready.epoch
        again.send(
            *(
                request.model_copy(update={"emitted_token_ids": begun[request.request_id].ids})
                for request in requests
                if request.request_id in front.unfinished()
            )
        )
        ended = again.finish()
        again.close()
        assert [worker.loads for worker in running.workers] == [1, 1, 1]
    for name, bits in expected.items():
        assert begun[name].bits + (ended[name].bits if name in ended else []) == bits


def test_a_stage_that_is_told_to_leave_ends_the_incarnation_and_the_shape_may_change() -> None:
    with pods(serve_config(PRESET, partition=EVEN), 4) as running:
        assert layers_of(running.form(2)) == ["0-2", "3-5"]
        expected = tokens_of(running)
        for stages in (4, 1, 3):
            present = [worker for worker in running.workers if worker.in_ring]
            present[-1].leave()
            assert {worker.hear()[0] for worker in present} == {"lost"}
            assert len(layers_of(running.form(stages))) == stages
            assert tokens_of(running) == expected


def test_statistics_reach_the_agent_of_stage_0() -> None:
    with pods(serve_config(PRESET, partition=EVEN), 2) as running:
        running.form()
        front = running.front()
        front.send(*submits())
        front.finish()
        while not (serving := running.workers[0].told().serving) or not serving.requests_per_second:
            pass
        assert serving.queued == 0
        front.close()
