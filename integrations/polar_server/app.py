"""The ASGI app: its routes. The same app runs under uvicorn, under another server's router, and in tests."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from polar_sdk import __version__
from polar_sdk.engine import ENGINE_VERSION
from polar_server import openapi
from polar_server.endpoints.account import Quote, ReceiptOf, Usage
from polar_server.endpoints.answer import Endpoint
from polar_server.http.exchange import Exchange, send_bytes, send_json
from polar_server.http.front import Front, unrouted
from polar_server.http.pages import page_routes
from polar_server.openai import chat, completions, responses
from polar_server.openai.choices import ChoiceWriter
from polar_server.openai.response_writer import ResponseWriter
from polar_server.server import Server
from polar_server.telemetry.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.types import Receive, Scope, Send

    from polar_server.openai.choices import Shape
    from polar_server.settings import Settings


def build(settings: Settings) -> Starlette:
    """Make the app.

    Its `state.server` is the `Server` behind it. When the app shuts down, answers that run have `settings.drain`
    seconds to finish; all of them are recorded.

    Args:
        settings: The model, and what to allow.
    """
    server = Server(settings)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await server.close()

    routes = [
        Route("/v1/chat/completions", _completions(server, chat, chat.ChatShape), methods=["POST"]),
        Route("/v1/completions", _completions(server, completions, completions.TextShape), methods=["POST"]),
        Route(
            "/v1/responses", Endpoint(server, responses.FIELDS, responses.read_call, ResponseWriter), methods=["POST"]
        ),
        Route("/v1/polar/quote", Quote(server), methods=["GET", "POST"]),
        Route("/v1/polar/usage", Usage(server), methods=["GET"]),
        Route("/v1/polar/receipts/{id:path}", ReceiptOf(server), methods=["GET"]),
        Route("/v1/models", _Json(lambda scope: _models(server, scope)), methods=["GET"]),
        Route("/v1/models/{model:path}", _Json(lambda scope: _model(server, scope)), methods=["GET"]),
        Route("/health", _Json(lambda _: {"status": "ok"}), methods=["GET"]),
        Route("/ready", _Ready(server), methods=["GET"]),
        Route("/metrics", _Metrics(server), methods=["GET"]),
        Route("/version", _Json(lambda _: {"version": __version__, "engine": ENGINE_VERSION}), methods=["GET"]),
        Route("/openapi.json", _Json(lambda _: openapi.document(__version__)), methods=["GET"]),
    ]
    if settings.pages is not None:
        routes += page_routes(settings.pages, server.guard, server.live)
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Front, server=server)],
        exception_handlers={HTTPException: unrouted},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.server = server
    return app


def _completions(server: Server, api: Any, shape: Shape) -> Endpoint:
    """The endpoint whose fields and calls a module describes."""
    return Endpoint(server, api.FIELDS, api.read_call, partial(ChoiceWriter, shape))


class _Json:
    """An endpoint whose answer follows from its scope."""

    def __init__(self, answer: Callable[[Scope], dict[str, Any]]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, self._answer(scope))


class _Metrics:
    """`GET /metrics`: what the server did."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_bytes(send, self._server.metrics.text(), CONTENT_TYPE)


class _Ready:
    """`GET /ready`: whether requests should come here now."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = await self._server.ready()
        status = {"status": "ok" if reason is None else reason, "compiled": self._server.engine.compiled}
        await send_json(send, status, status=200 if reason is None else 503)


def _models(server: Server, scope: Scope) -> dict[str, Any]:
    caller = server.caller(Exchange.of(scope))
    ids = [model for model in server.catalog.ids() if server.catalog.may_name(model, caller.models, caller.tiers)]
    return {"object": "list", "data": [server.catalog.entry(model) for model in ids]}


def _model(server: Server, scope: Scope) -> dict[str, Any]:
    caller, model = server.caller(Exchange.of(scope)), scope["path_params"]["model"]
    found = server.catalog.entry(model)
    if not server.catalog.may_name(model, caller.models, caller.tiers):
        raise server.catalog.missing(model)
    return found
