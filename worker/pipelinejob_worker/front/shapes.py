"""The JSON of answers: completions and chats, whole and in chunks."""

from dataclasses import dataclass
from typing import Any, Protocol

from pipelinejob_worker.front.transcript import Piece, Score

Object = dict[str, Any]
"""A JSON object."""


class Shape(Protocol):
    """How one of the two APIs shows choices."""

    prefix: str
    """Beginning of the ids of its answers."""
    whole_object: str
    chunk_object: str

    def opening(self, index: int, echo: str) -> Object | None:
        """Return what a streamed choice begins with, if anything."""

    def delta(self, index: int, piece: Piece) -> Object:
        """Return a choice of a chunk."""

    def whole(self, index: int, echo: str, piece: Piece) -> Object:
        """Return a choice of a whole answer."""


class CompletionShape(Shape):
    """``/v1/completions``. ``logprobs``: whether they were asked for."""

    prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, logprobs: bool) -> None:
        self._logprobs = logprobs

    def opening(self, index: int, echo: str) -> Object | None:
        """Return the echo, if there is one."""
        return self.delta(index, Piece(echo)) if echo else None

    def delta(self, index: int, piece: Piece) -> Object:
        """Return the piece in the form of a whole choice."""
        return self.whole(index, "", piece)

    def whole(self, index: int, echo: str, piece: Piece) -> Object:
        """Return the text behind its echo."""
        return {
            "index": index,
            "text": echo + piece.text,
            "logprobs": _columns(piece.scores) if self._logprobs else None,
            "finish_reason": piece.finish_reason,
        }


class ChatShape(Shape):
    """``/v1/chat/completions``. ``logprobs``: whether they were asked for."""

    prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, logprobs: bool) -> None:
        self._logprobs = logprobs

    def opening(self, index: int, echo: str) -> Object | None:
        """Return the role."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, piece: Piece) -> Object:
        """Return the text as an addition to the message."""
        return {
            "index": index,
            "delta": {"content": piece.text} if piece.text or not piece.finish_reason else {},
            "logprobs": self._scores(piece) if piece.scores else None,
            "finish_reason": piece.finish_reason,
        }

    def whole(self, index: int, echo: str, piece: Piece) -> Object:
        """Return the text as a message."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._scores(piece),
            "finish_reason": piece.finish_reason,
        }

    def _scores(self, piece: Piece) -> Object | None:
        return {"content": [_row(score) for score in piece.scores], "refusal": None} if self._logprobs else None


@dataclass(frozen=True)
class Envelope:
    """What surrounds the choices of one answer. ``created``: seconds since 1970."""

    shape: Shape
    identity: str
    model: str
    created: int

    def chunk(self, choices: list[Object], usage: Object | None, with_usage: bool) -> Object:
        """Return a chunk of a stream; with ``with_usage`` every chunk has the member, the last one its value."""
        chunk = self._around(self.shape.chunk_object, choices)
        return chunk | {"usage": usage} if with_usage else chunk

    def whole(self, choices: list[Object], usage: Object) -> Object:
        """Return a whole answer."""
        return self._around(self.shape.whole_object, choices) | {"usage": usage}

    def _around(self, kind: str, choices: list[Object]) -> Object:
        identity = self.shape.prefix + self.identity
        return {"id": identity, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def usage(prompt_tokens: int, completion_tokens: int) -> Object:
    """Return the numbers of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _columns(scores: list[Score]) -> Object:
    return {
        "tokens": [score.text for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [{one.text: one.logprob for one in score.alternatives} for score in scores],
        "text_offset": [score.offset for score in scores],
    }


def _row(score: Score) -> Object:
    return _named(score) | {"top_logprobs": [_named(one) for one in score.alternatives]}


def _named(score: Score) -> Object:
    return {"token": score.text, "logprob": score.logprob, "bytes": list(score.data)}
