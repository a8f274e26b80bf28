"""Completions, with the official client."""

import asyncio
from pathlib import Path

import openai
import pytest

from tests.unit.worker.front.engines import ANSWER, Engine
from tests.unit.worker.front.fronts import front

BYTES = ANSWER.encode()


async def test_a_whole_answer_has_text_reason_and_usage(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine) as server:
        found = await server.complete("Hé")
    assert (found.object, found.model, found.id[:5]) == ("text_completion", "tiny", "cmpl-")
    assert (found.choices[0].text, found.choices[0].finish_reason) == (ANSWER, "stop")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (
        3,
        len(BYTES),
        3 + len(BYTES),
    )
    assert engine.submissions[0].prompt_token_ids == list("Hé".encode())


async def test_a_stream_brings_whole_characters_only(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine) as server:
        chunks = [chunk async for chunk in await server.complete(stream=True)]
    texts = [chunk.choices[0].text for chunk in chunks]
    assert "".join(texts) == ANSWER
    assert not any("\ufffd" in text for text in texts)
    assert len(texts) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert chunks[0].usage is None


async def test_a_stream_tells_the_usage_last_when_asked(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine) as server:
        stream = await server.complete(stream=True, max_tokens=5, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 5)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == "length"


async def test_bytes_that_are_no_text_are_shown_as_such_at_the_end(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine) as server:
        found = await server.complete(max_tokens=3)  # the ü is cut in two
    assert (found.choices[0].text, found.choices[0].finish_reason) == ("Gr\ufffd", "length")


async def test_every_prompt_has_n_choices_with_seeds_of_their_own(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine) as server:
        found = await server.complete(["one", "two"], n=2, seed=7, max_tokens=6)
    assert [(choice.index, choice.text) for choice in found.choices] == [(index, "Grüß") for index in range(4)]
    asked = {(bytes(one.prompt_token_ids), one.sampling.seed) for one in engine.submissions}
    assert asked == {(b"one", 7), (b"one", 8), (b"two", 7), (b"two", 8)}
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (6, 24)


async def test_streamed_choices_come_interleaved_with_their_indices(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine) as server:
        texts = {0: "", 1: "", 2: ""}
        async for chunk in await server.complete(n=3, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == dict.fromkeys(range(3), ANSWER)


async def test_seeds_go_round_at_the_largest(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine) as server:
        await server.complete(n=2, seed=(1 << 63) - 1)
    assert {one.sampling.seed for one in engine.submissions} == {(1 << 63) - 1, -(1 << 63)}


async def test_seeds_of_those_who_give_none_differ(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine) as server:
        await asyncio.gather(*(server.complete(max_tokens=1) for _ in range(3)))
    assert len({one.sampling.seed for one in engine.submissions}) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_text_ends_before_a_stop_string_and_the_engine_is_told(tmp_path: Path, stream: bool) -> None:
    async with Engine(pause_at=BYTES.index(b"T") + 4) as engine, front(tmp_path, engine) as server:
        found = await server.complete(stop=["end", "👍🏽 The", "👍🏽 X"], stream=stream)
        choices = [chunk.choices[0] async for chunk in found] if stream else found.choices
        await engine.until(lambda: engine.cancelled)
    assert "".join(choice.text for choice in choices) == "Grüße, 世界! 😀"
    assert choices[-1].finish_reason == "stop"
    assert engine.submissions[0].stop == ["end", "👍🏽 The", "👍🏽 X"]
    assert engine.cancelled == [engine.submissions[0].request_id]


async def test_what_only_began_like_a_stop_string_is_sent_in_the_end(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine) as server:
        texts = [chunk.choices[0].text async for chunk in await server.complete(stop="end. And", stream=True)]
    assert "".join(texts) == ANSWER
    assert texts[-1].endswith("end.")


async def test_echo_begins_with_the_prompt(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine) as server:
        whole = await server.complete([list(b"one"), list(b"two")], echo=True, max_tokens=2)
        streamed = [chunk.choices[0].text async for chunk in await server.complete("one", echo=True, stream=True)]
        nothing = await server.complete("one", echo=True, max_tokens=0)
    assert [choice.text for choice in whole.choices] == ["oneGr", "twoGr"]
    assert (streamed[0], "".join(streamed)) == ("one", "one" + ANSWER)
    assert (nothing.choices[0].text, nothing.choices[0].finish_reason) == ("one", "length")
    assert len(engine.submissions) == 3


async def test_logprobs_come_in_columns(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine) as server:
        whole = await server.complete(logprobs=2, max_tokens=4)
        none = await server.complete(max_tokens=4)
        chunks = [chunk.choices[0].logprobs async for chunk in await server.complete(logprobs=0, stream=True)]
    found = whole.choices[0].logprobs
    assert found.tokens == ["G", "r", "\ufffd", "\ufffd"]
    assert found.token_logprobs == [-0.25] * 4
    assert found.text_offset == [0, 1, 2, 2]
    assert found.top_logprobs[0] == {"G": -0.25, "\ufffd": -2.0}
    assert none.choices[0].logprobs is None
    assert sum(len(one.tokens) for one in chunks) == len(BYTES)
    assert [offset for one in chunks for offset in one.text_offset][-1] == len(ANSWER) - 1


async def test_sampling_reaches_the_engine_as_it_was_asked_for(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine) as server:
        await server.complete(temperature=0.5, top_p=0.9, seed=-3, logprobs=1, extra_body={"top_k": 40})
        await server.complete()
        await server.complete(top_p=0)
    asked, default, greedy = (one.sampling for one in engine.submissions)
    assert (asked.temperature, asked.top_p, asked.top_k, asked.seed) == (0.5, 0.9, 40, -3)
    assert (asked.logprobs, asked.top_logprobs) == (True, 1)
    assert (default.temperature, default.top_p, default.top_k, default.logprobs) == (1.0, 1.0, 0, False)
    assert greedy.top_k == 1


async def test_sixteen_tokens_are_the_default_of_completions(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine) as server:
        await server.client.completions.create(model="tiny", prompt="Say")
    assert engine.submissions[0].max_tokens == 16


async def test_models_are_listed_and_found_by_name(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine) as server:
        assert [model.id async for model in server.client.models.list()] == ["tiny"]
        assert (await server.client.models.retrieve("tiny")).owned_by == "pipelinejob"
        with pytest.raises(openai.NotFoundError):
            await server.client.models.retrieve("gpt-4")
