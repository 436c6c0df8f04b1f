"""LangChain's standard suite for chat models, applied to `PolarLLM`: LangChain has no suite for text models.

The tests that the suite has for tools, schemas, media and roles have no counterpart in a text model. Each other one has
its own here, over the tiny engine and, with the real model, as a user would run it.
"""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any, Literal

import pytest
from langchain_core import exceptions as langchain
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.globals import set_llm_cache
from langchain_core.load import dumpd
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableParallel

from langchain_polar import ChatPolar, PolarLLM, get_polar_cost_callback
from polar_sdk import ListSink, PolarModel
from polar_sdk.errors import EmptyPromptError, InvalidRequestError
from polar_sdk.models.aliases import ALIASES
from polar_sdk.models.paths import cache_folder
from polar_sdk.testing import tiny_llama, tiny_model, tiny_tokenizer
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from pathlib import Path

    from langchain_core.outputs import LLMResult

QUESTION = "What is the capital of France?"
OTHER = "Name a colour."


class _Heard(BaseCallbackHandler):
    """Events of callbacks, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.tokens: list[str] = []
        self.results: list[LLMResult] = []

    def on_llm_start(self, *_: Any, **__: Any) -> None:
        self.events.append("start")

    def on_llm_new_token(self, token: str | list[str | dict[str, Any]], **_: Any) -> None:
        self.events.append("token")
        self.tokens.append(str(token))

    def on_llm_end(self, response: LLMResult, **_: Any) -> None:
        self.events.append("end")
        self.results.append(response)

    def on_llm_error(self, error: BaseException, **_: Any) -> None:
        self.events.append(type(error).__name__)


class CompletionSuite:
    """The suite; a subclass says which model."""

    model_override: str
    """A name of the model that differs from the default."""

    @pytest.fixture
    def sink(self) -> ListSink:
        return ListSink()

    @pytest.fixture
    def params(self, sink: ListSink) -> dict[str, Any]:
        raise NotImplementedError

    @pytest.fixture
    def llm(self, params: dict[str, Any]) -> PolarLLM:
        return PolarLLM(**params)

    @pytest.mark.parametrize("way", ["invoke", "ainvoke"])
    async def test_init_streaming(self, params: dict[str, Any], way: str) -> None:
        heard = _Heard()
        streaming = PolarLLM(**params, streaming=True)
        config: Any = {"callbacks": [heard]}
        text = streaming.invoke(QUESTION, config) if way == "invoke" else await streaming.ainvoke(QUESTION, config)
        assert text == PolarLLM(**params).invoke(QUESTION)
        assert heard.events == ["start", *["token"] * len(heard.tokens), "end"]
        assert len(heard.tokens) > 1

    def test_standard_params(self, llm: PolarLLM) -> None:
        params: Any = llm._get_ls_params(stop=["."], temperature=0.5)
        assert (params["ls_provider"], params["ls_model_type"]) == ("polar", "llm")
        assert (params["ls_model_name"], params["ls_stop"]) == (llm.model_name, ["."])
        assert (params["ls_temperature"], params["ls_max_tokens"]) == (0.5, llm.max_tokens)
        assert llm._get_ls_params(model="other")["ls_model_name"] == "other"

    async def test_every_way_gives_the_same_text(self, llm: PolarLLM) -> None:
        text = llm.invoke(QUESTION)
        assert isinstance(text, str)
        assert text.strip()
        pieces = list(llm.stream(QUESTION))
        assert len(pieces) > 1
        assert "".join(pieces) == text
        assert await llm.ainvoke(QUESTION) == text
        assert "".join([piece async for piece in llm.astream(QUESTION)]) == text
        other = llm.invoke(OTHER)
        assert llm.batch([QUESTION, OTHER]) == [text, other]
        assert await llm.abatch([QUESTION, OTHER]) == [text, other]
        assert dict(llm.batch_as_completed([QUESTION, OTHER])) == {0: text, 1: other}

    async def test_another_model_per_call(self, llm: PolarLLM, sink: ListSink) -> None:
        name = self.model_override
        assert llm.invoke(QUESTION, model=name)
        assert await llm.ainvoke(QUESTION, model=name)
        assert "".join(llm.stream(QUESTION, model=name))
        assert "".join([piece async for piece in llm.astream(QUESTION, model=name)])
        assert [record.model for record in sink.records] == [name] * 4
        with pytest.raises(langchain.ModelNotFoundError):
            llm.invoke(QUESTION, model="./no/such/folder")

    def test_every_kind_of_input(self, llm: PolarLLM) -> None:
        text = llm.invoke(QUESTION)
        assert llm.invoke(PromptTemplate.from_template(QUESTION).invoke({})) == text
        talk = [HumanMessage("Hi"), AIMessage("Hello!"), HumanMessage(QUESTION)]
        assert llm.invoke(talk) == llm.invoke(f"Human: Hi\nAI: Hello!\nHuman: {QUESTION}")
        assert llm.invoke([("human", QUESTION)]) == llm.invoke(f"Human: {QUESTION}")

    def test_usage_of_each_prompt_and_of_all(self, llm: PolarLLM, sink: ListSink) -> None:
        with get_polar_cost_callback() as costs:
            result = llm.generate([QUESTION, OTHER])
        records = {record.request_id: record for record in sink.records}
        assert len(records) == 2
        infos = [row[0].generation_info or {} for row in result.generations]
        for info, prompt in zip(infos, (QUESTION, OTHER), strict=True):
            record, usage = records[info["polar"]["request_id"]], info["usage_metadata"]
            assert (usage["input_tokens"], usage["output_tokens"]) == (record.tokens.input, record.tokens.output)
            assert usage["total_tokens"] == record.tokens.input + record.tokens.output
            assert usage["input_tokens"] >= llm.get_num_tokens(prompt)
            assert info["polar"]["flops"] == record.flops.total > 0
            assert info["model_name"] == record.model
        sums = (result.llm_output or {})["token_usage"]
        assert sums["total_tokens"] == sum(info["usage_metadata"]["total_tokens"] for info in infos)
        assert sums["flops"] == costs.total.flops == sum(record.flops.total for record in records.values())

    @pytest.mark.parametrize("way", ["stream", "astream"])
    async def test_usage_of_a_stream_comes_once(self, llm: PolarLLM, sink: ListSink, way: str) -> None:
        heard = _Heard()
        config: Any = {"callbacks": [heard]}
        if way == "stream":
            text = "".join(llm.stream(QUESTION, config))
        else:
            text = "".join([piece async for piece in llm.astream(QUESTION, config)])
        (answer,) = heard.results[0].generations[0]
        usage = (answer.generation_info or {})["usage_metadata"]
        assert (usage["input_tokens"], usage["output_tokens"]) == (
            sink.records[0].tokens.input,
            sink.records[0].tokens.output,
        )
        assert "".join(heard.tokens) == answer.text == text
        assert (heard.events[0], heard.events[-1]) == ("start", "end")

    async def test_callbacks_hear_each_prompt_of_a_batch_and_errors(self, llm: PolarLLM) -> None:
        heard, later = _Heard(), _Heard()
        llm.batch([QUESTION, OTHER], {"callbacks": [heard]})
        await llm.abatch([QUESTION, OTHER], {"callbacks": [later]})
        for one in (heard, later):
            assert sorted(one.events) == ["end", "end", "start", "start"]
            assert len(one.results) == 2
        with pytest.raises(langchain.ModelInvalidRequestError):
            llm.invoke(QUESTION, {"callbacks": [heard]}, compute="luxury")
        assert heard.events[-2:] == ["start", "UnknownTierError"]

    async def test_events_are_told(self, llm: PolarLLM) -> None:
        told = [event async for event in llm.astream_events(QUESTION, version="v2")]
        kinds = [event["event"] for event in told]
        assert (kinds[0], kinds[-1]) == ("on_llm_start", "on_llm_end")
        pieces: list[Any] = [event["data"]["chunk"] for event in told if event["event"] == "on_llm_stream"]
        assert "".join(piece if isinstance(piece, str) else piece.text for piece in pieces) == llm.invoke(QUESTION)

    async def test_the_cache_of_the_process_answers_and_is_recorded(self, params: Any, sink: ListSink) -> None:
        set_llm_cache(InMemoryCache())
        try:
            llm = PolarLLM(**params)
            texts = [llm.invoke(QUESTION), llm.invoke(QUESTION), await llm.ainvoke(QUESTION)]
            texts += llm.batch([QUESTION])
        finally:
            set_llm_cache(None)
        assert len(set(texts)) == 1
        assert [record.outcome for record in sink.records] == [Outcome.COMPLETED] + [Outcome.CACHED] * 3
        assert PolarLLM(**params, cache=False).invoke(QUESTION) == texts[0]
        assert sink.records[-1].outcome is Outcome.COMPLETED

    def test_another_model_can_be_configured(self, llm: PolarLLM, params: Any) -> None:
        chat: Any = ChatPolar(**params)
        other: Any = llm.configurable_alternatives(ConfigurableField(id="model"), chat=chat)
        assert isinstance(other.invoke(QUESTION), str)
        assert isinstance(other.with_config(configurable={"model": "chat"}).invoke(QUESTION), AIMessage)

    async def test_it_is_a_part_of_chains(self, llm: PolarLLM) -> None:
        chain = PromptTemplate.from_template("{x}") | llm | StrOutputParser()
        text = llm.invoke(QUESTION)
        assert chain.invoke({"x": QUESTION}) == "".join(chain.stream({"x": QUESTION})) == text
        assert "".join([piece async for piece in chain.astream({"x": QUESTION})]) == text
        both = RunnableParallel(one=chain, two=PromptTemplate.from_template(OTHER) | llm).invoke({"x": QUESTION})
        assert both == {"one": text, "two": llm.invoke(OTHER)}

    async def test_a_mistake_in_a_batch_may_be_returned(self, llm: PolarLLM) -> None:
        answers: list[Any] = llm.batch([QUESTION, " "], return_exceptions=True)
        for answer in answers:
            assert isinstance(answer, EmptyPromptError), "the prompts of a batch run together or not at all"
        with pytest.raises(EmptyPromptError):
            await llm.abatch([QUESTION, " "])

    def test_unicode_comes_through(self, llm: PolarLLM, sink: ListSink) -> None:
        llm.invoke("こんにちは 🌍 naïve", max_tokens=2)
        assert sink.records[-1].tokens.input >= llm.get_num_tokens("こんにちは 🌍 naïve")
        assert llm.invoke("?", choice=["größer 🌍", "größer 🌎"], max_tokens=20) in {"größer 🌍", "größer 🌎"}

    def test_what_it_does_not_do_is_refused_in_words(self, llm: PolarLLM) -> None:
        with pytest.raises(NotImplementedError):
            llm.with_structured_output(dict)
        with pytest.raises(NotImplementedError, match="tools="):
            llm.invoke(QUESTION, tools=[])

    def test_it_is_not_serialised(self, llm: PolarLLM) -> None:
        assert llm.is_lc_serializable() is False
        assert dumpd(llm)["type"] == "not_implemented"
        assert "lc_kwargs" not in json.dumps(dumpd(llm))


class TestTiny(CompletionSuite):
    """The tiny engine."""

    model_override = "llama"

    @pytest.fixture
    def params(self, sink: ListSink) -> dict[str, Any]:
        return {"engine": tiny_model(sink=sink), "max_tokens": 12}


@pytest.mark.model
class TestRealModel(CompletionSuite):
    """The default model."""

    @property
    def model_override(self) -> str:  # type: ignore[override]
        PolarModel.from_pretrained(ledger=None)  # fetched from here on
        return str(cache_folder() / "models" / ALIASES[0].key)

    @pytest.fixture
    def params(self, sink: ListSink) -> dict[str, Any]:
        return {"sink": sink, "max_tokens": 12, "compute": "exact"}


# --- Objects. ---


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A model folder."""
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("kind", ["langchain", "llama_index"])
def test_settings_are_pickled_and_weights_are_loaded_anew(
    folder: str, kind: Literal["langchain", "llama_index"]
) -> None:
    from llama_index_polar import PolarLLM as LlamaIndexLLM

    options: dict[str, Any] = {
        "model": folder,
        "max_tokens": 3,
        "ledger": None,
        "usage_tags": {"app": "shop"},
    }
    if kind == "langchain":
        llm = PolarLLM(**options)
        text = llm.invoke("Hello")
        again = pickle.loads(pickle.dumps(llm))
        assert again.invoke("Hello") == text
    else:
        other = LlamaIndexLLM(**options)
        text = other.complete("Hello").text
        again = pickle.loads(pickle.dumps(other))
        assert again.complete("Hello").text == text
    assert (again.usage_tags, again.max_tokens, again.ledger) == ({"app": "shop"}, 3, None)


def test_what_belongs_to_a_process_is_not_pickled(engine: PolarModel) -> None:
    from llama_index_polar import PolarLLM as LlamaIndexLLM

    for kind in (PolarLLM, ChatPolar, LlamaIndexLLM):
        with pytest.raises(TypeError, match="engine="):
            pickle.dumps(kind(engine=engine))
        with pytest.raises(TypeError, match="sink="):
            pickle.dumps(kind(sink=ListSink()))


# --- Batches and prompts. ---


@pytest.fixture
def llm(engine: PolarModel) -> PolarLLM:
    return PolarLLM(engine=engine, max_tokens=12)


def test_rows_of_a_batch_decode_together(llm: PolarLLM, sink: ListSink) -> None:
    llm.batch(["one", "two", "three"], config=[{"metadata": {"tenant": name}} for name in ("acme", "globex", "acme")])
    starts = [record.started_at for record in sink.records]
    ends = [record.prefill_ns + record.decode_ns for record in sink.records]
    spread = (max(starts) - min(starts)).total_seconds() * 1e9
    assert len(starts) == 3
    assert spread < min(ends), "each row would have started only when the one before had ended"


def test_run_ids_of_a_batch_are_request_ids(llm: PolarLLM, sink: ListSink) -> None:
    result = llm.generate(["one", "two"])
    assert result.run is not None
    assert {str(run.run_id) for run in result.run} == {record.request_id for record in sink.records}


def test_a_raw_prompt_gets_no_template(engine: PolarModel, sink: ListSink) -> None:
    PolarLLM(engine=engine, max_tokens=1, template="raw").invoke("abc")
    PolarLLM(engine=engine, max_tokens=1).invoke("abc")
    PolarLLM(engine=engine, max_tokens=1).invoke("abc", template="raw")
    raw, templated, per_call = (record.tokens.input for record in sink.records)
    assert raw == per_call == 3 < templated


def test_one_request_id_per_call_is_the_idempotency_key(llm: PolarLLM, sink: ListSink) -> None:
    llm.invoke("Hello", request_id="order-7")
    assert [record.request_id for record in sink.records] == ["order-7"]
    with pytest.raises(InvalidRequestError, match="order-8"):
        llm.generate(["one", "two"], request_id="order-8")
