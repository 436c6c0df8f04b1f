"""`GET /metrics`: what the server did, in Prometheus' text format, counted where requests are admitted and recorded.

Our own names begin with `polar_`. The others are vLLM's, which dashboards, gateways and autoscalers know. Tenants are
not labels: there may be too many of them, and the ledger says who used what.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from polar_sdk.errors import SinkError
from polar_sdk.programs.cost import layer_tokens
from polar_sdk.programs.program import Program
from polar_sdk.promises.monitor import State
from polar_sdk.usage import DISPUTED_TAG, STOPPED_TAG, UPSTREAM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from polar_sdk import UsageRecord
    from polar_sdk.promises.audit import PromiseStanding
    from polar_server.telemetry.live import LiveEngine

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_PARTS: Final = ("embed", "layers_prefill", "layers_decode", "head", "router", "drafts")
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 240.0)
_FINISHED: Final = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error", "cached": "stop"}
_NANO: Final = 1e-9
_PROMISE_DIGITS: Final = 12


class Metrics:
    """The figures of one server, in a registry of its own.

    Args:
        live: The engine; its name is a label of vLLM's names.
        standings: Where promises stand; may take as long as a database does.
    """

    def __init__(self, live: LiveEngine, standings: Callable[[], Mapping[str, PromiseStanding]]) -> None:
        self._live, self._standings = live, standings
        self._registry = registry = CollectorRegistry()
        self._labels = (live.name, "0")

        def counter(metric: str, what: str, *labels: str) -> Counter:
            return Counter(metric, what, labels, registry=registry)

        def gauge(metric: str, what: str, *labels: str) -> Gauge:
            return Gauge(metric, what, labels, registry=registry)

        def vllm(metric: str, what: str) -> Histogram:
            return Histogram(f"vllm:{metric}", what, ("model_name", "engine"), buckets=_SECONDS, registry=registry)

        self._calls = counter("polar_http_requests", "HTTP calls.", "path", "status")
        self._unknown = counter("polar_unknown_fields", "Fields of bodies that the API does not know.")
        self._refused = counter("polar_budget_refusals", "Requests that a budget refused.")
        self._disputed = counter("polar_disputed_requests", "Requests whose upstream said what cannot be.")
        self._stopped = counter("polar_stopped_requests", "Requests whose answer an option ended.", "by")
        self._flops = counter("polar_flops", "Executed FLOPs.", "tier", "part")
        self._saved = gauge("polar_flops_saved", "FLOPs saved against full depth; fewer after a loop.", "tier")
        self._visits = counter("polar_layer_visits", "Executed layer visits.", "kind")
        self._upstream = counter("polar_upstream_layer_tokens_billed", "Tokens by layers, billed for other servers.")
        self._unrecorded = gauge("polar_unrecorded_requests", "Requests that ended and whose record is not stored.")
        self._open = gauge("polar_open_answers", "Calls that are being answered.")
        of_promise = ("tier", "promise")
        self._in_force = gauge("polar_promise_in_force", "1 = the promise is in force, 0 = at risk.", *of_promise)
        self._in_doubt = gauge(
            "polar_promise_in_doubt", "1 = audits of late speak against it: more are made.", *of_promise
        )
        self._audits = gauge("polar_promise_audits", "Audited answers, of all replicas.", *of_promise)
        self._losses = gauge("polar_promise_losses", "Those of them that were lost.", *of_promise)
        self._unusual = gauge(
            "polar_prompts_unusual", "1 = prompts are unlike those of the calibration; see docs/drift.md."
        )
        self._unaudited = gauge("polar_audits_dropped", "Requests chosen to be audited for which there was no time.")
        self._standings_read = gauge("polar_promises_read", "0 = where promises stand cannot be read now.")
        served = ("model_name", "engine")
        self._running = gauge("vllm:num_requests_running", "Requests with a place in the engine.", *served)
        self._waiting = gauge("vllm:num_requests_waiting", "Requests that wait for a place in the engine.", *served)
        self._cache = gauge("vllm:kv_cache_usage_perc", "Share of the memory for keys and values in use.", *served)
        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens.", *served)
        self._written = counter("vllm:generation_tokens", "Sampled tokens.", *served)
        self._queries = counter("vllm:prefix_cache_queries", "Prompt tokens.", *served)
        self._hits = counter("vllm:prefix_cache_hits", "Prompt tokens whose keys were reused.", *served)
        self._success = counter("vllm:request_success", "Requests by how they ended.", *served, "finished_reason")
        self._first = vllm("time_to_first_token_seconds", "From arrival to the first token.")
        self._whole = vllm("e2e_request_latency_seconds", "From arrival to the last token.")
        self._queue = vllm("request_queue_time_seconds", "Waiting.")
        self._prefill = vllm("request_prefill_time_seconds", "Prompt.")
        self._decode = vllm("request_decode_time_seconds", "Answer.")
        self._per_token = vllm("request_time_per_output_token_seconds", "Per token after the first.")

    def called(self, path: str, status: int) -> None:
        """A call was answered; `path` is one of the routes."""
        self._calls.labels(path, str(status)).inc()

    def unknown(self, fields: int) -> None:
        """A body had fields that the API does not know."""
        self._unknown.inc(fields)

    def refused(self) -> None:
        """A budget refused a request."""
        self._refused.inc()

    def recorded(self, record: UsageRecord) -> None:
        """A request ended, and its record is stored."""
        tier = record.tier or "none"
        self._disputed.inc(DISPUTED_TAG in record.tags)
        if STOPPED_TAG in record.tags:
            self._stopped.labels(record.tags[STOPPED_TAG]).inc()
        for part in _PARTS:
            self._flops.labels(tier, part).inc(getattr(record.flops, part))
        self._saved.labels(tier).inc(record.flops_saved)
        self._visits.labels("prefill").inc(sum(record.visits.prefill))
        self._visits.labels("decode").inc(sum(record.visits.decode))
        tokens, labels = record.tokens, self._labels
        if record.device == UPSTREAM and tokens.output:
            program = Program.parse(record.program)
            self._upstream.inc(layer_tokens(program, tokens.input, tokens.output, cached=tokens.cached))
        self._prompt.labels(*labels).inc(tokens.input)
        self._written.labels(*labels).inc(tokens.output)
        self._queries.labels(*labels).inc(tokens.input)
        self._hits.labels(*labels).inc(tokens.cached)
        self._success.labels(*labels, _FINISHED[record.finish_reason]).inc()
        first = record.queue_ns + record.prefill_ns
        if tokens.output:
            self._first.labels(*labels).observe(first * _NANO)
        self._whole.labels(*labels).observe((first + record.decode_ns) * _NANO)
        self._queue.labels(*labels).observe(record.queue_ns * _NANO)
        self._prefill.labels(*labels).observe(record.prefill_ns * _NANO)
        self._decode.labels(*labels).observe(record.decode_ns * _NANO)
        if tokens.output > 1:
            self._per_token.labels(*labels).observe(record.decode_ns * _NANO / (tokens.output - 1))

    def text(self) -> bytes:
        """All figures, as Prometheus reads them; takes as long as the ledger does."""
        try:
            standings: Iterable[PromiseStanding] = self._standings().values()
            self._standings_read.set(1)
        except SinkError:  # those that were read last stay
            standings = ()
            self._standings_read.set(0)
        for one in standings:
            labels = (one.tier, one.promise[:_PROMISE_DIGITS])
            self._in_force.labels(*labels).set(one.state is State.IN_FORCE)
            self._in_doubt.labels(*labels).set(one.doubtful)
            self._audits.labels(*labels).set(one.audits)
            self._losses.labels(*labels).set(one.losses)
        look = self._live.look()
        self._waiting.labels(*self._labels).set(look.waiting)
        self._running.labels(*self._labels).set(look.running)
        self._cache.labels(*self._labels).set(look.pages_used / max(look.pages, 1))
        self._open.set(look.answers)
        self._unusual.set(look.unusual)
        self._unaudited.set(look.unaudited)
        self._unrecorded.set(look.unrecorded)
        return generate_latest(self._registry)
