"""A LangGraph agent with tools, on the default model or on one that you name.

Run it with `python examples/langchain_agent.py [MODEL]`. MODEL is a hub id or a folder; `POLAR_MODEL` may name it, too.

The default model of 135 million parameters can choose among a few clearly different tools and fill in their arguments
from the question. It cannot put a result into words, or plan: given a result, it calls the same tool again. So with
this model the tool's own words are the answer (`return_direct`). A model of a billion parameters or more may take
several steps and answer itself; nothing else changes.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Literal

from langchain.agents import create_agent
from langchain.agents.middleware import ModelCallLimitMiddleware
from langchain_core.tools import tool

from bill import ledger_of_this_run
from langchain_polar import ChatPolar

Day = Literal["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MOST_CALLS = 4
"""Maximum calls of the model per question, which ends an agent that goes round in circles."""
QUESTIONS = (
    ("acme", "When is the library open on Thursday?"),
    ("globex", "What does it cost to print 12 pages?"),
    ("acme", "Where is the book Moby Dick?"),
    ("globex", "What is the capital of France?"),  # no tool is needed
)


def opening_hours(day: Day) -> str:
    """Tell when the library is open on a day of the week."""
    if day in ("Sunday", "Monday"):
        return f"The library is closed on {day}."
    return f"On {day} the library is open from 10:00 to {'21:00' if day == 'Thursday' else '18:00'}."


def find_book(title: str) -> str:
    """Find the shelf of a book by its title."""
    shelves = {"moby dick": 12, "emma": 3}
    shelf = shelves.get(title.lower())
    return f"{title} is not in the library." if shelf is None else f"{title} is on shelf {shelf}."


def price_of_printing(pages: int) -> str:
    """Tell what it costs to print a number of pages."""
    return f"Printing {pages} pages costs {10 * pages} cents."


def build_agent(chat: ChatPolar, *, direct: bool) -> Any:
    """An agent whose tools' results are its answers, if `direct`."""
    functions = (opening_hours, find_book, price_of_printing)
    return create_agent(
        chat,
        [tool(function.__name__, return_direct=direct)(function) for function in functions],
        system_prompt="You help the visitors of a library.",
        middleware=[ModelCallLimitMiddleware(run_limit=MOST_CALLS)],
    )


def main(ledger: str, model: str | None) -> None:
    chat = ChatPolar(model=model, compute="exact", max_tokens=48, ledger=ledger)
    agent = build_agent(chat, direct=model is None)
    for tenant, question in QUESTIONS:
        print(question)
        state = agent.invoke({"messages": [("human", question)]}, config={"metadata": {"tenant": tenant}})
        for message in state["messages"][1:]:
            for call in getattr(message, "tool_calls", []):
                print(f"  calls {call['name']} with {call['args']}")
        print(f"  {state['messages'][-1].text}\n")


if __name__ == "__main__":
    named = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("POLAR_MODEL")
    with ledger_of_this_run() as ledger:
        main(ledger, named)
