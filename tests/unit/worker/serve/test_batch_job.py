"""A Batch job answers each request of a file exactly once, whichever stage dies when, and then ends on all stages."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pipelinejob_worker.protocol import WorkerConfig
from tests.unit.worker.agents import until
from tests.unit.worker.serve.workers import Pods, pods, serve_config

PRESET = {"preset": {"name": "gpt", "layers": 2, "width": 32, "heads": 4, "context": 64}}


def lines(count: int) -> list[dict[str, Any]]:
    """Requests in all forms, some of them wrong."""
    wrong = [{"prompt": "x" * 100}, {"url": "/v1/embeddings", "body": {"input": "x"}}, {"prompt": "x", "n": 0}]
    right = [
        {"prompt": f"{number} is", "max_tokens": 5 + number % 20}
        if number % 2
        else {
            "custom_id": f"mine-{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "tiny", "prompt": f"{number} was", "max_tokens": 9, "temperature": 0.5},
        }
        for number in range(count - len(wrong))
    ]
    return [*right[:2], *wrong, *right[2:]]


def batch_job(directory: Path, records: list[dict[str, Any]]) -> WorkerConfig:
    (directory / "in.jsonl").write_text("\n".join(map(json.dumps, records)) + "\nno JSON\n")
    return serve_config(
        PRESET,
        batch={"input": f"{directory}/in.jsonl", "output": f"{directory}/out.jsonl", "maxTokensInFlight": 512},
        partition={"strategy": "Even"},
    )


def answers(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "out.jsonl").read_text().splitlines()]


def comparable(found: list[dict[str, Any]]) -> str:
    """All but the time of an answer."""
    for line in found:
        line["response"]["body"].pop("created", None)
    return json.dumps(found)


def answered(directory: Path) -> int:
    """How many answers are written by now."""
    return sum(path.read_bytes().count(b'\n{"id"') for path in directory.glob("out.jsonl.part-*"))


def ended(running: Pods) -> set[str]:
    return {worker.hear()[0] for worker in running.workers}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("undisturbed")
    with pods(batch_job(directory, lines(40)), 1) as running:
        assert running.form()[0][0] == "joined"
        assert ended(running) == {"ended"}
        done = running.workers[0].progress
        assert (done.step, done.total_steps) == (41, 41)
    return answers(directory)


def test_a_file_has_an_answer_on_each_line_in_the_form_of_openai(undisturbed: list[dict[str, Any]]) -> None:
    assert [line["id"] for line in undisturbed] == [f"batch_req_{number}" for number in range(41)]
    assert [line["response"]["status_code"] for line in undisturbed] == [200, 200, 400, 400, 400, *[200] * 35, 400]
    assert all(line["error"] is None for line in undisturbed)
    first, second = (line["response"]["body"] for line in undisturbed[:2])
    assert (undisturbed[0]["custom_id"], undisturbed[1]["custom_id"]) == ("mine-0", None)
    assert first["usage"] == {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14}
    assert (second["object"], second["model"]) == ("text_completion", "tiny")
    assert second["choices"][0]["finish_reason"] == "length"
    codes = [undisturbed[place]["response"]["body"]["error"]["code"] for place in (2, 3, 4, 40)]
    assert codes == ["context_length_exceeded", None, "invalid_value", "invalid_json"]


@pytest.mark.parametrize("seed", [1, 2])
def test_through_deaths_of_all_stages_each_request_is_answered_once_and_the_same(
    seed: int, tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    drawn = random.Random(seed)
    with pods(batch_job(tmp_path, lines(40)), 2) as running:
        for stage in (1, 0, 0, 1):
            assert {what for what, _ in running.form()} == {"joined"}
            target = answered(tmp_path) + drawn.randint(1, 6)
            until(lambda target=target: answered(tmp_path) >= target)  # type: ignore[misc]
            running.replace(stage)
            assert running.workers[1 - stage].hear()[0] == "lost"
        running.form()
        assert ended(running) == {"ended"}
    assert comparable(answers(tmp_path)) == comparable(undisturbed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_job_whose_output_is_complete_ends_at_once(tmp_path: Path) -> None:
    config = batch_job(tmp_path, lines(5))
    for _ in range(2):
        with pods(config, 2) as running:
            running.form()
            assert ended(running) == {"ended"}
    (tmp_path / "out.jsonl").write_text("mine\n")
    with pods(config, 1) as running:
        ((what, problem),) = running.form()
    assert what == "failed"
    assert "spec.batch.output" in problem
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"


def test_an_empty_file_has_an_empty_answer(tmp_path: Path) -> None:
    config = batch_job(tmp_path, [])
    (tmp_path / "in.jsonl").write_text("\n")
    with pods(config, 2) as running:
        running.form()
        assert ended(running) == {"ended"}
    assert answers(tmp_path) == []
