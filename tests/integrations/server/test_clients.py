"""Real clients, unmodified, over a real socket."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integrations.server.conftest import RecordingSink, Served

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.client() as client:
        yield client


def test_openai_python_chats(client: openai.OpenAI, sink: RecordingSink) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=6, extra_body={"compute": "economy"}
    )
    (record,) = sink.records
    assert answer._request_id == record.request_id
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer.model_extra is not None
    assert answer.model_extra["polar"]["tier"] == record.tier == "economy"
    assert [model.id for model in client.models.list()][:2] == ["tiny", "tiny:economy"]
    assert client.models.retrieve("tiny:exact").id == "tiny:exact"


def test_openai_python_streams(client: openai.OpenAI) -> None:
    at_once = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=6)
    text, usage = "", None
    chunks = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=6, stream=True, stream_options={"include_usage": True}
    )
    for chunk in chunks:
        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
        usage = chunk.usage or usage
    assert text == at_once.choices[0].message.content
    assert usage is not None
    assert usage.total_tokens == at_once.usage.total_tokens if at_once.usage else None


def test_openai_python_completes(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="abc", max_tokens=4, logprobs=1)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    assert (
        "".join(
            chunk.choices[0].text
            for chunk in client.completions.create(model="tiny", prompt="abc", max_tokens=4, stream=True)
        )
        == answer.choices[0].text
    )


def test_openai_python_knows_our_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="none", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=3)
    assert bad.value.param == "temperature"


async def test_openai_python_leaves_a_stream(served: Served, sink: RecordingSink) -> None:
    async with openai.AsyncOpenAI(base_url=served.base_url, api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=2_000, stream=True, logit_bias={"33": 100}
        )
        async with stream:
            async for _ in stream:
                break
    assert sink.wait_for(1)[0].outcome == "cancelled"


def test_langchain_adds_up_usage(served: Served) -> None:
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model="tiny", base_url=served.base_url, api_key="none", max_tokens=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # sums of usage that LangChain cannot add up are a warning
        batch = chat.generate([[HumanMessage("hi")], [HumanMessage("ho")]])
    assert batch.llm_output is not None
    assert batch.llm_output["token_usage"]["completion_tokens"] == 12


def test_llama_index_chats_and_completes(served: Served) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike
    from openai import DefaultHttpxClient

    def model(is_chat_model: bool) -> Any:
        return OpenAILike(
            model="tiny",
            api_base=served.base_url,
            api_key="none",
            is_chat_model=is_chat_model,
            temperature=0,
            context_window=4096,
            max_tokens=6,
            max_retries=0,
            http_client=client,
        )

    with DefaultHttpxClient() as client:
        answer = model(True).chat([ChatMessage(role="user", content="hi")])
        assert answer.raw.usage.completion_tokens == 6
        *_, last = model(True).stream_chat([ChatMessage(role="user", content="hi")])
        assert last.message.content == answer.message.content
        text = model(False).complete("abc").text
        *_, last_text = model(False).stream_complete("abc")
        assert last_text.text == text


def test_the_command_llm_asks(served: Served, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: polar\n  model_name: tiny\n  api_base: {served.base_url}\n  api_key_name: polar\n"
    )
    command = [sys.executable, "-m", "llm", "-m", "polar", "hi", "-o", "max_tokens", "6", "--key", "none", "--usage"]
    done = subprocess.run(
        command,
        env={"LLM_USER_PATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONUTF8": "1"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert b"4 input, 6 output" in done.stderr


def test_the_calls_of_open_webui(served: Served, sink: RecordingSink) -> None:
    """As its backend makes them: the list of models, a streamed chat with its usage, and a title in the background."""
    headers = {
        "authorization": "Bearer none",
        "x-openwebui-user-name": "Ann",
        "x-openwebui-user-id": "1",
        "x-openwebui-user-email": "ann@example.com",
        "x-openwebui-user-role": "user",
        "x-openwebui-chat-id": "c1",
    }
    status, _, listed = served.call("GET", "/v1/models", headers=headers)
    assert (status, listed["data"][0]["id"]) == (200, "tiny")
    told = [{"role": "system", "content": "Help."}, *MESSAGES]
    chat = {"model": "tiny", "messages": told, "stream": True, "stream_options": {"include_usage": True}}
    settings = {
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.0,
        "seed": 1,
        "max_tokens": 6,
        "stop": ["END"],
    }
    status, _, text = served.call("POST", "/v1/chat/completions", {**chat, **settings}, headers)
    *pieces, last, done = text.strip().split("\n\n")
    assert (status, done) == (200, "data: [DONE]")
    assert len(pieces) > 2
    assert '"completion_tokens":6' in last
    title = {"model": "tiny", "messages": MESSAGES, "stream": False, "max_completion_tokens": 10}
    status, _, answer = served.call("POST", "/v1/chat/completions", title, headers)
    assert (status, answer["usage"]["completion_tokens"], len(sink.records)) == (200, 10, 2)
