"""A front on a port of its own in this process, with the client that its users have."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import openai

from pipelinejob_worker.front.server import serving
from pipelinejob_worker.front.settings import Limits, Settings
from tests.unit.worker.front.engines import Engine

MODEL = "tiny"


@dataclass
class Front:
    """``client`` does not retry, so that tests see each answer."""

    client: openai.AsyncOpenAI
    http: aiohttp.ClientSession
    port: int
    engines_file: Path

    async def complete(self, prompt: Any = "Say", **options: Any) -> Any:
        return await self.client.completions.create(model=MODEL, prompt=prompt, **{"max_tokens": 100} | options)

    async def chat(self, content: Any = "Say", **options: Any) -> Any:
        return await self.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": content}], **options
        )

    async def post(self, body: Any, path: str = "/v1/completions", **options: Any) -> tuple[int, Any, Any]:
        """Status, headers and JSON of an answer to any body."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | options.pop("headers", {})
        async with self.http.post(path, data=content, headers=headers, **options) as response:
            return response.status, response.headers, await response.json()

    async def post_raw(self, content: Any, headers: dict[str, str]) -> tuple[int, Any, Any]:
        """Post bytes or chunks exactly as they are."""
        headers = {"Content-Type": "application/json"} | headers
        async with self.http.post("/v1/completions", data=content, headers=headers) as response:
            return response.status, response.headers, await response.json()

    async def get(self, path: str) -> tuple[int, str]:
        async with self.http.get(path) as response:
            return response.status, await response.text()

    async def metric(self, name: str) -> float:
        """Value of a sample, by its name with labels."""
        _, text = await self.get("/metrics")
        return next((float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"{name} ")), 0.0)

    async def until_metric(self, name: str, value: float) -> None:
        async def reached() -> bool:
            return await self.metric(name) == value

        await until(reached)

    async def until_ready(self) -> None:
        async def ready() -> bool:
            return (await self.get("/readyz"))[0] == 200

        await until(ready)

    def follow(self, *engines: Engine) -> None:
        """Replace the file of engines."""
        self.engines_file.write_text("".join(f"127.0.0.1:{engine.port}\n" for engine in engines))


@asynccontextmanager
async def front(
    directory: Path, *engines: Engine, settings: dict[str, Any] | None = None, key: str = "unused", **limits: Any
) -> AsyncIterator[Front]:
    """A front that is connected to these engines; without any, it is still loading."""
    file = directory / "engines"
    file.write_text("".join(f"127.0.0.1:{engine.port}\n" for engine in engines))
    values = {"model": MODEL, "engines_file": file, "tokenizer": "Bytes", "host": "127.0.0.1", "port": 0}
    limited = Limits(**{"silence_seconds": 30, "drain_seconds": 0.2} | limits)
    async with serving(Settings(**values | (settings or {})), limited) as port:
        base = f"http://127.0.0.1:{port}"
        client = openai.AsyncOpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0, http_client=_plain())
        async with client, aiohttp.ClientSession(base) as http:
            found = Front(client, http, port, file)
            if engines:
                await found.until_metric("pipelinejob_front_engines_connected", len(engines))
            yield found


def _plain() -> openai.DefaultAsyncHttpxClient:
    """Connections without TLS need no certificates, which take long to load."""
    return openai.DefaultAsyncHttpxClient(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), timeout=20)


async def read(stream: Any, text: str) -> None:
    """Read a stream as far as this text."""
    found = ""
    while found != text:
        found += (await anext(stream)).choices[0].text
        assert text.startswith(found)


async def rest(stream: Any) -> str:
    """Read the rest of a stream."""
    return "".join([chunk.choices[0].text async for chunk in stream])


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Ask again and again, as what is asked has no other way to tell."""
    async with asyncio.timeout(10):
        while not await condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.01)
