"""Forty prompts with tools: how many calls are right in the form of a model's own template, and how many in ours.

    python -m benchmarks.tool_calls qwen2.5-coder-0.5b-instruct

Of the prompts 32 want one call, of which name and every argument must be right (texts without regard to case), and 8
want none. The model may choose in all of them; the last column forces a call where one is wanted. Greedy, full depth.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any, Final

from polar_sdk import PolarModel
from polar_sdk.frameworks.forms import AnswerForm
from polar_sdk.frameworks.tools import OURS

if TYPE_CHECKING:
    from polar_sdk.request.options import RequestOptions


def _tool(name: str, about: str, fields: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    parameters = {"type": "object", "properties": fields, "required": list(fields) if required is None else required}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


_TEXT: Final = {"type": "string"}
_WHOLE: Final = {"type": "integer"}
TOOLS: Final = [
    _tool("get_weather", "Tell the weather of a city.", {"city": _TEXT}),
    _tool("convert_currency", "Convert an amount of money.", {"amount": _WHOLE, "source": _TEXT, "target": _TEXT}),
    _tool("send_email", "Send an email.", {"to": _TEXT, "subject": _TEXT}),
    _tool("set_timer", "Set a timer.", {"minutes": _WHOLE}),
    _tool("play_music", "Play music of an artist.", {"artist": _TEXT}),
    _tool("add_numbers", "Add two numbers.", {"a": _WHOLE, "b": _WHOLE}),
    _tool("turn_light", "Turn the light of a room on or off.", {"room": _TEXT, "on": {"type": "boolean"}}),
    _tool("translate", "Translate a text.", {"text": _TEXT, "language": _TEXT}),
]
PROMPTS: Final[list[tuple[str, str, dict[str, Any]]]] = [
    ("What is the weather in Paris?", "get_weather", {"city": "Paris"}),
    ("Is it raining in Oslo right now?", "get_weather", {"city": "Oslo"}),
    ("Tell me the weather of Lima.", "get_weather", {"city": "Lima"}),
    ("Do I need an umbrella in Dublin today?", "get_weather", {"city": "Dublin"}),
    (
        "Convert 50 USD to EUR.",
        "convert_currency",
        {"amount": 50, "source": "USD", "target": "EUR"},
    ),
    (
        "How much is 200 GBP in JPY?",
        "convert_currency",
        {"amount": 200, "source": "GBP", "target": "JPY"},
    ),
    (
        "Change 15 CHF into USD, please.",
        "convert_currency",
        {"amount": 15, "source": "CHF", "target": "USD"},
    ),
    (
        "I have 1000 SEK. What is that in NOK?",
        "convert_currency",
        {"amount": 1000, "source": "SEK", "target": "NOK"},
    ),
    (
        "Send an email to anna@example.com with the subject Lunch.",
        "send_email",
        {"to": "anna@example.com", "subject": "Lunch"},
    ),
    (
        "Email bob@example.org; the subject is Invoice.",
        "send_email",
        {"to": "bob@example.org", "subject": "Invoice"},
    ),
    (
        "Write to team@example.com, subject: Meeting.",
        "send_email",
        {"to": "team@example.com", "subject": "Meeting"},
    ),
    (
        "Please mail carl@example.net under the subject Thanks.",
        "send_email",
        {"to": "carl@example.net", "subject": "Thanks"},
    ),
    ("Set a timer for 10 minutes.", "set_timer", {"minutes": 10}),
    ("Remind me in 25 minutes.", "set_timer", {"minutes": 25}),
    ("Timer, 3 minutes.", "set_timer", {"minutes": 3}),
    ("Start a timer of one hour.", "set_timer", {"minutes": 60}),
    ("Play some music by Miles Davis.", "play_music", {"artist": "Miles Davis"}),
    ("I want to hear Björk.", "play_music", {"artist": "Björk"}),
    ("Put on songs of Nina Simone.", "play_music", {"artist": "Nina Simone"}),
    ("Play ABBA.", "play_music", {"artist": "ABBA"}),
    ("What is 17 plus 25?", "add_numbers", {"a": 17, "b": 25}),
    ("Add 3 and 4.", "add_numbers", {"a": 3, "b": 4}),
    ("Compute the sum of 120 and 7.", "add_numbers", {"a": 120, "b": 7}),
    ("How much is 1 + 999?", "add_numbers", {"a": 1, "b": 999}),
    ("Turn on the light in the kitchen.", "turn_light", {"room": "kitchen", "on": True}),
    ("Switch the bedroom light off.", "turn_light", {"room": "bedroom", "on": False}),
    ("Lights out in the garage, please.", "turn_light", {"room": "garage", "on": False}),
    ("Make it bright in the office.", "turn_light", {"room": "office", "on": True}),
    ("Translate 'good morning' into French.", "translate", {"text": "good morning", "language": "French"}),
    ("How do you say 'thank you' in Japanese?", "translate", {"text": "thank you", "language": "Japanese"}),
    ("Put 'see you soon' into Spanish.", "translate", {"text": "see you soon", "language": "Spanish"}),
    ("What is 'bread' in Italian?", "translate", {"text": "bread", "language": "Italian"}),
    ("Hello!", "", {}),
    ("Thank you, that was all.", "", {}),
    ("Who are you?", "", {}),
    ("Tell me a joke.", "", {}),
    ("What can you do for me?", "", {}),
    ("Good night.", "", {}),
    ("I am a bit sad today.", "", {}),
    ("Explain in one sentence what a poem is.", "", {}),
]


def main() -> None:
    """Ask every prompt in both forms and print what was right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--show", action="store_true", help="print each wrong answer")
    options = parser.parse_args()
    model = PolarModel.from_pretrained(options.model, ledger=None)
    own = model.call_format
    print("| form | calls right, of 32 | no call, of 8 | of 40 | forced calls right, of 32 |\n|---|---|---|---|---|")
    for name, form in (("the model's own", own), ("ours", OURS)):
        if form is None:
            print(f"| {name} | none: the template has no tools | | | |")
            continue
        free = [_is_right(model, form, prompt, "auto", options.show) for prompt in PROMPTS]
        forced = [_is_right(model, form, prompt, "required", options.show) for prompt in PROMPTS if prompt[1]]
        called = sum(right for right, prompt in zip(free, PROMPTS, strict=True) if prompt[1])
        print(f"| {name} | {called} | {sum(free) - called} | {sum(free)} | {sum(forced)} |", flush=True)


def _is_right(model: PolarModel, calls: Any, prompt: tuple[str, str, dict[str, Any]], choice: str, show: bool) -> bool:
    asked, name, arguments = prompt
    form = AnswerForm.of({"tools": TOOLS, "tool_choice": choice}).written_as(calls)
    roles = form.teach([{"role": "user", "content": asked}])
    limits: RequestOptions = {"compute": "exact", "max_tokens": 80}
    answer = model.generate(roles, **limits | form.options())
    reader = form.reader()
    reader.push(answer.text)
    made = [(call.name, call.values()) for call in reader.calls]
    right = not made if not name else len(made) == 1 and made[0][0] == name and _plain(made[0][1]) == _plain(arguments)
    if show and not right:
        print(
            f"{calls.templated} {choice}: {asked!r} wanted {name} {arguments}: {answer.text[:150]!r}", file=sys.stderr
        )
    return right


def _plain(arguments: Any) -> str:
    """Arguments as text, without regard to case."""
    return json.dumps(arguments, sort_keys=True, ensure_ascii=False).lower()


if __name__ == "__main__":
    main()
