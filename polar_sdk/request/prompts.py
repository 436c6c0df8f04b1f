"""Prompts to token ids, through the model's own tokenizer and chat template. Knows no programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from polar_sdk.errors import EmptyPromptError, InvalidRequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Template = Literal["auto", "chat", "raw"]


class PromptEncoder:
    """Encodes texts and chat messages for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @property
    def has_chat_template(self) -> bool:
        """True where messages can be rendered."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    def encode(self, prompt: str | Sequence[Mapping[str, str]], template: Template = "auto") -> list[int]:
        """Token ids of a prompt.

        Args:
            prompt: A text, or chat messages.
            template: See `RequestOptions`.

        Raises:
            EmptyPromptError: The prompt holds no text.
            InvalidRequestError: A template the model lacks, a message without role or content, or broken Unicode.
        """
        if template not in ("auto", "chat", "raw"):
            raise InvalidRequestError(f"template {template!r} is unknown; use auto, chat or raw.")
        try:
            if isinstance(prompt, str):
                return self._text(prompt, template)
            given: Any = prompt
            if isinstance(given, bytes) or not isinstance(given, Sequence):
                raise InvalidRequestError(
                    f"the prompt is of type {type(prompt).__name__}; pass a text or a list of messages."
                )
            return self._chat(prompt, template)
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the prompt holds a lone surrogate at character {error.start}; pass valid Unicode text."
            ) from error

    def _text(self, text: str, template: Template) -> list[int]:
        text.encode()  # the tokenizer's own complaint about broken Unicode names nothing
        if not text.strip():
            raise EmptyPromptError(f"the prompt is empty ({len(text)} blank characters); give it some text.")
        if template == "chat" or (template == "auto" and self.has_chat_template):
            return self._render([{"role": "user", "content": text}])
        # `raw` means that the caller has placed every special token; otherwise the tokenizer's own apply.
        return list(self.tokenizer.encode(text, add_special_tokens=template != "raw"))

    def _chat(self, messages: Sequence[Mapping[str, str]], template: Template) -> list[int]:
        if template == "raw":
            raise InvalidRequestError("template 'raw' takes a text, not messages; render them first.")
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise InvalidRequestError(f"message {number} is {message!r}; each needs the keys 'role' and 'content'.")
            for key in ("role", "content"):
                if not isinstance(message[key], str):
                    raise InvalidRequestError(
                        f"message {number} has the {key} {message[key]!r}; it must be text: join its parts first."
                    )
                message[key].encode()
        if not any(message["content"].strip() for message in messages):
            raise EmptyPromptError(f"the prompt is empty ({len(messages)} messages without text); give it some text.")
        return self._render(messages)

    def _render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if not self.has_chat_template:
            raise InvalidRequestError("this model has no chat template; pass a text with template='raw'.")
        from jinja2 import TemplateError

        plain: list[Any] = [dict(message) for message in messages]
        try:
            rendered = self.tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise InvalidRequestError(f"the model's chat template refuses these messages: {error}.") from error
        return list(self.tokenizer.encode(str(rendered), add_special_tokens=False))
