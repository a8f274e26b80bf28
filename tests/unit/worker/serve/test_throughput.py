"""Batches in flight keep all stages busy, and the chunks of a prompt follow each other: with stages that sleep."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from pipelinejob_worker.serve.batch import Batch
from pipelinejob_worker.serve.wire import Sampling, Submit
from pipelinejob_worker.serve.worker import Service
from tests.unit.worker.serve.group import Front, StageProcess, form

STAGES, WIDTH, VOCABULARY = 4, 512, 8
STAGE_SECONDS = 0.01
SECONDS = 6
ATTEMPTS = 4
"""Whatever else runs on the machine can only make a measurement worse, so the best one counts."""


@dataclass
class Sleeping:
    """A stage that takes a given time for a batch and for each of its tokens, and computes nothing."""

    last: bool
    batch_seconds: float = 0.0
    token_seconds: float = 0.0

    def run(self, batch: Batch, hidden: torch.Tensor | None = None) -> torch.Tensor:
        time.sleep(self.batch_seconds + self.token_seconds * batch.size)
        return torch.zeros(len(batch.draws), VOCABULARY) if self.last else torch.zeros(batch.size, WIDTH)


@contextmanager
def sleeping(batches: int, **seconds: float) -> Iterator[Front]:
    service = Service("sleeping", VOCABULARY, 4096, WIDTH, 4096, 100_000, deterministic=False, batches=batches)
    stages = [
        StageProcess(service, partial(Sleeping, stage == STAGES - 1, **seconds), blocks=1000) for stage in range(STAGES)
    ]
    try:
        front = Front(form(stages, epoch=1))
        yield front
        front.close()
    finally:
        for stage in stages:
            stage.kill()


def request(name: str, prompt: int = 1, tokens: int = 1) -> Submit:
    return Submit(request_id=name, prompt_token_ids=[1] * prompt, max_tokens=tokens, sampling=Sampling(temperature=0))


def decoding(batches: int) -> tuple[float, float]:
    """Steps a second with one request in each of the batches in flight, and the share of time that stages idle.

    Both of the best of some seconds; in the first one the stages began.
    """
    with sleeping(batches, batch_seconds=STAGE_SECONDS) as front:
        front.send(*(request(f"{number}", tokens=1000) for number in range(batches)))
        while len(front.stats) < SECONDS:
            assert front.take()
        best = min(front.stats[1:], key=lambda each: each.bubble_percent)
        return best.tokens_per_second, best.bubble_percent / 100


def first_token_seconds(chunks: int) -> float:
    with sleeping(chunks, token_seconds=0.002) as front:
        began = time.monotonic()
        front.send(request("long", prompt=160))
        front.finish()
        return time.monotonic() - began


def test_one_batch_more_than_stages_gives_the_throughput_of_all_stages() -> None:
    one, idle_of_one = decoding(1)
    assert idle_of_one == pytest.approx(1 - 1 / STAGES, abs=0.05)
    for _ in range(ATTEMPTS):
        many, idle = decoding(STAGES + 1)
        if many >= 3.7 * one and idle <= 0.1:  # of a stage's 10 ms, 1 ms for a hop on a busy machine
            return
    pytest.fail(f"{many:.1f} steps/s with {STAGES + 1} batches, {one:.1f} with one; stages idle for {idle:.1%}")


def test_the_chunks_of_a_prompt_pass_the_stages_one_behind_the_other() -> None:
    chunks = STAGES + 1
    expected = (chunks + STAGES - 1) / (chunks * STAGES)
    for _ in range(ATTEMPTS):
        share = first_token_seconds(chunks) / first_token_seconds(1)
        if share == pytest.approx(expected, rel=0.1):
            return
    pytest.fail(f"a prompt of {chunks} chunks takes {share:.2f} of its time in one; expected {expected:.2f}")
