"""The zygote: forks that compute, ends that are told truly, and nobody left behind."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio

from pipelinejob_worker.agent.program import Program
from pipelinejob_worker.agent.worker_process import Nursery
from pipelinejob_worker.agent.zygote import ForkedWorker, Zygote, ZygoteDiedError

ROOT = Path(__file__).parents[4]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}/worker:{ROOT}"}
IDLERS = "tests.unit.worker.recovery.idlers:work"
PATIENCE_SECONDS = 60.0

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def zygote() -> AsyncIterator[Zygote]:
    """One that has imported no torch: quick."""
    zygote = await Zygote.start(IDLERS, ENVIRONMENT)
    yield zygote
    await zygote.stop()


async def command(zygote: Zygote, text: str, log: int = 2) -> tuple[ForkedWorker, socket.socket]:
    """Fork a worker and tell it what to do; the caller closes its link."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        worker = await asyncio.wait_for(zygote.fork(theirs, log), PATIENCE_SECONDS)
    await asyncio.get_running_loop().sock_sendall(ours, text.encode())
    return worker, ours


async def answer(link: socket.socket) -> str:
    with link:
        return (await asyncio.get_running_loop().sock_recv(link, 4096)).decode()


async def end_of(zygote: Zygote, text: str) -> int:
    worker, link = await command(zygote, text)
    with link:
        return await asyncio.wait_for(worker.wait(), PATIENCE_SECONDS)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


async def until_gone(*pids: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline, f"{pids} still run"
        await asyncio.sleep(0.01)


async def test_a_fork_of_the_imported_worker_computes_and_its_parent_had_one_thread() -> None:
    zygote = await Zygote.start("tests.unit.worker.recovery.trainers:work", ENVIRONMENT)
    try:
        for threads in ("1", "2", "1"):  # two would hang in the child of a parent that has used two itself
            worker, link = await command(zygote, threads)
            assert await asyncio.wait_for(answer(link), PATIENCE_SECONDS) == "1024"
            assert await worker.wait() == 1, "the number of the zygote's threads"
    finally:
        await zygote.stop()


async def test_a_crash_is_told_with_its_signal_and_the_next_fork_works(zygote: Zygote) -> None:
    assert await end_of(zygote, "segfault") == -signal.SIGSEGV
    assert await end_of(zygote, "7") == 7
    worker, link = await command(zygote, "wait")
    assert await answer(link.dup()) == str(worker.pid)
    with link:
        worker.send_signal(signal.SIGKILL)
        assert await worker.wait() == -signal.SIGKILL
    worker.send_signal(signal.SIGKILL)  # to an ended one: nothing
    assert await end_of(zygote, "0") == 0


async def test_several_workers_live_side_by_side(zygote: Zygote) -> None:
    links = [await command(zygote, "wait") for _ in range(3)]
    pids = {await answer(link.dup()) for _, link in links}
    assert len(pids) == 3
    assert [worker.running for worker, _ in links] == [True] * 3
    for _, link in links:
        link.close()
    assert [await worker.wait() for worker, _ in links] == [0] * 3


async def test_a_worker_inherits_no_descriptor_of_the_agent_or_of_other_workers(zygote: Zygote) -> None:
    other, other_link = await command(zygote, "wait")
    assert await answer(other_link.dup()) == str(other.pid)
    worker, link = await command(zygote, "sockets")
    assert await answer(link) == "1", "its own link"
    other_link.close()
    assert [await worker.wait(), await other.wait()] == [0, 0]


async def test_output_errors_and_tracebacks_go_to_the_log(zygote: Zygote, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        for text in ("speak", "raise"):
            worker, link = await command(zygote, text, log.fileno())
            with link:
                assert await worker.wait() == (1 if text == "raise" else 0)
    written = (tmp_path / "log").read_text()
    assert "to the output\n" in written
    assert "to the errors\n" in written
    assert "ValueError: of my own" in written


async def test_the_death_of_a_zygote_is_told_and_takes_its_workers_along() -> None:
    zygote = await Zygote.start(IDLERS, ENVIRONMENT)
    worker, link = await command(zygote, "wait")
    with link:
        os.kill(zygote.pid, signal.SIGKILL)
        assert await asyncio.wait_for(worker.wait(), PATIENCE_SECONDS) == -signal.SIGKILL
        await until_gone(worker.pid)
        assert not zygote.alive
        ours, theirs = socket.socketpair()
        with ours, theirs, pytest.raises(ZygoteDiedError, match=f"process {zygote.pid} has ended"):
            await zygote.fork(theirs, 2)
    await zygote.stop()


async def test_a_zygote_that_cannot_import_fails_all_that_wait_for_it(capfd: pytest.CaptureFixture[str]) -> None:
    zygote = await Zygote.start("tests.unit.worker.recovery.nowhere:work", ENVIRONMENT)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ZygoteDiedError):
        await asyncio.wait_for(zygote.fork(theirs, 2), PATIENCE_SECONDS)
    with pytest.raises(ZygoteDiedError):
        await zygote.ready()
    await zygote.stop()
    assert "No module named 'tests.unit.worker.recovery.nowhere'" in capfd.readouterr().err


AGENT = f"""
import asyncio, socket
from pipelinejob_worker.agent.zygote import Zygote

async def main():
    zygote = await Zygote.start({IDLERS!r})
    ours, theirs = socket.socketpair()
    worker = await zygote.fork(theirs, 2)
    print(zygote.pid, worker.pid, flush=True)
    await worker.wait()

asyncio.run(main())
"""


async def test_zygote_and_workers_die_with_the_agent() -> None:
    agent = await asyncio.create_subprocess_exec(sys.executable, "-c", AGENT, stdout=subprocess.PIPE, env=ENVIRONMENT)
    assert agent.stdout
    pids = [int(word) for word in (await agent.stdout.readline()).split()]
    assert len(pids) == 2
    assert not any(map(gone, pids))
    agent.kill()
    await agent.wait()
    await until_gone(*pids)


def children() -> set[int]:
    pids: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        # A thread may end between the look at the list and the look at the thread.
        with suppress(FileNotFoundError, ProcessLookupError):
            pids.update(int(pid) for pid in (task / "children").read_text().split())
    return pids


async def test_who_asks_at_once_gets_the_same_zygote_also_when_the_first_one_gives_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    before, nursery = children(), Nursery(Program(IDLERS))
    first = asyncio.create_task(nursery.ready())
    others = [asyncio.create_task(nursery.ready()) for _ in range(3)]
    await asyncio.sleep(0)
    first.cancel()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await asyncio.gather(*others)
    assert len(children() - before) == 1
    await nursery.stop()
