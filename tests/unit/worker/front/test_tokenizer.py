"""Tokens and templates, against the libraries that define them."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.front.chat import ChatTemplate
from pipelinejob_worker.front.refusals import ApiError
from pipelinejob_worker.front.settings import Settings
from pipelinejob_worker.front.tokenizer import Tokenizer, load
from tests.unit.worker.front.tokenizers_of_models import TEMPLATE, byte_fallback, byte_level, save

TEXT = "Hello wörld, 世界 😀!\n\tThe end."


def loaded(directory: Path) -> Tokenizer:
    return load(Settings(model="m", tokenizer_directory=directory))


def test_bytes_are_tokens_of_their_number() -> None:
    tokenizer = load(Settings(model="m", tokenizer="Bytes"))
    assert tokenizer.encode(TEXT, special=True) == list(TEXT.encode())
    assert tokenizer.decode(range(128)) == bytes(range(128)).decode()
    assert tokenizer.decode(b"a\xffb\xe4\xb8") == b"a\xffb\xe4\xb8".decode(errors="replace")
    assert [tokenizer.token_bytes(byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert tokenizer.token_bytes(256) == b""
    assert (tokenizer.end_token_ids, tokenizer.chat_template) == ([], None)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_tokens_are_those_of_transformers(tmp_path: Path, make: Any) -> None:
    reference = save(make(), tmp_path)
    tokenizer = loaded(tmp_path)
    ids = tokenizer.encode(TEXT, special=False)
    assert ids == reference.encode(TEXT, add_special_tokens=False)
    assert tokenizer.decode([*ids, reference.eos_token_id]) == reference.decode(ids) == TEXT
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().strip() == TEXT
    assert tokenizer.token_bytes(reference.eos_token_id) == b"<|end|>"


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_chats_are_rendered_as_transformers_renders_them(tmp_path: Path, make: Any) -> None:
    template = "{{ bos_token }}{{ user_token }}" + TEMPLATE + "{{ tools }}{{ extra | default('-') | tojson }}"
    reference = save(make(), tmp_path, template)
    tokenizer = loaded(tmp_path)
    assert tokenizer.chat_template is not None
    messages = [{"role": "user", "content": " <b>Grüße</b> \n"}, {"role": "assistant", "content": "hi"}]
    mine = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens).render(messages, {"extra": {"ä": "<&>"}})
    asked = {"add_generation_prompt": True, "extra": {"ä": "<&>"}}
    assert mine == reference.apply_chat_template(messages, tokenize=False, **asked)
    ids = reference.apply_chat_template(messages, tokenize=True, return_dict=False, **asked)
    assert tokenizer.encode(mine, special=False) == ids


def test_the_end_tokens_of_the_model_and_of_the_tokenizer_end_an_answer(tmp_path: Path) -> None:
    reference = save(byte_level(), tmp_path)
    assert loaded(tmp_path).end_token_ids == [reference.eos_token_id]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 200]}))
    assert loaded(tmp_path).end_token_ids == sorted({reference.eos_token_id, 3, 200})


def test_a_template_may_be_in_the_configuration_alone_or_among_others(tmp_path: Path) -> None:
    save(byte_level(), tmp_path, template=None)
    assert loaded(tmp_path).chat_template is None
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"chat_template": "one"}))
    assert loaded(tmp_path).chat_template == "one"
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    path.write_text(json.dumps(config | {"chat_template": several}))
    assert loaded(tmp_path).chat_template == "yes"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer.json", None, "cannot be read"),
        ("tokenizer.json", b"{}", "it is no tokenizer"),
        ("tokenizer.json", b"\xff", "cannot be read"),
        ("tokenizer_config.json", b"{", "it is not JSON"),
        ("generation_config.json", b"[]", "it is no JSON object"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: bytes | None, problem: str) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=problem) as caught:
        loaded(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% set x = messages.append(1) %}", "unsafe"),
    ],
)
def test_a_template_can_refuse_messages_and_do_nothing_else(source: str, problem: str) -> None:
    with pytest.raises(ApiError, match=problem) as caught:
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}], {})
    assert caught.value.status == 400


def test_messages_cannot_be_replaced_by_arguments_of_the_template() -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ thinking }}{{ eos_token }}", {"eos_token": "!"})
    assert template.render([{"content": "x"}], {"messages": [], "thinking": "y"}) == "xy!"


def test_what_is_no_template_is_refused_with_its_line() -> None:
    with pytest.raises(ConfigurationError, match="line 2"):
        ChatTemplate("a\n{% if %}", {})


def test_loops_may_be_left_and_the_date_told() -> None:
    source = "{% for one in messages %}{{ one.content }}{% break %}{% endfor %}{{ strftime_now('%Y') | length }}"
    assert ChatTemplate(source, {}).render([{"content": "a"}, {"content": "b"}], {}) == "a4"


def test_random_bytes_round_trip() -> None:
    tokenizer = load(Settings(model="m", tokenizer="Bytes"))
    data = random.Random(0).randbytes(500)
    assert tokenizer.decode(data) == data.decode(errors="replace")
