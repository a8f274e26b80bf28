"""Batches in flight keep all stages busy, and the chunks of a prompt follow each other: with stages that sleep."""

import time

import pytest
import torch

from pipelinejob_worker.serve.batch import Batch
from pipelinejob_worker.serve.wire import Sampling, Submit
from pipelinejob_worker.serve.worker import Service
from tests.unit.worker.serve.group import Front, threads

STAGES, WIDTH, VOCABULARY = 4, 512, 8
STAGE_SECONDS = 0.01


class Sleeping:
    """A stage that takes a given time for a batch or for each of its tokens, and computes nothing."""

    def __init__(self, *, last: bool, batch_seconds: float = 0.0, token_seconds: float = 0.0) -> None:
        self._last = last
        self._seconds = (batch_seconds, token_seconds)

    def run(self, batch: Batch, hidden: torch.Tensor | None = None) -> torch.Tensor:
        per_batch, per_token = self._seconds
        time.sleep(per_batch + per_token * batch.size)
        return torch.zeros(len(batch.draws), VOCABULARY) if self._last else torch.zeros(batch.size, WIDTH)


def service(batches: int) -> Service:
    return Service("sleeping", VOCABULARY, 4096, WIDTH, 4096, 100_000, deterministic=False, batches=batches)


def sleeping(**seconds: float) -> list[Sleeping]:
    return [Sleeping(last=stage == STAGES - 1, **seconds) for stage in range(STAGES)]


def steps_per_second(batches: int, tokens: int = 40) -> tuple[float, float]:
    """Decoding steps a second with that many batches of one request in flight, and the share of time stages idle."""
    with threads(service(batches), sleeping(batch_seconds=STAGE_SECONDS), blocks=100) as (_, port):
        front = Front(port)
        front.send(*(request(f"{number}", tokens=tokens) for number in range(batches)))
        began, stats = time.monotonic(), 0.0
        answers = front.finish()
        seconds = time.monotonic() - began
        while len(front.stats) < 1:
            front.take()
        stats = front.stats[0].bubble_percent / 100
        front.close()
    return sum(len(mine.tokens) for mine in answers.values()) / seconds, stats


def request(name: str, prompt: int = 1, tokens: int = 1) -> Submit:
    return Submit(request_id=name, prompt_token_ids=[1] * prompt, max_tokens=tokens, sampling=Sampling(temperature=0))


def first_token_seconds(prompt: int, batches: int) -> float:
    with threads(service(batches), sleeping(token_seconds=0.001), blocks=1000) as (_, port):
        front = Front(port)
        began = time.monotonic()
        front.send(request("long", prompt))
        front.finish()
        seconds = time.monotonic() - began
        front.close()
    return seconds


def test_one_batch_more_than_stages_gives_the_throughput_of_all_stages() -> None:
    one, idle = steps_per_second(1)
    assert idle == pytest.approx(1 - 1 / STAGES, abs=0.05)
    many, idle = steps_per_second(STAGES + 1)
    print(f"{one=} {many=} {idle=}")
    assert many / one >= 3.7
    assert idle <= 0.05


def test_the_chunks_of_a_prompt_pass_the_stages_one_behind_the_other() -> None:
    chunks = 5
    whole = first_token_seconds(320, batches=1)
    chunked = first_token_seconds(320, batches=chunks)
    print(f"{whole=} {chunked=}")
    assert chunked / whole == pytest.approx((chunks + STAGES - 1) / (chunks * STAGES), rel=0.1)
