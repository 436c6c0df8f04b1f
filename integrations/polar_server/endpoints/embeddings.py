"""`POST /v1/embeddings`: vectors of texts, admitted, recorded and billed like answers."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from functools import partial
from time import perf_counter_ns
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field, WithJsonSchema

from polar_sdk.frameworks.cost import cost_facts
from polar_sdk.programs.program import Program
from polar_sdk.reading import shown
from polar_sdk.serving.threads import run_in_thread
from polar_sdk.usage import FlopUsage, Offer, Outcome, TokenUsage, UsageBound, UsageRecord, VisitUsage, new_request_id
from polar_server.embedder import of_length_1
from polar_server.errors import ApiError
from polar_server.http.exchange import Exchange, read_body
from polar_server.openai.fields import Body, Name, Text, invalid, read

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starlette.types import Receive, Scope

    from polar_server.embedder import Embedder, Vectors
    from polar_server.openai.calls import Caller
    from polar_server.server import Server

_MAX_TEXTS: Final = 2_048


class EmbeddingsBody(Body):
    """A body of `POST /v1/embeddings`."""

    model: Name
    input: Annotated[Any, WithJsonSchema({"oneOf": [{"type": "string"}, {"type": "array"}]})] = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    user: Name | None = None

    def texts(self, embedder: Embedder) -> list[list[int]]:
        """Token ids of every input.

        Raises:
            ApiError: One of them cannot be embedded.
        """
        given = self.input
        if isinstance(given, list) and given and all(_is_id(one) for one in given):
            given = [given]
        listed = given if isinstance(given, list) else [given]
        if not listed or len(listed) > _MAX_TEXTS:
            raise invalid("input", f"there are {len(listed):,} texts; use 1 to {_MAX_TEXTS:,}.")
        several = isinstance(self.input, list)
        return [_tokens(one, f"input[{place}]" if several else "input", embedder) for place, one in enumerate(listed)]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _tokens(given: Any, where: str, embedder: Embedder) -> list[int]:
    if isinstance(given, str):
        text = Text().check(where, given)
        if not text.strip():
            raise invalid(where, "it is empty; give it some text.")
        if len(text) > 64 * embedder.window:
            raise invalid(where, f"it has {len(text):,} characters; this model reads {embedder.window:,} tokens.")
        ids = embedder.tokens(text)
    elif isinstance(given, list) and given and all(_is_id(one) for one in given):
        ids = given
        if (wrong := next((one for one in ids if not 0 <= one < embedder.vocabulary), None)) is not None:
            raise invalid(where, f"{wrong} is not a token id; those of this model are 0 to {embedder.vocabulary - 1}.")
    else:
        raise invalid(where, f"{shown(given)} is neither text nor a list of token ids.")
    if len(ids) > embedder.window:
        raise ApiError(
            f"{where}: it has {len(ids):,} tokens; this model reads {embedder.window:,}: split it.",
            code="context_length_exceeded",
            param="input",
        )
    return ids


class Embeddings:
    """`POST /v1/embeddings`."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive) -> dict[str, Any]:
        """The vectors.

        Raises:
            ApiError: The body is wrong, or there is no such model.
        """
        exchange, server = Exchange.of(scope), self._server
        embedder = server.settings.embeddings
        if embedder is None:
            raise ApiError(
                "this server has no embedding model; start it with --embeddings FOLDER, which needs the extra "
                '`pip install "polar-llm[embeddings]"`.',
                status=404,
                code="not_found",
            )
        caller = server.caller(exchange)

        def checked(content: dict[str, Any]) -> tuple[EmbeddingsBody, list[list[int]]]:
            body, unknown = read(content, EmbeddingsBody, lenient=server.settings.lenient)
            server.metrics.unknown(unknown)
            if body.model != embedder.name or not embedder.may_be_named(caller.models):
                raise server.catalog.missing(body.model)
            if body.dimensions is not None and body.dimensions > embedder.width:
                raise invalid("dimensions", f"{body.dimensions} is more than the {embedder.width} of this model.")
            return body, body.texts(embedder)

        async with server.counted(exchange):
            body, texts = await read_body(exchange, receive, server.settings.max_body, checked)
            exchange.facts |= {"model": body.model, "texts": len(texts)}
            call = _Metered(server, embedder, caller, body.user)
            return await run_in_thread(lambda _: _answer(body, texts, *call.embed(texts)), None)


class _Metered:
    """One call: reserved before it computes, recorded once however it ends."""

    def __init__(self, server: Server, embedder: Embedder, caller: Caller, user: str | None) -> None:
        self._sink, self._embedder = server.sink, embedder
        self._program = Program.identity(embedder.depth).text
        self.request_id = new_request_id()
        self._facts: dict[str, Any] = {
            "request_id": self.request_id,
            "tenant": caller.tenant or server.engine.tenant,
            "tags": {**server.engine.tags, **({} if user is None else {"user": user}), **caller.tags},
        }

    def embed(self, texts: Sequence[Sequence[int]]) -> tuple[Vectors, dict[str, Any]]:
        """The vectors, and what they cost."""
        sink, started = self._sink, datetime.now(UTC)
        tokens, flops = sum(map(len, texts)), sum(self._embedder.flops(len(ids)) for ids in texts)
        sink.check()
        offer = Offer(program=self._program, flops_bound=flops)
        sink.reserve(
            UsageBound(
                **self._facts, id_is_new=True, tokens_input=tokens, tokens_output_max=0, offers=(offer,), at=started
            )
        )
        try:
            sink.watch(self._facts["tenant"], self.request_id, lambda _: None)
        except BaseException:
            sink.release(self._facts["tenant"], self.request_id)
            raise
        record = partial(
            UsageRecord,
            **self._facts,
            model=self._embedder.name,
            model_fingerprint=self._embedder.fingerprint,
            router="identity",
            router_version="1",
            program=self._program,
            device="cpu",
            dtype="float32",
            started_at=started,
        )
        begun = perf_counter_ns()
        try:
            vectors = self._embedder.embed(texts)
        except BaseException as error:
            sink.emit(record(outcome=Outcome.ERROR, finish_reason="error", error=type(error).__name__))
            raise
        used = record(
            outcome=Outcome.COMPLETED,
            finish_reason="stop",
            tokens=TokenUsage(input=tokens),
            visits=VisitUsage(prefill=(len(texts),) * self._embedder.depth),
            flops=FlopUsage(layers_prefill=flops, total=flops),
            identity_flops=flops,
            prefill_ns=perf_counter_ns() - begun,
        )
        return vectors, cost_facts(used, sink.emit(used))


def _answer(
    body: EmbeddingsBody, texts: Sequence[Sequence[int]], vectors: Vectors, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The answer as OpenAI's API has it, with its price."""
    if body.dimensions is not None:
        vectors = of_length_1(vectors[:, : body.dimensions])
    packed = body.encoding_format == "base64"
    tokens = sum(map(len, texts))
    return {
        "object": "list",
        "model": body.model,
        "data": [
            {"object": "embedding", "index": place, "embedding": _packed(vector) if packed else vector.tolist()}
            for place, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        **facts,
    }


def _packed(vector: Any) -> str:
    """A vector as OpenAI's clients ask for it: float32 in the order of little-endian machines."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
