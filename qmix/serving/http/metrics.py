"""/metrics: the engine's counts and how long requests took, as Prometheus reads them.

Knows no routes.
"""

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from qmix.serving.engine import Engine
from qmix.serving.request import Ended

_GAUGES = {"running": "Requests that have a slot.", "waiting": "Requests that wait for one."}
_COUNTERS = {
    "requests": "Requests that were taken.",
    "refused": "Requests that found the queue full.",
    "cancelled": "Requests whose caller left.",
    "failed": "Requests that failed.",
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Tokens of prompts that a slot's cache or the folder of prompts held.",
    "restored_tokens": "Those of them that came from the folder.",
    "stored_prompts": "Texts that were written into the folder.",
    "refused_prompts": "Texts that could not be written there.",
    "new_tokens": "Tokens of replies.",
    "decode_steps": "Steps that made them, for one request or several.",
    "drafted_tokens": "Tokens that were drafted from texts that repeat.",
    "accepted_tokens": "Drafted tokens that became tokens of replies.",
}
CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


class EngineCounts(Collector):
    """The engine's counts at the moment of reading."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        counts = self._engine.counts
        yield GaugeMetricFamily("qmix_up", "Whether requests are taken.", int(self._engine.healthy))
        yield GaugeMetricFamily("qmix_slots", "Requests at a time.", self._engine.limits.slots)
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"qmix_requests_{name}", text, getattr(counts, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"qmix_{name}", text, getattr(counts, name))


class Metrics:
    """What /metrics shows."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCounts(engine))
        self._first_token, self._whole, self._wait = (
            Histogram(f"qmix_{name}_seconds", text, registry=self._registry, buckets=_SECONDS)
            for name, text in (
                ("first_token", "From a request's arrival to its first token."),
                ("request", "From a request's arrival to its end."),
                ("queue", "From a request's arrival to its slot."),
            )
        )

    def observe(self, ended: Ended) -> None:
        """Count the times of a request that has ended."""
        self._whole.observe(ended.elapsed_s)
        self._wait.observe(ended.waited_s)
        if ended.new_tokens:
            self._first_token.observe(ended.first_token_s)

    @property
    def text(self) -> bytes:
        """In Prometheus's format."""
        return generate_latest(self._registry)
