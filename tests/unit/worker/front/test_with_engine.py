"""A front before stages that really compute: what clients get does not depend on deaths in between."""

import asyncio
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pipelinejob_worker.models.gpt import Gpt
from pipelinejob_worker.protocol import Preset
from tests.unit.worker.front.fronts import Front, front, rest
from tests.unit.worker.serve.group import service_of, stages_of, threads

PRESET = Preset(name="gpt", layers=4, width=32, heads=4, context=256)
CLIENTS = 6


def engine(stages: int, epoch: int) -> AbstractContextManager[Any]:
    model = Gpt(PRESET)
    parts = stages_of(model, stages, deterministic=True)
    return threads(service_of(model, deterministic=True), parts, blocks=200, epoch=epoch)


def follow(server: Front, port: int) -> None:
    server.engines_file.write_text(f"127.0.0.1:{port}\n")


async def begin(server: Front, client: int) -> Any:
    return await server.complete(f"def main{client}(", seed=client, temperature=0.8, max_tokens=200, stream=True)


async def test_streams_go_on_with_the_same_bits_over_another_split_of_a_later_epoch(tmp_path: Path) -> None:
    async with front(tmp_path) as server:
        with engine(stages=2, epoch=1) as (_, port):
            follow(server, port)
            await server.until_ready()
            expected = [await rest(await begin(server, client)) for client in range(CLIENTS)]

            streams = await asyncio.gather(*(begin(server, client) for client in range(CLIENTS)))
            first = [(await anext(stream)).choices[0].text for stream in streams]
        with engine(stages=3, epoch=2) as (_, port):
            follow(server, port)
            others = await asyncio.gather(*map(rest, streams))
        assert await server.metric("pipelinejob_front_resubmissions_total") == CLIENTS
    assert [begun + other for begun, other in zip(first, others, strict=True)] == expected
    assert len(set(expected)) == CLIENTS
