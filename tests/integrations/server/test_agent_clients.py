"""litellm, instructor, pydantic-ai and openai-agents, unmodified, over a real socket.

They want versions of their own of what we use, so that they have an environment, which `make test-long` makes.
Other clients are in `test_clients` and `test_langchain_over_http`.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from polar_sdk.frameworks.tools import call_text
from polar_sdk.testing import scripted_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integrations.server.conftest import RecordingSink, Served

PYTHON = Path(__file__).parents[3] / ".clients" / "bin" / "python"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not PYTHON.exists(), reason="`make .clients/.installed` makes their environment"),
]

LITELLM = """
import json, litellm

asked = {"model": "openai/tiny", "api_base": URL, "api_key": "none", "messages": [{"role": "user", "content": "hi"}]}
whole = litellm.completion(**asked, max_tokens=6)
stream = litellm.completion(**asked, max_tokens=6, stream=True, stream_options={"include_usage": True})
pieces = list(stream)
text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
called = litellm.completion(**asked, max_tokens=60, tools=[tool], tool_choice="required")
print(json.dumps({
    "whole": whole.choices[0].message.content,
    "streamed": text,
    "tokens": [whole.usage.completion_tokens, pieces[-1].usage.completion_tokens],
    "called": [call.function.name for call in called.choices[0].message.tool_calls],
}))
"""
INSTRUCTOR = """
import json, instructor, openai
from pydantic import BaseModel, Field

class Person(BaseModel):
    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=120)

found = {}
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai.OpenAI(base_url=URL, api_key="none"), mode=mode)
    person = client.create(
        model="tiny", response_model=Person, max_retries=0, max_tokens=200,
        messages=[{"role": "user", "content": "Ann, 9"}],
    )
    found[mode.name] = person.model_dump()
print(json.dumps(found))
"""
PYDANTIC_AI = """
import json
from pydantic import BaseModel, Field
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

class Person(BaseModel):
    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=120)

model = OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=URL, api_key="none"))
typed = Agent(model, output_type=Person, model_settings={"max_tokens": 200}).run_sync("Ann, 9")
agent = Agent(model, model_settings={"max_tokens": 80})

@agent.tool_plain
def weather(city: str) -> str:
    return f"sunny in {city}"

told = agent.run_sync("What is the weather?")
print(json.dumps({"typed": typed.output.model_dump(), "told": told.output, "tokens": told.usage.output_tokens}))
"""
AGENTS = """
import asyncio, json, openai
from agents import (
    Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled,
)

set_tracing_disabled(True)

@function_tool
def weather(city: str) -> str:
    "Tell the weather."
    return f"sunny in {city}"

async def main():
    found = {}
    client = openai.AsyncOpenAI(base_url=URL, api_key="none")
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        model = kind(model="tiny", openai_client=client)
        settings = ModelSettings(max_tokens=80)
        agent = Agent(name="A", instructions="Help.", model=model, tools=[weather], model_settings=settings)
        whole = await Runner.run(agent, "What is the weather?")
        streamed = Runner.run_streamed(agent, "What is the weather?")
        events = [event.type async for event in streamed.stream_events()]
        found[kind.__name__] = [whole.final_output, streamed.final_output, len(events) > 3]
    print(json.dumps(found))

asyncio.run(main())
"""


def run(script: str, served: Served, folder: Path) -> Any:
    """What a script prints that asks a server."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "OPENAI_API_KEY": "none", "PYTHONUTF8": "1"}
    done = subprocess.run(
        [PYTHON, "-c", f"URL = {served.base_url!r}\n{script}"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**environment, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def weather_of(prompt: Any) -> str:
    """A call at first, and an answer once its result is there."""
    asked = any("sunny" in str(message.get("content")) for message in prompt)
    return "It is sunny." if asked else call_text("weather", {"city": "Paris"})


@pytest.fixture
def told(serve: Callable[..., Served], sink: RecordingSink) -> Served:
    return serve(engine=scripted_model(weather_of, context_window=4096, sink=sink))


def is_person(found: Any) -> bool:
    return set(found) == {"name", "age"} and 0 <= found["age"] <= 120


def test_litellm(served: Served, sink: RecordingSink, tmp_path: Path) -> None:
    found = run(LITELLM, served, tmp_path)
    assert found["whole"] == found["streamed"]
    assert (found["tokens"], found["called"]) == ([6, 6], ["now"])
    assert len(sink.records) == 3


def test_instructor(served: Served, tmp_path: Path) -> None:
    found = run(INSTRUCTOR, served, tmp_path)
    assert len(found) == 2
    assert all(map(is_person, found.values()))


def test_pydantic_ai(told: Served, tmp_path: Path) -> None:
    found = run(PYDANTIC_AI, told, tmp_path)
    assert is_person(found["typed"])
    assert (found["told"], found["tokens"] > 0) == ("It is sunny.", True)


def test_openai_agents(told: Served, tmp_path: Path) -> None:
    found = run(AGENTS, told, tmp_path)
    assert len(found) == 2
    assert all(answers == ["It is sunny.", "It is sunny.", True] for answers in found.values())
