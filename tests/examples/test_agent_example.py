"""The agent of the example on a model that, unlike the default one, can put a tool's result into words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from langchain_polar import ChatPolar
from polar_sdk import ListSink
from polar_sdk.frameworks.tools import call_text
from polar_sdk.testing import scripted_model

if TYPE_CHECKING:
    from collections.abc import Callable

QUESTION = "What do 3 pages cost?"
CALL = call_text("price_of_printing", {"pages": 3})


def _ask(module: Any, reply: Callable[[Any], str], *, direct: bool) -> tuple[list[str], ListSink]:
    """Kinds and texts of what was said after the question, and what was recorded."""
    sink = ListSink()
    chat = ChatPolar(engine=scripted_model(reply, context_window=4096, sink=sink), max_tokens=120)
    state = module.build_agent(chat, direct=direct).invoke(
        {"messages": [("human", QUESTION)]}, config={"metadata": {"tenant": "acme"}}
    )
    return [f"{message.type}: {message.text}" for message in state["messages"][1:]], sink


def _capable(prompt: Any) -> str:
    return CALL if prompt[-1]["content"] == QUESTION else "They cost 30 cents."


@pytest.mark.parametrize("direct", [True, False])
def test_a_result_is_the_answer_or_goes_back_to_the_model(example: Callable[[str], Any], direct: bool) -> None:
    said, sink = _ask(example("langchain_agent"), _capable, direct=direct)
    assert said[:2] == ["ai: ", "tool: Printing 3 pages costs 30 cents."]
    assert said[2:] == ([] if direct else ["ai: They cost 30 cents."])
    assert [record.tenant for record in sink.records] == ["acme"] * (1 if direct else 2)


def test_an_agent_that_goes_round_in_circles_ends(example: Callable[[str], Any]) -> None:
    module = example("langchain_agent")
    said, sink = _ask(module, lambda _: CALL, direct=False)
    assert len(sink.records) == module.MOST_CALLS
    assert "limit" in said[-1]
