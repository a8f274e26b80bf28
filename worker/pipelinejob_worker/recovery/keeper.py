"""All that the agent of a rank keeps and does for recovery, apart from its worker."""

import asyncio
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import structlog

from pipelinejob_worker.recovery import memory
from pipelinejob_worker.recovery.agreement import assign, held_twice
from pipelinejob_worker.recovery.copies import PieceClient, in_thread
from pipelinejob_worker.recovery.cut import Cut
from pipelinejob_worker.recovery.messages import FAILURES_TOLD, Join, Plan
from pipelinejob_worker.recovery.piece_server import PieceServer
from pipelinejob_worker.recovery.pieces import Held, Incarnation
from pipelinejob_worker.recovery.slots import Place, SlotStore
from pipelinejob_worker.recovery.transport import Address, TransferError

log = structlog.get_logger()

RETRY_SECONDS = 0.5
POLL_SECONDS = 0.05


class Keeper:
    """The slots of one rank, the copies that it keeps and has kept, and what it has written down."""

    def __init__(
        self,
        directory: Path,
        *,
        job_uid: str,
        rank: int,
        limit_bytes: int,
        guarded: Callable[[int], object],
        settled: Callable[[], object] = lambda: None,
        stored: Callable[[], object] = lambda: None,
    ) -> None:
        """``guarded`` is called with each step that the guard has acknowledged; ``settled`` once in each incarnation,
        when every rank holds a step that was computed in it; ``stored`` after each copy that has come from another
        rank. Raises OSError.
        """
        self.store = SlotStore(directory, job_uid, limit_bytes)
        self.limit_bytes = limit_bytes
        self._directory = directory
        self._job_uid = job_uid
        self._rank = rank
        self._on_guarded = guarded
        self._on_settled = settled
        self.copy_seconds = 0.0
        """Over how long a copy is spread, so that it does not hold up the training's own messages; 0: at full speed."""

        self._server = PieceServer(self.store, job_uid, stored)
        self._client = PieceClient(self.store, job_uid, rank)
        self._plan: Plan | None = None
        self._layers: Collection[int] | None = None
        """Those of this rank in the present incarnation, as far as it had to ask for any."""

        self._settled: Incarnation | None = None
        """The newest incarnation in which everything has been guarded where it belongs."""

        self._guarding: asyncio.Task[None] | None = None
        self._giving_up: asyncio.Task[None] | None = None
        self.guard_problem = ""
        """Why the newest snapshot is not at the guard, empty if it is or is still on its way."""
        try:
            self.memory = memory.load(directory)
        except ValueError as error:
            # Without the rollbacks nobody can tell which of the pieces count.
            log.warning("what was written down cannot be read: the slots are dropped", error=str(error))
            self.memory = memory.Memory()
            self.store.invalidate(lambda _: True)

    @property
    def bytes_sent(self) -> int:
        """Payload that has left this pod: copies and fetched pieces."""
        return self._client.traffic.sent + self._server.traffic.sent

    @property
    def bytes_received(self) -> int:
        """Payload that has come into this pod."""
        return self._client.traffic.received + self._server.traffic.received

    def become(self, rank: int) -> None:
        """Take another rank's place; what is held stays. Between two incarnations only."""
        self._rank = rank
        self._client = PieceClient(self.store, self._job_uid, rank, self._client.traffic)

    @property
    def bytes_fetched(self) -> int:
        """Payload of pieces that this rank has taken over from others."""
        return self._client.traffic.received

    def start(self, host: str, port: int = 0) -> int:
        """Serve pieces; return the port. Raises OSError."""
        return self._server.start(host, port)

    async def stop(self) -> None:
        """End all transfers."""
        await self.leave()
        await self._server.stop()

    def remember(self, new: memory.Memory) -> None:
        """Write something down. Raises OSError."""
        memory.save(self._directory, new)
        self.memory = new

    def join(
        self, *, epoch: int, world_size: int, leaving: int, node: str, address: Address, cut: Cut | None = None
    ) -> Join:
        """Return what this rank tells the coordinator.

        ``leaving``: how many agents have ranks from ``world_size`` on, and only give what they hold.
        """
        return Join(
            job_uid=self._job_uid,
            epoch=epoch,
            rank=self._rank,
            world_size=world_size,
            present=world_size if self._settled and self._settled.epoch == epoch else world_size + leaving,
            node=node,
            address=address,
            last=self.memory.incarnation,
            lineage=self.memory.lineage,
            held=self.store.held(),
            cut=cut,
            failures=self.memory.failures[-FAILURES_TOLD:],
        )

    async def apply(self, plan: Plan) -> None:
        """Write a plan down, invalidate what it makes void, and serve its incarnation only. Raises OSError."""
        await self.leave()
        self.remember(self.memory.model_copy(update={"incarnation": plan.incarnation, "lineage": plan.lineage}))
        step = plan.step
        void = self.store.invalidate(
            lambda held: step is None or held.step > step or not plan.lineage.counts(held),
        )
        self._plan, self._layers = plan, None
        await self._server.advance(plan.incarnation)
        log.info("a new incarnation", incarnation=str(plan.incarnation), step=step, void_pieces=len(void))

    async def fetch(self, needs: Mapping[int, Collection[int]]) -> None:
        """Own all layers that this rank needs at the plan's step. ``needs``: the layers of every rank.

        Raises TransferError, and ConfigurationError when there is no room.
        """
        assert self._plan
        plan, layers = self._plan, set(needs[self._rank])
        self._layers, twice = layers, held_twice(plan.holdings)

        def useless(place: Place, step: int | None) -> bool:
            wanted = place.piece in self._server.reserved if place.copied else place.piece.layer in layers
            return not wanted and (step is None or (twice and step < (plan.step or 0)))

        fetches = assign(plan.holdings, needs)[self._rank]
        addresses = dict(enumerate(plan.addresses))
        await self._client.fetch(addresses, plan.incarnation, fetches, useless=useless)

    def protect(self, step: int) -> None:
        """The worker has a valid snapshot of ``step``: have it guarded, in the background, until that is done.

        One that is newer than the plan's step shows that this is guarded everywhere: what else is kept of other
        splits and incarnations is given up.
        """
        assert self._plan
        if step > (self._plan.step or 0) and self._settled != self._plan.incarnation:
            own = {held.piece for held in self.store.held() if held.step == step and not held.copied}
            # In a thread: giving gigabytes back takes longer than others wait for a sign of life.
            self._giving_up = asyncio.create_task(in_thread(self.store.retain, own, self._server.reserved))
            self._settled = self._plan.incarnation
            self._on_settled()
        if self._guarding:
            self._guarding.cancel()
        self._guarding = asyncio.create_task(self._guard(self._plan, step))

    async def leave(self) -> None:
        """The incarnation is over: send no more copies of it, and give up nothing of the next one."""
        guarding, self._guarding = self._guarding, None
        if guarding:
            guarding.cancel()
            await asyncio.wait([guarding])
            if not guarding.cancelled():
                guarding.result()
        self._client.release()
        giving_up, self._giving_up = self._giving_up, None
        if giving_up:
            await giving_up

    async def hand_over(self) -> None:
        """Wait until the newest snapshot is guarded, or the guard cannot be reached."""
        while self._guarding and not self._guarding.done() and not self.guard_problem:
            await asyncio.wait([self._guarding], timeout=POLL_SECONDS)

    async def _guard(self, plan: Plan, step: int) -> None:
        guard = plan.guards[self._rank]
        pieces = [held for held in self.store.held() if held.step == step and not held.copied and self._has(held)]
        rate = sum(held.size for held in pieces) / self.copy_seconds if self.copy_seconds else 0.0
        while guard is not None:
            try:
                address = plan.addresses[guard]
                await self._client.guard(address, plan.incarnation, pieces, bytes_per_second=rate)
                break
            except TransferError as error:
                if not self.guard_problem:
                    log.warning("snapshot not guarded", step=step, guard=guard, error=str(error))
                self.guard_problem = f"rank {guard} does not keep the copy of step {step}: {error}"
                await asyncio.sleep(RETRY_SECONDS)
        self.guard_problem = ""
        self._on_guarded(step)

    def _has(self, held: Held) -> bool:
        """Whether it is of this rank's layers: those that another split took from it have another owner, and guard."""
        return self._layers is None or held.piece.layer in self._layers
