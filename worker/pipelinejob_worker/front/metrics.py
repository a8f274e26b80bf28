"""What ``/metrics`` shows; the names follow those of other servers of language models."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipelinejob_worker.front.dispatcher import Dispatcher

_PREFIX = "pipelinejob_front_"
_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
_FIRST_TOKEN_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_REQUEST_SECONDS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = tuple(1 << power for power in range(18))


class Metrics:
    """The metrics of one front."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Answered requests to the API.", "path", "status")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of the prompts of accepted choices.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens of answers.")
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _FIRST_TOKEN_SECONDS
        )
        self.time_per_output_token = self._histogram(
            "time_per_output_token_seconds", "Mean time between two tokens of a choice.", _TOKEN_SECONDS
        )
        self.request_latency = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to the end of its answer.", _REQUEST_SECONDS
        )
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.request_generation_tokens = self._histogram("request_generation_tokens", "Tokens of a choice.", _TOKENS)
        self.registry.register(_State(dispatcher))

    def render(self) -> bytes:
        """Return all in the text format of Prometheus."""
        return generate_latest(self.registry)

    def _counter(self, name: str, explanation: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, explanation, labels, registry=self.registry)

    def _histogram(self, name: str, explanation: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(_PREFIX + name, explanation, buckets=buckets, registry=self.registry)


class _State(Collector):
    """What the dispatcher knows at the time of a scrape; that of an engine is shared by all fronts."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def collect(self) -> Iterator[Metric]:
        own = self._dispatcher
        yield GaugeMetricFamily(_PREFIX + "requests_running", "Choices with an engine.", value=own.running)
        yield GaugeMetricFamily(_PREFIX + "requests_waiting", "Choices without an engine.", value=own.waiting)
        yield GaugeMetricFamily(_PREFIX + "engines_connected", "Engines that take requests.", value=len(own.engines))
        yield CounterMetricFamily(
            _PREFIX + "resubmissions", "Choices handed to another engine or epoch.", value=own.resubmissions
        )
        yield CounterMetricFamily(_PREFIX + "stale_tokens", "Dropped tokens of older epochs.", value=own.stale_tokens)
        yield from self._engines()

    def _engines(self) -> Iterator[Metric]:
        known = [(str(pipeline), one.stats) for pipeline, one in self._dispatcher.engines.items() if one.stats]
        for name, explanation, values in (
            ("requests_running", "Requests with cache.", [one.running for _, one in known]),
            ("requests_waiting", "Accepted requests without cache.", [one.queued for _, one in known]),
            (
                "kv_cache_usage_ratio",
                "Used share of the key-value cache.",
                [one.cache_blocks_used / max(one.cache_blocks, 1) for _, one in known],
            ),
            ("prompt_tokens_per_second", "Tokens of prompts.", [one.prompt_tokens_per_second for _, one in known]),
            ("tokens_per_second", "Tokens of answers.", [one.tokens_per_second for _, one in known]),
            ("preemptions", "Since the group was formed.", [one.preemptions for _, one in known]),
            ("bubble_ratio", "Idle share of the stages.", [one.bubble_percent / 100 for _, one in known]),
        ):
            family = GaugeMetricFamily(f"pipelinejob_engine_{name}", explanation, labels=["pipeline"])
            for (pipeline, _), value in zip(known, values, strict=True):
                family.add_metric([pipeline], value)
            yield family
