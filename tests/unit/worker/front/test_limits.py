"""What a front refuses, how it says so, and that it forgets those who leave."""

import asyncio
import json
import socket
import zlib
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.unit.worker.front.engines import ANSWER, Engine
from tests.unit.worker.front.fronts import Front, front, read, rest

COMPLETION = {"model": "tiny", "prompt": "Say"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Say"}]}


async def only_this_one_failed(server: Front) -> None:
    assert (await server.complete()).choices[0].text == ANSWER


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"", None, "not valid JSON"),
        (b"{", None, "not valid JSON"),
        (b"[" * 5000, None, "not valid JSON"),
        (b'{"model": "tiny", "prompt": "\xff"}', None, "not valid JSON"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', None, "not valid JSON"),
        (b"[]", None, "object"),
        ({"model": "tiny"}, "prompt", "Missing required parameter"),
        (COMPLETION | {"prompt": []}, "prompt", "none of them an empty list"),
        (COMPLETION | {"prompt": ""}, "prompt", "prompt is empty"),
        (COMPLETION | {"prompt": [1, "a"]}, "prompt", "a list of token ids"),
        (COMPLETION | {"prompt": [-1]}, "prompt", "a list of token ids"),
        (COMPLETION | {"prompt": [256]}, "prompt", "ids are below 256"),
        (COMPLETION | {"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        (COMPLETION | {"max_tokens": 0}, None, "max_tokens must be at least 1 without echo"),
        (COMPLETION | {"max_tokens": "5"}, "max_tokens", "valid integer"),
        (COMPLETION | {"max_tokens": 1 << 80}, "max_tokens", "at most"),
        (COMPLETION | {"n": 0}, "n", "greater than or equal to 1"),
        (COMPLETION | {"n": 65}, "n", "more than 64 choices"),
        (COMPLETION | {"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', "temperature", "finite number"),
        (COMPLETION | {"top_p": 1.1}, "top_p", "less than or equal to 1"),
        (COMPLETION | {"seed": 1 << 63}, "seed", "less than"),
        (COMPLETION | {"stop": ["x"] * 17}, "stop", "up to 16 strings"),
        (COMPLETION | {"stop": ""}, "stop", "1 to 1024 characters"),
        (COMPLETION | {"logprobs": 21}, "logprobs", "less than or equal to 20"),
        (COMPLETION | {"echo": True, "logprobs": 1}, None, "echo together with logprobs"),
        (COMPLETION | {"prompt": [9] * 400, "n": 3}, "n", "All choices together have 1200 prompt tokens"),
        (COMPLETION | {"best_of": 2}, None, "best_of must equal n"),
        (COMPLETION | {"frequency_penalty": 0.5}, "frequency_penalty", "not available"),
        (COMPLETION | {"logit_bias": {"5": 1}}, "logit_bias", "not available"),
        (COMPLETION | {"stream_options": {}}, None, "stream_options are allowed only"),
        (COMPLETION | {"surprise": 1}, "surprise", "Unrecognized request argument"),
    ],
)
async def test_a_body_that_cannot_be_served_is_blamed_precisely(
    tmp_path: Path, body: Any, param: str | None, words: str
) -> None:
    async with Engine() as engine, front(tmp_path, engine, held_tokens=1000) as server:
        status, _, answer = await server.post(body)
        assert (status, answer["error"]["type"], answer["error"]["param"]) == (400, "invalid_request_error", param)
        assert words in answer["error"]["message"]
        assert len(answer["error"]["message"]) < 500
        await only_this_one_failed(server)
    assert len(engine.submissions) == 1


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (CHAT | {"messages": []}, "messages", "at least 1 item"),
        (CHAT | {"messages": [{"content": "x"}]}, "messages.0.role", "Missing required parameter"),
        (
            CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
            "parts of the type text",
        ),
        (CHAT | {"tools": [{"type": "function"}]}, "tools", "not available"),
        (CHAT | {"top_logprobs": 2}, None, "only with logprobs=true"),
        (CHAT | {"response_format": {"type": "json_object"}}, "response_format.type", "'text'"),
        (CHAT | {"max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
    ],
)
async def test_a_chat_that_cannot_be_served_is_blamed_precisely(
    tmp_path: Path, body: Any, param: str | None, words: str
) -> None:
    async with Engine() as engine, front(tmp_path, engine) as server:
        status, _, answer = await server.post(body, "/v1/chat/completions")
    assert (status, answer["error"]["param"]) == (400, param)
    assert words in answer["error"]["message"]


async def test_the_client_raises_its_own_kinds_of_errors(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine, prompt_tokens=20) as server:
        with pytest.raises(openai.NotFoundError) as unknown:
            await server.client.completions.create(model="gpt-4", prompt="x")
        with pytest.raises(openai.BadRequestError) as long:
            await server.complete("x" * 21)
        with pytest.raises(openai.BadRequestError) as much:
            await server.complete("x" * 20, max_tokens=493)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "prompt")
    assert (much.value.code, much.value.param) == ("context_length_exceeded", "max_tokens")
    assert "at most 492 tokens" in much.value.message


@pytest.mark.parametrize(
    ("path", "method", "status"), [("/v1/nothing", "GET", 404), ("/v1/completions", "GET", 405), ("/", "POST", 404)]
)
async def test_routes_that_are_not_there_are_refused_in_the_same_shape(
    tmp_path: Path, path: str, method: str, status: int
) -> None:
    async with front(tmp_path) as server, server.http.request(method, path) as response:
        assert (response.status, (await response.json())["error"]["type"]) == (status, "invalid_request_error")
        assert response.headers["X-Request-Id"]


async def test_a_body_that_is_too_large_is_refused_however_it_is_sent(tmp_path: Path) -> None:
    body = json.dumps(COMPLETION | {"prompt": "x" * 10_000}).encode()

    async def chunks() -> Any:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    async with Engine() as engine, front(tmp_path, engine, body_bytes=5000) as server:
        compressed = {"Content-Type": "application/json", "Content-Encoding": "deflate"}
        for content, headers in ((body, {}), (chunks(), {}), (zlib.compress(body), compressed)):
            status, _, answer = await server.post_raw(content, headers)
            assert (status, answer["error"]["code"]) == (413, "body_too_large")
        await only_this_one_failed(server)


async def test_a_small_request_may_not_ask_for_a_large_echo(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine, body_bytes=1024) as server:
        with pytest.raises(openai.BadRequestError, match="All echoes have 1500 characters") as caught:
            await server.complete("x" * 300, n=5, echo=True)
    assert caught.value.param == "echo"


async def test_a_body_must_be_json_and_arrive_in_time(tmp_path: Path) -> None:
    async def never() -> Any:
        yield b"{"
        await asyncio.sleep(60)

    async with Engine() as engine, front(tmp_path, engine, body_seconds=0.1) as server:
        assert (await server.post(COMPLETION, headers={"Content-Type": "text/plain"}))[0] == 415
        status, _, answer = await server.post_raw(never(), {})
        assert (status, "did not arrive" in answer["error"]["message"]) == (408, True)
        await only_this_one_failed(server)


async def test_overload_is_429_with_retry_after_and_passes(tmp_path: Path) -> None:
    async with Engine(pause_at=0) as engine, front(tmp_path, engine, requests=3) as server:
        running = asyncio.gather(*(server.complete() for _ in range(2)))
        await engine.until(lambda: len(engine.submissions) == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            await server.complete(n=2)
        assert caught.value.code == "rate_limit_exceeded"
        assert caught.value.response.headers["Retry-After"] == "1"
        more = asyncio.create_task(server.complete())
        await engine.until(lambda: len(engine.submissions) == 3)
        with pytest.raises(openai.RateLimitError):
            await server.complete()
        engine.resume()
        assert [found.choices[0].text for found in [*await running, await more]] == [ANSWER] * 3
        await only_this_one_failed(server)


async def test_tokens_that_are_held_are_limited_as_well(tmp_path: Path) -> None:
    async with Engine(pause_at=0) as engine, front(tmp_path, engine, held_tokens=100) as server:
        running = asyncio.create_task(server.complete("x" * 90))
        await engine.until(lambda: engine.submissions)
        with pytest.raises(openai.RateLimitError, match="90 tokens"):
            await server.complete("x" * 11)
        small = asyncio.create_task(server.complete("x" * 10))
        await engine.until(lambda: len(engine.submissions) == 2)
        engine.resume()
        assert [one.choices[0].text for one in (await running, await small)] == [ANSWER] * 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_forgotten_and_its_work_cancelled(tmp_path: Path, stream: bool) -> None:
    async with Engine(pause_at=4) as engine, front(tmp_path, engine) as server:
        asked = asyncio.create_task(server.complete(stream=stream, n=2))
        await engine.until(lambda: len(engine.submissions) == 2)
        if stream:
            await (await asked).close()
        else:
            asked.cancel()
        await engine.until(lambda: len(engine.cancelled) == 2)
        assert set(engine.cancelled) == {one.request_id for one in engine.submissions}
        await server.until_metric("pipelinejob_front_requests_running", 0)
        await server.until_metric('pipelinejob_front_requests_total{path="/v1/completions",status="499"}', 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_does_not_read_is_left_and_harms_nobody(tmp_path: Path, stream: bool) -> None:
    large = {"prompt": "\x01" * 100_000, "echo": True, "max_tokens": 0, "n": 32, "stream": stream}  # 19 MB
    limits = {"stall_seconds": 0.3, "held_tokens": 1 << 22, "body_bytes": 1 << 22}
    async with Engine(context=1 << 18) as engine, front(tmp_path, engine, **limits) as server:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            reader, writer = await asyncio.open_connection(sock=client, limit=1)
            body = json.dumps(COMPLETION | large).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
            writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
            assert await reader.readexactly(1) == b"H"
            await only_this_one_failed(server)
            await server.until_metric('pipelinejob_front_requests_total{path="/v1/completions",status="499"}', 1)
            writer.transport.abort()


async def test_a_request_has_a_time_limit(tmp_path: Path) -> None:
    async with Engine(pause_at=4) as engine, front(tmp_path, engine, request_seconds=0.3) as server:
        with pytest.raises(openai.InternalServerError, match=r"longer than 0\.3 seconds") as caught:
            await server.complete()
        assert (caught.value.status_code, caught.value.response.headers["X-Should-Retry"]) == (504, "false")
        stream = await server.complete(stream=True)
        await read(stream, "Grü")
        with pytest.raises(openai.APIError, match=r"longer than 0\.3 seconds"):
            await rest(stream)
        await engine.until(lambda: len(engine.cancelled) == 2)


async def test_before_the_model_has_been_there_the_front_is_not_ready(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path) as server:
        assert await server.get("/healthz") == (200, "ok\n")
        assert await server.get("/readyz") == (503, "loading\n")
        with pytest.raises(openai.InternalServerError, match="being loaded") as caught:
            await server.complete()
        assert (caught.value.status_code, caught.value.response.headers["Retry-After"]) == (503, "5")
        server.follow(engine)
        await server.until_ready()
        await only_this_one_failed(server)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),  # TLS
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"400"),
        (b"GET /v1/models HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", b"400"),
        (b"GET /v1/models HTTP/1.1\r\nHost: x\r\nExpect: wonders\r\n\r\n", b"417"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"4"),
    ],
)
async def test_what_is_hardly_http_is_refused_and_harms_nobody(tmp_path: Path, sent: bytes, status: bytes) -> None:
    async with Engine() as engine, front(tmp_path, engine) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(sent)
        async with asyncio.timeout(10):
            assert (await reader.readline()).split()[1].startswith(status)
        writer.close()
        await only_this_one_failed(server)


async def test_ids_of_requests_come_from_the_client_or_the_front(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with Engine() as engine, front(tmp_path, engine) as server:
        given = {"X-Request-Id": "order-66.b"}
        _, headers, _ = await server.post(COMPLETION, headers=given)
        found = await server.complete(stream=False)
        _, evil, _ = await server.post(COMPLETION, headers={"X-Request-Id": "x y\u00e9"})
        stream = await server.complete(stream=True, extra_headers=given)
        await rest(stream)
    assert headers["X-Request-Id"] == stream.response.headers["X-Request-Id"] == "order-66.b"
    assert len(found._request_id) == len(evil["X-Request-Id"]) == 32
    assert "order-66.b" in capsys.readouterr().out


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer wrong", "Basic c2VjcmV0", "Bearer secret2", "secret"])
async def test_without_the_token_there_is_nothing(tmp_path: Path, authorization: str) -> None:
    (tmp_path / "token").write_text("secret\n")
    async with (
        Engine() as engine,
        front(tmp_path, engine, settings={"bearer_token_file": tmp_path / "token"}) as server,
    ):
        status, headers, answer = await server.post(COMPLETION, headers={"Authorization": authorization})
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert headers["WWW-Authenticate"] == "Bearer"
        assert (await server.get("/v1/models"))[0] == 401
        assert [(await server.get(path))[0] for path in ("/healthz", "/readyz", "/metrics")] == [200] * 3
    assert not engine.submissions


async def test_the_token_may_change_and_is_never_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "token"
    file.write_text("topsecret\n")
    settings = {"bearer_token_file": file}
    async with Engine() as engine, front(tmp_path, engine, settings=settings, key="topsecret") as server:
        await only_this_one_failed(server)
        file.write_text("othersecret")
        with pytest.raises(openai.AuthenticationError):
            await server.complete()
        file.unlink()  # nobody gets in while there is none
        with pytest.raises(openai.InternalServerError):
            await server.complete()
    output = capsys.readouterr()
    assert "secret" not in output.out.replace("FileNotFoundError", "") + output.err


async def test_metrics_tell_times_and_the_engines_state(tmp_path: Path) -> None:
    async with Engine(others=4) as engine, front(tmp_path, engine) as server:
        await server.complete(n=2)
        await server.until_metric('pipelinejob_engine_requests_running{pipeline="0"}', 4)
        for name, count in (
            ("time_to_first_token_seconds", 2),
            ("time_per_output_token_seconds", 2),
            ("e2e_request_latency_seconds", 1),
            ("request_prompt_tokens", 2),
            ("request_generation_tokens", 2),
        ):
            assert await server.metric(f"pipelinejob_front_{name}_count") == count
        assert await server.metric("pipelinejob_front_generation_tokens_total") == 2 * len(ANSWER.encode())
        assert await server.metric('pipelinejob_engine_kv_cache_usage_ratio{pipeline="0"}') == 0.25
        assert await server.metric('pipelinejob_engine_bubble_ratio{pipeline="0"}') == 0.125


async def test_a_thousand_refused_requests_leave_nothing_behind(tmp_path: Path) -> None:
    async with Engine(pause_at=0) as engine, front(tmp_path, engine, requests=2) as server:
        running = asyncio.gather(server.complete(), server.complete())
        await engine.until(lambda: len(engine.submissions) == 2)
        for _ in range(10):
            answers = await asyncio.gather(*(server.post(COMPLETION) for _ in range(100)))
            assert {status for status, _, _ in answers} == {429}
        engine.resume()
        await running
        assert not engine.cancelled
        await only_this_one_failed(server)
