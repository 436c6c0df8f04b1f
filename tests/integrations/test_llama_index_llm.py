"""The LlamaIndex model: eight calls, one event each, nothing that blocks, and what each leaves behind."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.prompts import PromptTemplate
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.dispatcher import instrument_tags
from pydantic import PrivateAttr

import polar_sdk
from llama_index_polar import PolarLLM
from llama_index_polar._messages import to_roles
from polar_sdk import ListSink
from polar_sdk import errors as polar
from polar_sdk.frameworks.tools import arranged
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama_index.core.instrumentation.events import BaseEvent

    from polar_sdk import PolarModel

HELLO = [ChatMessage("Hello")]
WAYS = (
    "complete",
    "chat",
    "stream_complete",
    "stream_chat",
    "acomplete",
    "achat",
    "astream_complete",
    "astream_chat",
)


def _text(response: Any) -> str:
    return str((response.message.content or "") if isinstance(response, ChatResponse) else response.text)


async def _ask(llm: PolarLLM, way: str, **options: Any) -> list[Any]:
    """Call one of the eight and return its responses; the last is the whole answer."""
    prompt: Any = HELLO if way.endswith("chat") else "Hello"
    answer: Any = getattr(llm, way)(prompt, **options)
    if way.startswith("a"):
        answer = await answer
    if way.startswith("stream"):
        return list(answer)
    if way.startswith("astream"):
        return [response async for response in answer]
    return [answer]


@pytest.fixture
def llm(engine: PolarModel) -> PolarLLM:
    return PolarLLM(engine=engine, max_tokens=12)


async def test_all_eight_give_the_same_answer(llm: PolarLLM, sink: ListSink) -> None:
    answers = {way: await _ask(llm, way) for way in WAYS}
    assert len({_text(responses[-1]) for responses in answers.values()}) == 1
    for way, responses in answers.items():
        assert _text(responses[-1]), way
        if "stream" in way:
            assert "".join(response.delta for response in responses) == _text(responses[-1])
    assert len(sink.records) == len(WAYS)


@pytest.mark.parametrize("way", WAYS)
async def test_options_of_a_call_act_and_raw_says_what_it_cost_once(llm: PolarLLM, sink: ListSink, way: str) -> None:
    whose: Any = {"tenant": "acme", "usage_tags": {"a": "b"}, "request_id": "order-7"}
    responses = await _ask(llm, way, compute="economy", max_tokens=10, **whose)
    (raw,) = [response.raw for response in responses if response.raw is not None]
    assert raw is responses[-1].raw
    (record,) = sink.records
    assert (record.tenant, record.tags, record.request_id) == ("acme", {"a": "b"}, "order-7")
    assert raw["usage"] == {
        "prompt_tokens": record.tokens.input,
        "completion_tokens": 10,
        "total_tokens": record.tokens.input + 10,
    }
    assert raw["model"] == record.model
    assert raw["finish_reason"] == "length"
    assert raw["cost"] is None
    assert raw["polar"]["flops"] == record.flops.total
    assert raw["polar"]["tier"] == record.tier == "economy"
    assert raw["polar"]["request_id"] == record.request_id


def test_a_price_of_the_sink_comes_back_exactly(priced: PolarModel) -> None:
    response = PolarLLM(engine=priced, max_tokens=3).complete("Hello")
    assert response.raw is not None
    assert response.raw["cost"] == 0.003
    assert response.raw["cost_details"] == {"amount": "0.003", "currency": "EUR", "price_book": "t1"}


@pytest.mark.parametrize("way", WAYS)
async def test_one_call_is_one_event_with_the_models_own_token_counts(
    engine: PolarModel, sink: ListSink, events: _Events, way: str
) -> None:
    counter = TokenCountingHandler(tokenizer=lambda _: [0] * 999)
    debug = LlamaDebugHandler(print_trace_on_end=False)
    llm = PolarLLM(engine=engine, max_tokens=4, callback_manager=CallbackManager([counter, debug]))
    await _ask(llm, way)
    assert len(debug.get_event_pairs(CBEventType.LLM)) == 1
    assert counter.prompt_llm_token_count == sink.records[0].tokens.input
    assert counter.completion_llm_token_count == 4
    kind = "Chat" if way.endswith("chat") else "Completion"
    assert events.names.count(f"LLM{kind}StartEvent") == events.names.count(f"LLM{kind}EndEvent") == 1
    assert not [name for name in events.names if name.startswith("LLM") and kind not in name]


class _Events(BaseEventHandler):
    _names: list[str] = PrivateAttr(default_factory=list)

    @property
    def names(self) -> list[str]:
        return self._names

    def handle(self, event: BaseEvent, **_: Any) -> None:
        self._names.append(type(event).__name__)


@pytest.fixture
def events() -> Iterator[_Events]:
    handler, dispatcher = _Events(), get_dispatcher()
    dispatcher.add_event_handler(handler)
    yield handler
    dispatcher.event_handlers.remove(handler)


async def test_instrument_tags_reach_the_record(engine: PolarModel, sink: ListSink) -> None:
    llm = PolarLLM(engine=engine, max_tokens=1, tenant="object", usage_tags={"app": "shop"})
    with instrument_tags({"tenant": "acme", "team": "search"}):
        llm.predict(PromptTemplate("Say {x}"), x="Hello")
        await llm.apredict(PromptTemplate("Say {x}"), x="Hello")
    llm.complete("Hello")
    assert [record.tenant for record in sink.records] == ["acme", "acme", "object"]
    assert sink.records[0].tags == sink.records[1].tags == {"app": "shop", "team": "search"}


@pytest.mark.parametrize("way", ["achat", "acomplete", "astream_chat", "astream_complete"])
async def test_the_event_loop_runs_while_the_model_loads(
    engine: PolarModel, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    threads = []

    def load(*_: object, **__: object) -> PolarModel:
        threads.append(threading.current_thread())
        return engine

    monkeypatch.setattr(polar_sdk.PolarModel, "from_pretrained", load)
    await _ask(PolarLLM(max_tokens=1), way)
    assert [thread is threading.current_thread() for thread in threads] == [False]


@pytest.mark.parametrize("way", ["achat", "acomplete", "astream_chat", "astream_complete"])
async def test_the_event_loop_runs_while_the_model_answers(engine: PolarModel, contract: Any, way: str) -> None:
    await contract.check_loop_runs(_ask(PolarLLM(engine=engine), way, max_tokens=60))


@pytest.mark.parametrize("way", WAYS)
async def test_an_error_of_the_engine_surfaces_at_once(llm: PolarLLM, sink: ListSink, way: str) -> None:
    with pytest.raises(polar.UnknownTierError):
        await asyncio.wait_for(_ask(llm, way, compute="luxury"), timeout=20)
    assert sink.records == []


@pytest.mark.parametrize("way", ["stream_chat", "stream_complete"])
def test_a_stream_that_is_left_stops_and_is_recorded(engine: PolarModel, contract: Any, way: str) -> None:
    llm = PolarLLM(engine=engine, max_tokens=200, callback_manager=_keeps_exceptions())
    stream = getattr(llm, way)(HELLO if way.endswith("chat") else "Hello")
    contract.check_left_stream(stream, pieces=1, max_computed=4)


def test_a_stream_collected_in_the_engines_thread_hangs_nobody(engine: PolarModel, contract: Any) -> None:
    contract.check_collected_stream(engine, lambda: PolarLLM(engine=engine, max_tokens=200).stream_complete("Hello"))


@pytest.mark.parametrize("way", ["astream_chat", "astream_complete"])
async def test_an_async_stream_that_is_left_stops_and_is_recorded(engine: PolarModel, contract: Any, way: str) -> None:
    llm = PolarLLM(engine=engine, max_tokens=450, callback_manager=_keeps_exceptions())
    stream = await getattr(llm, way)(HELLO if way.endswith("chat") else "Hello")
    await contract.check_left_async_stream(stream, max_tokens=450)


def _keeps_exceptions() -> CallbackManager:
    """Callbacks that keep an exception, whose traceback keeps the frames of the stream alive."""
    return CallbackManager([LlamaDebugHandler(print_trace_on_end=False)])


@pytest.mark.parametrize("way", ["achat", "acomplete"])
async def test_a_cancelled_task_stops_compute_and_is_recorded(engine: PolarModel, contract: Any, way: str) -> None:
    call = _ask(PolarLLM(engine=engine), way, max_tokens=450)
    await contract.check_cancelled_task(call, max_tokens=450)


@pytest.mark.parametrize("way", WAYS)
async def test_a_timeout_stops_the_request_and_says_so(llm: PolarLLM, sink: ListSink, way: str) -> None:
    with pytest.raises(polar.RequestTimeoutError) as caught:
        await _ask(llm, way, timeout=1e-9)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.usage == sink.records[0]
    assert sink.records[0].outcome is Outcome.CANCELLED


def test_formatted_means_no_template(llm: PolarLLM, sink: ListSink) -> None:
    llm.complete("abc", formatted=True, max_tokens=1)
    llm.complete("abc", max_tokens=1)
    formatted, templated = (record.tokens.input for record in sink.records)
    assert formatted == 3 < templated


def test_a_formatter_of_the_user_replaces_the_template(engine: PolarModel, sink: ListSink) -> None:
    llm = PolarLLM(
        engine=engine,
        max_tokens=1,
        completion_to_prompt=lambda prompt: f"<{prompt}>",
        messages_to_prompt=lambda messages: "".join(message.content or "" for message in messages) + "!!",
    )
    llm.complete("abc")
    llm.chat([ChatMessage("abcd")])
    assert [record.tokens.input for record in sink.records] == [5, 6]


def test_metadata_is_the_models_own(llm: PolarLLM, engine: PolarModel) -> None:
    about = llm.metadata
    assert about.context_window == engine.context_window
    assert about.num_output == 12
    assert about.model_name == engine.name
    assert about.is_chat_model
    assert llm.get_token_ids("héllo") == engine.encode("héllo")
    assert about.is_function_calling_model


def test_what_it_writes_of_itself_makes_it_again() -> None:
    written = PolarLLM(model="some/model", compute="economy", stop="x", timeout=5).to_dict()
    assert PolarLLM(**written).to_dict() == PolarLLM.from_dict(dict(written)).to_dict() == written


def test_a_misspelt_setting_or_option_names_the_nearest(llm: PolarLLM) -> None:
    with pytest.raises(TypeError, match="'temperature'"):
        PolarLLM(temprature=0.5)
    with pytest.raises(TypeError, match="'max_tokens'"):
        llm.complete("Hello", max_token=3)
    with pytest.raises(polar.InvalidRequestError, match="tools="):
        llm.complete("Hello", tools=[{"type": "function", "function": {"name": "f"}}])


def test_messages_become_roles_and_texts() -> None:
    messages = [
        ChatMessage("Be brief.", role=MessageRole.SYSTEM),
        ChatMessage(role=MessageRole.USER, blocks=[TextBlock(text="a"), TextBlock(text="b")]),
        ChatMessage(
            role=MessageRole.ASSISTANT,
            blocks=[ThinkingBlock(content="hm"), ToolCallBlock(tool_name="add", tool_kwargs={"a": 1})],
        ),
        ChatMessage("21", role=MessageRole.TOOL, additional_kwargs={"name": "add"}),
    ]
    assert arranged(to_roles(messages)) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": '{"name": "add", "arguments": {"a": 1}}'},
        {"role": "user", "content": "Result of add: 21"},
    ]


def test_what_is_no_text_is_refused(llm: PolarLLM, sink: ListSink) -> None:
    message = ChatMessage(role=MessageRole.USER, blocks=[TextBlock(text="?"), ImageBlock(url="http://x/y.png")])
    with pytest.raises(polar.InvalidRequestError, match="ImageBlock"):
        llm.chat([message])
    assert sink.records == []
