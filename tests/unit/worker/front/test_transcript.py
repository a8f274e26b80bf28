"""The text of a choice while its tokens come."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from pipelinejob_worker.front.generation import Generation
from pipelinejob_worker.front.refusals import ApiError, failed
from pipelinejob_worker.front.settings import Settings
from pipelinejob_worker.front.tokenizer import Tokenizer, load
from pipelinejob_worker.front.transcript import Piece, Transcript, joined
from pipelinejob_worker.serve.wire import Sampling, Token
from tests.unit.worker.front.tokenizers_of_models import byte_fallback, byte_level

TEXT = "hi Grüße, 世界 😀👍🏽 all.  The end"


def generation(prompt: list[int], **members: Any) -> Generation:
    values = {"sampling": Sampling(), "max_tokens": 1000, "deadline": 0.0, "changed": asyncio.Event()}
    return Generation("g", prompt, **values | members)


def emit(one: Generation, token_id: int, logprob: float | None = None) -> None:
    one.emit(Token(request_id="g", position=one.next_position, token_id=token_id, epoch=1, logprob=logprob))


def pieces(tokenizer: Tokenizer, one: Generation, ids: list[int], reason: str = "length") -> list[Piece]:
    """Pieces when a client takes each token as it comes."""
    transcript = Transcript(one, tokenizer)
    found = []
    for token_id in ids:
        emit(one, token_id)
        found.append(transcript.take())
    if not transcript.finished:
        one.end(reason)
        found.append(transcript.take())
    assert transcript.finished
    return found


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_the_pieces_are_whole_characters_and_together_the_text(make: Any) -> None:
    tokenizer = Tokenizer(make())
    prompt, ids = tokenizer.encode("Say", special=False), tokenizer.encode("Say" + TEXT, special=False)
    start = len(prompt) if make is byte_fallback else 0
    found = pieces(tokenizer, generation(prompt), ids[start:])
    whole = joined(found)
    assert whole.text == (TEXT if start else "Say" + TEXT)
    assert not any("\ufffd" in piece.text for piece in found)
    assert max(len(piece.text) for piece in found) <= 8


def test_the_first_word_of_an_answer_keeps_the_space_before_it() -> None:
    tokenizer = Tokenizer(byte_fallback())
    ids = tokenizer.encode("say hi", special=False)
    assert joined(pieces(tokenizer, generation(ids[:-1]), ids[-1:])).text == " hi"


def test_an_answer_may_begin_within_a_run_of_bytes() -> None:
    tokenizer = Tokenizer(byte_fallback())
    ids = tokenizer.encode("hi 世界", special=False)
    assert joined(pieces(tokenizer, generation(ids[:-3]), ids[-3:])).text == "界"
    long = tokenizer.encode("世" * 9, special=False)
    assert joined(pieces(tokenizer, generation(long[:-3]), long[-3:])).text == "世"


def test_any_bytes_give_the_text_that_decoding_them_at_once_gives() -> None:
    tokenizer = load(Settings(model="m", tokenizer="Bytes"))
    source = random.Random(1)
    for _ in range(20):
        data = source.randbytes(40) + "é😀".encode()[: source.randint(0, 6)]
        assert joined(pieces(tokenizer, generation([1]), list(data))).text == data.decode(errors="replace")


def test_the_token_that_ends_an_answer_has_no_text_but_counts() -> None:
    tokenizer = load(Settings(model="m", tokenizer="Bytes"))
    one = generation([1], stop_token_ids=[10])
    transcript = Transcript(one, tokenizer)
    for token_id in b"ab\n":
        emit(one, token_id, logprob=-1.0)
    one.end("stop")
    piece = transcript.take()
    assert (piece.text, len(piece.scores), piece.finish_reason, transcript.tokens) == ("ab", 2, "stop", 3)


def test_nothing_behind_a_stop_string_is_counted_or_shown() -> None:
    tokenizer = load(Settings(model="m", tokenizer="Bytes"))
    one = generation([1], stop=["bc"])
    transcript = Transcript(one, tokenizer)
    for token_id in b"abcdef":
        emit(one, token_id)
    piece = transcript.take()
    assert (piece.text, piece.finish_reason, transcript.tokens) == ("a", "stop", 3)


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["xyz"], "ab xy xyz", "ab xy "),
        (["b", "ab"], "ab", ""),
        (["aab"], "aaab", "a"),
        (["never"], "nev", "nev"),
        ([], "text", "text"),
    ],
)
def test_the_first_stop_string_ends_the_text_however_it_is_cut(stops: list[str], text: str, expected: str) -> None:
    tokenizer = load(Settings(model="m", tokenizer="Bytes"))
    assert joined(pieces(tokenizer, generation([1], stop=stops), list(text.encode()))).text == expected


def test_a_failure_comes_after_all_that_was_there_before(tmp_path: Path) -> None:
    one = generation([1])
    transcript = Transcript(one, load(Settings(model="m", tokenizer="Bytes")))
    emit(one, 97)
    one.fail(failed("broken"))
    assert transcript.take().text == "a"
    with pytest.raises(ApiError, match="broken"):
        transcript.take()
