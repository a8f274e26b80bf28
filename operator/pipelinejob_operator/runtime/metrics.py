"""Prometheus metrics of the operator."""

from collections.abc import Callable, Iterable

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector

PREFIX = "pipelinejob_operator"

RECONCILES = Counter(f"{PREFIX}_reconciles", "Reconciles by outcome.", ["outcome"])
RECONCILE_SECONDS = Histogram(f"{PREFIX}_reconcile_seconds", "Duration of a reconcile.")
QUEUE_WAIT_SECONDS = Histogram(f"{PREFIX}_queue_wait_seconds", "Time a ready key waited.")
QUEUE_DEPTH = Gauge(f"{PREFIX}_queue_depth", "Keys that are ready for a worker.")
QUEUE_DELAYED = Gauge(f"{PREFIX}_queue_delayed", "Keys that wait for their time.")
DRIFT = Counter(f"{PREFIX}_drift", "Objects the watch missed and a re-list found.", ["kind", "what"])
PLAN_SECONDS = Histogram(f"{PREFIX}_plan_seconds", "Duration of a plan of a gang's nodes.")
WRITES = Counter(f"{PREFIX}_writes", "Writes to the API server by what was written.", ["what"])
RESTARTS = Counter(f"{PREFIX}_restarts", "Restarts of gangs because of a failure.")
LEADER = Gauge(f"{PREFIX}_leader", "1 where this replica leads.")
AGENT_POLLS = Counter(f"{PREFIX}_agent_polls", "Requests to stage agents by outcome.", ["outcome"])


class JobCollector(Collector):
    """Jobs by state, and each job's step and bubble, read from the cache when somebody asks.

    ``rows`` yields namespace, name, state, step and bubble in percent (None where not known).
    """

    def __init__(self, rows: Callable[[], Iterable[tuple[str, str, str, int, int | None]]]) -> None:
        self._rows = rows
        REGISTRY.register(self)

    def collect(self) -> Iterable[Metric]:
        """Yield the three families."""
        states = GaugeMetricFamily("pipelinejob_jobs", "Jobs by state.", labels=["state"])
        labels = ["namespace", "job"]
        steps = GaugeMetricFamily("pipelinejob_step", "Last finished step.", labels=labels)
        text = "Measured idle share of the stages, 0 to 1."
        bubbles = GaugeMetricFamily("pipelinejob_bubble_ratio", text, labels=labels)
        count: dict[str, int] = {}
        for namespace, name, state, step, bubble in self._rows():
            count[state] = count.get(state, 0) + 1
            steps.add_metric([namespace, name], step)
            if bubble is not None:
                bubbles.add_metric([namespace, name], bubble / 100)
        for state, number in sorted(count.items()):
            states.add_metric([state], number)
        return (states, steps, bubbles)
