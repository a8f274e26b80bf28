"""What full and read-only volumes do to a running job: real ones, in a mount namespace of a forked process."""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.state.history import History
from tests.unit.worker import forked
from tests.unit.worker.checkpoints import Job, same, store

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000


def mount_volume(at: Path, kibibytes: int) -> None:
    """Mount a volume that this process alone sees, and that ends with it."""
    user, group = os.geteuid(), os.getegid()
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS | (_CLONE_NEWUSER if user else 0)):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "volume", at], check=True)


def remount(at: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", at], check=True)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _fill_and_free(volume: Path) -> None:
    mount_volume(volume, kibibytes=256)
    job = Job(volume, stages=2, pipelines=2)
    job.save(10)
    with (volume / "others.bin").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    job.save(20)
    assert "step 20 was not written: stage 0 of pipeline 0: No space left on device; " in job.problem
    assert job.problem.endswith("; and 1 more; the newest is of step 10"), "all four failed"
    assert job.saved_step == 10
    assert names(volume) == ["latest", "others.bin", "step-000000010"], "no space is kept by what does not count"
    assert all(same(resumed.layers, 10) for resumed in Job(volume, 3).resumed)
    (volume / "others.bin").unlink()
    job.save(30)
    assert (job.saved_step, job.problem) == (30, "")


def test_a_full_volume_costs_a_checkpoint_and_the_next_succeeds_when_there_is_space(tmp_path: Path) -> None:
    forked.call(_fill_and_free, tmp_path)


def _turn_read_only(volume: Path) -> None:
    mount_volume(volume, kibibytes=1024)
    job = Job(volume, stages=2)
    job.save(10)
    remount(volume, "ro")
    job.save(20)
    cause = "stage 0: Read-only file system; stage 1: Read-only file system"
    assert job.problem == f"the checkpoint of step 20 was not written: {cause}; the newest is of step 10"
    with pytest.raises(ConfigurationError, match=r"volumeClaimName: .* cannot be written: Read-only file system"):
        store(volume).check_writable(0)
    assert [resumed.step for resumed in Job(volume, 3).resumed] == [10] * 3, "it can still be read"
    remount(volume, "rw")
    job.save(30)
    assert (job.saved_step, job.problem) == (30, "")


def test_a_volume_that_turns_read_only_costs_a_checkpoint(tmp_path: Path) -> None:
    forked.call(_turn_read_only, tmp_path)


def _turn_read_only_before_completion(volume: Path) -> None:
    mount_volume(volume, kibibytes=1024)
    job = Job(volume, stages=2)
    job.begin(10)
    for saver in job.savers:  # both have written; the vote that says so has not been taken
        while saver.vote() == [0.0, 0.0]:
            pass
    remount(volume, "ro")
    job.finish()
    assert job.problem == (
        "the checkpoint of step 10 was not completed: stage 0: Read-only file system; there is none yet"
    )
    remount(volume, "rw")
    job.save(20)
    assert names(volume) == ["latest", "step-000000020"]


def test_a_volume_that_turns_read_only_before_completion_costs_a_checkpoint(tmp_path: Path) -> None:
    forked.call(_turn_read_only_before_completion, tmp_path)


def _fill_the_history(volume: Path) -> None:
    mount_volume(volume, kibibytes=64)
    history, kept = History(volume, 0), 0
    with pytest.raises(OSError, match="No space left on device"):
        while True:
            history.append(kept + 1, 1 / 3)
            kept += 1
    lines = (volume / "history.jsonl").read_bytes()
    assert lines.endswith(b"}\n"), "no half line is left"
    assert lines.count(b"\n") == kept
    remount(volume, "size=128k")
    history.append(kept + 1, 0.5)
    assert (volume / "history.jsonl").read_bytes().startswith(lines)
    assert (volume / "history.jsonl").read_bytes().count(b"\n") == kept + 1


def test_a_full_volume_leaves_no_half_line_in_the_history(tmp_path: Path) -> None:
    forked.call(_fill_the_history, tmp_path)
