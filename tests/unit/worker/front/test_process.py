"""A front as its pod runs it: settings from the environment, an orderly end, and no torch."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.front.engines import addresses
from pipelinejob_worker.front.settings import Limits, Settings, from_environment
from pipelinejob_worker.protocol import ExitCode
from tests.unit.worker.front.engines import ANSWER, Engine
from tests.unit.worker.front.fronts import read, rest

ROOT = Path(__file__).parents[4]
ENVIRONMENT = {"PIPELINEJOB_FRONT_MODEL": "tiny"}


async def start(**environment: object) -> asyncio.subprocess.Process:
    own = {name: value for name, value in os.environ.items() if not name.startswith("PIPELINEJOB_")}
    given = {f"PIPELINEJOB_FRONT_{name.upper()}": str(value) for name, value in environment.items()}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "pipelinejob_worker.front",
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env=own | {"PYTHONPATH": str(ROOT / "worker")} | given,
    )


async def event(process: asyncio.subprocess.Process, name: str) -> dict[str, Any]:
    """Read the log as far as this event."""
    assert process.stdout is not None
    async with asyncio.timeout(30):
        while line := await process.stdout.readline():
            if (found := json.loads(line))["event"] == name:
                return found
    raise AssertionError(f"the log ended without {name}")


@asynccontextmanager
async def running(directory: Path, engine: Engine, **environment: object) -> AsyncIterator[tuple[Any, Any]]:
    """A front's process with its client, once it is connected."""
    file = directory / "engines"
    file.write_text(f"127.0.0.1:{engine.port}\n")
    settings = {"model": "tiny", "tokenizer": "Bytes", "host": "127.0.0.1", "port": 0, "engines_file": file}
    process = await start(**settings | environment)
    try:
        port = (await event(process, "serving"))["port"]
        await event(process, "engine connected")
        base = f"http://127.0.0.1:{port}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="x", max_retries=0, timeout=20) as client:
            yield process, client
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_after_sigterm_streams_finish_and_nobody_new_comes_in(tmp_path: Path) -> None:
    async with Engine(pause_at=4) as engine, running(tmp_path, engine) as (process, client):
        stream = await client.completions.create(model="tiny", prompt="Say", max_tokens=100, stream=True)
        await read(stream, "Grü")
        process.send_signal(signal.SIGTERM)
        assert (await event(process, "draining"))["unfinished"] == 1
        with pytest.raises(openai.APIConnectionError):
            await openai.AsyncOpenAI(base_url=client.base_url, api_key="x", max_retries=0).models.list()
        engine.resume()
        assert await rest(stream) == ANSWER.removeprefix("Grü")
        request = await event(process, "request")
        assert await process.wait() == ExitCode.SUCCEEDED
    assert (request["status"], request["outcome"], request["completion_tokens"]) == (200, "ok", len(ANSWER.encode()))


async def test_what_does_not_finish_in_time_is_told_so(tmp_path: Path) -> None:
    async with Engine(pause_at=4) as engine, running(tmp_path, engine, drain_seconds=0.1) as (process, client):
        stream = await client.completions.create(model="tiny", prompt="Say", max_tokens=100, stream=True)
        whole = asyncio.create_task(client.completions.create(model="tiny", prompt="Say", max_tokens=100))
        await engine.until(lambda: len(engine.submissions) == 2)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="This server stops"):
            await rest(stream)
        with pytest.raises(openai.InternalServerError, match="This server stops") as caught:
            await whole
        assert (caught.value.status_code, caught.value.response.headers["Connection"]) == (503, "close")
        assert await process.wait() == ExitCode.SUCCEEDED


async def test_what_can_never_work_ends_with_the_final_exit_code() -> None:
    process = await start(model="tiny", tokenizer_directory="/nowhere")
    failed = await event(process, "failed")
    assert "/nowhere/tokenizer.json cannot be used" in failed["error"]
    assert await process.wait() == ExitCode.CONFIGURATION


async def test_a_front_imports_no_torch() -> None:
    code = "import sys, pipelinejob_worker.front.__main__; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, env={"PYTHONPATH": str(ROOT / "worker")}
    )
    output, _ = await process.communicate()
    assert output == b"set()\n"


def test_every_setting_has_a_variable() -> None:
    values = {
        "ENGINES_FILE": "/e",
        "PORT": "81",
        "BEARER_TOKEN_FILE": "/t",
        "BODY_BYTES": "2048",
        "STALL_SECONDS": "1.5",
    }
    given = {f"PIPELINEJOB_FRONT_{name}": value for name, value in values.items()} | {"PATH": "/bin"}
    settings, limits = from_environment(ENVIRONMENT | given | {"PIPELINEJOB_FRONT_HOST": ""})
    assert settings == Settings(model="tiny", engines_file=Path("/e"), port=81, bearer_token_file=Path("/t"))
    assert limits == Limits(body_bytes=2048, stall_seconds=1.5)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "PIPELINEJOB_FRONT_MODEL: nothing cannot be used"),
        ({"PIPELINEJOB_FRONT_PORT": "http"}, "PIPELINEJOB_FRONT_PORT: 'http' cannot be used"),
        ({"PIPELINEJOB_FRONT_REQUESTS": "0"}, "PIPELINEJOB_FRONT_REQUESTS: '0' cannot be used"),
        ({"PIPELINEJOB_FRONT_TOKENIZER": "Words"}, "'Bytes' or 'HuggingFace'"),
    ],
)
def test_a_wrong_variable_is_named(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        from_environment((ENVIRONMENT if environment else {}) | environment)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", {}),
        ("a:1\nb.c.svc:65535\n", {0: ("a", 1), 1: ("b.c.svc", 65535)}),
        ("\n a:1 \n", {1: ("a", 1)}),
        ("[fd00::1]:80", {0: ("fd00::1", 80)}),
    ],
)
def test_each_line_of_the_file_is_the_engine_of_a_pipeline(content: str, expected: Any) -> None:
    assert addresses(content) == expected


@pytest.mark.parametrize("line", ["a", "a:", ":1", "a:0", "a:65536", "a:x", "a:-1"])
def test_a_line_that_is_no_address_is_named(line: str) -> None:
    with pytest.raises(ValueError, match=f"'{line}' is no address"):
        addresses(line)


@pytest.mark.parametrize("content", [None, b" \n"])
async def test_without_a_token_in_its_file_a_front_does_not_start(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "token").write_bytes(content)
    process = await start(model="tiny", tokenizer="Bytes", bearer_token_file=tmp_path / "token")
    assert "serve.bearerTokenSecretName" in (await event(process, "failed"))["error"]
    assert await process.wait() == ExitCode.CONFIGURATION
