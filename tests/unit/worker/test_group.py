"""Which errors mean that another stage is lost, told from those of this stage, with torch's real ones."""

import socket
import time

import pytest
import torch
from torch import distributed

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.pipeline.group import PeerLostError, is_link_error, joined, prepare_device
from pipelinejob_worker.protocol import Membership
from tests.unit.worker import forked


def _alone(port: int) -> Membership:
    return Membership(epoch=1, action="Run", stage=0, stages=1, master_address="localhost", master_port=port)


def _raise(error: Exception, port: int) -> str:
    try:
        with joined(_alone(port), torch.device("cpu")):
            raise error  # noqa: TRY301
    except Exception as seen:  # noqa: BLE001 - its type is what is tested
        return type(seen).__name__


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (
            RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:29500"),
            "PeerLostError",
        ),
        (RuntimeError("Application timeout caused pair closure"), "PeerLostError"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), "RuntimeError"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError"),
        (OSError(28, "No space left on device"), "OSError"),
    ],
)
def test_only_errors_of_links_mean_that_a_peer_is_lost(error: Exception, seen: str) -> None:
    assert forked.call(_raise, error, forked.free_port()) == seen


def test_the_cause_counts_not_its_wrapper() -> None:
    error = RuntimeError("[Stage 1] for chunk 0 failed to run backward")
    error.__cause__ = RuntimeError("gloo: Connection reset by peer")
    assert is_link_error(error)
    assert is_link_error(PeerLostError("stage 0"))


def test_errors_that_were_raised_from_each_other_end_the_search() -> None:
    error, wrapper = ValueError("a tensor is missing"), RuntimeError("loading failed")
    error.__cause__, wrapper.__cause__ = wrapper, error
    assert not is_link_error(error)


def _join_a_taken_port() -> str:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        try:
            with joined(_alone(taken.getsockname()[1]), torch.device("cpu")):
                return "joined"
        except distributed.DistNetworkError as error:
            return type(error).__name__


def test_a_taken_port_is_this_stages_own_failure() -> None:
    assert forked.call(_join_a_taken_port) == "DistNetworkError"


def _exchange(port: int) -> tuple[list[list[int]], bool, bool]:
    with joined(_alone(port), torch.device("cpu")) as group:
        return group.gather(2**62, -5), group.agree(True), group.agree(False)


def test_integers_of_64_bits_are_exchanged_exactly() -> None:
    assert forked.call(_exchange, forked.free_port()) == ([[2**62, -5]], True, False)


def _work_together(membership: Membership, fails: bool) -> str:
    def work() -> str:
        if membership.stage == 1:
            time.sleep(0.3)  # the work that takes long
            if fails:
                raise OSError("no such volume")
        return f"done by {membership.stage}"

    try:
        with joined(membership, torch.device("cpu")) as group:
            before = time.monotonic()
            result = group.together(work)
            return result if time.monotonic() - before > 0.2 else "did not wait"
    except (OSError, PeerLostError) as error:
        return type(error).__name__


@pytest.mark.parametrize(
    ("fails", "answers"), [(False, ["done by 0", "done by 1"]), (True, ["PeerLostError", "OSError"])]
)
def test_ranks_wait_for_long_work_of_another(monkeypatch: pytest.MonkeyPatch, fails: bool, answers: list[str]) -> None:
    port = forked.free_port()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    members = [
        Membership(epoch=1, action="Run", stage=stage, stages=2, master_address="127.0.0.1", master_port=port)
        for stage in (0, 1)
    ]
    assert forked.call_all([(_work_together, member, fails) for member in members]) == answers


def _meet_after_a_failure(failing: Membership, membership: Membership) -> tuple[str, list[list[int]]]:
    """Rank 0 opens the store of the first meeting and is gone; only the others come to form that group, in vain."""
    seen = "opened the store"
    if membership.stage == 0:
        distributed.TCPStore("127.0.0.1", failing.master_port, failing.world_size, is_master=True)  # type: ignore[attr-defined]
    else:
        try:
            with joined(failing, torch.device("cpu")):
                seen = "joined"
        except PeerLostError:
            seen = "lost a peer"
    with joined(membership, torch.device("cpu")) as group:
        return seen, group.gather(group.rank)


def test_ranks_meet_also_when_some_have_failed_to_form_a_group_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    failing, after = [
        [
            Membership(epoch=epoch, action="Run", stage=stage, stages=2, master_address="127.0.0.1", master_port=port)
            for stage in (0, 1)
        ]
        for epoch, port in ((1, forked.free_port()), (2, forked.free_port()))
    ]
    together = [[0], [1]]
    assert forked.call_all([(_meet_after_a_failure, *members) for members in zip(failing, after, strict=True)]) == [
        ("opened the store", together),
        ("lost a peer", together),
    ]


def test_an_interface_that_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    prepare_device()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib9")
    with pytest.raises(ConfigurationError, match=r"^spec\.network\.interface: this pod has no network interface ib9; "):
        prepare_device()
