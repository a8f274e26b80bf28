"""Engines die, come back, lie and disagree; the clients of a front see a pause, or an honest error."""

import asyncio
from pathlib import Path

import openai
import pytest

from pipelinejob_worker.serve.wire import Finished, Refused, Submit
from tests.unit.worker.front.engines import ANSWER, Engine, Say, answer, token
from tests.unit.worker.front.fronts import front, read, rest, until

BYTES = list(ANSWER.encode())


async def test_a_stream_goes_on_behind_what_was_sent_when_the_engine_returns(tmp_path: Path) -> None:
    async with Engine(pause_at=9) as engine, front(tmp_path, engine) as server:
        stream = await server.complete(stream=True, seed=5, stop="never", temperature=0.7)
        await read(stream, "Grüße, ")
        engine.break_off()
        engine.pause_at = None
        assert await rest(stream) == ANSWER.removeprefix("Grüße, ")
    before, after = engine.submissions
    assert (before.emitted_token_ids, after.emitted_token_ids) == ([], BYTES[:9])
    assert before.request_id != after.request_id
    unchanged = {"prompt_token_ids", "sampling", "max_tokens", "stop", "stop_token_ids"}
    assert before.model_dump(include=unchanged) == after.model_dump(include=unchanged)
    assert after.priority > before.priority
    assert 0 < after.deadline_seconds <= before.deadline_seconds


async def test_many_clients_and_many_deaths_lose_and_repeat_nothing(tmp_path: Path) -> None:
    async def broken(engine: Engine, submit: Submit, say: Say) -> None:
        if len(submit.emitted_token_ids) < 20 and engine.epoch < 8:
            epoch, start = engine.epoch, len(submit.emitted_token_ids)
            for index in range(start, start + 5):
                say(token(engine, submit, index, BYTES[index]))
            await asyncio.sleep(0.01)  # others have their turn
            if engine.epoch == epoch:
                engine.break_off()
        else:
            await answer(engine, submit, say)

    async with Engine(broken) as engine, front(tmp_path, engine) as server:

        async def text() -> str:
            return await rest(await server.complete(stream=True))

        assert await asyncio.gather(*(text() for _ in range(16))) == [ANSWER] * 16
        assert engine.connections > 3
        assert await server.metric("pipelinejob_front_requests_running") == 0
        assert await server.metric("pipelinejob_front_generation_tokens_total") == 16 * len(BYTES)


async def test_an_outage_is_a_queue_and_the_front_stays_ready(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine) as server:
        await engine.die()
        await server.until_metric("pipelinejob_front_engines_connected", 0)
        waiting = asyncio.gather(*(server.complete() for _ in range(3)))
        await server.until_metric("pipelinejob_front_requests_waiting", 3)
        assert (await server.get("/readyz"))[0] == 200
        await engine.listen()
        assert [found.choices[0].text for found in await waiting] == [ANSWER] * 3


async def test_behind_the_deadline_of_a_recovery_there_is_503_with_retry_after(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine, recovery_seconds=0.2) as server:
        await engine.die()
        await server.until_metric("pipelinejob_front_engines_connected", 0)
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="did not recover") as caught:
                await server.complete(stream=stream)
            assert (caught.value.status_code, caught.value.code) == (503, "service_unavailable")
            assert int(caught.value.response.headers["Retry-After"]) >= 1


async def test_a_stream_that_cannot_go_on_ends_with_an_error_event(tmp_path: Path) -> None:
    async with Engine(pause_at=4) as engine, front(tmp_path, engine, recovery_seconds=0.2) as server:
        stream = await server.complete(stream=True)
        await read(stream, "Grü")
        await engine.die()
        with pytest.raises(openai.APIError, match="did not recover"):
            await rest(stream)


async def test_a_full_queue_during_an_outage_answers_503(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine, held_tokens=14) as server:
        await engine.die()
        await server.until_metric("pipelinejob_front_engines_connected", 0)
        waiting = asyncio.create_task(server.complete("twelve bytes"))
        await server.until_metric("pipelinejob_front_requests_waiting", 1)
        with pytest.raises(openai.InternalServerError, match="the queue is full") as caught:
            await server.complete()
        assert caught.value.status_code == 503
        await engine.listen()
        assert (await waiting).choices[0].text == ANSWER


async def test_another_replica_takes_over_at_once(tmp_path: Path) -> None:
    async with Engine(pause_at=7) as one, Engine(pause_at=7) as other, front(tmp_path, one, other) as server:
        stream = await server.complete(stream=True)
        await read(stream, "Grüße")
        used, spare = (one, other) if one.submissions else (other, one)
        spare.pause_at = None
        await used.die()
        assert await rest(stream) == ANSWER.removeprefix("Grüße")
    assert spare.submissions[0].emitted_token_ids == BYTES[:7]


async def test_tokens_of_an_older_epoch_and_repeated_ones_are_dropped(tmp_path: Path) -> None:
    async def stale(engine: Engine, submit: Submit, say: Say) -> None:
        for index in range(3):
            say(token(engine, submit, index, BYTES[index]))
        engine.epoch -= 1
        say(token(engine, submit, 3, ord("X")))
        engine.epoch += 1
        say(token(engine, submit, 2, ord("Y")))
        say(token(engine, submit, 3, BYTES[3]))
        say(token(engine, submit, 4, ord("Z")).model_copy(update={"request_id": "unknown"}))
        say(Finished(request_id=submit.request_id, reason="stop"))

    async with Engine(stale, epoch=4) as engine, front(tmp_path, engine) as server:
        assert (await server.complete()).choices[0].text == "Grü"
        assert await server.metric("pipelinejob_front_stale_tokens_total") == 1


async def test_an_engine_of_an_older_epoch_is_not_used(tmp_path: Path) -> None:
    async with Engine(epoch=5) as engine, front(tmp_path, engine) as server:
        await engine.die()
        async with Engine(epoch=4) as replaced:
            server.follow(replaced)
            await replaced.until(lambda: replaced.connections > 1)
            assert await server.metric("pipelinejob_front_engines_connected") == 0
            replaced.epoch = 6
            assert (await server.complete()).choices[0].text == ANSWER


async def test_an_engine_that_skips_a_token_is_asked_again(tmp_path: Path) -> None:
    async def skipping(engine: Engine, submit: Submit, say: Say) -> None:
        if not submit.emitted_token_ids:
            say(token(engine, submit, 0, BYTES[0]))
            say(token(engine, submit, 2, BYTES[2]))
        else:
            await answer(engine, submit, say)

    async with Engine(skipping) as engine, front(tmp_path, engine) as server:
        assert (await server.complete()).choices[0].text == ANSWER
    assert engine.connections == 2


async def test_an_engine_that_freezes_is_left(tmp_path: Path) -> None:
    async with Engine(pause_at=3) as engine, front(tmp_path, engine, silence_seconds=0.3) as server:
        asked = asyncio.create_task(server.complete())
        await engine.until(lambda: engine.paused)
        engine.pause_at = None
        assert (await asked).choices[0].text == ANSWER
    assert len(engine.submissions) == 2
    assert engine.submissions[1].emitted_token_ids == BYTES[:3]


async def test_what_is_complete_but_for_its_last_word_ends_without_an_engine(tmp_path: Path) -> None:
    async def speechless(engine: Engine, submit: Submit, say: Say) -> None:
        for index in range(submit.max_tokens):
            say(token(engine, submit, index, BYTES[index]))

    async with Engine(speechless) as engine, front(tmp_path, engine) as server:
        stream = await server.complete(stream=True, max_tokens=2)
        await read(stream, "Gr")
        await engine.die()
        assert [chunk.choices[0].finish_reason async for chunk in stream] == ["length"]


async def test_a_replica_that_leaves_the_file_gives_its_work_to_the_others(tmp_path: Path) -> None:
    async with Engine(pause_at=5) as one, Engine(pause_at=5) as other, front(tmp_path, one, other) as server:
        asked = asyncio.create_task(server.complete())
        await server.until_metric("pipelinejob_front_requests_running", 1)
        used, spare = (one, other) if one.submissions else (other, one)
        spare.pause_at = None
        server.follow(spare)
        assert (await asked).choices[0].text == ANSWER
        assert await server.metric("pipelinejob_front_engines_connected") == 1
    assert len(spare.submissions) == len(used.submissions) == 1


async def test_a_broken_file_of_engines_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def seen() -> bool:
        return "'nonsense' is no address" in capsys.readouterr().out

    async with Engine() as engine, front(tmp_path, engine) as server:
        server.engines_file.write_text("nonsense\n")
        await until(seen)
        assert await server.metric("pipelinejob_front_engines_connected") == 1
        assert (await server.complete()).choices[0].text == ANSWER


async def refuse(engine: Engine, submit: Submit, say: Say) -> None:
    say(Refused(request_id=submit.request_id, reason="overloaded", message="No room.", retry_after_seconds=2.5))


async def test_a_busy_replica_is_passed_over(tmp_path: Path) -> None:
    async with Engine(refuse) as busy, Engine() as free, front(tmp_path, busy, free) as server:
        found = await asyncio.gather(*(server.complete(f"prompt {index}") for index in range(6)))
    assert [one.choices[0].text for one in found] == [ANSWER] * 6
    assert len(free.submissions) == 6
    assert busy.submissions


async def test_when_all_replicas_are_busy_the_client_is_told_when_to_return(tmp_path: Path) -> None:
    async with Engine(refuse) as one, Engine(refuse) as other, front(tmp_path, one, other) as server:
        with pytest.raises(openai.RateLimitError, match="No room") as caught:
            await server.complete()
    assert caught.value.response.headers["Retry-After"] == "3"
    assert len(one.submissions) == len(other.submissions) == 1


async def test_what_was_accepted_once_waits_for_room_after_a_recovery(tmp_path: Path) -> None:
    refusals = 0

    async def crowded(engine: Engine, submit: Submit, say: Say) -> None:
        nonlocal refusals
        if engine.epoch > 1 and refusals < 2:
            refusals += 1
            say(Refused(request_id=submit.request_id, reason="overloaded", message="full", retry_after_seconds=0.05))
        else:
            await answer(engine, submit, say)

    async with Engine(crowded, pause_at=6) as engine, front(tmp_path, engine) as server:
        asked = asyncio.create_task(server.complete())
        await engine.until(lambda: engine.submissions)
        engine.break_off()
        engine.pause_at = None
        assert (await asked).choices[0].text == ANSWER
    assert refusals == 2


async def test_an_error_behind_tokens_comes_behind_their_text(tmp_path: Path) -> None:
    async def fail(engine: Engine, submit: Submit, say: Say) -> None:
        say(token(engine, submit, 0, BYTES[0]))
        say(token(engine, submit, 1, BYTES[1]))
        say(Finished(request_id=submit.request_id, reason="error", message="NaN"))

    async with Engine(fail) as engine, front(tmp_path, engine) as server:
        stream = await server.complete(stream=True)
        await read(stream, "Gr")
        with pytest.raises(openai.APIError, match="NaN"):
            await rest(stream)


@pytest.mark.parametrize(
    ("ending", "error", "code"),
    [
        (
            Refused(request_id="x", reason="too_large", message="Too many."),
            openai.BadRequestError,
            "context_length_exceeded",
        ),
        (Refused(request_id="x", reason="invalid", message="Bad token."), openai.BadRequestError, None),
        (Finished(request_id="x", reason="error", message="NaN"), openai.InternalServerError, "internal_error"),
        (Finished(request_id="x", reason="deadline"), openai.InternalServerError, "deadline_exceeded"),
    ],
)
async def test_what_the_engine_says_becomes_the_clients_error(
    tmp_path: Path, ending: Refused | Finished, error: type[openai.APIStatusError], code: str | None
) -> None:
    async def end(engine: Engine, submit: Submit, say: Say) -> None:
        say(ending.model_copy(update={"request_id": submit.request_id}))

    async with Engine(end) as engine, front(tmp_path, engine) as server:
        with pytest.raises(error) as caught:
            await server.complete()
    assert caught.value.code == code
