"""The edges of the process: settings, health, agents' answers and the election."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from pydantic import ValidationError

from pipelinejob_operator.runtime import agents
from pipelinejob_operator.runtime.client import Resource
from pipelinejob_operator.runtime.health import Health
from pipelinejob_operator.runtime.leader import DEADLINE_SECONDS, Leader, NotLeaderError
from pipelinejob_operator.runtime.settings import Settings
from pipelinejob_worker.protocol import AgentStatus


class TestSettings:
    def test_the_image_is_enough(self) -> None:
        made = Settings.read({"PIPELINEJOB_WORKER_IMAGE": "worker:1"})
        assert made.watch_namespace == ""
        assert made.topology_levels == ()
        assert (made.http_port, made.relist_seconds) == (8080, 300)

    def test_levels_are_a_list_with_commas(self) -> None:
        made = Settings.read({"PIPELINEJOB_WORKER_IMAGE": "w", "PIPELINEJOB_TOPOLOGY_LEVELS": "zone, rack,host"})
        assert made.installation().topology_levels == ("zone", "rack", "host")

    @pytest.mark.parametrize(
        "environment",
        [
            {},
            {"PIPELINEJOB_WORKER_IMAGE": ""},
            {"PIPELINEJOB_WORKER_IMAGE": "w", "PIPELINEJOB_HTTP_PORT": "0"},
            {"PIPELINEJOB_WORKER_IMAGE": "w", "PIPELINEJOB_LOG_LEVEL": "LOUD"},
            {"PIPELINEJOB_WORKER_IMAGE": "w", "PIPELINEJOB_RELIST_SECONDS": "-1"},
        ],
    )
    def test_a_wrong_variable_is_named(self, environment: dict[str, str]) -> None:
        with pytest.raises(ValidationError, match="PIPELINEJOB_"):
            Settings.read(environment)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class TestHealth:
    def make(self, clock: Clock, last_list: list[float]) -> Health:
        return Health(clock, 300, lambda: last_list[0], lambda: True)

    def test_a_working_process_is_alive(self) -> None:
        clock, listed = Clock(), [1000.0]
        health = self.make(clock, listed)
        health.busy("worker-0")
        clock.now += 119
        assert health.problems() == []

    def test_a_worker_that_is_stuck_is_named(self) -> None:
        clock, listed = Clock(), [1000.0]
        health = self.make(clock, listed)
        health.busy("worker-0")
        clock.now += 121
        assert health.problems() == ["worker worker-0 has been at one reconcile for 121 s; allowed: 120"]
        health.idle("worker-0")
        assert health.problems() == []

    def test_without_a_list_for_long_the_process_is_blind(self) -> None:
        clock, listed = Clock(), [1000.0]
        health = self.make(clock, listed)
        clock.now += 901
        assert health.problems() == ["no LIST has succeeded for 901 s; allowed: 900"]


class TestLeader:
    def test_nobody_leads_before_an_election(self) -> None:
        leader = Leader("a", "team", "lease", Clock())
        with pytest.raises(NotLeaderError, match="a does not hold lease team/lease"):
            leader.require()

    async def test_a_lease_is_given_up_by_the_clock_before_others_may_take_it(self) -> None:
        clock = Clock()
        leader = Leader("a", "team", "lease", clock)
        await leader.attempt(Leases())
        leader.require()
        clock.now += DEADLINE_SECONDS - 0.1
        leader.require()
        clock.now += 0.1
        with pytest.raises(NotLeaderError):
            leader.require()

    async def test_a_lease_is_taken_over_only_after_it_was_not_renewed_for_its_whole_time(self) -> None:
        leases = Leases()
        clock = Clock()
        await Leader("a", "team", "lease", clock).attempt(leases)
        second = Leader("b", "team", "lease", clock)
        for wait, leads in ((0.0, False), (14.9, False), (0.2, True)):
            clock.now += wait
            await second.attempt(leases)
            assert second.leads is leads
        assert leases.lease is not None
        assert leases.lease["spec"]["leaseTransitions"] == 1


class Leases:
    """A store of one lease, so that the test can turn the clock."""

    lease: dict[str, Any] | None = None

    async def get(self, resource: Resource, namespace: str, name: str) -> dict[str, Any] | None:
        return self.lease

    async def create_lease(self, lease: dict[str, Any]) -> dict[str, Any]:
        lease["metadata"]["resourceVersion"] = "1"
        self.lease = lease
        return lease

    async def replace_lease(self, lease: dict[str, Any]) -> dict[str, Any]:
        self.lease = lease
        return lease


class TestAgents:
    @pytest.fixture
    async def serve(self, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
        """Serve a text as an agent's status, on a port of its own."""
        runners = []

        async def start(text: str) -> None:
            async def answer(_: web.Request) -> web.Response:
                return web.Response(text=text)

            app = web.Application()
            app.router.add_get("/status", answer)
            runner = web.AppRunner(app)
            await runner.setup()
            runners.append(runner)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            monkeypatch.setattr(agents, "STATUS_PORT", runner.addresses[0][1])

        yield start
        for runner in runners:
            await runner.cleanup()

    async def test_a_status_is_read(self, serve: Any) -> None:
        status = AgentStatus(job_uid="u", stage=0, epoch=1, state="Running")
        await serve(status.to_json())
        async with aiohttp.ClientSession() as session:
            assert await agents.ask(session, "127.0.0.1") == status

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ("x" * (agents.BODY_LIMIT_BYTES + 1), "more than 262144 bytes"),
            ("{}", "no status"),
            ('{"jobUid":"u","stage":0,"epoch":1,"state":"Running","protocolVersion":9,"oldestReader":8}', "protocol 9"),
        ],
    )
    async def test_an_unfit_answer_is_refused(self, serve: Any, text: str, word: str) -> None:
        await serve(text)
        async with aiohttp.ClientSession() as session:
            with pytest.raises(ValueError, match=word):
                await agents.ask(session, "127.0.0.1")
