"""`POST /tokenize` and `/detokenize`: between text and token ids, with the fields of vLLM and of llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from polar_sdk.errors import ContextWindowError
from polar_sdk.serving.threads import run_in_thread
from polar_server.http.exchange import Exchange, read_body
from polar_server.openai.fields import Body, Name, Text, invalid, read
from polar_server.openai.messages import read_messages
from polar_server.openai.tools import read_form

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Receive, Scope

    from polar_sdk.request.options import Prompt
    from polar_server.server import Server

_MAX_IDS = 2**18


class TokenizeBody(Body):
    """A body of `POST /tokenize`."""

    other_names: ClassVar[Mapping[str, str]] = {
        "content": "prompt",
        "add_special": "add_special_tokens",
    }
    model: Name | None = None
    prompt: Annotated[str, Text(4 * 2**20)] | None = None
    messages: Any = None
    tools: Any = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    with_pieces: bool = False
    """As llama.cpp has it: each token is an object with its id and text, or bytes where those are no text."""

    def said(self, server: Server) -> tuple[Prompt, list[dict[str, Any]] | None]:
        """The text or messages to be tokenized, and the tools that the chat template shows.

        Raises:
            ApiError: There is not one of the two, or one that cannot be.
        """
        if self.model is not None:
            server.catalog.tier_of(self.model)
        if (self.prompt is None) == (self.messages is None):
            raise invalid("prompt", "give a text, or messages.", code="missing_required_parameter")
        if self.messages is None:
            if self.tools:
                raise invalid("tools", "they go with messages; leave them out.")
            return self.prompt or "", None
        if not self.add_generation_prompt:
            raise invalid("add_generation_prompt", "messages are followed by the beginning of an answer, as they run.")
        form = read_form(self.tools, None, None, parallel=False, nested=True).written_as(server.engine.call_format)
        return form.teach(read_messages(self.messages)), form.shown


class DetokenizeBody(Body):
    """A body of `POST /detokenize`."""

    model: Name | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=_MAX_IDS)]


class Tokenize:
    """`POST /tokenize`: token ids of a text, or of messages as a request would run them."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive) -> dict[str, Any]:
        """The tokens.

        Raises:
            ApiError: The body is wrong.
        """

        def checked(content: dict[str, Any]) -> tuple[TokenizeBody, Prompt, list[dict[str, Any]] | None]:
            body, _ = read(content, TokenizeBody, lenient=self._server.settings.lenient)
            return body, *body.said(self._server)

        return await _counted(self._server, scope, receive, checked, lambda asked: self._tokens(*asked))

    def _tokens(self, body: TokenizeBody, prompt: Prompt, tools: list[dict[str, Any]] | None) -> dict[str, Any]:
        engine = self._server.engine
        window = engine.context_window
        if (least := engine.more_tokens_than(prompt, window)) is not None:
            raise ContextWindowError(f"there are at least {least:,} tokens; at most {window:,} are allowed.")
        if not isinstance(prompt, str):
            ids = engine.prompt_tokens(prompt, tools=tools)
        elif body.add_special_tokens:
            ids = list(engine.loaded.tokenizer.encode(prompt))
        else:
            ids = engine.encode(prompt)
        written = [self._server.token_bytes.text([token]) for token in ids] if body.return_token_strs else None
        tokens = [{"id": token, "piece": self._piece(token)} for token in ids] if body.with_pieces else ids
        return {"count": len(ids), "max_model_len": window, "tokens": tokens, "token_strs": written}

    def _piece(self, token: int) -> str | list[int]:
        text = self._server.token_bytes.text([token])
        return list(self._server.token_bytes.of(token)) if "\ufffd" in text else text


class Detokenize:
    """`POST /detokenize`: the text of token ids."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive) -> dict[str, Any]:
        """The text.

        Raises:
            ApiError: The body is wrong.
        """

        def checked(content: dict[str, Any]) -> DetokenizeBody:
            body, _ = read(content, DetokenizeBody, lenient=self._server.settings.lenient)
            if body.model is not None:
                self._server.catalog.tier_of(body.model)
            most = len(self._server.engine.loaded.tokenizer) - 1
            for place, token in enumerate(body.tokens):
                if token > most:
                    raise invalid("tokens", f"tokens[{place}] is {token}; ids of this model are 0 to {most}.")
            return body

        def text(body: DetokenizeBody) -> dict[str, Any]:
            found = self._server.engine.loaded.tokenizer.decode(body.tokens)
            return {"prompt": found, "content": found}

        return await _counted(self._server, scope, receive, checked, text)


async def _counted(
    server: Server,
    scope: Scope,
    receive: Receive,
    checked: Callable[[dict[str, Any]], Any],
    answer: Callable[[Any], dict[str, Any]],
) -> dict[str, Any]:
    """Read a body and answer it, counted among the calls of its key."""
    exchange = Exchange.of(scope)
    async with server.counted(exchange):
        asked = await read_body(exchange, receive, server.settings.max_body, checked)
        return await run_in_thread(lambda _: answer(asked), None)
