"""What the agents of a job tell, asked twenty times a second: the finished steps, and who is in which incarnation."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Self, TypeVar
from urllib.parse import quote

import aiohttp

from pipelinejob_worker.protocol import STATUS_PORT, AgentStatus
from tests.cluster.api import Api, ApiError
from tests.e2e import kit

POLL_SECONDS = 0.05
ANSWER_SECONDS = 1.0
LIST_SECONDS = 0.25

Seen = TypeVar("Seen")


class Incarnation(NamedTuple):
    """A life of the group; a later one is larger."""

    epoch: int
    attempt: int


@dataclass(frozen=True)
class Pod:
    """A pod that runs."""

    name: str
    uid: str
    node: str
    address: str


@dataclass(frozen=True)
class Sighting:
    """What an agent told that it had not told before."""

    at: float
    """On the monotonic clock, in seconds."""

    pod: Pod
    status: AgentStatus

    @property
    def incarnation(self) -> Incarnation:
        """The life of the group that the agent is in, or was in."""
        return Incarnation(self.status.epoch, self.status.incarnation_attempt)

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.status.progress.step

    @property
    def reached(self) -> bool:
        """Whether it trains in a group, and its worker has told where it stands."""
        return self.status.state == "Running" and self.status.progress.total_steps > 0


@dataclass
class Watch:
    """Sightings of one job's agents, oldest first. For one thread beside its own."""

    namespace: str
    job: str
    sightings: list[Sighting] = field(default_factory=list)
    _newest: dict[str, Sighting] = field(default_factory=dict)
    _pods: list[Pod] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _broken: BaseException | None = None

    @classmethod
    @contextmanager
    def of(cls, job: kit.Job) -> Iterator[Self]:
        """Watch a job during the block."""
        watch = cls(job.namespace.name, job.name)
        loop = asyncio.new_event_loop()
        task = loop.create_task(watch._run())
        thread = threading.Thread(target=watch._follow, args=(loop, task), daemon=True)
        thread.start()
        try:
            yield watch
        finally:
            if thread.is_alive():
                loop.call_soon_threadsafe(task.cancel)
                thread.join()

    def newest(self) -> Mapping[str, Sighting]:
        """Return the last sighting of each pod that runs, by UID."""
        with self._changed:
            uids = {pod.uid for pod in self._pods}
            return {uid: sighting for uid, sighting in self._newest.items() if uid in uids}

    def wait(self, what: str, look: Callable[[], Seen], seconds: float) -> Seen:
        """Look whenever an agent has told something new, until the answer is true, and return it.

        Raises kit.Timeout that shows where each agent stands.
        """
        end = time.monotonic() + seconds
        with self._changed:
            while not (seen := look()):
                if self._broken:
                    raise AssertionError(f"the watch has ended: {self._broken}") from self._broken
                left = end - time.monotonic()
                if left <= 0:
                    raise kit.Timeout(f"not within {seconds:.0f} s: {what}\n{self.describe()}")
                self._changed.wait(min(1.0, left))
            return seen

    def last_step(self) -> int:
        """Largest step that any agent has told."""
        return max((sighting.step for sighting in self.sightings), default=0)

    def describe(self) -> str:
        """Say where each agent stands."""
        return "\n".join(
            f"{seen.pod.name} on {seen.pod.node}: stage {seen.status.stage}, {seen.status.state}, incarnation "
            f"{seen.incarnation}, step {seen.step}, {seen.status.protection.to_json()} {seen.status.refused}"
            for seen in sorted(self.newest().values(), key=lambda seen: seen.pod.name)
        )

    def _follow(self, loop: asyncio.AbstractEventLoop, task: "asyncio.Task[None]") -> None:
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            return
        except BaseException as error:  # noqa: BLE001 - whoever waits must hear of it
            with self._changed:
                self._broken = error
                self._changed.notify_all()
        finally:
            loop.close()

    async def _run(self) -> None:
        api, timeout = Api(), aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        asking: dict[tuple[str, str], asyncio.Task[None]] = {}
        try:
            async with aiohttp.ClientSession(timeout=timeout) as session:
                while True:
                    try:
                        pods = await asyncio.to_thread(self._list, api)
                    except (ApiError, OSError):  # it may be the fault under test: the pods that are known are asked on
                        pods = self._pods
                    with self._changed:
                        self._pods = pods
                    known = {(pod.uid, pod.address): pod for pod in pods}
                    for place in known.keys() - asking.keys():
                        asking[place] = asyncio.create_task(self._ask(session, known[place]))
                    for place in [place for place, task in asking.items() if task.done()]:
                        asking.pop(place).result()  # raises what has ended it
                    await asyncio.sleep(LIST_SECONDS)
        finally:
            for task in asking.values():
                task.cancel()
            await asyncio.gather(*asking.values(), return_exceptions=True)

    def _list(self, api: Api) -> list[Pod]:
        selector = quote(f"pipelinejob.dev/job={self.job}")
        found = api.request("GET", f"/api/v1/namespaces/{self.namespace}/pods?labelSelector={selector}")
        return [
            Pod(item["metadata"]["name"], item["metadata"]["uid"], item["spec"]["nodeName"], item["status"]["podIP"])
            for item in found["items"]
            if item["status"].get("podIP") and item["status"].get("phase") == "Running"
        ]

    async def _ask(self, session: aiohttp.ClientSession, pod: Pod) -> None:
        while True:
            try:
                async with session.get(f"http://{pod.address}:{STATUS_PORT}/status") as answer:
                    self._note(Sighting(time.monotonic(), pod, AgentStatus.model_validate_json(await answer.read())))
            except (aiohttp.ClientError, TimeoutError):
                if pod not in self._pods:  # a pod that was deleted may live on for some steps, but not begin anew
                    return
            await asyncio.sleep(POLL_SECONDS)

    def _note(self, seen: Sighting) -> None:
        with self._changed:
            before = self._newest.get(seen.pod.uid)
            self._newest[seen.pod.uid] = seen
            if before is None or before.status != seen.status:
                self.sightings.append(seen)
                self._changed.notify_all()
