"""What is built once: complete or not there, by the content of its inputs."""

import os
from pathlib import Path

import pytest

from tests.cluster import cache, progress, settings


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(settings, "CACHE", tmp_path)
    return tmp_path


def build(target: Path) -> None:
    (target / "program").write_text("built")


def unexpected(target: Path) -> None:
    raise AssertionError(f"built again: {target}")


def test_it_is_built_once() -> None:
    first = cache.ensure("thing", "k1", build)
    assert (first / "program").read_text() == "built"
    assert cache.ensure("thing", "k1", unexpected) == first


def test_an_interrupted_build_is_not_taken_for_a_complete_one() -> None:
    def interrupted(target: Path) -> None:
        (target / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.ensure("thing", "k1", interrupted)
    assert sorted(path.name for path in cache.ensure("thing", "k1", build).iterdir()) == ["program"]


def test_the_two_versions_used_last_are_kept(root: Path) -> None:
    for age, key in enumerate(("k1", "k2")):
        os.utime(cache.ensure("thing", key, build), (age, age))
    cache.ensure("thing", "k1", unexpected)
    cache.ensure("thing", "k3", build)
    assert sorted(path.name for path in root.glob("thing-*")) == ["thing-k1", "thing-k3"]


def test_a_hash_tells_contents_and_their_borders_apart(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("a")
    assert cache.digest(file) == cache.digest("a") == cache.digest(b"a")
    assert cache.digest("ab", "c") != cache.digest("a", "bc")


def test_a_long_step_says_how_long_it_took_last_time(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with progress.step("building it", key="it", usual="about 3 min"):
            pass
    first, _, second, _ = capsys.readouterr().out.splitlines()
    assert first == "building it (first time on this machine; about 3 min) ..."
    assert second == "building it (took 0.0 s last time) ..."


def test_a_step_that_failed_does_not_count_as_the_last_time(root: Path) -> None:
    with pytest.raises(OSError, match="full"), progress.step("building it", key="it"):
        raise OSError("full")
    assert not (root / "durations.json").exists()
