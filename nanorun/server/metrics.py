"""What a Prometheus server is told: vLLM's names where it has one, with `nanorun_` before them.

Requests are counted when they end, from their records, so a token costs nothing here. What can be
looked up (who runs, who waits, memory) is looked up when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import psutil
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector

from nanorun import __version__
from nanorun.model.chat import Finished
from nanorun.runtime.protocol import Client, LocalEngine
from nanorun.server.admission import Admission
from nanorun.server.record import AnswerRecord, RequestRecord

_WAITS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
"""Bounds for what waits and long prompts stretch: up to half an hour."""
_TOKENS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_CUT_OFF = "abort"
"""vLLM's word for replies whose client left, or that failed."""


class Metrics:
    """The figures of one endpoint, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests", "HTTP requests.", "method", "route", "status")
        self._finished = self._counter("request_success", "Replies, by end.", "finished_reason")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens, reused ones included.")
        self._cached = self._counter(
            "prompt_tokens_cached", "Prompt tokens whose state was reused, by where.", "source"
        )
        self._generated = self._counter("generation_tokens", "Tokens made, thinking included.")
        self._thought = self._counter("thinking_tokens", "Tokens of thinking.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Tokens guessed ahead.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Guesses that held.")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From the request to its first token.", _WAITS_S
        )
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time from token to token.", _TOKENS_S
        )
        self._total = self._histogram(
            "e2e_request_latency_seconds", "From a request to the end of its reply.", _WAITS_S
        )
        self._queue = self._histogram(
            "request_queue_time_seconds", "From a request to its first batch.", _WAITS_S
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "Reading the prompt.", _WAITS_S
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "From the first token to the last.", _WAITS_S
        )

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"nanorun_{name}", about, labels, registry=self.registry)

    def _histogram(self, name: str, about: str, bounds: tuple[float, ...]) -> Histogram:
        return Histogram(f"nanorun_{name}", about, registry=self.registry, buckets=bounds)

    def take(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        status = "none" if record.status is None else str(record.status)
        self._requests.labels(record.method, record.route or "other", status).inc()
        for answer in record.answers:
            self._take_answer(answer, record)

    def _take_answer(self, answer: AnswerRecord, record: RequestRecord) -> None:
        if answer.first_at is not None:
            self._first_token.observe(answer.first_at - record.started)
        if answer.finished is not None:
            self._finished.labels(answer.finished.reason).inc()
            self._total.observe(record.age_s)
            self._take_finished(answer.finished)
            return
        self._finished.labels(_CUT_OFF).inc()
        self._prompt.inc(answer.n_read)
        self._generated.inc(answer.n_generated)
        if answer.n_reused:
            self._cached.labels("unknown").inc(answer.n_reused)

    def _take_finished(self, finished: Finished) -> None:
        usage, timings = finished.usage, finished.timings
        self._prompt.inc(usage.prompt_tokens)
        if usage.cached_tokens:
            self._cached.labels(usage.cached_from or "unknown").inc(usage.cached_tokens)
        self._generated.inc(usage.completion_tokens)
        self._thought.inc(usage.thinking_tokens)
        self._drafted.inc(usage.drafted_tokens)
        self._accepted.inc(usage.accepted_tokens)
        self._queue.observe(timings.queue_s)
        self._prefill.observe(timings.prefill_s)
        self._decode.observe(timings.decode_s)
        if usage.completion_tokens > 1:
            self._per_token.observe(timings.decode_s / (usage.completion_tokens - 1))

    def exposed(self, accept: str) -> tuple[bytes, str]:
        """All figures and their media type, in the form that a scraper's `Accept` asks for."""
        encode, media_type = choose_encoder(accept)
        return encode(self.registry), media_type


class EngineCollector(Collector):
    """Figures that are looked up when somebody asks.

    Args:
        client: What answers.
        admission: Who runs and who waits.
        planned_bytes: What the engine's process is to take of main memory; None if not known.
    """

    def __init__(
        self, client: Client, admission: Admission, planned_bytes: Callable[[], int | None]
    ) -> None:
        self._client = client
        self._admission = admission
        self._planned_bytes = planned_bytes

    def collect(self) -> Iterator[Metric]:
        """The figures now."""
        n_waiting = self._admission.n_waiting
        n_running = self._admission.n_active - n_waiting
        yield _gauge("num_requests_running", "Replies that the engine makes.", n_running)
        yield _gauge("num_requests_waiting", "Replies that it has not begun.", n_waiting)
        info = GaugeMetricFamily("nanorun_build_info", "The version.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        yield from self._memory()
        if isinstance(self._client, LocalEngine):
            yield _gauge("engine_up", "Whether its process runs.", self._client.pid is not None)
            restarts = self._client.n_restarts
            yield CounterMetricFamily(
                "nanorun_engine_restarts", "Engines started after one that died.", restarts
            )

    def _memory(self) -> Iterator[Metric]:
        planned = self._planned_bytes()
        if planned is not None:
            about = "Main memory that the engine's process is to take."
            yield _gauge("engine_memory_planned_bytes", about, planned)
        pid = self._client.pid if isinstance(self._client, LocalEngine) else None
        resident = None if pid is None else _resident_bytes(pid)
        if resident is not None:
            about = "Main memory that the engine's process takes."
            yield _gauge("engine_memory_resident_bytes", about, resident)
        own = _resident_bytes(None)
        if own is not None:
            yield _gauge("server_memory_resident_bytes", "Main memory of the server itself.", own)


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"nanorun_{name}", about, float(value))


def _resident_bytes(pid: int | None) -> int | None:
    """Main memory of a process, this one for None; None if it is gone."""
    with suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return None
