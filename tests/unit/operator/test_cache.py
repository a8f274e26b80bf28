"""The cache only ever moves forward, whatever order the watch, the re-list and our own writes arrive in."""

from typing import Any

from pipelinejob_operator.runtime.cache import Cache, Drift, Key

KEY = Key("team", "tiny")


def job(version: int, uid: str = "j") -> dict[str, Any]:
    return {"metadata": {"namespace": "team", "name": "tiny", "uid": uid, "resourceVersion": str(version)}}


def pod(version: int, uid: str = "p", name: str = "tiny-s0-a0") -> dict[str, Any]:
    meta = {"namespace": "team", "name": name, "uid": uid, "resourceVersion": str(version)}
    labels = {"pipelinejob.dev/job": "tiny"}
    return {"metadata": meta | {"labels": labels}, "spec": {"containers": [{}], "nodeName": "n"}, "status": {}}


def test_an_older_version_does_not_replace_a_newer_one() -> None:
    cache = Cache()
    assert cache.put_job(job(10))
    assert not cache.put_job(job(9))
    assert not cache.put_job(job(10))
    assert cache.put_job(job(11))


def test_versions_are_numbers_not_texts() -> None:
    cache = Cache()
    cache.put_job(job(9))
    assert cache.put_job(job(10))


def test_a_deleted_object_does_not_come_back_with_a_late_page() -> None:
    cache = Cache()
    cache.put_pod(pod(5))
    assert cache.drop_pod(KEY, "tiny-s0-a0", "p")
    assert not cache.put_pod(pod(5))
    assert cache.pods(KEY) == []


def test_a_late_deletion_does_not_hit_the_successor_of_the_same_name() -> None:
    cache = Cache()
    cache.put_job(job(5, "old"))
    cache.put_job(job(9, "new"))
    assert not cache.drop_job(KEY, "old")
    assert cache.job(KEY) is not None


def test_a_relist_drops_ghosts_and_counts_them() -> None:
    cache = Cache()
    cache.put_pod(pod(5))
    cache.put_pod(pod(6, "q", "tiny-s1-a0"))
    changed, drift = cache.replace_pods([pod(5)], version=10)
    assert (changed, drift) == ({KEY}, Drift(ghosts=1))
    assert [item["metadata"]["uid"] for item in cache.pods(KEY)] == ["p"]


def test_a_relist_leaves_alone_what_is_newer_than_itself() -> None:
    cache = Cache()
    cache.put_pod(pod(12))
    changed, drift = cache.replace_pods([], version=10)
    assert (changed, drift) == (set(), Drift())
    assert len(cache.pods(KEY)) == 1


def test_a_relist_takes_over_what_the_watch_missed() -> None:
    cache = Cache()
    cache.put_job(job(5))
    changed, drift = cache.replace_jobs([job(8)], version=10)
    assert (changed, drift) == ({KEY}, Drift(stale=1))


def test_a_fresh_read_of_one_jobs_pods_leaves_other_jobs_alone() -> None:
    cache = Cache()
    cache.put_pod(pod(5))
    assert cache.replace_pods([], version=10, only=Key("team", "other")) == (set(), Drift())
    assert cache.replace_pods([], version=10, only=KEY) == ({KEY}, Drift(ghosts=1))


def test_only_what_plans_are_made_from_is_kept_of_a_pod() -> None:
    cache = Cache()
    some = pod(5)
    some["metadata"]["annotations"] = {"pipelinejob.dev/config": "long", "pipelinejob.dev/membership": "{}"}
    some["metadata"]["managedFields"] = [{}]
    cache.put_pod(some)
    (kept,) = cache.pods(KEY)
    assert kept["spec"] == {"nodeName": "n"}
    assert kept["metadata"]["annotations"] == {"pipelinejob.dev/membership": "{}"}
    assert "managedFields" not in kept["metadata"]
