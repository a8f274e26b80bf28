"""The engine gives each request the tokens of the whole model, whatever else it serves and however it is cut."""

import random
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from pipelinejob_worker.models.gpt import Gpt
from pipelinejob_worker.protocol import Preset
from pipelinejob_worker.serve.sampling import draw
from pipelinejob_worker.serve.wire import Cancel, Finished, Refused, Sampling, Submit, Token
from tests.unit.worker.decoders import CONFIGS, VOCABULARY, layered, save
from tests.unit.worker.serve.group import (
    Answers,
    Front,
    StageProcess,
    form,
    service_of,
    stage_of_preset,
    stages_of,
    threads,
)

CONTEXT = 64
GREEDY = Sampling(temperature=0)
SIX = ["Llama", "Qwen 3", "Mistral", "Gemma 3", "GPT-2", "GPT-NeoX"]
PRESET = Preset(name="gpt", layers=4, width=32, heads=4, context=CONTEXT)

FEW_BLOCKS = 5
"""Two requests fit at their begin and one at its end."""


def requests_of(count: int, vocabulary: int, **sampling: object) -> list[Submit]:
    """Mixed lengths; every other one greedy, unless ``sampling`` says how."""
    drawn = random.Random(5)
    return [
        Submit(
            request_id=f"request-{number}",
            prompt_token_ids=drawn.choices(range(vocabulary), k=drawn.randint(1, 24)),
            max_tokens=drawn.randint(16, 28),
            sampling=Sampling(**{"temperature": number % 2, "seed": number, "top_p": 0.95, **sampling}),
        )
        for number in range(count)
    ]


def assert_right(whole: PreTrainedModel, request: Submit, answers: Answers) -> None:
    """Under teacher forcing each token is the one that is drawn from the logits of the whole model.

    A greedy one may also be another whose logit is as large within 1e-4.
    """
    prompt, output = request.prompt_token_ids, answers.ids
    assert isinstance(answers.end, Finished)
    assert answers.end.reason == "length"
    assert len(output) == request.max_tokens
    assert answers.tokens[0].position == len(prompt)
    with torch.no_grad():
        logits = whole(torch.tensor([prompt + output[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
    if request.sampling.temperature == 0:
        chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        assert (logits.amax(1) - chosen).max() <= 1e-4
    else:
        positions = range(len(prompt), len(prompt) + len(output))
        assert output == [one.token for one in draw(logits, [request.sampling] * len(output), positions)]


@pytest.mark.parametrize("name", SIX)
def test_tokens_are_those_of_the_whole_model_for_every_split(name: str, tmp_path: Path) -> None:
    whole = save(CONFIGS[name], tmp_path).eval()
    model = layered(tmp_path, CONTEXT)
    requests = requests_of(6, VOCABULARY)
    for count in (1, 2, 4):
        with threads(service_of(model), stages_of(model, count), FEW_BLOCKS) as (leader, port):
            front = Front(port)
            front.send(*requests)
            answers = front.finish()
            front.close()
        assert leader.scheduler.preemptions > 0
        for request in requests:
            assert_right(whole, request, answers[request.request_id])
    for greedy in (request for request in requests if request.sampling.temperature == 0):
        generated = whole.generate(
            torch.tensor([greedy.prompt_token_ids]),
            max_new_tokens=greedy.max_tokens,
            do_sample=False,
            eos_token_id=None,
        )
        assert answers[greedy.request_id].ids == generated[0, len(greedy.prompt_token_ids) :].tolist()


def answers_of(stages: int, requests: list[Submit], blocks: int, **settings: object) -> dict[str, Answers]:
    model = Gpt(PRESET)
    with threads(
        service_of(model, deterministic=True, **settings), stages_of(model, stages, deterministic=True), blocks
    ) as (leader, port):
        front = Front(port)
        front.send(*requests)
        answers = front.finish()
        front.close()
    assert (leader.scheduler.preemptions > 0) == (blocks == FEW_BLOCKS)
    return answers


def test_deterministic_logits_do_not_depend_on_split_composition_or_preemption() -> None:
    requests = requests_of(10, 256, top_logprobs=20, logprobs=True)
    expected = answers_of(1, requests, blocks=200)
    runs = [
        answers_of(1, requests, FEW_BLOCKS),
        answers_of(2, requests[::-1], FEW_BLOCKS, batch_tokens=17),
        answers_of(6, requests, blocks=100, batches=3),
    ]
    for answers in runs:
        for request in requests:
            assert answers[request.request_id].bits == expected[request.request_id].bits


def test_after_a_stages_death_requests_go_on_with_the_same_bits() -> None:
    requests = requests_of(6, 256, top_logprobs=5, logprobs=True, temperature=1)
    expected = answers_of(1, requests, blocks=200)
    service = service_of(Gpt(PRESET), deterministic=True)
    builds = [partial(stage_of_preset, PRESET, number, 3, deterministic=True) for number in range(3)]
    stages = [StageProcess(service, build, blocks=20) for build in builds]
    emitted: dict[str, list[Token]] = {request.request_id: [] for request in requests}
    unfinished = requests

    def serve(epoch: int, kill: int | None) -> list[Submit]:
        """Serve what is unfinished, until the end or until a stage is killed; returns what is unfinished then."""
        front = Front(form(stages, epoch))
        assert front.ready.epoch == epoch
        front.send(
            *(
                request.model_copy(
                    update={"emitted_token_ids": [token.token_id for token in emitted[request.request_id]]}
                )
                for request in unfinished
            )
        )
        if kill is not None:
            while sum(len(mine.tokens) for mine in front.answers.values()) < 30:
                front.take()
            stages[kill].kill()
        while front.unfinished() and front.take():
            pass
        front.close()
        for name, mine in front.answers.items():
            emitted[name] += mine.tokens
        return [request for request in unfinished if request.request_id in front.unfinished()]

    try:
        for epoch, killed in enumerate((1, 0), 1):
            unfinished = serve(epoch, killed)
            assert unfinished
            assert {stage.receive()[0] for number, stage in enumerate(stages) if number != killed} == {"lost"}
            stages[killed] = StageProcess(service, builds[killed], blocks=20)
        assert serve(3, None) == []
    finally:
        for stage in stages:
            stage.kill()
    assert {name: Answers(tokens).bits for name, tokens in emitted.items()} == {
        name: answers.bits for name, answers in expected.items()
    }


@pytest.fixture
def port() -> object:
    model = Gpt(PRESET)
    with threads(service_of(model, accepted_tokens=300), stages_of(model, 2), 12) as (_, listening):
        yield listening


def submit(name: str, **others: object) -> Submit:
    return Submit(**{"request_id": name, "prompt_token_ids": [1, 2, 3], "max_tokens": 4, "sampling": GREEDY, **others})


def test_requests_end_with_stop_tokens_and_with_stop_texts(port: int) -> None:
    front = Front(port)
    front.send(submit("free", max_tokens=20, sampling=Sampling(seed=1)))
    ids = front.finish()["free"].ids
    front.send(
        submit("token", max_tokens=20, sampling=Sampling(seed=1), stop_token_ids=[ids[3]]),
        submit("text", max_tokens=20, sampling=Sampling(seed=1), stop=[bytes(ids[5:7]).decode(errors="replace")]),
    )
    front.finish()
    assert front.answers["token"].ids == ids[: ids.index(ids[3]) + 1]
    assert front.answers["text"].ids == ids[: len(front.answers["text"].ids)]
    assert len(front.answers["text"].ids) <= 8
    assert [front.answers[name].end.reason for name in ("token", "text")] == ["stop", "stop"]  # type: ignore[union-attr]
    front.close()


def test_bad_requests_are_refused_with_their_reason_and_others_are_served(port: int) -> None:
    front = Front(port)
    front.send(
        submit("good", max_tokens=30),
        submit("context", max_tokens=62),
        submit("token", prompt_token_ids=[256]),
        submit("emitted", emitted_token_ids=[300]),
        submit("resumed", emitted_token_ids=[7, 8, 9, 10]),
    )
    front.finish()
    refused = {name: mine.end for name, mine in front.answers.items() if isinstance(mine.end, Refused)}
    assert {name: end.reason for name, end in refused.items()} == {
        "context": "too_large",
        "token": "invalid",
        "emitted": "invalid",
    }
    assert refused["token"].message == "promptTokenIds: the model knows no token 256; allowed: 0 to 255"
    assert len(front.answers["good"].ids) == 30
    assert front.answers["resumed"].ids == []
    front.close()


def test_overload_is_refused_with_a_time_to_try_again(port: int) -> None:
    front = Front(port)
    front.send(*(submit(f"{number}", max_tokens=50) for number in range(10)))
    ends = [mine.end for mine in front.finish().values()]
    refused = [end for end in ends if isinstance(end, Refused)]
    assert 0 < len(refused) <= 5
    assert {end.reason for end in refused} == {"overloaded"}
    assert all(1 <= (end.retry_after_seconds or 0) <= 60 for end in refused)
    front.close()


def test_cancelled_and_late_requests_end_and_those_of_a_front_that_left_are_dropped(port: int) -> None:
    leaving, front = Front(port), Front(port)
    leaving.send(submit("abandoned", max_tokens=60))
    while not leaving.answers["abandoned"].tokens:
        leaving.take()
    leaving.close()
    front.send(submit("cancelled", max_tokens=60), submit("late", max_tokens=60, deadline_seconds=0.001))
    front.send(Cancel(request_id="cancelled"), Cancel(request_id="unknown"))
    answers = front.finish()
    assert [answers[name].end.reason for name in ("cancelled", "late")] == ["cancelled", "deadline"]  # type: ignore[union-attr]
    while not front.stats or front.stats[-1].running:
        front.take()
    assert (front.stats[-1].queued, front.stats[-1].cache_blocks_used) == (0, 0)
    front.close()


@pytest.mark.parametrize("line", [b"no json\n", b'{"kind":"submit","requestId":"x"}\n', b'{"kind":"ready"}\n'])
def test_a_front_that_sends_what_is_no_message_is_disconnected_alone(port: int, line: bytes) -> None:
    wrong, front = Front(port), Front(port)
    wrong.send_raw(line)
    while wrong.take():  # statistics may have been on their way
        pass
    front.send(submit("good"))
    assert len(front.finish()["good"].ids) == 4
    wrong.close()
    front.close()
