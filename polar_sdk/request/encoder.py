"""From a prompt to token ids: the model's chat template, and texts whose special tokens stay text.

Knows a tokenizer and its template; neither requests nor models.

A template writes special tokens around messages. The same characters inside a message are plain text; otherwise the
author of a message could end it and begin a system turn. Only prompts that contain such characters take the longer path
below.
"""

from __future__ import annotations

import copy
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.errors import EmptyPromptError, InvalidRequestError
from polar_sdk.reading import shown
from polar_sdk.request.call_format import call_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from polar_sdk.request.call_format import CallFormat
    from polar_sdk.request.options import Prompt, Template

_FAR: Final = 8
"""The start of a prompt with twice this number of characters per token of the window very likely exceeds it."""
_MAX_GROWTH: Final = 4
"""A chat template may write this many times the characters of the messages, and `_MAX_ADDED` more."""
_MAX_ADDED: Final = 200_000
"""Unit: characters."""
_REPAIR: Final = "Correct the template in the model's folder, or pass a text with template='raw'."
_SAMPLE: Final = ({"role": "user", "content": "a"},)
"""A conversation that shows what the template writes around a message."""


class PromptEncoder:
    """Encodes texts and chat messages for one tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @property
    def has_chat_template(self) -> bool:
        """True where messages can be rendered."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return len(self.tokenizer)

    @property
    def calls(self) -> CallFormat | None:
        """How the chat template writes calls of tools; None if it has no tools."""
        return call_format(self.tokenizer)

    def plain(self, text: str) -> list[int]:
        """Token ids of a text, no template, no special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def encode(self, prompt: Prompt, template: Template = "auto", tools: Any = None) -> list[int]:
        """Token ids of a prompt.

        Args:
            prompt: A text, chat messages, or token ids, which are taken as they are.
            template: See `RequestOptions`.
            tools: The same.

        Raises:
            EmptyPromptError: The prompt holds no text.
            InvalidRequestError: A template that the model lacks, a message without role or content, or broken Unicode.
        """
        if template not in ("auto", "chat", "raw"):
            raise InvalidRequestError(f"template {template!r} is unknown; use auto, chat or raw.")
        try:
            if tools:
                return self._chat(prompt, template, self._shown(tools))
            if isinstance(prompt, str):
                return self._text(prompt, template)
            untyped: Any = prompt
            if isinstance(untyped, bytes | bytearray) or not isinstance(untyped, Sequence):
                raise InvalidRequestError(
                    f"the prompt is of type {type(prompt).__name__}; pass a text or a list of messages."
                )
            if untyped and isinstance(untyped[0], int):
                return self._ids(untyped, template)
            return self._chat(untyped, template, None)
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the prompt contains a lone surrogate at character {error.start}; pass valid Unicode text."
            ) from error

    def more_than(self, prompt: Prompt, window: int) -> int | None:
        """A number of tokens beyond a window that a prompt has at least, of a prompt far beyond it; None of any other.

        No more of a text is encoded for it than that takes: all of a long one would take seconds, to no use.
        """
        if isinstance(prompt, str):
            texts = [prompt]
        elif not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
            return None
        elif prompt and isinstance(prompt[0], int):
            return len(prompt) if len(prompt) > window else None
        else:
            said = (message for message in prompt if isinstance(message, Mapping))
            texts = [text for message in said for key in ("content", "tool_calls") for text in _texts(message.get(key))]
        size, length = 2 * _FAR * window, sum(map(len, texts))
        if length <= size:
            return None
        text = "".join(texts).encode("utf-8", "replace").decode()
        while size < length:
            count = len(self.plain(text[:size]))
            if count > 2 * window + self._longest:  # at its end, a start may have more tokens than in the text
                return count // 2
            size *= 2
        return None

    def message_start(self) -> list[int]:
        """Tokens before a user's first message by the chat template; empty if there is no template or no such start.

        Raises:
            InvalidRequestError: The template refuses a message.
        """
        mark = f"x{secrets.token_hex(16)}x"
        rendered = self._rendered([{"role": "user", "content": mark}]) if self.has_chat_template else ""
        start, found, _ = rendered.partition(mark)
        return self.plain(start) if found else []

    def _text(self, text: str, template: Template) -> list[int]:
        text.encode()  # the tokenizer's own error for broken Unicode names nothing
        if not text.strip():
            raise EmptyPromptError(f"the prompt is empty ({len(text)} blank characters); give it some text.")
        if template == "chat" or (template == "auto" and self.has_chat_template):
            return self._render([{"role": "user", "content": text}])
        if template == "raw":  # the caller has placed every special token but, perhaps, the first
            ids = self.plain(text)
            return ids if ids[:1] == self._beginning else [*self._beginning, *ids]
        if self._markers.search(text):
            self._as_text(text)  # refuses what cannot be text
            return list(self._text_tokenizer.encode(text, split_special_tokens=True))
        return list(self.tokenizer.encode(text))

    def _ids(self, ids: Sequence[Any], template: Template) -> list[int]:
        """Token ids as they are, nothing added."""
        if template == "chat":
            raise InvalidRequestError("template 'chat' takes messages or a text, not token ids; use 'raw'.")
        count = self.vocabulary
        for place, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < count:
                raise InvalidRequestError(
                    f"token {place} of the prompt is {shown(token)}; ids of this model are 0 to {count - 1}."
                )
        return list(ids)

    def _shown(self, tools: Any) -> list[Any]:
        """Tools that the template can show.

        Raises:
            InvalidRequestError: It has none, or they are no list of mappings.
        """
        if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
            raise InvalidRequestError(f"tools={shown(tools)} is not a list of tools; pass one.")
        if not all(isinstance(tool, Mapping) for tool in tools):
            raise InvalidRequestError("tools= contains an entry that is not a mapping; pass tools in OpenAI's form.")
        if self.calls is None:
            raise InvalidRequestError("this model's chat template does not support tools; describe them in a message.")
        return list(tools)

    def _chat(self, messages: Any, template: Template, tools: list[Any] | None) -> list[int]:
        if isinstance(messages, str) or not isinstance(messages, Sequence):
            raise InvalidRequestError("tools= needs a list of messages as the prompt; pass one.")
        if template == "raw":
            raise InvalidRequestError("template 'raw' takes a text, not messages; render them first.")
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise InvalidRequestError(f"message {index} is {message!r}; each needs the keys 'role' and 'content'.")
            for key in ("role", "content"):
                if not isinstance(message[key], str):
                    raise InvalidRequestError(
                        f"message {index} has the {key} {message[key]!r}; it must be text: join its parts first."
                    )
                message[key].encode()
        if not any(message["content"].strip() or message.get("tool_calls") for message in messages):
            raise EmptyPromptError(f"the prompt is empty ({len(messages)} messages without text); give it some text.")
        return self._render(messages, tools)

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None) -> list[int]:
        if not self.has_chat_template:
            raise InvalidRequestError("this model has no chat template; pass a text with template='raw'.")
        plain: list[Any] = [dict(message) for message in messages]
        held = _Held(self._markers)
        rendered = self._rendered(held.of(plain), held.of(tools))
        if not held.texts:
            return self.plain(rendered)
        ids: list[int] = []
        for piece, is_text in self._pieces(rendered, held):
            ids += self._as_text(held.restored(piece)) if is_text else self.plain(piece)
        return ids

    def _rendered(self, messages: Any, tools: Any = None) -> str:
        try:
            rendered = str(
                self.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
            )
        except UnicodeEncodeError:
            raise
        except Exception as error:  # a template is code of a stranger: it may raise anything
            reason = str(error).rstrip(".")[:300] or "no reason given"
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {type(error).__name__}: {reason}.", hint=_REPAIR
            ) from error
        written = sum(len(str(part)) for message in messages for part in message.values()) + len(str(tools or ""))
        if len(rendered) > _MAX_GROWTH * written + _MAX_ADDED:
            raise InvalidRequestError(
                f"the model's chat template makes {len(rendered):,} characters of {written:,}; at most {_MAX_GROWTH} "
                f"times as many and {_MAX_ADDED:,} more are encoded.",
                hint=_REPAIR,
            )
        return rendered

    def _pieces(self, rendered: str, held: _Held) -> list[tuple[str, bool]]:
        """The rendered template in pieces; True for those between two markers that hold text of a special token."""
        parts = self._markers.split(rendered)  # text, marker, text, …, text
        pieces: list[tuple[str, bool]] = []
        marker_before = ""
        for text, marker in zip(parts[::2], [*parts[1::2], ""], strict=True):
            if not held.is_in(text):
                pieces.append((text + marker, False))
            else:
                # White space that a marker takes in goes with it.
                start = len(text) - len(text.lstrip()) if self._takes_in(marker_before, "rstrip") else 0
                stop = len(text.rstrip()) if self._takes_in(marker, "lstrip") else len(text)
                pieces += [(text[:start], False), (text[start:stop], True), (text[stop:] + marker, False)]
            marker_before = marker
        joined: list[tuple[str, bool]] = []
        for piece, is_text in pieces:
            if joined and not is_text and not joined[-1][1]:
                joined[-1] = (joined[-1][0] + piece, False)
            elif piece:
                joined.append((piece, is_text))
        return joined

    def _takes_in(self, marker: str, side: str) -> bool:
        return bool(marker) and bool(getattr(self._special[marker][1], side))

    def _as_text(self, text: str) -> list[int]:
        """Token ids of a text, none of them of a special token.

        Raises:
            InvalidRequestError: This tokenizer makes special tokens of the text even so.
        """
        ids = list(self._text_tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        for content, (index, _) in self._special.items():
            if index in ids:
                raise InvalidRequestError(
                    f"the prompt contains {content!r}, which this model's tokenizer cannot read as text; remove it, or "
                    "pass a text with template='raw'."
                )
        return ids

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def _beginning(self) -> list[int]:
        """The token that the tokenizer puts before a text by default; empty if it puts none."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer.encode("a")[:1] == [bos] != self.plain("a")[:1] else []

    @cached_property
    def separators(self) -> tuple[int, ...]:
        """Ids of the special tokens that the chat template puts around messages; none without a template."""
        try:
            around = self.encode(list(_SAMPLE)) if self.has_chat_template else []
        except InvalidRequestError:
            around = []
        return tuple(sorted({index for index, _ in self._special.values()}.intersection(around)))

    @cached_property
    def _special(self) -> dict[str, tuple[int, Any]]:
        """Id and description of each special token, and of other added tokens that the template puts around messages.

        Some models do not mark theirs as special.
        """
        added = self.tokenizer.added_tokens_decoder.items()
        try:
            around = self._rendered(list(_SAMPLE)) if self.has_chat_template else ""
        except InvalidRequestError:
            around = ""
        if self.calls is not None:  # and around calls and their results
            around += self.calls.sample
        return {
            token.content: (index, token)
            for index, token in added
            if token.content.strip() and (token.special or token.content in around)
        }

    @cached_property
    def _markers(self) -> re.Pattern[str]:
        """Matches the text of any special token, the longest first, as the tokenizer does."""
        contents = sorted(self._special, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, contents))})" if contents else "((?!))")

    @cached_property
    def _text_tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy that reads special tokens as text: it is a state of the tokenizer, and other threads use that one."""
        tokenizer = copy.deepcopy(self.tokenizer)
        unmarked = [token.content for _, token in self._special.values() if not token.special]
        if unmarked and (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            backend.add_special_tokens(unmarked)  # they keep their ids
        return tokenizer


class _Held:
    """Texts of special tokens taken out of messages, each with a stand-in that no message can contain."""

    def __init__(self, markers: re.Pattern[str]) -> None:
        self.texts: list[str] = []
        self._markers = markers
        self._key = f"x{secrets.token_hex(16)}x"

    def of(self, value: Any) -> Any:
        """Messages, or a part of one, with stand-ins."""
        if isinstance(value, str):
            return self._markers.sub(self._stand_in, value)
        if isinstance(value, Mapping):
            return {self.of(name): self.of(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(part) for part in value]
        return value

    def is_in(self, rendered: str) -> bool:
        """True if the text contains a stand-in."""
        return self._key in rendered

    def restored(self, rendered: str) -> str:
        """The text with what the stand-ins stand for."""
        return re.sub(f"{self._key}(\\d+)x", lambda match: self.texts[int(match[1])], rendered)

    def _stand_in(self, match: re.Match[str]) -> str:
        self.texts.append(match[0])
        return f"{self._key}{len(self.texts) - 1}x"


def _texts(value: Any) -> list[str]:
    """All texts within a value."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in _texts(part)]
    return [text for part in value for text in _texts(part)] if isinstance(value, list | tuple) else []
