"""A vLLM that is sent each request's program: what it is asked, what is billed, and what it may not be."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
import torch

from polar_sdk import ListSink, PolarModel, Program, __version__
from polar_sdk.engine.hashes import hash_fills
from polar_sdk.engine.maps import Fill
from polar_sdk.errors import InvalidRequestError
from polar_sdk.programs.cost import layer_tokens
from polar_sdk.programs.policy import Policy
from polar_sdk.testing import tiny_llama, tiny_policy, tiny_tokenizer
from polar_sdk.usage import WORKER_TAG
from polar_server.upstream.client import UpstreamError
from tests.integrations.server.conftest import chat_body

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.integrations.server.conftest import RecordingSink, Served

FILLS = "0-2 (3-5:2)"
PIECES = ("a", "b", "c")
CACHED = 3


class Upstream:
    """A server with the wire format of a vLLM that runs programs."""

    def __init__(self, digests: dict[str, str]) -> None:
        self.digests, self.bodies = digests, list[Any]()
        self.worker: str | None = digests["worker"]
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._say(
                    {"data": [{"id": "tiny", "owned_by": "vllm"}]} if self.path == "/v1/models" else upstream.digests
                )

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                upstream.bodies.append(body)
                usage = {
                    "prompt_tokens": len(body["prompt"]),
                    "completion_tokens": len(PIECES),
                    "prompt_tokens_details": {"cached_tokens": CACHED},
                }
                events = [{"choices": [{"text": piece}]} for piece in PIECES]
                last = {"choices": [{"text": "", "finish_reason": "length"}], "usage": usage}
                text = "".join(f"data: {json.dumps(event)}\n\n" for event in [*events, last])
                self._send(f"{text}data: [DONE]\n\n".encode(), 200)

            def _say(self, content: Any, status: int = 200) -> None:
                self._send(json.dumps(content).encode(), status)

            def _send(self, content: bytes, status: int) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                if upstream.worker is not None:
                    self.send_header("polar-worker", upstream.worker)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def filling() -> PolarModel:
    """A model with a fill, whose tiers fill, skip and run everything."""
    tiers = {"economy": {"program": FILLS}, "standard": {"program": "0 2-5"}, "exact": {"program": "0-5"}}
    policy = Policy.model_validate({"protected": [], "default_tier": "exact", "tiers": tiers})
    whole = tiny_llama(max_position_embeddings=4096)
    model = PolarModel.from_hf(whole, tiny_tokenizer(), policy=Policy.permissive(), ledger=None)
    decoder = model.loaded.decoder
    shape = 3, 2, decoder.family.kv_heads, decoder.family.head_dim
    weight = torch.randn(48, torch.Size(shape).numel(), generator=torch.Generator().manual_seed(0))
    decoder.set_fills({(3, 5): Fill((weight.to(decoder.dtype),), torch.zeros(shape, dtype=decoder.dtype))})
    return PolarModel(model.loaded, policy=policy, ledger=None)


@pytest.fixture
def upstream(filling: PolarModel) -> Iterator[Upstream]:
    fills = hash_fills(filling.decoder.fills)
    made = Upstream({"model": filling.fingerprint, "fills": fills, "version": __version__, "worker": "first"})
    yield made
    made.server.shutdown()
    made.server.server_close()


def served(serve: Callable[..., Served], model: PolarModel, sink: ListSink, **backends: str) -> Served:
    engine = PolarModel(model.loaded, policy=model.policy, sink=sink)
    return serve(engine=engine, backends={tier: [url] for tier, url in backends.items()})


def ask(front: Served, tier: str) -> tuple[int, Any]:
    messages = [{"role": "user", "content": "the sea was calm that day, and so were they"}]
    body = chat_body(model=f"tiny:{tier}", max_tokens=3, messages=messages)
    status, _, answer = front.call("POST", "/v1/chat/completions", body)
    return status, answer


def test_one_server_runs_the_program_of_each_tier_and_the_formula_bills_it(
    serve: Callable[..., Served], filling: PolarModel, upstream: Upstream, sink: RecordingSink
) -> None:
    url = f"programs+{upstream.url}"
    front = served(serve, filling, sink, economy=url, exact=url)
    digest = upstream.digests["fills"]
    for tier, program in (("economy", FILLS), ("exact", "0-5")):
        status, answer = ask(front, tier)
        assert (status, answer["choices"][0]["message"]["content"]) == (200, "".join(PIECES)), answer
        assert answer["polar"]["program"] == program
        assert upstream.bodies[-1]["vllm_xargs"] == {"polar": program, "polar_fills": digest}
        record = sink.records[-1]
        cost = filling.decoder.cost.request(Program.parse(program), record.tokens.input, len(PIECES), cached=CACHED)
        assert (record.program, record.tier, record.flops) == (program, tier, cost)
        assert record.tokens.cached == CACHED
        assert record.tags[WORKER_TAG] == "first"
    assert sink.records[0].flops.total < sink.records[1].flops.total
    billed = sum(
        layer_tokens(Program.parse(one.program), one.tokens.input, len(PIECES), cached=CACHED) for one in sink.records
    )
    metrics = front.call("GET", "/metrics")[2]
    assert f"polar_upstream_layer_tokens_billed_total {billed:.1f}" in str(metrics)


def test_what_no_vllm_runs_is_answered_at_full_depth(
    serve: Callable[..., Served], filling: PolarModel, upstream: Upstream, sink: RecordingSink
) -> None:
    front = served(serve, filling, sink, standard=f"programs+{upstream.url}")
    assert ask(front, "standard")[1]["polar"]["program"] == sink.records[0].program == "0-5"


OTHERS: tuple[dict[str, str], ...] = ({"model": "0" * 64}, {"fills": "0" * 64}, {"version": "0.0.1"})


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: next(iter(other)))
def test_it_does_not_start_before_a_server_with_other_files(
    serve: Callable[..., Served], filling: PolarModel, upstream: Upstream, sink: RecordingSink, other: dict[str, str]
) -> None:
    own = upstream.digests
    for digests, part in (({**own, **other}, next(iter(other.values()))[:12]), ({}, "runs no programs")):
        upstream.digests = digests
        with pytest.raises(UpstreamError, match=part) as raised:
            served(serve, filling, sink, economy=f"programs+{upstream.url}")
        assert upstream.url in str(raised.value)
        assert "\n" not in str(raised.value)


def test_it_starts_where_one_server_of_a_tier_answers_and_not_where_none_does(
    serve: Callable[..., Served], filling: PolarModel, upstream: Upstream, sink: RecordingSink
) -> None:
    nobody = "programs+http://127.0.0.1:1"
    with pytest.raises(UpstreamError, match=r"economy.*127\.0\.0\.1:1/v1"):
        served(serve, filling, sink, economy=nobody)
    engine = PolarModel(filling.loaded, policy=filling.policy, sink=sink)
    front = serve(engine=engine, backends={"economy": [nobody, f"programs+{upstream.url}"]})
    assert ask(front, "economy")[0] == 200


@pytest.mark.parametrize("other", [*OTHERS, None], ids=lambda other: next(iter(other or ["programs"])))
def test_a_server_that_was_restarted_answers_by_the_same_files_or_not_at_all(
    serve: Callable[..., Served],
    filling: PolarModel,
    upstream: Upstream,
    sink: RecordingSink,
    other: dict[str, str] | None,
) -> None:
    front = served(serve, filling, sink, economy=f"programs+{upstream.url}")
    upstream.worker = "second"
    own = upstream.digests = {**upstream.digests, "worker": "second"}
    assert ask(front, "economy")[0] == 200  # asked again, and nobody noticed
    assert [record.tags[WORKER_TAG] for record in sink.records] == ["second"]
    upstream.worker, upstream.digests = ("third", {**own, **other}) if other else (None, {})
    status, answer = ask(front, "economy")
    assert (status, answer["error"]["code"]) == (502, "upstream_error"), answer
    assert upstream.url in answer["error"]["message"]
    assert len(sink.records) == 1  # nothing was answered, and nothing billed
    upstream.worker, upstream.digests = "second", own
    assert ask(front, "economy")[0] == 200


def test_an_upstream_that_never_is_the_one_that_was_compared_is_left(
    serve: Callable[..., Served], filling: PolarModel, upstream: Upstream, sink: RecordingSink
) -> None:
    front = served(serve, filling, sink, economy=f"programs+{upstream.url}")
    upstream.worker = "of another server behind the same address"
    status, answer = ask(front, "economy")
    assert (status, answer["error"]["code"]) == (503, "upstream_restarted"), answer
    assert sink.records == []


def test_a_tier_has_upstreams_of_one_kind(serve: Callable[..., Served], filling: PolarModel) -> None:
    engine = PolarModel(filling.loaded, policy=tiny_policy(6), sink=ListSink())
    with pytest.raises(InvalidRequestError, match=r"programs\+"):
        serve(engine=engine, backends={"economy": ["http://127.0.0.1:1", "programs+http://127.0.0.1:2"]})
