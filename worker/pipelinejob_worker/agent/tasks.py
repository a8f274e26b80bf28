"""Tasks by name, of which a failure is never lost."""

import asyncio
from collections.abc import Coroutine


class Tasks:
    """What runs beside; the first failure is in ``failed``."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    def spawn(self, name: str, work: Coroutine[None, None, None]) -> None:
        """Run ``work`` until its end, or until it is stopped by its name."""
        task = self._tasks[name] = asyncio.create_task(work, name=name)

        def finished(task: asyncio.Task[None]) -> None:
            if self._tasks.get(name) is task:
                del self._tasks[name]
            if not task.cancelled() and (error := task.exception()) and not self.failed.done():
                self.failed.set_result(error)

        task.add_done_callback(finished)

    async def stop(self, name: str) -> None:
        """End a task, if it still runs."""
        if task := self._tasks.pop(name, None):
            task.cancel()
            await asyncio.wait([task])

    async def close(self) -> None:
        """End them all."""
        for name in list(self._tasks):
            await self.stop(name)
