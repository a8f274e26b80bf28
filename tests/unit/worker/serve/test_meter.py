"""The rates that the status shows of a model that is served."""

import pytest

from pipelinejob_worker.serve.meter import REQUESTS_SECONDS, Meter
from pipelinejob_worker.serve.scheduler import Limits, Scheduler


def test_a_burst_of_requests_is_in_the_rate_for_some_seconds_however_often_it_is_asked_for() -> None:
    scheduler = Scheduler(Limits(blocks=10, context=64, batches=1, batch_tokens=64, accepted_tokens=64))
    meter = Meter(0.0)
    for _ in range(20):
        meter.finished()
    rates = {second: meter.stats(1, scheduler, float(second)).requests_per_second for second in range(1, 13)}
    for second, rate in rates.items():
        assert rate == pytest.approx(20 / REQUESTS_SECONDS if second <= REQUESTS_SECONDS else 0)
