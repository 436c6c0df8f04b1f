"""The ASGI app: its routes, and the document that describes them.

The same app runs under uvicorn, under another server's router, and in tests.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from polar_sdk import __version__
from polar_sdk.engine import ENGINE_VERSION
from polar_sdk.serving.threads import run_in_thread
from polar_server.endpoints.account import NUMBERS, USAGE, Quote, receipt, usage
from polar_server.endpoints.answer import Endpoint
from polar_server.endpoints.embeddings import Embeddings, EmbeddingsBody
from polar_server.endpoints.tokens import Detokenize, DetokenizeBody, Tokenize, TokenizeBody
from polar_server.http.exchange import Exchange, JsonEndpoint, send_bytes, send_json
from polar_server.http.front import Front, unrouted
from polar_server.http.pages import page_routes
from polar_server.openai.chat import ChatBody, ChatShape
from polar_server.openai.choices import ChoiceWriter
from polar_server.openai.completions import TextBody, TextShape
from polar_server.openai.response_writer import ResponseWriter
from polar_server.openai.responses import ResponseBody
from polar_server.server import Server
from polar_server.telemetry.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.types import Receive, Scope, Send

    from polar_server.openai.fields import Body
    from polar_server.settings import Settings


def build(settings: Settings) -> Starlette:
    """Make the app.

    Its `state.server` is the `Server` behind it. When the app shuts down, answers that run have `settings.drain`
    seconds to finish; all of them are recorded.

    Args:
        settings: The model, and what is allowed.
    """
    server = Server(settings)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        server.open()
        yield
        await server.close()

    routes = [
        Route("/v1/chat/completions", Endpoint(server, ChatBody, partial(ChoiceWriter, ChatShape)), methods=["POST"]),
        Route("/v1/completions", Endpoint(server, TextBody, partial(ChoiceWriter, TextShape)), methods=["POST"]),
        Route("/v1/responses", Endpoint(server, ResponseBody, ResponseWriter), methods=["POST"]),
        Route("/v1/embeddings", JsonEndpoint(Embeddings(server)), methods=["POST"]),
        Route("/tokenize", JsonEndpoint(Tokenize(server)), methods=["POST"]),
        Route("/detokenize", JsonEndpoint(Detokenize(server)), methods=["POST"]),
        Route("/v1/polar/quote", JsonEndpoint(Quote(server)), methods=["GET", "POST"]),
    ]
    reads: dict[str, Callable[[Scope, Receive], Any]] = {
        "/v1/polar/usage": partial(usage, server),
        "/v1/polar/receipts/{id:path}": partial(receipt, server),
        "/v1/models": lambda scope, _: _models(server, scope),
        "/v1/models/{model:path}": lambda scope, _: _model(server, scope),
        "/health": lambda *_: {"status": "ok"},
        "/version": lambda *_: {"version": __version__, "engine": ENGINE_VERSION},
        "/openapi.json": lambda *_: _document(),
    }
    routes += [Route(path, JsonEndpoint(answer), methods=["GET"]) for path, answer in reads.items()]
    routes += [
        Route("/ready", _Ready(server), methods=["GET"]),
        Route("/metrics", _Metrics(server), methods=["GET"]),
    ]
    if settings.pages is not None:
        routes += page_routes(settings.pages, server.live)
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Front, guard=server.guard, counts=server.metrics)],
        exception_handlers={HTTPException: unrouted},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.server = server
    return app


class _Metrics:
    """`GET /metrics`: what the server did."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = await run_in_thread(lambda _: self._server.metrics.text(), None)
        await send_bytes(send, text, CONTENT_TYPE)


class _Ready:
    """`GET /ready`: whether requests should come here now."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = await self._server.ready()
        status = {"status": "ok" if reason is None else reason}
        await send_json(send, status, status=200 if reason is None else 503)


def _models(server: Server, scope: Scope) -> dict[str, Any]:
    caller = server.caller(Exchange.of(scope))
    ids = [model for model in server.catalog.ids() if server.catalog.may_name(model, caller.models, caller.tiers)]
    embedder = server.settings.embeddings
    others = [] if embedder is None or not embedder.may_be_named(caller.models) else [embedder.entry]
    return {"object": "list", "data": [*(server.catalog.entry(model) for model in ids), *others]}


def _model(server: Server, scope: Scope) -> dict[str, Any]:
    caller, model = server.caller(Exchange.of(scope)), scope["path_params"]["model"]
    embedder = server.settings.embeddings
    if embedder is not None and model == embedder.name and embedder.may_be_named(caller.models):
        return embedder.entry
    found = server.catalog.entry(model)
    if not server.catalog.may_name(model, caller.models, caller.tiers):
        raise server.catalog.missing(model)
    return found


# -- the document ------------------------------------------------------------------------------------------------------

_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_READS: Final = {
    "/v1/models": "The models and tiers that a request may name.",
    "/v1/models/{model}": "One model.",
    "/v1/polar/quote": "The maximum cost of a request with the given numbers of tokens, by tier.",
    "/v1/polar/usage": "What the caller's tenant has used and spent.",
    "/v1/polar/receipts/{id}": "The receipt of one request of the caller's tenant.",
    "/health": "Whether the process runs.",
    "/ready": "Whether requests should come here now.",
    "/metrics": "What the server did, in Prometheus' text format.",
    "/version": "Versions of the package and of the engine's arithmetic.",
    "/openapi.json": "This document.",
}


def _document() -> dict[str, Any]:
    """The OpenAPI 3.1 document; bodies are those of the models that check them."""
    paths: dict[str, Any] = {
        "/v1/chat/completions": _post("Answer messages.", "chat.completion", ChatBody),
        "/v1/responses": _post("Answer items, statelessly.", "response", ResponseBody),
        "/v1/completions": _post("Continue a text.", "text_completion", TextBody),
    }
    for path, summary, body in (
        ("/v1/embeddings", "Vectors of texts.", EmbeddingsBody),
        ("/tokenize", "Token ids of a text or of messages.", TokenizeBody),
        ("/detokenize", "The text of token ids.", DetokenizeBody),
    ):
        paths[path] = _post(summary, path.rpartition("/")[2], body)
        paths[path]["post"]["responses"] = _responses("application/json")
    for path, summary in _READS.items():
        paths[path] = {"get": {"summary": summary, "responses": _responses("application/json")}}
    for path, name in (("/v1/models/{model}", "model"), ("/v1/polar/receipts/{id}", "id")):
        paths[path]["parameters"] = [_parameter(name, "path", "string")]
    paths["/v1/polar/quote"]["get"]["parameters"] = [_parameter(name, "query", "integer") for name in NUMBERS]
    paths["/v1/polar/usage"]["get"]["parameters"] = [
        _parameter(name, "query", "string", required=False) for name in USAGE
    ]
    paths["/v1/polar/quote"]["post"] = {
        "summary": "The maximum cost of the request in the body, as it is and by tier.",
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}},
        "responses": _responses("application/json"),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "PoLar", "version": __version__},
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }


def _parameter(name: str, place: str, kind: str, *, required: bool = True) -> dict[str, Any]:
    return {"name": name, "in": place, "required": required, "schema": {"type": kind}}


def _post(summary: str, kind: str, model: type[Body]) -> dict[str, Any]:
    return {
        "post": {
            "summary": summary,
            "operationId": kind,
            "requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}},
            "responses": _responses("application/json", "text/event-stream"),
        }
    }


def _responses(*kinds: str) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "200": {"description": "Answered.", "content": {kind: {} for kind in kinds}},
        "default": {"description": "Refused or failed.", "content": error},
    }
