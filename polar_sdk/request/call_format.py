"""How a model's chat template writes tool calls, read from what it writes for an invented call.

A model was trained on calls written by its template, so the template knows their form: the text around the name and the
arguments, between several calls, and after the last. Reading it from there needs no list of families. If a template
does not support tools, or writes calls in another form, there is no format. Knows a tokenizer; no grammars.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CallFormat:
    """The form of calls in an answer: `opening`, then each call, with `separator` between them, then `closing`.

    A call is `head`, the name of its tool, `middle`, its arguments and `tail`. Without arguments, ours: a line of JSON.
    """

    opening: str = ""
    head: str = '{"name": "'
    middle: str = '", "arguments": '
    tail: str = "}"
    separator: str | None = "\n"
    """None = an answer has one call at most."""
    closing: str = ""
    templated: bool = False
    """Whether the template shows tools, calls and results itself."""
    keywords: bool = False
    """Whether arguments are written as in Python, `city="Rome", days=3`, and not as a JSON object."""
    as_text: bool = False
    """Whether the template takes arguments as JSON text."""
    quoted: bool = True
    """Whether the template writes the quotation marks of a keyword's text."""
    tokens: Mapping[str, int] = field(default_factory=dict)
    """Added tokens of the tokenizer in these texts, by their own text."""
    sample: str = field(default="", repr=False)
    """A conversation with a call as the template writes it."""

    @property
    def start(self) -> str:
        """The text before the name of the first call."""
        return self.opening + self.head

    @property
    def after_text(self) -> bool:
        """Whether calls may follow text: they begin with a token that no text has."""
        return any(self.start.startswith(token) for token in self.tokens)


_formats: WeakKeyDictionary[PreTrainedTokenizerBase, CallFormat | None] = WeakKeyDictionary()
_KEY, _VALUE, _ID, _RESULT, _TEXT = "zqkey", "zqvalue", "zq7call19", "zqresult", "zqtext"
_NAMES: Final = ("zqfirst", "zqsecond")
_ARGUMENTS: Final = re.compile(rf'\{{\s*"{_KEY}":\s*"{_VALUE}"\s*\}}')
_KEYWORDS: Final = re.compile(rf"""{_KEY}=(["']?){_VALUE}\1""")
_WRITTEN_ID: Final = re.compile(rf',?\s*"id":\s*"{_ID}"|\[CALL_ID\]{_ID}')
"""An id within a call: templates write those of earlier calls, models none."""
_USER: Final = {"role": "user", "content": "zquestion"}
_TOOLS: Final[list[Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "zqdescription",
            "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}, "required": [_KEY]},
        },
    }
    for name in _NAMES
]


def call_format(tokenizer: PreTrainedTokenizerBase) -> CallFormat | None:
    """The form of calls of a tokenizer's chat template; None if it has none, or one that cannot be read."""
    if tokenizer not in _formats:
        _formats[tokenizer] = _Probe(tokenizer).format()
    return _formats[tokenizer]


class _Probe:
    """Lets a template write conversations, and reads from them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}

    def format(self) -> CallFormat | None:
        if "tools" not in str(getattr(self._tokenizer, "chat_template", None)):
            return None
        asked = self._write([_USER])
        if asked is None or "zqdescription" not in asked:
            return None
        return self._of_calls(asked, as_text=False) or self._of_calls(asked, as_text=True)

    def _of_calls(self, asked: str, *, as_text: bool) -> CallFormat | None:
        sample = self._write([_USER, *_called(_NAMES[:1], as_text=as_text)])
        if sample is None or _RESULT not in sample or not sample.startswith(asked):
            return None
        turn = sample[len(asked) :]
        first = _Parts.of(turn, _NAMES[0])
        end = self._end_of_turn(asked)
        if first is None or end is None or end not in first.after:
            return None
        ending = first.after.partition(end)[0]
        head, tail, separator = first.before, ending, None
        several = self._write([_USER, *_called(_NAMES, as_text=as_text)])
        if several is not None and several.startswith(asked):
            second = _Parts.of(several[len(asked) :].partition(_NAMES[0])[2], _NAMES[1])
            found = _ARGUMENTS.search(several) or _KEYWORDS.search(several)
            if second is not None and found is not None:
                between = _WRITTEN_ID.sub("", several[found.end() :].partition(_NAMES[1])[0])
                head = _shared(first.before[::-1], between[::-1])[::-1]
                rest = between[: len(between) - len(head)]
                tail = _shared(ending, rest)
                separator = rest[len(tail) :]
        format = CallFormat(
            opening=first.before[: len(first.before) - len(head)],
            head=head,
            middle=first.middle,
            tail=tail,
            separator=separator,
            closing=ending[len(tail) :],
            templated=True,
            keywords=first.keywords,
            as_text=as_text,
            quoted=first.quoted,
            sample=sample,
        )
        written = "".join((format.start, format.middle, tail, separator or "", format.closing))
        plain = _ID in written or not format.middle.strip()
        tokens = {token: index for token, index in self._added.items() if token in written}
        return None if plain else CallFormat(**{**vars(format), "tokens": tokens})

    def _end_of_turn(self, asked: str) -> str | None:
        """The token that ends an answer."""
        text = self._write([_USER, {"role": "assistant", "content": _TEXT}, _USER])
        after = "" if text is None else text.partition(_TEXT)[2]
        places = {after.find(token): token for token in self._added if token.strip() and token in after}
        return places[min(places)] if places else None

    def _write(self, messages: Sequence[Mapping[str, Any]]) -> str | None:
        try:
            written = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tools=_TOOLS, add_generation_prompt=True, tokenize=False
            )
        except Exception:  # a template is code of a stranger: it may raise anything
            return None
        return str(written)


@dataclass(frozen=True)
class _Parts:
    """The parts of a turn with a call."""

    before: str
    middle: str
    after: str
    keywords: bool
    quoted: bool

    @classmethod
    def of(cls, turn: str, name: str) -> _Parts | None:
        before, named, rest = turn.partition(name)
        found = _ARGUMENTS.search(rest) or _KEYWORDS.search(rest)
        if not named or found is None:
            return None
        middle, after = (_WRITTEN_ID.sub("", part) for part in (rest[: found.start()], rest[found.end() :]))
        return cls(before, middle, after, found.re is _KEYWORDS, found.re is not _KEYWORDS or bool(found[1]))


def _shared(one: str, other: str) -> str:
    """The beginning that two texts share."""
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _called(names: Sequence[str], *, as_text: bool) -> list[dict[str, Any]]:
    """A turn that calls tools, and their results."""
    arguments = {_KEY: _VALUE}
    given: Any = json.dumps(arguments) if as_text else arguments
    calls = [{"id": _ID, "type": "function", "function": {"name": name, "arguments": given}} for name in names]
    results = [{"role": "tool", "name": name, "tool_call_id": _ID, "content": _RESULT} for name in names]
    return [{"role": "assistant", "content": "", "tool_calls": calls}, *results]
