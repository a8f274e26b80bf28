"""Each request of a file is answered exactly once, wherever its writers crash."""

import json
import random
from pathlib import Path

import pytest

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.front import records
from pipelinejob_worker.front.records import Answers, Requests

LINES = [b'{"prompt":"a"}\n', b"\n", b'{"prompt":"b"}\n', b'{"prompt":"c"}\n', b'{"prompt":"d"}']
NUMBERS = [0, 2, 3, 4]


@pytest.fixture
def requests(tmp_path: Path) -> Requests:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(LINES))
    return Requests.of(path)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "answers").mkdir()
    return tmp_path / "answers" / "out.jsonl"


def ids(output: Path) -> list[str]:
    return [json.loads(line)["id"] for line in output.read_text().splitlines()]


def answer_all(answers: Answers, by: str) -> None:
    for number in NUMBERS:
        if not answers.answered[number]:
            answers.append(number, {"by": by})
    answers.finish()


EXPECTED = [f"batch_req_{number}" for number in NUMBERS]


def test_blank_lines_are_no_requests_and_the_last_line_needs_no_end(requests: Requests) -> None:
    assert (requests.count, requests.lines) == (4, 5)
    assert list(requests) == [(number, LINES[number]) for number in NUMBERS]


def test_the_output_is_in_the_order_of_the_input_and_alone(requests: Requests, output: Path) -> None:
    answers = Answers(output, requests)
    for number in reversed(NUMBERS):
        assert not output.exists(), "it appears when it is complete"
        answers.append(number, {"text": "ä" * number})
    answers.finish()
    assert ids(output) == EXPECTED
    assert json.loads(output.read_text().splitlines()[1]) == {"id": "batch_req_2", "text": "ää"}
    assert list(output.parent.iterdir()) == [output]
    assert answers.complete


def test_a_successor_goes_on_behind_whatever_a_crash_has_left(requests: Requests, output: Path) -> None:
    first = Answers(output, requests)
    first.append(3, {"by": "first"})
    first.append(0, {"by": "first"})
    first.close()
    (part,) = output.parent.iterdir()
    whole = part.read_bytes()
    for size in range(len(whole) + 1):  # a crash may tear the file anywhere
        part.write_bytes(whole[:size])
        successor = Answers(output, requests)
        left = {number: _has(whole[:size], number) for number in (0, 3)}
        assert [successor.answered[number] for number in (0, 3)] == [left[0], left[3]]
        assert successor.count == sum(left.values())
        answer_all(successor, "second")
        assert ids(output) == EXPECTED
        found = {json.loads(line)["id"]: json.loads(line)["by"] for line in output.read_text().splitlines()}
        assert found["batch_req_0"] == ("first" if left[0] else "second")
        assert list(output.parent.iterdir()) == [output]
        output.unlink()
        part.write_bytes(whole)


def _has(content: bytes, number: int) -> bool:
    """Whether the whole line of an answer is there."""
    return any(line.startswith(b'{"id":"batch_req_%d"' % number) for line in content.split(b"\n")[:-1])


def test_what_a_predecessor_that_was_only_cut_off_adds_later_is_not_there_twice(
    requests: Requests, output: Path
) -> None:
    late, successor = Answers(output, requests), Answers(output, requests)
    successor.append(2, {"by": "successor"})
    late.append(2, {"by": "late"})
    late.append(0, {"by": "late"})
    answer_all(successor, "successor")
    assert ids(output) == EXPECTED
    late.append(3, {"by": "late"})  # to a file without a name by now
    late.close()
    assert ids(output) == EXPECTED
    assert list(output.parent.iterdir()) == [output]


def test_processes_that_crash_at_random_answer_each_request_once(requests: Requests, output: Path) -> None:
    drawn = random.Random(1)
    for _ in range(50):
        writers = []
        while not output.exists():
            answers = Answers(output, requests)
            writers.append(answers)
            for number in drawn.sample(NUMBERS, 4):
                if not answers.answered[number]:
                    if drawn.random() < 0.4:
                        answers.close()
                        path = answers._part_path(len(writers))
                        path.write_bytes(path.read_bytes()[: -drawn.randint(0, 9) or None])
                        break
                    answers.append(number, {})
            else:
                answers.finish()
        assert ids(output) == EXPECTED
        output.unlink()


def test_a_crash_between_the_output_and_the_end_is_seen(requests: Requests, output: Path) -> None:
    answer_all(Answers(output, requests), "first")
    again = Answers(output, requests)
    assert (again.complete, again.count) == (True, 4)

    (output.parent / "out.jsonl.part-1").write_bytes(b"left\n")
    assert Answers(output, requests).complete
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("content", [b"", b'{"id":"batch_req_0","by":"me"}\n', b"something else\n"])
def test_a_file_that_is_not_the_answer_is_not_touched(requests: Requests, output: Path, content: bytes) -> None:
    output.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"spec\.batch\.output: .* exists and is not the answer"):
        Answers(output, requests)
    assert output.read_bytes() == content


def test_parts_of_another_input_are_refused(requests: Requests, output: Path) -> None:
    Answers(output, requests).close()
    requests.path.write_bytes(b'{"prompt":"other"}\n')
    with pytest.raises(ConfigurationError, match="holds answers to another input"):
        Answers(output, Requests.of(requests.path))


def test_files_that_cannot_be_used_are_named(requests: Requests, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"spec\.batch\.input: .*none.* cannot be read: No such file"):
        Requests.of(tmp_path / "none")
    with pytest.raises(ConfigurationError, match=r"spec\.batch\.output: .* cannot be written: No such file"):
        Answers(tmp_path / "none" / "out", requests)


def test_a_line_without_bounds_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LINE_LIMIT_BYTES", 20)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt":"a"}\n' + b"x" * 1000 + b"\n" + b"y" * 20 + b"\n")
    requests = Requests.of(path)
    assert (requests.count, requests.lines) == (3, 3)
    assert list(requests) == [(0, b'{"prompt":"a"}\n'), (1, None), (2, None)]
