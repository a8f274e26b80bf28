"""Real agents keep a model served: clients see a pause, the survivors load nothing, and the answers stay the same."""

import asyncio
import signal
from pathlib import Path
from typing import Any

from pipelinejob_worker.protocol import ENGINE_PORT, ExitCode, WorkerConfig
from tests.unit.worker import ladders
from tests.unit.worker.agents import until
from tests.unit.worker.front.fronts import Front, front, rest
from tests.unit.worker.serve.workers import addresses, serve_config

PRESET = {"preset": {"name": "gpt", "layers": 4, "width": 32, "heads": 4, "context": 256}}
CLIENTS = 4
TOKENS = 200


class Ladder(ladders.Ladder):
    """Pods that have addresses of their own."""

    kept: dict[str, Any] = {}  # noqa: RUF012 - replaced, not changed
    """What a container that is restarted keeps beside its memory."""

    def new_pod(self, **settings: Any) -> Any:
        return super().new_pod(address=addresses(1)[0], **settings)

    def restart_container(self, rank: int) -> None:
        self.kept = {"address": self.pods[rank].settings["address"]}
        super().restart_container(rank)

    def _start(self, settings: dict[str, Any]) -> Any:
        kept, self.kept = self.kept, {}
        return super()._start(kept | settings)

    def until_running(self, attempt: int = 0) -> int:
        """Wait until all serve in a later incarnation than ``attempt`` of the epoch; return which."""

        def running() -> int | None:
            told = [self.status(rank) for rank in range(len(self.pods))]
            same = {(one.epoch, one.incarnation_attempt) for one in told}
            ready = all(one.state == "Running" for one in told) and len(same) == 1
            return told[0].incarnation_attempt if ready and told[0].epoch == self.epoch else None

        return until(lambda: (found := running()) and found > attempt and found)

    def follow(self, server: Front) -> None:
        server.engines_file.write_text(f"{self.pods[0].settings['address']}:{ENGINE_PORT}\n")

    def loads(self, pod: Any) -> int:
        return pod.output.count('"event": "layers loaded"')


def config(**changes: Any) -> WorkerConfig:
    recovery = {"strategy": "Ladder", "maxRestarts": 100}
    return serve_config(PRESET, partition={"strategy": "Even"}, jobUid="uid-1", recovery=recovery, **changes)


async def begin(server: Front, client: int) -> Any:
    options = {"seed": client, "temperature": 0.8, "max_tokens": TOKENS, "stream": True}
    return await server.complete(f"def main{client}(", **options)


async def through(server: Front, disturb: Any) -> list[str]:
    """What clients get whose streams have begun when ``disturb`` is called."""
    streams = await asyncio.gather(*(begin(server, client) for client in range(CLIENTS)))
    first = [(await anext(stream)).choices[0].text for stream in streams]
    await asyncio.to_thread(disturb)
    others = await asyncio.gather(*map(rest, streams))
    return [begun + other for begun, other in zip(first, others, strict=True)]


async def test_streams_go_on_through_the_loss_of_workers_containers_and_pods_and_another_shape(tmp_path: Path) -> None:
    with Ladder(tmp_path, config(), 3) as ladder:
        await asyncio.to_thread(ladder.until_running)
        async with front(tmp_path, recovery_seconds=60) as server:
            server.client = server.client.with_options(timeout=120)  # an agent imports for seconds
            ladder.follow(server)
            await server.until_ready()
            expected = await through(server, lambda: None)
            assert len(set(expected)) == CLIENTS

            survivor = ladder.pods[2]
            for disturb in (
                lambda: ladder.hit(1, signal.SIGKILL),
                lambda: ladder.hit(0, signal.SIGKILL),
                lambda: ladder.hit(1, signal.SIGSTOP),
                lambda: ladder.restart_container(1),
                lambda: ladder.replace(1),
            ):
                assert await through(server, disturb) == expected
                await asyncio.to_thread(ladder.until_running)
            assert ladder.loads(survivor) == 1
            assert await server.metric("pipelinejob_front_resubmissions_total") >= 5

            assert await through(server, lambda: ladder.scale(2)) == expected
            await asyncio.to_thread(ladder.until_running)
            assert await through(server, lambda: None) == expected
        told = ladder.status()
        assert told.recovery.last_pause_seconds is not None
        assert {record.reason for record in told.failures} >= {"Signal"}
        ladder.pods[1].terminate()
        assert ladder.pods[1].exit_code() == ExitCode.DRAINED
