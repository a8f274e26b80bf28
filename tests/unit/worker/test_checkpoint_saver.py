"""Saving goes on beside training: what is saved, what it waits for, and what a failing volume changes."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipelinejob_worker.state.commit import PENDING
from pipelinejob_worker.state.snapshot import FileImage, Snapshot
from tests.unit.worker.checkpoints import PATIENCE_SECONDS, Job, layer, same


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def wait(gate: threading.Event) -> Callable[[], None]:
    """A volume that takes its time."""

    def until_open() -> None:
        assert gate.wait(PATIENCE_SECONDS)

    return until_open


@pytest.mark.parametrize(("stages", "pipelines"), [(1, 1), (3, 1), (2, 2), (1, 3)])
def test_a_checkpoint_is_saved_while_steps_go_on(tmp_path: Path, stages: int, pipelines: int) -> None:
    job = Job(tmp_path, stages, pipelines)
    job.begin(10)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while job.savers[0].in_flight and time.monotonic() < deadline:
        job.vote()
    assert (job.saved_step, job.problem) == (10, "")
    assert names(tmp_path) == ["latest", "step-000000010"]
    assert {code for saver in job.savers for code in saver.vote()} == {PENDING}, "there is nothing more to say"
    for before, after in ((stages, pipelines), (1, 1), (5, 1), (2, 3)):
        again = Job(tmp_path, before, after)
        assert [resumed.step for resumed in again.resumed] == [10] * before * after
        assert all(same(resumed.layers, 10) for resumed in again.resumed)
        assert all(resumed.extra == {"lossScale": 0.5, "goodSteps": 10} for resumed in again.resumed)


def test_what_is_saved_is_the_state_of_that_step_however_late_it_is_written(tmp_path: Path) -> None:
    job, gate = Job(tmp_path, 2), threading.Event()
    live = job.begin(10, first={0: wait(gate), 1: wait(gate)})
    for layers in live:
        for tensors in layers.values():
            for tensor in tensors.values():
                tensor.fill_(-1)  # the next update
    gate.set()
    job.finish()
    assert all(same(resumed.layers, 10) for resumed in Job(tmp_path, 1).resumed)


def test_a_slow_volume_delays_no_step_and_what_falls_due_meanwhile_is_skipped(tmp_path: Path) -> None:
    job, gate = Job(tmp_path, 2), threading.Event()
    job.begin(10, first={1: wait(gate)})
    started = time.monotonic()
    for step in range(11, 111):
        job.vote()
        if step % 10 == 0:
            job.begin(step)
    assert time.monotonic() - started < 2
    assert [saver.skipped for saver in job.savers] == [10, 10]
    assert job.saved_step == 0
    gate.set()
    job.finish()
    assert (job.saved_step, job.problem) == (10, "")
    job.save(120)
    assert job.saved_step == 120


def test_a_volume_that_hangs_in_the_middle_delays_no_step(tmp_path: Path) -> None:
    job = Job(tmp_path, 2)
    job.save(10)
    partial = tmp_path / "step-000000020.partial-0"
    partial.mkdir()
    fifo = partial / "head.safetensors"
    os.mkfifo(fifo)  # to open it for writing blocks until somebody reads
    job.begin(20)
    started = time.monotonic()
    for _ in range(100):
        job.vote()
    assert time.monotonic() - started < 2
    assert job.savers[1].in_flight
    assert fifo.read_bytes()  # the writer goes on; a FIFO has nothing to sync, so it fails
    job.finish()
    assert job.saved_step == 10
    assert job.problem == (
        "the checkpoint of step 20 was not written: stage 1: Invalid argument; the newest is of step 10"
    )
    assert names(tmp_path) == ["latest", "step-000000010"]


_LEAVE = """
import os, sys
from pathlib import Path
from tests.unit.worker.checkpoints import Job

volume = Path(sys.argv[1])
job = Job(volume, 1)
(volume / "step-000000010.partial-0").mkdir()
os.mkfifo(volume / "step-000000010.partial-0/head.safetensors")
job.begin(10)
sys.exit(41)
"""


def test_a_process_that_must_leave_does_not_wait_for_a_volume_that_hangs(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", _LEAVE, tmp_path], timeout=PATIENCE_SECONDS, check=False)
    assert ended.returncode == 41


def test_the_end_waits_longer_than_ranks_may_be_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelinejob_worker.state.saver.POLL_SECONDS", 0.001)
    job, gate, sums = Job(tmp_path, 2), threading.Event(), 0

    def counted(values: torch.Tensor) -> torch.Tensor:
        nonlocal sums
        sums += 1
        if sums == 100:
            gate.set()
        return job.together.sum(values)

    job.begin(10, first={1: wait(gate)})
    job.together.all(lambda: job.savers[0].finish(counted), lambda: job.savers[1].finish(job.together.sum))
    assert sums >= 100
    assert job.saved_step == 10


def test_a_mistake_in_the_background_is_raised_where_training_sees_it(tmp_path: Path) -> None:
    def mistake() -> None:
        raise ZeroDivisionError

    job = Job(tmp_path, 1)
    job.begin(10, first={0: mistake})
    deadline = time.monotonic() + PATIENCE_SECONDS
    with pytest.raises(ZeroDivisionError):
        while time.monotonic() < deadline:
            job.vote()


def test_what_must_come_first_fails_the_checkpoint(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(5, "Input/output error")

    job = Job(tmp_path, 2)
    job.begin(10, first={1: fail})
    job.finish()
    assert job.problem == "the checkpoint of step 10 was not written: stage 1: Input/output error; there is none yet"
    job.save(20)
    assert (job.saved_step, job.problem) == (20, "")


def test_a_list_that_vanishes_before_completion_fails_the_checkpoint(tmp_path: Path) -> None:
    job = Job(tmp_path, 2)
    job.save(10)
    job.begin(20)
    written = tmp_path / "step-000000020.partial-0" / "written-1.json"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not written.exists() and time.monotonic() < deadline:
        pass
    written.unlink()
    job.finish()
    assert job.problem == (
        "the checkpoint of step 20 was not completed: stage 0: Input/output error; the newest is of step 10"
    )
    assert names(tmp_path) == ["latest", "step-000000010"]


def test_retention_follows_each_save(tmp_path: Path) -> None:
    job = Job(tmp_path, 2, keep=2)
    for step in (10, 20, 30, 40):
        job.save(step)
    assert names(tmp_path) == ["latest", "step-000000030", "step-000000040"]
    assert (tmp_path / "latest").read_text() == "step-000000040\n"


def test_an_image_is_the_file_that_the_library_reads() -> None:
    tensors = {
        "b": torch.arange(6.0).view(2, 3).t(),  # not contiguous
        "a": torch.tensor(1.5, dtype=torch.bfloat16),
        "c": torch.tensor([0.1], dtype=torch.float64),
        "nothing": torch.ones(0, 3),
    }
    image = FileImage(tensors, pinned=False)
    image.copy(tensors)
    read = safetensors.torch.load(bytes(image.content))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensor) and read[key].dtype == tensor.dtype for key, tensor in tensors.items())


def test_each_snapshot_uses_the_memory_of_the_one_before() -> None:
    snapshot = Snapshot()
    addresses = set()
    for step in range(3):
        snapshot.take({"head": layer(0, step)})
        ((_, content),) = snapshot.files()
        addresses.add(torch.frombuffer(content, dtype=torch.uint8).data_ptr())
    assert len(addresses) == 1
    snapshot.take({"head": layer(0, 3) | {"momentum.bias": torch.ones(4)}})
    ((_, content),) = snapshot.files()
    assert "momentum.bias" in safetensors.torch.load(bytes(content))
