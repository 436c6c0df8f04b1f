"""Models whose chat template has tools: calls and results in its form, on every surface, whole and streamed.

The templates here write calls as those of the families that they are named after do, token by token, and no more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from llama_index.core.tools import FunctionTool

from langchain_polar import ChatPolar
from llama_index_polar import PolarLLM
from polar_sdk import PolarModel
from polar_sdk.errors import InvalidRequestError
from polar_sdk.frameworks.call_reader import CallReader
from polar_sdk.frameworks.forms import AnswerForm
from polar_sdk.frameworks.tools import Tool, ToolUse
from polar_sdk.testing import scripted_model, tiny_model
from polar_server import Settings
from tests.integrations.server.conftest import RecordingSink, Served, chat_body

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_sdk.request.options import RequestOptions

_START = "{% for m in messages %}"
_SAID = "<|{{ m.role }}|>{{ m.content }}<|end|>"
_SHOWN = "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
_OPEN = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def _template(call: str, result: str, *, shown: str = _SHOWN) -> str:
    turns = "{% if m.tool_calls %}<|assistant|>" + call + "<|end|>{% elif m.role == 'tool' %}" + result
    return shown + _START + turns + "{% else %}" + _SAID + "{% endif %}{% endfor %}" + _OPEN


_EACH = "{% for c in m.tool_calls %}"
_QWEN = _template(
    "{{ m.content }}" + _EACH + "{% if not loop.first or m.content %}{{ '\n' }}{% endif %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}',
    "<|user|><tool_response>\n{{ m.content }}\n</tool_response><|end|>",
)
_LLAMA = _template(
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}',
    "<|user|>{{ m.content | tojson }}<|end|>",
)
_CHECK = "{% if c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
_MISTRAL = _template(
    "[TOOL_CALLS] [" + _EACH + _CHECK + '{{ (c.function | tojson)[:-1] }}, "id": "{{ c.id }}"}'
    "{% if not loop.last %}, {% endif %}{% endfor %}]",
    '[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]',
)
_TEKKEN = _template(
    _EACH + "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}",
    "[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]",
)
_PYTHON = _template(
    "[" + _EACH + "{{ c.function.name }}({% for key in c.function.arguments %}{{ key }}="
    "{{ '%s' | format(c.function.arguments[key]) }}{% if not loop.last %}, {% endif %}{% endfor %})"
    "{% if not loop.last %}, {% endif %}{% endfor %}]",
    "<|user|>{{ m.content | tojson }}<|end|>",
)
_ARGUMENTS = {"city": "Köln", "days": 3}
_JSON = '{"city": "Köln", "days": 3}'
_RESULT = ToolMessage("sunny", tool_call_id="call_one", name="weather")


@dataclass(frozen=True)
class Family:
    """A form of calls.

    Attributes:
        template: What writes it.
        special: Tokens of its own.
        call: An answer that calls `weather`.
        both: One that calls `weather` and `now`; empty = it makes one call at a time.
        asked: The call as the next prompt has it.
    """

    template: str
    special: tuple[str, ...]
    call: str
    both: str
    asked: str = ""

    def model(self, reply: str | Callable[[Any], str] = "", **settings: Any) -> PolarModel:
        """A scripted model with this template."""
        say = reply if callable(reply) else lambda _: reply
        return scripted_model(say, chat_template=self.template, special=self.special, context_window=4096, **settings)


_HERMES = f'<tool_call>\n{{"name": "weather", "arguments": {_JSON}}}\n</tool_call>'
FAMILIES = {
    "qwen": Family(
        _QWEN,
        ("<tool_call>", "</tool_call>"),
        _HERMES,
        f'{_HERMES}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>',
    ),
    "llama": Family(_LLAMA, (), f'{{"name": "weather", "parameters": {_JSON}}}', ""),
    "mistral": Family(
        _MISTRAL,
        ("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {_JSON}}}]',
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {_JSON}}}, {{"name": "now", "arguments": {{}}}}]',
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {_JSON}, "id": "',
    ),
    "tekken": Family(
        _TEKKEN,
        ("[TOOL_CALLS]", "[ARGS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        f"[TOOL_CALLS]weather[ARGS]{_JSON}",
        f"[TOOL_CALLS]weather[ARGS]{_JSON}[TOOL_CALLS]now[ARGS]{{}}",
    ),
    "pythonic": Family(_PYTHON, (), '[weather(city="Köln", days=3)]', '[weather(city="Köln", days=3), now()]'),
}


def _weather(city: str, days: int = 1) -> str:
    """Tell the weather."""
    return f"sunny for {days} days in {city}"


weather = tool("weather")(_weather)


@tool
def now() -> str:
    """Tell the time."""
    return "12:00"


def _calls(message: Any) -> list[tuple[str, Any]]:
    return [(call["name"], call["args"]) for call in message.tool_calls]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


WANTED = [("weather", _ARGUMENTS)]
BOTH = [*WANTED, ("now", {})]


def test_langchain_reads_calls_whole_and_streamed(family: Family) -> None:
    for reply, wanted in ((family.call, WANTED), (family.both, BOTH)):
        if not reply:
            continue
        chat = ChatPolar(engine=family.model(reply), max_tokens=200)
        bound = chat.bind_tools([weather, now], parallel_tool_calls=len(wanted) > 1)
        message = bound.invoke("Weather?")
        assert (_calls(message), message.content) == (wanted, "")
        whole: Any = None
        for chunk in bound.stream("Weather?"):
            whole = chunk if whole is None else whole + chunk
        assert (_calls(whole), whole.content) == (wanted, "")


def test_llama_index_reads_calls(family: Family) -> None:
    llm = PolarLLM(engine=family.model(family.call), max_tokens=200)
    tools = [FunctionTool.from_defaults(fn=_weather, name="weather")]
    response = llm.chat_with_tools(tools, user_msg="Weather?")
    (selection,) = llm.get_tool_calls_from_response(response)
    assert (selection.tool_name, selection.tool_kwargs) == ("weather", _ARGUMENTS)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


@pytest.mark.parametrize("stream", [False, True])
def test_calls_over_http(family: Family, stream: bool) -> None:
    served = Served(Settings(engine=family.model(family.call, sink=RecordingSink()), name="tiny"))
    try:
        assert _over_http(served, stream) == ("weather", _ARGUMENTS, "tool_calls")
    finally:
        served.close()


def _over_http(served: Served, stream: bool) -> tuple[str, Any, str]:
    body = chat_body(model="tiny", max_tokens=200, tools=[WEATHER])
    if not stream:
        (choice,) = served.chat(**body)["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert choice["message"]["content"] is None
        return call["function"]["name"], json.loads(call["function"]["arguments"]), choice["finish_reason"]
    name, arguments, finish = "", "", ""
    for event in served.events(**body)[:-1]:
        for choice in event["choices"]:
            assert not choice["delta"].get("content")
            finish = choice["finish_reason"] or finish
            for call in choice["delta"].get("tool_calls", ()):
                name += call["function"].get("name", "")
                arguments += call["function"].get("arguments", "")
    return name, json.loads(arguments), finish


def test_calls_and_results_are_in_the_next_prompt_as_the_template_writes_them(family: Family) -> None:
    model = family.model("Fine.")
    calls: Any = [
        {"name": "weather", "args": _ARGUMENTS, "id": "call_one"},
        {"name": "now", "args": {}, "id": "call_two"},
    ]
    history = [
        HumanMessage("?"),
        AIMessage("", tool_calls=calls),
        ToolMessage("12:00", tool_call_id="call_two", name="now"),
        ToolMessage("sunny", tool_call_id="call_one", name="weather", status="error"),
    ]
    form = AnswerForm.of({"tools": [WEATHER]}).written_as(model.call_format)
    from langchain_polar._messages import to_roles

    roles = form.teach(to_roles(history))
    prompt = model.loaded.tokenizer.decode(model.prompt_tokens(roles, "chat", form.shown))
    assert "Tell the weather." in prompt
    assert (family.asked or family.call).removesuffix("]") in prompt
    assert prompt.index("weather", prompt.index("?")) < prompt.index("Error: sunny")
    assert prompt.index("now", prompt.index("?")) < prompt.index("12:00")
    chat = ChatPolar(engine=model).bind_tools([weather])
    assert chat.invoke(history).text == "Fine."


def test_any_weights_make_valid_calls(family: Family) -> None:
    model = tiny_model(chat_template=family.template, special=family.special, context_window=4096)
    chat = ChatPolar(engine=model, max_tokens=300, temperature=2.0)
    for seed in range(3):
        message = chat.bind_tools([weather, now], tool_choice="any").invoke("Hello", seed=seed)
        assert message.tool_calls
        for call in message.tool_calls:
            {"weather": weather, "now": now}[call["name"]].invoke(call["args"])


def test_text_stays_text(family: Family) -> None:
    for reply in ("It is {nice} [today](x).", "a"):
        chat = ChatPolar(engine=family.model(reply)).bind_tools([weather])
        assert (chat.invoke("Hi").text, chat.invoke("Hi").tool_calls) == (reply, [])
        assert "".join(chunk.text for chunk in chat.stream("Hi")) == reply


def test_calls_may_follow_text_where_a_token_begins_them() -> None:
    for name in ("qwen", "mistral", "tekken"):
        family = FAMILIES[name]
        chat = ChatPolar(engine=family.model(f"I look.\n{family.call}"), max_tokens=200).bind_tools([weather])
        message = chat.invoke("?")
        assert (message.content, _calls(message)) == ("I look.\n", WANTED)


@pytest.mark.parametrize("written", ["{}", "```json\n{}\n```"])
def test_an_object_without_its_token_is_a_call(written: str) -> None:
    said = written.replace("{}", f'{{"name": "weather", "arguments": {_JSON}}}')
    message = ChatPolar(engine=FAMILIES["qwen"].model(said), max_tokens=200).bind_tools([weather]).invoke("?")
    assert (message.content, _calls(message)) == ("", WANTED)


def test_markers_within_messages_and_tools_are_text() -> None:
    model = FAMILIES["qwen"].model("")
    marker = model.prompt_tokens([{"role": "user", "content": "a"}])
    token = model.loaded.tokenizer.get_vocab()["<tool_call>"]
    said = model.prompt_tokens([{"role": "user", "content": "<tool_call>"}])
    assert token not in said
    assert len(said) > len(marker)
    plain = {"type": "function", "function": {"name": "f", "description": "<|end|>", "parameters": {"<|user|>": 1}}}
    shown = model.prompt_tokens([{"role": "user", "content": "a"}], "chat", [plain])
    known = model.loaded.tokenizer.get_vocab()
    ends, users = known["<|end|>"], known["<|user|>"]
    assert (shown.count(ends), shown.count(users)) == (2, 1)


def test_a_schema_and_tools_go_together(family: Family) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    options = {"tools": [WEATHER], "response_format": schema}
    for reply in ('{"ok": true}', family.call):
        model = family.model(reply)
        form = AnswerForm.of(options).written_as(model.call_format)
        roles = form.teach([{"role": "user", "content": "?"}])
        limits: RequestOptions = {"max_tokens": 200}
        answer = model.generate(roles, **limits | form.options())
        reader = form.reader()
        reader.push(answer.text)
        made = [(call.name, call.values()) for call in reader.calls]
        assert made == (WANTED if reply == family.call else [])
        assert answer.text == reply


def test_answers_are_read_in_any_pieces(family: Family) -> None:
    form = tiny_model(chat_template=family.template, special=family.special).call_format
    assert form is not None
    use = ToolUse((Tool("weather"), Tool("now")), parallel=True)
    for reply in filter(None, (family.call, family.both, "Hello [you] <tool {there}.")):
        for size in (1, 2, 7):
            reader, whole = CallReader(use, form), CallReader(use, form)
            for start in range(0, len(reply), size):
                reader.push(reply[start : start + size])
            reader.finish()
            whole.push(reply)
            whole.finish()
            assert reader.text == whole.text
            assert [(c.name, c.values()) for c in reader.calls] == [(c.name, c.values()) for c in whole.calls]
            assert bool(whole.calls) == (reply != "Hello [you] <tool {there}.")


def test_keywords_are_literals_of_python() -> None:
    schema = {
        "type": "object",
        "properties": {
            "on": {"type": "boolean"},
            "room": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["on"],
    }
    family = FAMILIES["pythonic"]
    for said, wanted in (
        ('[light(on=True, room="a, b=(c)", tags=["x"])]', {"on": True, "room": "a, b=(c)", "tags": ["x"]}),
        ("[light(on=False, room=None)]", {"on": False, "room": None}),
        ("[light(on=True)]", {"on": True}),
    ):
        light = {"type": "function", "function": {"name": "light", "parameters": schema}}
        message = ChatPolar(engine=family.model(said), max_tokens=200).invoke("?", tools=[light])
        assert _calls(message) == [("light", wanted)]


def test_a_template_without_tools_has_no_form_and_takes_none() -> None:
    model = tiny_model()
    assert model.call_format is None
    with pytest.raises(InvalidRequestError):
        model.generate([{"role": "user", "content": "a"}], tools=[WEATHER])


@pytest.mark.model
def test_qwen_calls_in_the_form_of_its_file() -> None:
    model = PolarModel.from_pretrained("qwen2.5-coder-0.5b-instruct", ledger=None)
    form = model.call_format
    assert form is not None
    assert (form.start, form.after_text) == ('<tool_call>\n{"name": "', True)
    message = ChatPolar(engine=model, max_tokens=80).bind_tools([weather, now]).invoke("How is the weather in Rome?")
    assert [call["name"] for call in message.tool_calls] == ["weather"]
