"""An engine of a few lines: it speaks the protocol over TCP, and does what a test tells it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Self

from pipelinejob_worker.serve.wire import (
    TO_ENGINE,
    Cancel,
    Finished,
    Ready,
    Refused,
    Stats,
    Submit,
    Token,
    to_line,
)

ANSWER = "Grüße, 世界! 😀👍🏽 The end."
"""What engines say: characters of one to four bytes, each byte a token."""

Say = Callable[[Token | Finished | Refused], None]
Behaviour = Callable[["Engine", Submit, Say], Awaitable[None]]


async def answer(engine: "Engine", submit: Submit, say: Say) -> None:
    """Say the engine's answer, or what follows those emitted before, one token a position."""
    tokens = engine.tokens
    for index in range(len(submit.emitted_token_ids), min(len(tokens), submit.max_tokens)):
        await engine.may_emit(index)
        say(token(engine, submit, index, tokens[index]))
    say(Finished(request_id=submit.request_id, reason="length" if len(tokens) > submit.max_tokens else "stop"))


def token(engine: "Engine", submit: Submit, index: int, token_id: int) -> Token:
    """The token of an output's position, with a score where one is asked for."""
    names = [{"token_id": token_id, "logprob": -0.25}, {"token_id": 0xC3, "logprob": -2.0}]
    return Token(
        request_id=submit.request_id,
        position=len(submit.prompt_token_ids) + index,
        token_id=token_id,
        epoch=engine.epoch,
        logprob=-0.25 if submit.sampling.logprobs else None,
        top_logprobs=names[: submit.sampling.top_logprobs],
    )


class Engine:
    """Stage 0, as far as a front can see. ``pause_at``: index of a token before which it waits for ``resume``."""

    def __init__(
        self,
        behaviour: Behaviour = answer,
        *,
        epoch: int = 1,
        vocabulary: int = 256,
        context: int = 512,
        pause_at: int | None = None,
        others: int = 0,
        silent: bool = False,
    ) -> None:
        self.behaviour = behaviour
        self.tokens = list(ANSWER.encode())
        self.epoch, self.vocabulary, self.context = epoch, vocabulary, context
        self.pause_at, self._resume = pause_at, asyncio.Event()
        self._others, self._silent = others, silent
        self.submissions: list[Submit] = []
        self.cancelled: list[str] = []
        self.connections = 0
        self.paused = False
        self.happened = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def listen(self) -> None:
        """Take connections, on the port that it had before if it had one."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=1 << 24)
        self.port = self._server.sockets[0].getsockname()[1]

    async def die(self) -> None:
        """End all connections and take no more."""
        self._server.close()
        self.break_off()

    def break_off(self) -> None:
        """The group breaks: end all connections, and forget what they had asked for. The next epoch begins."""
        for task in self._tasks.values():
            task.cancel()
        for writer in self._writers:
            writer.transport.abort()
        self._tasks.clear()
        self.epoch += 1

    def resume(self) -> None:
        """Go on behind ``pause_at``."""
        self._resume.set()

    async def may_emit(self, index: int) -> None:
        """Wait where the test wants it."""
        if index == self.pause_at:
            self.paused = True
            self.happened.set()
            await self._resume.wait()
        await asyncio.sleep(0)

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until something that was heard makes the condition true."""
        async with asyncio.timeout(10):
            while not condition():
                self.happened.clear()
                await self.happened.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def say(message: Token | Finished | Refused | Ready | Stats) -> None:
            writer.write(to_line(message))

        self.connections += 1
        self._writers.add(writer)
        say(Ready(epoch=self.epoch, vocabulary=self.vocabulary, context=self.context, deterministic=True))
        if not self._silent:
            say(self._stats())
        self.happened.set()
        try:
            while line := await reader.readline():
                self._obey(TO_ENGINE.validate_json(line), say)
        except ConnectionError:
            pass  # the front, or break_off, ended it
        finally:
            self._writers.discard(writer)
            writer.close()

    def _obey(self, message: Submit | Cancel, say: Say) -> None:
        if isinstance(message, Submit):
            self.submissions.append(message)
            self._tasks[message.request_id] = asyncio.create_task(self._behave(message, say))
        else:
            self.cancelled.append(message.request_id)
            if (task := self._tasks.pop(message.request_id, None)) is not None:
                task.cancel()
        self.happened.set()

    async def _behave(self, submit: Submit, say: Say) -> None:
        await self.behaviour(self, submit, say)

    def _stats(self) -> Stats:
        return Stats(
            epoch=self.epoch,
            queued=0,
            running=self._others,
            batches_in_flight=2,
            cache_blocks=100,
            cache_blocks_used=25,
            prompt_tokens_per_second=7,
            tokens_per_second=9,
            preemptions=3,
            bubble_percent=12.5,
        )
