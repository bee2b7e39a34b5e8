"""``GET /metrics``: what the server and its engine have done, for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from qnext.llm import LLM
from qnext.serve.record import Record
from qnext.serve.worker import Worker

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_PER_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counters of one server, and a look into its engine when they are asked for."""

    def __init__(self, llm: LLM, worker: Worker) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(llm, worker))
        ProcessCollector(registry=self._registry)
        registry = self._registry
        self._requests = Counter(
            "qnext_requests", "Requests by route and status", ["route", "status"],
            registry=registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "qnext_request_seconds", "From the request to the end of its answer", ["route"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._first = Histogram(
            "qnext_first_token_seconds", "From the request to the first token", ["route"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._queued = Histogram(
            "qnext_token_seconds", "Mean time between tokens of an answer", ["route"],
            buckets=_PER_TOKEN, registry=registry,
        )  # fmt: skip
        self._tokens = Counter(
            "qnext_tokens", "Tokens of requests that have ended, by kind", ["kind"],
            registry=registry,
        )  # fmt: skip
        self._finished = Counter(
            "qnext_answers", "Answers by the reason they ended", ["reason"], registry=registry
        )

    def ended(self, record: Record, status: int, now: float) -> None:
        """Count a request that has ended, however it did."""
        route = record.route or "other"
        self._requests.labels(route, str(status)).inc()
        if record.first is None:
            return
        self._seconds.labels(route).observe(now - record.begun)
        self._first.labels(route).observe(record.first - record.begun)
        completion = record.tokens("completion_tokens")
        if record.last is not None and completion > 1 and len(record.usages) == 1:
            self._queued.labels(route).observe((record.last - record.first) / (completion - 1))
        for kind in ("prompt", "cached"):
            self._tokens.labels(kind).inc(record.tokens(f"{kind}_tokens", of_prompt=True))
        for kind in ("completion", "reasoning", "drafted", "accepted"):
            self._tokens.labels(kind).inc(record.tokens(f"{kind}_tokens"))
        for reason, count in record.reasons.items():
            self._finished.labels(reason).inc(count)

    def text(self) -> bytes:
        """The page Prometheus reads."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """What the engine's thread noted after its last step."""

    def __init__(self, llm: LLM, worker: Worker) -> None:
        self._llm, self._worker = llm, worker

    def collect(self) -> Iterator[Metric]:
        load, log = self._worker.load, self._llm.engine.scheduler.log
        gauges = {
            "up": (self._worker.is_alive, "1 while the engine works"),
            "running_requests": (load.running, "Requests in the batch"),
            "waiting_requests": (load.waiting, "Requests that wait for a place or for memory"),
            "unfinished_requests": (self._worker.unfinished, "Requests that have not ended"),
            "slots": (load.slots_total, "Requests that can run at once"),
            "cache_pages": (load.pages_total, "Pages of keys and values"),
            "cache_pages_free": (load.pages_free, "Pages that nothing holds"),
            "snapshots": (load.snapshots, "Prefixes held in memory"),
            "snapshot_slots": (load.snapshot_slots, "Prefixes that fit into memory"),
            "context_tokens": (self._llm.max_model_len, "Tokens of prompt and answer together"),
        }
        for name, (value, words) in gauges.items():
            yield GaugeMetricFamily(f"qnext_{name}", words, value=float(value))
        yield CounterMetricFamily("qnext_steps", "Steps of the engine", value=load.steps)
        yield CounterMetricFamily(
            "qnext_generated_tokens", "Tokens of answers as they are written",
            value=self._worker.generated,
        )  # fmt: skip
        prompt = CounterMetricFamily(
            "qnext_prompt_tokens", "Tokens of prompts by what became of them", labels=["fate"]
        )
        counts = log.counts()
        for name, value in counts.items():
            if name in ("cached_tokens", "unmatched_tokens"):
                prompt.add_metric([name.removesuffix("_tokens")], value)
            elif name.startswith("lost_tokens:"):
                prompt.add_metric(["lost_" + name.partition(":")[2]], value)
        yield prompt
        prepared = CounterMetricFamily(
            "qnext_background_tokens", "Tokens run in advance, while nothing else was to do",
            value=load.background.tokens,
        )  # fmt: skip
        yield prepared
        gone = CounterMetricFamily(
            "qnext_ended_requests", "Requests by the way they left the engine", labels=["way"]
        )
        for way, count in list(self._worker.ended.items()):
            gone.add_metric([way], count)
        yield gone
        about = {"model": self._llm.name, "kernels": "; ".join(self._llm.model.kernels)}
        yield InfoMetricFamily("qnext_model", "What is served", value=about)
