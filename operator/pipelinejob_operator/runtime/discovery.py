"""What the API server serves, asked now and then: CRDs and feature gates come and go while the operator runs."""

import time
from collections.abc import Callable

from pipelinejob_operator.build.delegation import Delegate
from pipelinejob_operator.runtime.client import Kubernetes

KEPT_SECONDS = 30.0


class Discovery:
    """Answers from memory for ``KEPT_SECONDS``. ``clock`` returns seconds that never go back."""

    def __init__(self, kubernetes: Kubernetes, clock: Callable[[], float] = time.monotonic) -> None:
        self._kubernetes, self._clock = kubernetes, clock
        self._answers: dict[str, tuple[float, bool]] = {}

    async def serves(self, delegate: Delegate) -> bool:
        """Whether one of the delegate's APIs is served. Raises what ``Kubernetes`` raises."""
        now = self._clock()
        asked, answer = self._answers.get(delegate.name, (float("-inf"), False))
        if now - asked >= KEPT_SECONDS:
            answer = False
            for api in delegate.apis:
                answer = answer or delegate.resource in await self._kubernetes.resources(api)
            self._answers[delegate.name] = (now, answer)
        return answer
