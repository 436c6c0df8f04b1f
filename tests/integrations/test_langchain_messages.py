"""Messages of LangChain as roles and texts, and `trim_messages` with the model as its counter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core import exceptions as langchain
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    HumanMessageChunk,
    SystemMessage,
    ToolMessage,
    trim_messages,
)
from langchain_core.runnables import RunnableLambda

from langchain_polar import ChatPolar
from langchain_polar._messages import to_roles
from polar_sdk import ListSink
from polar_sdk.errors import InvalidRequestError
from polar_sdk.frameworks.tools import arranged
from polar_sdk.testing import tiny_model

if TYPE_CHECKING:
    from polar_sdk import PolarModel


@pytest.mark.parametrize(
    ("message", "role", "content"),
    [
        (SystemMessage("Be brief."), "system", "Be brief."),
        (HumanMessage("Hi"), "user", "Hi"),
        (HumanMessageChunk(content="Hi"), "user", "Hi"),
        (AIMessage("Hello"), "assistant", "Hello"),
        (AIMessageChunk(content="Hello"), "assistant", "Hello"),
        (ChatMessage(content="Hi", role="user"), "user", "Hi"),
        (ChatMessage(content="Hi", role="assistant"), "assistant", "Hi"),
        (ChatMessage(content="Hi", role="developer"), "system", "Hi"),
        (ToolMessage("21", tool_call_id="1", name="add"), "user", "Result of add: 21"),
        (ToolMessage("21", tool_call_id="1"), "user", "Result of the tool: 21"),
        (FunctionMessage(content="21", name="add"), "user", "Result of add: 21"),
        (HumanMessage([{"type": "text", "text": "a"}, "b"]), "user", "ab"),
        (
            AIMessage([{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "a"}]),
            "assistant",
            "a",
        ),
    ],
)
def test_a_message_becomes_a_role_and_a_text(message: BaseMessage, role: str, content: str) -> None:
    assert arranged(to_roles([message])) == [{"role": role, "content": content}]


def test_tool_calls_of_an_earlier_answer_are_told() -> None:
    call: Any = {"name": "add", "args": {"a": 1}, "id": "1"}
    silent, said = arranged(to_roles([AIMessage("", tool_calls=[call]), AIMessage("Wait.", tool_calls=[call])]))
    assert silent["content"] == '{"name": "add", "arguments": {"a": 1}}'
    assert said["content"].startswith("Wait.\n{")


@pytest.mark.parametrize("kind", ["image", "image_url", "audio", "file"])
def test_what_is_no_text_is_refused_before_compute(kind: str) -> None:
    chat = ChatPolar(engine=tiny_model())
    message = HumanMessage([{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "x"}}])
    with pytest.raises(langchain.ModelInvalidRequestError, match="message 1"):
        chat.invoke([message])


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="critic"):
        to_roles([ChatMessage(content="Hi", role="critic")])


TALK: list[BaseMessage] = [
    SystemMessage("Be brief."),
    HumanMessage("Who is Ada?"),
    AIMessage("A mathematician."),
    HumanMessage("And Grace?"),
    AIMessage("An admiral, who wrote a compiler."),
    HumanMessage("And Radia?"),
]


@pytest.fixture
def chat(engine: PolarModel) -> ChatPolar:
    return ChatPolar(engine=engine, max_tokens=1)


def test_the_last_messages_that_fit_are_kept(chat: ChatPolar, sink: ListSink) -> None:
    count = chat.get_num_tokens_from_messages
    limit = count(TALK[:1]) + count(TALK[3:])  # it counts the system's message apart
    trimmed = trim_messages(
        TALK, max_tokens=limit, token_counter=chat, strategy="last", include_system=True, start_on="human"
    )
    assert trimmed == [TALK[0], *TALK[3:]]
    tighter = trim_messages(
        TALK, max_tokens=limit - 1, token_counter=chat, strategy="last", include_system=True, start_on="human"
    )
    assert tighter == [TALK[0], TALK[5]]
    chat.invoke(trimmed)
    assert sink.records[0].tokens.input == count(trimmed) <= limit


def test_trimming_is_a_step_of_a_chain(chat: ChatPolar, sink: ListSink) -> None:
    trim: Any = trim_messages(max_tokens=100, token_counter=chat, strategy="last", include_system=True)
    (trim | chat).invoke(TALK)
    (RunnableLambda(lambda question: [*TALK, HumanMessage(str(question))]) | trim | chat).invoke("?")
    assert [record.tokens.input <= 100 for record in sink.records] == [True, True]


def test_no_messages_are_no_tokens(chat: ChatPolar) -> None:
    assert chat.get_num_tokens_from_messages([]) == 0
    assert trim_messages([], max_tokens=5, token_counter=chat) == []
    assert trim_messages(TALK, max_tokens=0, token_counter=chat) == []


def test_a_strict_template_does_not_keep_anybody_from_trimming(
    chat: ChatPolar, engine: PolarModel, sink: ListSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer: Any = engine.loaded.tokenizer
    refusal = "{% if messages[-1].role != 'user' %}{{ raise_exception('the last one is not a user') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", refusal + tokenizer.chat_template)
    with pytest.raises(InvalidRequestError, match="not a user"):
        chat.invoke(TALK[:3])
    trimmed = trim_messages(TALK, max_tokens=110, token_counter=chat, strategy="last", include_system=True)
    chat.invoke(trimmed)
    assert len(trimmed) > 1
    assert sink.records[0].tokens.input == chat.get_num_tokens_from_messages(trimmed) <= 110


_CHAT = ChatPolar(engine=tiny_model(sink=ListSink()), max_tokens=1)


@settings(max_examples=30)
@given(
    texts=st.lists(st.text(max_size=30), max_size=7),
    limit=st.integers(0, 150),
    strategy=st.sampled_from(["first", "last"]),
    partial=st.booleans(),
)
def test_whatever_is_left_fits(texts: list[str], limit: int, strategy: Any, partial: bool) -> None:
    talk = [HumanMessage(text) if index % 2 else AIMessage(text) for index, text in enumerate(texts)]
    trimmed = trim_messages(talk, max_tokens=limit, token_counter=_CHAT, strategy=strategy, allow_partial=partial)
    assert _CHAT.get_num_tokens_from_messages(trimmed) <= limit
