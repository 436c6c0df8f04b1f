"""`PolarLLM`: the mirror of LangChain's chat suite for a text model, which LangChain does not have."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate

from langchain_polar import PolarLLM
from polar_sdk.errors import InvalidRequestError

if TYPE_CHECKING:
    from langchain_core.outputs import LLMResult

    from polar_sdk import ListSink, PolarModel


@pytest.fixture
def llm(engine: PolarModel) -> PolarLLM:
    return PolarLLM(engine=engine, max_tokens=12)


class _Heard(BaseCallbackHandler):
    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.results: list[LLMResult] = []

    def on_llm_new_token(self, token: Any, **_: Any) -> None:
        self.tokens.append(token)

    def on_llm_end(self, response: LLMResult, **_: Any) -> None:
        self.results.append(response)


async def test_all_ways_of_asking_give_the_same_text(llm: PolarLLM) -> None:
    text = llm.invoke("Hello")
    assert text
    assert "".join(llm.stream("Hello")) == text
    assert await llm.ainvoke("Hello") == text
    assert "".join([piece async for piece in llm.astream("Hello")]) == text
    assert llm.batch(["Hello", "Hey", "Hello"]) == [text, llm.invoke("Hey"), text]
    assert await llm.abatch(["Hello", "Hey"]) == [text, llm.invoke("Hey")]
    assert llm.batch(["Hello", "Hey", "Hello"], config={"max_concurrency": 2})[2] == text


def test_it_drops_into_a_chain(llm: PolarLLM) -> None:
    chain = PromptTemplate.from_template("Say {word}") | llm | StrOutputParser()
    assert chain.invoke({"word": "yes"}) == llm.invoke("Say yes")
    assert len(chain.batch([{"word": "yes"}, {"word": "no"}])) == 2
    assert "".join(chain.stream({"word": "yes"})) == llm.invoke("Say yes")


def test_usage_stands_with_each_prompt_and_the_sum_with_the_call(llm: PolarLLM, sink: ListSink) -> None:
    result = llm.generate(["Hi", "A much longer prompt"])
    infos = [row[0].generation_info or {} for row in result.generations]
    records = {record.request_id: record for record in sink.records}
    for info in infos:
        record = records[info["polar"]["request_id"]]
        assert info["usage_metadata"]["input_tokens"] == record.tokens.input
        assert info["usage_metadata"]["output_tokens"] == record.tokens.output == 12
        assert info["polar"]["flops"] == record.flops.total
        assert info["finish_reason"] == "length"
    assert infos[0]["usage_metadata"]["input_tokens"] < infos[1]["usage_metadata"]["input_tokens"]
    assert result.llm_output is not None
    sums = result.llm_output["token_usage"]
    assert sums["total_tokens"] == sum(info["usage_metadata"]["total_tokens"] for info in infos)
    assert sums["flops"] == sum(record.flops.total for record in sink.records)


def test_rows_of_a_batch_decode_together(llm: PolarLLM, sink: ListSink) -> None:
    llm.batch(["one", "two", "three"], config=[{"metadata": {"tenant": name}} for name in ("acme", "globex", "acme")])
    starts = [record.started_at for record in sink.records]
    ends = [record.prefill_ns + record.decode_ns for record in sink.records]
    spread = (max(starts) - min(starts)).total_seconds() * 1e9
    assert len(starts) == 3
    assert spread < min(ends), "each row would have started only when the one before had ended"


def test_a_batch_with_a_config_per_prompt_records_each_with_its_own(llm: PolarLLM, sink: ListSink) -> None:
    tenants = ["acme", "globex", "acme"]
    llm.batch(
        ["one", "two", "three"],
        config=[{"metadata": {"tenant": name, "row": index}} for index, name in enumerate(tenants)],
    )
    found = {record.tags["row"]: record.tenant for record in sink.records}
    assert found == {"0": "acme", "1": "globex", "2": "acme"}


def test_run_ids_of_a_batch_are_request_ids(llm: PolarLLM, sink: ListSink) -> None:
    result = llm.generate(["one", "two"])
    assert result.run is not None
    assert {str(run.run_id) for run in result.run} == {record.request_id for record in sink.records}


@pytest.mark.parametrize("ways", ["sync", "async"])
def test_streaming_shows_tokens_to_callbacks_during_invoke(engine: PolarModel, ways: str) -> None:
    heard = _Heard()
    llm = PolarLLM(engine=engine, max_tokens=6, streaming=True)
    if ways == "sync":
        text = llm.invoke("Hello", config={"callbacks": [heard]})
    else:
        text = asyncio.run(llm.ainvoke("Hello", config={"callbacks": [heard]}))
    assert "".join(heard.tokens) == text
    assert len(heard.tokens) > 1
    assert heard.results[0].generations[0][0].text == text


def test_a_stream_tells_each_token_once_and_its_usage_once(llm: PolarLLM) -> None:
    heard = _Heard()
    text = "".join(llm.stream("Hello", config={"callbacks": [heard]}))
    assert "".join(heard.tokens) == text
    info = heard.results[0].generations[0][0].generation_info or {}
    assert info["usage_metadata"]["output_tokens"] == 12  # added up over chunks, so it stood on one


def test_a_raw_prompt_gets_no_template(engine: PolarModel, sink: ListSink) -> None:
    PolarLLM(engine=engine, max_tokens=1, template="raw").invoke("abc")
    PolarLLM(engine=engine, max_tokens=1).invoke("abc")
    PolarLLM(engine=engine, max_tokens=1).invoke("abc", template="raw")
    raw, templated, per_call = (record.tokens.input for record in sink.records)
    assert raw == per_call == 3 < templated


def test_one_request_id_per_call_is_the_idempotency_key(llm: PolarLLM, sink: ListSink) -> None:
    llm.invoke("Hello", request_id="order-7")
    assert [record.request_id for record in sink.records] == ["order-7"]
    with pytest.raises(InvalidRequestError, match="2 prompts have the request_id 'order-8'"):
        llm.generate(["one", "two"], request_id="order-8")


@pytest.mark.model
def test_the_sentence_of_the_readme() -> None:
    assert "Paris" in PolarLLM().invoke("What is the capital of France?")
