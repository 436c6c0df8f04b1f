"""`/metrics` and the log: figures of the records, names that dashboards know, and nobody's words."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

from polar_sdk.errors import BudgetExceededError, SinkError
from polar_sdk.promises.audit import PromiseStanding
from polar_sdk.promises.monitor import State
from polar_server.deployment.launch import JsonLines
from tests.integrations.server.conftest import RecordingSink, chat_body
from tests.integrations.server.test_disconnects import endless, read_events, send_request

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pytest

    from tests.integrations.server.conftest import Served

VLLM = [
    "num_requests_running",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "time_to_first_token_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_sum",
    "request_prefill_time_seconds_sum",
    "request_decode_time_seconds_sum",
    "request_time_per_output_token_seconds_count",
]


def figures(served: Served) -> dict[str, float]:
    """Sample → value, labels other than those named left out and added up."""
    _, headers, text = served.call("GET", "/metrics")
    assert headers["content-type"].startswith("text/plain")
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            for name in (sample.name, *(f"{sample.name} {value}" for value in sample.labels.values())):
                found[name] = found.get(name, 0) + sample.value
    return found


def test_figures_are_those_of_the_records(served: Served, sink: RecordingSink) -> None:
    served.chat(n=2, temperature=1)
    served.chat(model="tiny:economy")
    with send_request(served, endless(served, stream=True)) as connection:
        read_events(connection, 3)
    records, found = sink.wait_for(4), figures(served)
    assert found["polar_flops_total"] == sum(record.flops.total for record in records)
    assert found["polar_flops_saved economy"] == records[2].flops_saved
    assert found["polar_layer_visits_total"] == sum(record.visits.total for record in records)
    assert found["vllm:prompt_tokens_total"] == sum(record.tokens.input for record in records)
    assert found["vllm:generation_tokens_total"] == sum(record.tokens.output for record in records)
    assert found["vllm:request_success_total abort"] == 1
    assert found["vllm:request_success_total"] == 4
    assert found["polar_http_requests_total 200"] == 3
    assert found["polar_unrecorded_requests"] == 0
    for name in VLLM:
        assert f"vllm:{name}" in found


def test_promises_stand_there_as_they_do_in_the_ledger(serve: Callable[..., Served]) -> None:
    class Watched(RecordingSink):
        readable = True

        def standings(self) -> Mapping[str, PromiseStanding]:
            if not self.readable:
                raise SinkError("gone")
            common: dict[str, Any] = {"tier": "economy", "audits": 40, "since": datetime.now(UTC), "reason": "x"}
            states = {"a" * 64: (State.IN_FORCE, 1), "b" * 64: (State.AT_RISK, 20)}
            return {
                promise: PromiseStanding(promise=promise, state=state, losses=losses, doubtful=losses == 1, **common)
                for promise, (state, losses) in states.items()
            }

    sink = Watched()
    served = serve(sink=sink)
    for readable in (True, False):
        sink.readable = readable
        found = figures(served)
        assert found["polar_promises_read"] == readable
        assert (found["polar_promise_in_force aaaaaaaaaaaa"], found["polar_promise_in_force bbbbbbbbbbbb"]) == (1, 0)
        assert (found["polar_promise_in_doubt aaaaaaaaaaaa"], found["polar_promise_in_doubt economy"]) == (1, 1)
        assert (found["polar_promise_audits economy"], found["polar_promise_losses bbbbbbbbbbbb"]) == (80, 20)


def test_unusual_prompts_show(serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve()
    assert figures(served)["polar_prompts_unusual"] == 0
    monkeypatch.setattr("polar_server.telemetry.live.LiveEngine.unusual", True)
    assert figures(served)["polar_prompts_unusual"] == 1


def test_a_record_that_could_not_be_stored_shows(serve: Callable[..., Served]) -> None:
    class Failing(RecordingSink):
        def emit(self, record: object) -> None:
            raise OSError("the disk is full")

    served = serve(sink=Failing())
    status, _, body = served.call("POST", "/v1/chat/completions", chat_body())
    assert (status, body["error"]["code"]) == (500, "internal_error")
    assert "disk" not in json.dumps(body)
    assert figures(served)["polar_unrecorded_requests"] == 1


def test_budget_refusals_are_counted(serve: Callable[..., Served]) -> None:
    class Refusing(RecordingSink):
        def reserve(self, bound: object) -> int:
            raise BudgetExceededError("nothing is left.")

    served = serve(sink=Refusing())
    assert served.call("POST", "/v1/chat/completions", chat_body())[0] == 429
    assert figures(served)["polar_budget_refusals_total"] == 1


def test_the_log_holds_no_prompt_and_no_answer(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="polar_server"):
        answer = served.chat(messages=[{"role": "user", "content": "a secret"}])
        served.call("GET", "/v1/other%0a")
        served.close()
    lines = [JsonLines().format(record) for record in caplog.records if record.name == "polar_server.access"]
    first, second = map(json.loads, lines)
    assert "secret" not in "".join(lines)
    assert answer["choices"][0]["message"]["content"] not in "".join(lines)
    assert first["request_id"] == answer["polar"]["receipt"]
    assert (first["status"], first["flops"]) == (200, answer["polar"]["flops"])
    assert (second["status"], second["path"]) == (404, "other")
