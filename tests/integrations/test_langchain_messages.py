"""Messages in all their kinds, as the roles and text of a chat template."""

from __future__ import annotations

from typing import Any

import pytest
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
)

from langchain_polar import ChatPolar
from langchain_polar._messages import to_roles
from polar_sdk.errors import InvalidRequestError
from polar_sdk.testing import tiny_model


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
    assert to_roles([message]) == [{"role": role, "content": content}]


def test_tool_calls_of_an_earlier_answer_are_told() -> None:
    call: Any = {"name": "add", "args": {"a": 1}, "id": "1"}
    assert to_roles([AIMessage("", tool_calls=[call])])[0]["content"] == '{"name": "add", "arguments": {"a": 1}}'
    assert to_roles([AIMessage("Wait.", tool_calls=[call])])[0]["content"].startswith("Wait.\n{")


@pytest.mark.parametrize("kind", ["image", "image_url", "audio", "file"])
def test_what_is_no_text_is_refused_before_compute(kind: str) -> None:
    chat = ChatPolar(engine=tiny_model())
    message = HumanMessage([{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "x"}}])
    with pytest.raises(langchain.ModelInvalidRequestError, match=r"message 1 \(human\) cannot be read.*text only"):
        chat.invoke([message])


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="role 'critic'"):
        to_roles([ChatMessage(content="Hi", role="critic")])
