"""Owns what /metrics shows: the counts and times of requests, and workers as the router knows them.

Made by router/main.py. The front door and the fleet tell it what happened; what can be looked up is
looked up when the page is asked for. Labels have few values: no request and no client is one.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric

from kvrelay.wire import inference_pb2, worker_pb2
from kvrelay.wire.inference_pb2 import Finished
from router.refusals import Reason
from router.request import Request
from router.workers import Workers

_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_QUEUE_S = (0.001, *_TTFT_S)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10)
_WHOLE_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.1, 1.25, 1.5, 2, 3, 5, 10, 30)
_EXPOSED_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)


class Watched(Protocol):
    """What is looked up when the page is asked for; a Fleet."""

    def connected(self, role: str) -> int: ...

    @property
    def requests(self) -> tuple[int, int]:
        """Requests with a worker, and requests that wait for one."""
        ...

    @property
    def workers(self) -> Workers: ...


class Metrics:
    """One router's. The attributes are for those who count; `text` is the page."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.generated_tokens = 0
        self.token_gaps = TokenGaps()
        self._make_counters()
        self._make_histograms()
        self._registry.register(_Collector(self._collect_own))

    def _make_counters(self) -> None:
        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(name, what, labels, namespace="kvrelay", registry=self._registry)

        self._requests = counter(
            "requests", "Requests that ended, by how: finish or refusal.", "protocol", "outcome"
        )
        self.http_responses = counter("http_responses", "HTTP answers.", "route", "status")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were answered.")
        self._cached_tokens = counter("cached_tokens", "Prompt tokens that were not computed.")
        self._placements = counter(
            "placements", "Placements, by where the prompt is computed.", "kind"
        )
        self._retries = counter("retries", "Placements of requests whose workers failed them.")
        self._kv_bytes = counter("kv_bytes", "KV cache moved between workers.", "transport")

    def _make_histograms(self) -> None:
        def histogram(name: str, what: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(
                f"{name}_seconds",
                what,
                namespace="kvrelay",
                buckets=tuple(buckets),
                registry=self._registry,
            )

        self._ttft = histogram("ttft", "Arrival until the first token.", _TTFT_S)
        self._tpot = histogram("tpot", "Mean time for a token after the first.", _TOKEN_S)
        self._queue_wait = histogram("queue_wait", "Arrival until prefill began.", _QUEUE_S)
        self._prefill = histogram("prefill", "Computing a prompt, as the worker says.", _TTFT_S)
        self._whole = histogram("request", "Arrival until the end.", _WHOLE_S)
        self._exposed = histogram(
            "kv_exposed", "End of prefill until the decode worker had all KV.", _EXPOSED_S
        )
        self._predictions = Histogram(
            "prediction_ratio",
            "TTFT from placement on, and TPOT: as measured, in that predicted at placement.",
            ("of", "kind"),
            namespace="kvrelay",
            buckets=_RATIOS,
            registry=self._registry,
        )

    # ---- what happens

    def refused(self, protocol: str, reason: Reason) -> None:
        """A call was refused before it was a request."""
        self._requests.labels(protocol, reason.value).inc()

    def ended(self, protocol: str, outcome: Reason | Finished | None, request: Request) -> None:
        """A request is over; outcome None: its client went away or was cut off."""
        times = request.times
        finished = isinstance(outcome, Finished)
        self._requests.labels(protocol, _outcome(outcome)).inc()
        if times.first_token_at_ms is None or outcome is Reason.TAKEN_OVER:
            return
        self._prompt_tokens.inc(len(request.prompt))
        self._cached_tokens.inc(times.cached_tokens)
        self._ttft.observe((times.first_token_at_ms - times.arrived_at_ms) / 1000)
        if times.prefill_began_at_ms is not None:
            self._queue_wait.observe((times.prefill_began_at_ms - times.arrived_at_ms) / 1000)
        self._prefill.observe(times.prefill_ms / 1000)
        if times.transport:
            self._kv_bytes.labels(times.transport).inc(times.kv_bytes)
            self._exposed.observe(times.kv_exposed_ms / 1000)
        if finished and times.last_token_at_ms is not None:
            self._whole.observe((times.last_token_at_ms - times.arrived_at_ms) / 1000)
            if len(request.answer) > 1:
                gaps_ms = times.last_token_at_ms - times.first_token_at_ms
                self._tpot.observe(gaps_ms / (len(request.answer) - 1) / 1000)
        self._compare(request)

    def _compare(self, request: Request) -> None:
        """What was predicted, with what came. Of a request that was placed again nothing: what it
        lost by that was not for its placement to know."""
        times, predicted = request.times, request.placement
        first_ms, last_ms = times.first_token_at_ms, times.last_token_at_ms
        if predicted is None or request.attempt != 1 or first_ms is None or last_ms is None:
            return
        kind = _kind(here=predicted.prefill is None)
        if predicted.predicted_ttft_ms > 0:
            ratio = (first_ms - request.placed_at_ms) / predicted.predicted_ttft_ms
            self._predictions.labels("ttft", kind).observe(ratio)
        gaps = len(request.answer) - 1
        if gaps > 0 and predicted.predicted_tpot_ms > 0:
            ratio = (last_ms - first_ms) / gaps / predicted.predicted_tpot_ms
            self._predictions.labels("tpot", kind).observe(ratio)

    def placed(self, reserve: worker_pb2.Reserve) -> None:
        """A request was placed."""
        self._placements.labels(_kind(here=reserve.prefill_here)).inc()
        if reserve.attempt > 1:
            self._retries.inc()

    def generated(self, tokens: int, gap_ms: float | None) -> None:
        """Tokens left for a client, so long after those before them. Called for every step's."""
        self.generated_tokens += tokens
        if gap_ms is not None:
            self.token_gaps.add(gap_ms / 1000, tokens)

    # ---- the page

    def watch(self, fleet: Watched) -> None:
        """From now on the page shows this fleet."""
        self._registry.register(_Collector(lambda: _fleet_metrics(fleet)))

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def _collect_own(self) -> Iterator[Metric]:
        generated = Metric("kvrelay_generated_tokens", "Tokens that left for clients.", "counter")
        generated.add_sample("kvrelay_generated_tokens_total", {}, self.generated_tokens)
        yield generated
        yield self.token_gaps.metric("kvrelay_itl_seconds", "Between two tokens of one answer.")


class TokenGaps:
    """A histogram for what happens at every token, at a sixth of the library's cost."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_TOKEN_S) + 1)
        self._sum_s = 0.0

    def add(self, gap_s: float, tokens: int) -> None:
        """One gap before several tokens that came together counts as so many equal ones."""
        self._counts[bisect_left(_TOKEN_S, gap_s / tokens)] += tokens
        self._sum_s += gap_s

    def metric(self, name: str, what: str) -> HistogramMetricFamily:
        sums: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip((*map(str, _TOKEN_S), "+Inf"), self._counts, strict=True):
            total += count
            sums.append((bound, total))
        family = HistogramMetricFamily(name, what)
        family.add_metric([], sums, self._sum_s)
        return family


class _Collector:
    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self.collect = collect


def _kind(*, here: bool) -> str:
    """Where the prompt is computed."""
    return "local" if here else "prefill_worker"


def _outcome(outcome: Reason | Finished | None) -> str:
    if outcome is None:
        return "cancelled"
    if isinstance(outcome, Reason):
        return outcome.value
    return "length" if outcome.reason == inference_pb2.FINISH_REASON_LENGTH else "stop"


def _fleet_metrics(fleet: Watched) -> Iterator[Metric]:
    running, queued = fleet.requests
    yield _gauge("kvrelay_requests_running", "Requests that workers have.", running)
    yield _gauge("kvrelay_requests_queued", "Requests that wait for a worker.", queued)
    connected = GaugeMetricFamily("kvrelay_workers", "Workers connected.", labels=["role"])
    for role in ("prefill", "decode"):
        connected.add_metric([role], fleet.connected(role))
    yield connected
    yield from _worker_metrics(fleet.workers)


def _worker_metrics(workers: Workers) -> Iterator[Metric]:
    def gauge(name: str, what: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"kvrelay_worker_{name}", what, labels=["instance", "role"])

    queued = gauge("queued_tokens", "Prompt tokens to be computed.")
    total = gauge("blocks_total", "KV blocks.")
    free = gauge("blocks_free", "KV blocks free, cached ones that nobody uses included.")
    running = gauge("running", "Sequences in the batch.")
    for name, prefill in workers.prefill.items():
        queued.add_metric([name, "prefill"], prefill.queued_tokens)
        total.add_metric([name, "prefill"], prefill.blocks_total)
    for name, decode in workers.decode.items():
        total.add_metric([name, "decode"], decode.blocks_total)
        queued.add_metric([name, "decode"], decode.queued_tokens)
        free.add_metric([name, "decode"], decode.blocks_free)
        running.add_metric([name, "decode"], decode.running)
    yield from (queued, total, free, running)


def _gauge(name: str, what: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, what, value=value)
