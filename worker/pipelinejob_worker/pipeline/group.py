"""The process group of the stages: rendezvous, the one collective that the worker needs, and lost peers."""

import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.protocol import Env, Membership
from pipelinejob_worker.recovery.pulse import Doing, Heart, LeaveError, Pulse
from pipelinejob_worker.recovery.sockets import knock, tcp_sockets

RENDEZVOUS_LIMIT = timedelta(minutes=5)
"""How long a stage waits for the others to appear."""

CONNECT_LIMIT = timedelta(seconds=1)
"""How long one round of connecting to the store lasts where agents watch."""

RETRY_SECONDS = 0.02

SILENCE_LIMIT = timedelta(minutes=10)
"""How long a stage waits for a message of another before it takes it for lost."""

WATCHED_SILENCE_LIMIT = timedelta(days=7)
"""The same where agents watch the ranks: they know who computes for long, and who is lost, and free those who wait."""

POLL_SECONDS = 1.0
"""How often ranks that wait for work of unknown length exchange a message."""

Result = TypeVar("Result")

_LINK_ERROR = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|application timeout|timed out|socket",
    re.IGNORECASE,
)


class PeerLostError(Exception):
    """A link to another stage broke; this stage itself is well."""


def prepare_device() -> torch.device:
    """Choose this process's device and pin what changes the bits of a result.

    The number of threads is part of a job's numerical identity (another count sums in another order), so it
    comes from ``OMP_NUM_THREADS`` or is 1, never from the pod's CPU limit. Raises ConfigurationError.
    """
    torch.set_num_threads(int(os.environ.get(Env.THREADS) or 1))
    _check_interfaces()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    torch.use_deterministic_algorithms(True)
    device = torch.device("cuda", int(os.environ.get(Env.LOCAL_RANK) or 0))
    torch.cuda.set_device(device)
    return device


def _check_interfaces() -> None:
    """gloo would take one that is missing for a lost link, which another attempt may find again."""
    present = [name for _, name in socket.if_nameindex()]
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in present:
            raise ConfigurationError(
                f"spec.network.interface: this pod has no network interface {name}; allowed: {', '.join(present)}"
            )


@dataclass(frozen=True)
class Meeting:
    """Where the ranks meet for one incarnation of their group, if not at the address in the membership."""

    name: str
    port: int
    listener: int | None
    """On rank 0: descriptor of a socket that listens there already, so that no rank comes too early."""

    pulse: Pulse


@dataclass(frozen=True)
class Group:
    """This stage's place among all stages of all pipelines.

    Methods are collective: all ranks call them in the same order.
    """

    stage: int
    stages: int
    device: torch.device
    pipeline: int = 0
    pipelines: int = 1
    replicas: distributed.ProcessGroup | None = None
    """The copies of this stage in the order of the pipelines; None where there is one."""

    pulse: Pulse | None = None
    """Where an agent watches: what it sees of this rank."""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Say that the block waits for other ranks.

        Raises LeaveError before and after the block if the agent has ordered to leave the group.
        """
        if self.pulse:
            self.pulse.move(Doing.WAITING)
        yield
        self.computing()

    def computing(self) -> None:
        """Say that this rank computes, and is not stuck. Raises LeaveError."""
        if self.pulse:
            self.pulse.move(Doing.COMPUTING)

    @property
    def rank(self) -> int:
        """This stage's rank: the stages of pipeline 0 come first."""
        return self.rank_of(self.stage)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.stages * self.pipelines

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0

    def rank_of(self, stage: int) -> int:
        """Rank of a stage of this pipeline."""
        return self.pipeline * self.stages + stage

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the element-wise sum over the ranks, on the CPU.

        Where all ranks but one hold zero the sum is exact, in any order: that is how values are exchanged.
        """
        total = values.to(self.device)
        with self.waiting():
            distributed.all_reduce(total)
            return total.cpu()

    def gather(self, *values: int) -> list[list[int]]:
        """Return the ``values`` of every rank, in their order; integers of 64 bits."""
        table = torch.zeros(self.size, len(values), dtype=torch.int64)
        table[self.rank] = torch.tensor(values, dtype=torch.int64)
        rows: list[list[int]] = self.sum(table).tolist()
        return rows

    def together(self, work: Callable[[], Result]) -> Result:
        """Return ``work()`` once it is done on all ranks, however long it takes some of them.

        Meanwhile the ranks exchange messages, or the fast ones would take the slow ones for lost.
        """
        with ThreadPoolExecutor(1) as thread:
            mine = thread.submit(work)
            while not self.agree(mine.done()):
                wait([mine], POLL_SECONDS)
                if mine.done():
                    mine.result()  # a failure ends this rank, and so the others
            return mine.result()

    def agree(self, mine: bool) -> bool:
        """Whether all ranks say yes."""
        return all(row == [1] for row in self.gather(int(mine)))


@contextmanager
def joined(membership: Membership, device: torch.device, meeting: Meeting | None = None) -> Iterator[Group]:
    """Meet the other stages at the master's store and form the group; leave it at the end.

    NCCL connects CUDA devices, gloo everything else. An error of a link to another stage, here or inside the
    block, is raised as PeerLostError. The group is left before that, so that the stages on either side notice
    at once: with gloo the failure then runs along the pipeline in about 10 ms a stage.
    """
    stage, rank = membership.stage, membership.rank
    _forget_groups()
    try:
        store = _store(membership, meeting)
        with _leaving_meanwhile(membership, meeting):
            distributed.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=rank,
                world_size=membership.world_size,
                timeout=WATCHED_SILENCE_LIMIT if meeting else SILENCE_LIMIT,
            )
            replicas = _join_replicas(membership)
        if meeting:
            meeting.pulse.move(Doing.STARTING)
        yield Group(
            stage,
            membership.stages,
            device,
            membership.pipeline,
            membership.pipelines,
            replicas,
            meeting.pulse if meeting else None,
        )
    except LeaveError:
        raise
    except Exception as error:
        if is_link_error(error):
            raise PeerLostError(f"stage {stage} lost a link to another stage: {_cause(error)}") from error
        raise
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _forget_groups() -> None:
    """Number torch's groups from 0 again, as it does when a group is left, but not when it could not be formed.

    The number is part of the keys under which the ranks exchange their addresses: ranks of which some have failed more
    often would wait for each other for ever (``_process_group_name`` in torch/distributed/distributed_c10d.py).
    """
    distributed.distributed_c10d._world.group_count = 0


def _store(membership: Membership, meeting: Meeting | None) -> "distributed.PrefixStore":  # type: ignore[name-defined]
    master = membership.rank == 0
    host = "localhost" if master else membership.master_address
    if meeting:
        store = _watched_store(host, meeting, master=master)
    else:
        store = distributed.TCPStore(  # type: ignore[attr-defined]
            host, membership.master_port, membership.world_size, is_master=master, timeout=RENDEZVOUS_LIMIT
        )
    return distributed.PrefixStore(meeting.name if meeting else f"epoch-{membership.epoch}", store)  # type: ignore[attr-defined]


def _watched_store(host: str, meeting: Meeting, *, master: bool) -> "distributed.TCPStore":  # type: ignore[name-defined]
    """Connect in short rounds, between which the agent's order to leave is obeyed.

    torch's own loop connects again and again until its timeout, with seconds of sleep between, whatever becomes of its
    sockets; so it gets to see no port that refuses. Raises LeaveError, and PeerLostError when the master does not come.
    """
    end = time.monotonic() + RENDEZVOUS_LIMIT.total_seconds()
    while True:
        meeting.pulse.move(Doing.WAITING)
        try:
            if not master:
                socket.create_connection((host, meeting.port), CONNECT_LIMIT.total_seconds()).close()
            store = distributed.TCPStore(  # type: ignore[attr-defined]
                host,
                meeting.port,
                is_master=master,
                timeout=RENDEZVOUS_LIMIT if master else CONNECT_LIMIT,
                wait_for_workers=False,
                master_listen_fd=meeting.listener,
            )
        except (distributed.DistError, OSError) as error:
            if master or time.monotonic() > end:
                raise PeerLostError(f"nobody meets at {host}:{meeting.port}") from error
            time.sleep(RETRY_SECONDS)
        else:
            store.set_timeout(RENDEZVOUS_LIMIT)
            return store


@contextmanager
def _leaving_meanwhile(membership: Membership, meeting: Meeting | None) -> Iterator[None]:
    """Obey the agent's order to leave also while the block waits for ranks to connect to this one."""
    if not meeting:
        yield
        return
    before = tcp_sockets()
    knocking = Heart(meeting.pulse, lambda: knock(membership.world_size, spare=before))
    try:
        yield
    finally:
        knocking.stop()


def _join_replicas(membership: Membership) -> distributed.ProcessGroup | None:
    """Form the groups of equal stages, on all ranks in one order; return this stage's."""
    if membership.pipelines == 1:
        return None
    mine = None
    for stage in range(membership.stages):
        made = distributed.new_group([pipeline * membership.stages + stage for pipeline in range(membership.pipelines)])
        if isinstance(made, distributed.ProcessGroup):  # what ranks outside get is none
            mine = made
    return mine


def is_link_error(error: BaseException) -> bool:
    """Whether ``error``, or what it was raised from, is torch's way to say that a stage cannot be reached.

    gloo raises plain RuntimeErrors, hence the look at the text. A port that is taken is this stage's own
    failure.
    """
    chain = _chain(error)
    if any("EADDRINUSE" in str(link) or isinstance(link, torch.OutOfMemoryError) for link in chain):
        return False
    return any(
        isinstance(link, distributed.DistError | PeerLostError)
        or (isinstance(link, RuntimeError) and _LINK_ERROR.search(str(link)) is not None)
        for link in chain
    )


def _chain(error: BaseException) -> list[BaseException]:
    """The error, what it was raised from, and so on down to the cause; chains of libraries may end where they began."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and not any(cause is link for link in chain):
        chain.append(cause)
    return chain


def _cause(error: BaseException) -> str:
    """First line of the cause: torch adds a stack of C++ frames."""
    cause = _chain(error)[-1]
    return (str(cause).splitlines() or [type(cause).__name__])[0]
