"""Chats, with the official client and a template of the model's own."""

from pathlib import Path
from typing import Any

import openai
import pytest

from tests.unit.worker.front.engines import ANSWER, Engine
from tests.unit.worker.front.fronts import front
from tests.unit.worker.front.tokenizers_of_models import byte_level, save

TOKENS = 300
"""Vocabulary of the model: ``byte_level`` with its merges."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("model")
    return directory, save(byte_level(), directory)


class Chatty(Engine):
    """An engine whose answers are tokens of the model, its end of an answer last."""

    def __init__(self, reference: Any, **options: Any) -> None:
        super().__init__(vocabulary=TOKENS, **options)
        self.tokens = [*reference.encode(ANSWER, add_special_tokens=False), reference.eos_token_id]


def settings(directory: Path) -> dict[str, Any]:
    return {"tokenizer": "HuggingFace", "tokenizer_directory": directory}


async def test_a_chat_is_rendered_answered_and_ended_by_the_models_own_token(
    tmp_path: Path, model: tuple[Path, Any]
) -> None:
    directory, reference = model
    async with Chatty(reference) as engine, front(tmp_path, engine, settings=settings(directory)) as server:
        found = await server.chat("Grüße")
    choice = found.choices[0]
    assert (found.object, found.id[:9]) == ("chat.completion", "chatcmpl-")
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    submit = engine.submissions[0]
    expected = reference.apply_chat_template(
        [{"role": "user", "content": "Grüße"}], add_generation_prompt=True, return_dict=False
    )
    assert submit.prompt_token_ids == expected
    assert submit.stop_token_ids == [reference.eos_token_id]
    assert submit.max_tokens == engine.context - len(expected)
    assert found.usage.completion_tokens == len(engine.tokens)


async def test_a_streamed_chat_begins_with_the_role(tmp_path: Path, model: tuple[Path, Any]) -> None:
    directory, reference = model
    async with Chatty(reference) as engine, front(tmp_path, engine, settings=settings(directory)) as server:
        stream = await server.chat(stream=True, n=2, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
    deltas = [(chunk.choices[0].index, chunk.choices[0].delta) for chunk in chunks if chunk.choices]
    for index in (0, 1):
        own = [delta for at, delta in deltas if at == index]
        assert (own[0].role, own[0].content) == ("assistant", "")
        assert "".join(delta.content or "" for delta in own) == ANSWER
        assert not any("\ufffd" in (delta.content or "") for delta in own)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1].usage.completion_tokens == 2 * len(engine.tokens)


async def test_parts_of_text_are_joined_and_members_of_the_template_handed_over(
    tmp_path: Path, model: tuple[Path, Any]
) -> None:
    directory, reference = model
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    async with Chatty(reference) as engine, front(tmp_path, engine, settings=settings(directory)) as server:
        await server.chat(parts, max_tokens=3, extra_body={"chat_template_kwargs": {"thinking": False}})
        await server.chat(parts, max_completion_tokens=4)
    joined = reference.apply_chat_template(
        [{"role": "user", "content": "one\ntwo"}], add_generation_prompt=True, return_dict=False
    )
    assert [one.prompt_token_ids for one in engine.submissions] == [joined, joined]
    assert [one.max_tokens for one in engine.submissions] == [3, 4]


async def test_scores_of_a_chat_come_with_bytes(tmp_path: Path, model: tuple[Path, Any]) -> None:
    directory, reference = model
    async with Chatty(reference) as engine, front(tmp_path, engine, settings=settings(directory)) as server:
        found = await server.chat(logprobs=True, top_logprobs=2)
        streamed = [chunk async for chunk in await server.chat(logprobs=True, stream=True)]
        none = await server.chat(logprobs=True, max_tokens=1)
    rows = found.choices[0].logprobs.content
    assert bytes(byte for row in rows for byte in row.bytes).decode() == ANSWER
    assert [len(row.top_logprobs) for row in rows] == [2] * len(rows)
    assert rows[0].logprob == rows[0].top_logprobs[0].logprob == -0.25
    told = [row.bytes for chunk in streamed if chunk.choices[0].logprobs for row in chunk.choices[0].logprobs.content]
    assert told == [row.bytes for row in rows]
    assert none.choices[0].logprobs.content[0].top_logprobs == []


async def test_going_on_behind_the_end_is_the_clients_choice(tmp_path: Path, model: tuple[Path, Any]) -> None:
    directory, reference = model
    async with Chatty(reference) as engine, front(tmp_path, engine, settings=settings(directory)) as server:
        await server.chat(extra_body={"ignore_eos": True})
    assert engine.submissions[0].stop_token_ids == []


async def test_a_model_without_template_takes_no_chats(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine) as server:
        with pytest.raises(openai.BadRequestError, match="no chat template") as caught:
            await server.chat()
    assert caught.value.code == "no_chat_template"
