"""Prompts of token ids, and the log-probabilities of a prompt, as evaluation harnesses ask for them."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.integrations.server.conftest import RecordingSink, Served

TEXT = "The äöü end."


def complete(served: Served, **fields: Any) -> dict[str, Any]:
    status, _, body = served.call(
        "POST", "/v1/completions", {"model": "tiny", "prompt": TEXT, "max_tokens": 1, **fields}
    )
    assert status == 200, body
    answer: dict[str, Any] = body
    return answer


def test_token_ids_are_a_prompt_like_their_text(served: Served, sink: RecordingSink) -> None:
    ids = served.server.engine.encode(TEXT)
    by_text = complete(served, max_tokens=6, echo=True)["choices"][0]
    by_ids = complete(served, prompt=ids, max_tokens=6, echo=True)["choices"][0]
    assert by_text == by_ids
    assert by_ids["text"].startswith(TEXT)
    several = complete(served, prompt=[ids, ids[:3], "ab"], max_tokens=2)
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]
    assert several["usage"]["prompt_tokens"] == len(ids) + 5
    assert [record.tokens.input for record in sink.records[:2]] == [len(ids)] * 2
    events = served.events("/v1/completions", model="tiny", prompt=ids, max_tokens=6, echo=True)
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == by_ids["text"]


def test_a_prompt_is_scored_as_the_engine_scores_it(served: Served, sink: RecordingSink) -> None:
    engine = served.server.engine
    ids = engine.encode(TEXT)
    body = complete(served, echo=True, logprobs=2, model="tiny:exact")
    (choice,) = body["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    scored = logprobs["token_logprobs"][1 : len(ids)]
    first = engine.decode(ids[:1])
    assert sum(scored) == pytest.approx(engine.score(first, [TEXT[len(first) :]])[0], abs=1e-3)
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == len(ids) + body["usage"]["completion_tokens"]
    assert all(len(top) in (1, 2) for top in logprobs["top_logprobs"][1:]), "two that are written alike are one"
    assert choice["text"].startswith(TEXT)
    plain = "abc def"
    tokens = complete(served, prompt=plain, echo=True, logprobs=0)["choices"][0]["logprobs"]
    assert "".join(tokens["tokens"][: len(plain)]) == plain
    assert tokens["text_offset"] == list(accumulate([0, *map(len, tokens["tokens"][:-1])]))
    assert sink.records[0].flops.head > sink.records[0].tokens.output * engine.decoder.cost.head


def test_nothing_but_the_score_is_shown_with_no_tokens(served: Served, sink: RecordingSink) -> None:
    body = complete(served, max_tokens=0, echo=True, logprobs=1)
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    assert len(choice["logprobs"]["tokens"]) == body["usage"]["prompt_tokens"]
    assert body["usage"]["completion_tokens"] == sink.records[0].tokens.output == 1, "it is sampled, and not shown"
    longer = complete(served, max_tokens=3, echo=True, logprobs=1)["choices"][0]["logprobs"]
    assert longer["token_logprobs"][: len(choice["logprobs"]["tokens"])] == pytest.approx(
        choice["logprobs"]["token_logprobs"], abs=1e-4
    )


def test_it_is_what_lm_eval_reads(served: Served) -> None:
    """As `local-completions` of lm-evaluation-harness asks and reads: token ids, several at a time, one more token."""
    engine = served.server.engine
    contexts, endings = ["The sky is", "Two and two is"], [" blue", " four!"]
    prompts = [engine.encode(context + ending) for context, ending in zip(contexts, endings, strict=True)]
    with served.client() as client:
        answer = client.completions.create(
            model="tiny:exact", prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
        )
    for choice, context, ending in zip(answer.choices, contexts, endings, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.top_logprobs is not None
        begin = len(engine.encode(context))
        scored, top = choice.logprobs.token_logprobs[begin:-1], choice.logprobs.top_logprobs[begin:-1]
        assert sum(scored) == pytest.approx(engine.score(context, [ending])[0], abs=1e-3)
        assert all(value <= max(best.values()) + 1e-6 for value, best in zip(scored, top, strict=True))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [-1]}, None),
        ({"prompt": [100_000]}, None),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": True}, "max_tokens"),
        ({"echo": True, "logprobs": 1, "stream": True}, "stream"),
    ],
)
def test_what_cannot_be_scored_is_refused(refusing: Served, fields: dict[str, Any], param: str | None) -> None:
    status, _, body = refusing.call("POST", "/v1/completions", {"model": "tiny", "prompt": "ab", **fields})
    assert (status, body["error"]["param"]) == (400, param)
