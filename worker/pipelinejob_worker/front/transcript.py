"""What clients get of one choice: its text, scores and end, piece by piece as tokens come."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pipelinejob_worker.front.generation import Generation
from pipelinejob_worker.front.tokenizer import Tokenizer
from pipelinejob_worker.serve.text import REPLACEMENT, IncrementalText, StopText
from pipelinejob_worker.serve.wire import Token

_CONTEXT_TOKENS = 6


@dataclass(frozen=True)
class Score:
    """A token with the natural logarithm of its probability. ``offset``: characters of the choice before it."""

    data: bytes
    logprob: float
    offset: int = 0
    alternatives: tuple["Score", ...] = ()

    @property
    def text(self) -> str:
        """The token as text; U+FFFD where it is a part of a character."""
        return self.data.decode(errors="replace")


@dataclass
class Piece:
    """What is new of a choice; ``finish_reason`` is set on its last piece."""

    text: str = ""
    scores: list[Score] = field(default_factory=list)
    finish_reason: str | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.scores or self.finish_reason)


class Transcript:
    """Turns what has come of a choice into pieces. ``offset``: characters that clients get before its text."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer, offset: int = 0) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._text = IncrementalText(tokenizer.decode)
        for token_id in _context(generation.prompt, tokenizer):
            self._text.add(token_id)
        self._stop = StopText(generation.stop)
        self._offset = offset
        self.tokens = 0
        """Tokens that the text is made of, with the one that ended it."""
        self.finished = False

    def take(self) -> Piece:
        """Return what is new, perhaps nothing. Raises ApiError when the choice has failed, and all before is taken."""
        piece = Piece()
        for token in self._generation.take():
            self._add(token, piece)
            if self._stop.stopped:
                break
        if self._generation.reason and not self._stop.stopped:
            piece.text += self._stop.add(self._text.rest()) + self._stop.rest()
            piece.finish_reason = self._generation.reason
        if self._stop.stopped:
            piece.finish_reason = "stop"
        self.finished = bool(piece.finish_reason)
        if not piece and self._generation.failure:
            raise self._generation.failure
        return piece

    def _add(self, token: Token, piece: Piece) -> None:
        self.tokens += 1
        if token.token_id in self._generation.stop_token_ids:
            return
        text = self._text.add(token.token_id)
        if token.logprob is not None:
            piece.scores.append(self._score(token, token.logprob))
        self._offset += len(text)
        piece.text += self._stop.add(text)

    def _score(self, token: Token, logprob: float) -> Score:
        found = (Score(self._tokenizer.token_bytes(one.token_id), one.logprob) for one in token.top_logprobs)
        return Score(self._tokenizer.token_bytes(token.token_id), logprob, self._offset, tuple(found))


def _context(prompt: Sequence[int], tokenizer: Tokenizer) -> Sequence[int]:
    """Return the end of the prompt: on it depends whether an answer's first word begins with a space.

    It begins with a whole character, if there is one near.
    """
    ends = [prompt[-count:] for count in range(_CONTEXT_TOKENS, 0, -1)]
    return next((end for end in ends if not tokenizer.decode(end).startswith(REPLACEMENT)), ends[0])


def joined(pieces: Iterable[Piece]) -> Piece:
    """Return all pieces of a choice as one."""
    whole = Piece()
    for piece in pieces:
        whole.text += piece.text
        whole.scores += piece.scores
        whole.finish_reason = piece.finish_reason or whole.finish_reason
    return whole
