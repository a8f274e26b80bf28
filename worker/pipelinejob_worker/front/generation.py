"""One accepted choice: all that any engine needs to begin it, or to go on with it."""

import asyncio
from dataclasses import dataclass, field

from pipelinejob_worker.front.refusals import ApiError
from pipelinejob_worker.serve.wire import MAX_SECONDS, Sampling, Submit, Token


@dataclass(eq=False)
class Generation:
    """``deadline``: time of the event loop. ``changed`` is set when there are tokens to take, or the end has come;
    the choices of one request share it.
    """

    name: str
    """Unique in this front."""
    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    deadline: float
    changed: asyncio.Event
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    """Tokens that have come from engines; they are never changed or repeated."""
    reason: str = ""
    """Why it ended, ``stop`` or ``length``; empty while more tokens are to come, and after a failure."""
    failure: ApiError | None = None
    attempt: int = 0
    """How often it has been submitted; part of the id by which engines know it."""
    waiting_since: float = 0.0
    """When it was accepted or lost its engine, whichever was last."""
    orphaned: bool = False
    """Whether an engine that had it was lost."""
    fruitless: int = 0
    """Engines that were lost one after the other before they had said a token of it."""
    refused_by: set[int] = field(default_factory=set)
    """Pipelines that were too busy for it."""
    _fresh: list[Token] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        """The id of the present attempt: what is said of an earlier one cannot be taken for it."""
        return f"{self.name}.{self.attempt}"

    @property
    def next_position(self) -> int:
        """Position of the token that is to come, counted over prompt and output."""
        return len(self.prompt) + len(self.emitted)

    @property
    def ended(self) -> bool:
        """Whether no more tokens come."""
        return bool(self.reason or self.failure)

    @property
    def held_tokens(self) -> int:
        """Tokens that are held in memory for it."""
        return len(self.prompt) + len(self.emitted)

    def submission(self, now: float) -> Submit:
        """Return what an engine needs; what has lost its engine goes before what has not had one."""
        return Submit(
            request_id=self.request_id,
            prompt_token_ids=self.prompt,
            emitted_token_ids=self.emitted,
            sampling=self.sampling,
            max_tokens=self.max_tokens,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            deadline_seconds=min(max(self.deadline - now, 0.001), MAX_SECONDS),  # the difference is rounded
            priority=int(self.orphaned),
        )

    def emit(self, token: Token) -> None:
        """Append the token at ``next_position``."""
        self.emitted.append(token.token_id)
        self.fruitless = 0
        self._fresh.append(token)
        self.changed.set()

    def end(self, reason: str) -> None:
        """No more tokens come, and nothing is wrong."""
        self.reason = reason
        self.changed.set()

    def fail(self, failure: ApiError) -> None:
        """No more tokens come, as something is wrong."""
        self.failure = failure
        self.changed.set()

    def end_if_complete(self) -> bool:
        """End it where all tokens have come and only the word of the engine, which is gone, is missing."""
        if self.emitted and self.emitted[-1] in self.stop_token_ids:
            self.end("stop")
        elif len(self.emitted) >= self.max_tokens:
            self.end("length")
        return self.ended

    def take(self) -> list[Token]:
        """Return the tokens that have come since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh
