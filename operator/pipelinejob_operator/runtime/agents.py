"""Polls of the stage agents: one agent a job, because each knows the progress of the whole pipeline."""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
import structlog
from pydantic import ValidationError

from pipelinejob_operator.runtime import metrics
from pipelinejob_operator.runtime.cache import Key
from pipelinejob_worker.protocol import PROTOCOL_VERSION, STATUS_PORT, AgentStatus

PERIOD_SECONDS = 3.0
HURRIED_SECONDS = 0.5
"""Time between two questions to a job that recovers or hands over: something waits for the answers."""
FRESH_SECONDS = 2 * PERIOD_SECONDS
"""An answer that is older says nothing about who lives."""
JITTER = 0.2
TIMEOUT_SECONDS = 2.0
BODY_LIMIT_BYTES = 262_144
"""512 stages' timings take about 100 KB, with many chunks up to 200 KB."""
AT_ONCE = 32

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Target:
    """A job whose gang runs, and the addresses of its stages' pods."""

    key: Key
    uid: str
    epoch: int
    addresses: tuple[str, ...]
    part: int = 0
    """Pipeline of a Serve job, of which each knows its own work only; of others always 0."""
    leavers: tuple[str, ...] = ()
    """Addresses of pods that hand over what they hold."""
    hurried: bool = False
    """Whether something waits for the answers."""

    @property
    def asked(self) -> tuple[str, int]:
        """Whose answer it is: the job's UID and the part."""
        return self.uid, self.part


class Agents:
    """Asks agents and keeps their last answers, by job UID and part."""

    def __init__(self, targets: Callable[[], list[Target]], wake: Callable[[Key], None]) -> None:
        self._targets, self._wake = targets, wake
        self._last: dict[tuple[str, int], AgentStatus] = {}
        self._turn: dict[tuple[str, int], int] = {}
        self._heard: dict[tuple[str, int], float] = {}
        self._due: dict[tuple[str, int], float] = {}
        self._released: dict[tuple[str, int], tuple[int, frozenset[str]]] = {}
        self._limit = asyncio.Semaphore(AT_ONCE)

    def last(self, uid: str, epoch: int, part: int = 0) -> AgentStatus | None:
        """Return the last answer of an agent of this incarnation of the gang."""
        answer = self._last.get((uid, part))
        return answer if answer and answer.epoch == epoch else None

    def fresh(self, uid: str, epoch: int) -> bool:
        """Whether an agent of this incarnation has answered a moment ago."""
        return self.last(uid, epoch) is not None and time.monotonic() - self._heard[uid, 0] < FRESH_SECONDS

    def released(self, uid: str, epoch: int) -> frozenset[str]:
        """Return the addresses of leaving pods that have given all in this epoch."""
        of, addresses = self._released.get((uid, 0), (epoch, frozenset()))
        return addresses if of == epoch else frozenset()

    async def run(self) -> None:
        """Poll for ever. A job is forgotten once it is no target any more."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()) as session:
            while True:
                targets = self._targets()
                self._forget({target.asked for target in targets})
                await asyncio.gather(*(self._ask(session, target) for target in targets if self._is_due(target)))
                await asyncio.sleep(HURRIED_SECONDS)

    def _forget(self, living: set[tuple[str, int]]) -> None:
        """Forget what belongs to jobs that are no targets any more."""
        for kept in (self._last, self._turn, self._heard, self._due, self._released):
            for one in kept.keys() - living:
                del kept[one]

    def _is_due(self, target: Target) -> bool:
        """Whether to ask a job now; from then on its next time counts."""
        now = time.monotonic()
        if not target.hurried and now < self._due.get(target.asked, now):
            return False
        self._due[target.asked] = now + PERIOD_SECONDS * (1 + random.uniform(-JITTER, JITTER))  # noqa: S311 - spreads load
        return True

    async def _ask(self, session: aiohttp.ClientSession, target: Target) -> None:
        leavers = [address for address in target.leavers if address not in self.released(target.uid, target.epoch)]
        await asyncio.gather(
            self._poll(session, target), *(self._poll_leaver(session, target, address) for address in leavers)
        )

    async def _poll_leaver(self, session: aiohttp.ClientSession, target: Target, address: str) -> None:
        """Ask a leaving pod whether it has given all."""
        async with self._limit:
            try:
                answer = await ask(session, address)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                log.debug("a leaving agent does not answer", job=str(target.key), address=address, error=str(error))
                return
        if answer.job_uid == target.uid and answer.epoch == target.epoch and answer.released:
            known = self.released(target.uid, target.epoch)
            self._released[target.uid, 0] = target.epoch, known | {address}
            self._wake(target.key)

    async def _poll(self, session: aiohttp.ClientSession, target: Target) -> None:
        turn = self._turn.setdefault(target.asked, 0)
        address = target.addresses[turn % len(target.addresses)]
        async with self._limit:
            try:
                answer = await ask(session, address)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                # The next stage is asked next time: one deaf agent must not hide the progress of the others.
                self._turn[target.asked] = turn + 1
                metrics.AGENT_POLLS.labels("failed").inc()
                log.debug("an agent does not answer", job=str(target.key), address=address, error=str(error))
                return
        metrics.AGENT_POLLS.labels("answered").inc()
        if answer.job_uid != target.uid or answer.epoch != target.epoch:
            self._turn[target.asked] = turn + 1
            return
        # The first stage knows most: it is asked again next time.
        self._turn[target.asked] = 0
        self._heard[target.asked] = time.monotonic()
        if self._last.get(target.asked) != answer:
            self._last[target.asked] = answer
            self._wake(target.key)


async def ask(session: aiohttp.ClientSession, address: str) -> AgentStatus:
    """Get one agent's status; raises ValueError for an answer that is too long, malformed or too new."""
    host = f"[{address}]" if ":" in address else address
    url = f"http://{host}:{STATUS_PORT}/status"
    async with session.get(url, allow_redirects=False, raise_for_status=True) as response:
        body = await response.content.read(BODY_LIMIT_BYTES + 1)
        while len(body) <= BODY_LIMIT_BYTES and (more := await response.content.read(BODY_LIMIT_BYTES)):
            body += more
    if len(body) > BODY_LIMIT_BYTES:
        raise ValueError(f"the agent at {address} sends more than {BODY_LIMIT_BYTES} bytes")
    try:
        status = AgentStatus.model_validate_json(body)
    except ValidationError as error:
        raise ValueError(f"the agent at {address} sends no status: {error.error_count()} fields are wrong") from error
    if status.oldest_reader > PROTOCOL_VERSION:
        raise ValueError(
            f"the agent at {address} speaks protocol {status.protocol_version}, which readers of protocol "
            f"{status.oldest_reader} understand; this operator has {PROTOCOL_VERSION}: upgrade it"
        )
    return status
