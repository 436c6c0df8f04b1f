"""Middleware around every call: API key, headers of its answer, and errors as JSON."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Protocol

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from polar_sdk.errors import BudgetExceededError, PolarError
from polar_server.errors import ApiError, ClientLeftError, api_error
from polar_server.http.exchange import Exchange, raw_headers, send_json

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from polar_server.access.keys import KeyGuard


_log: Final = logging.getLogger("polar_server.access")
_faults: Final = logging.getLogger("polar_server")
_PATHS: Final = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/embeddings",
        "/v1/models",
        "/v1/polar/quote",
        "/v1/polar/usage",
        "/tokenize",
        "/detokenize",
        "/health",
        "/ready",
        "/metrics",
        "/version",
    }
)
"""Paths that the log and the metrics name; others are text of strangers."""
_RECEIPTS: Final = "/v1/polar/receipts"
_OPEN: Final = frozenset({"/health", "/ready"})
"""Paths that need no key."""
PAGES: Final = "/polar"
"""Path of the operations page."""
_SCOPES: Final = {
    "/metrics": "metrics",
    "/v1/polar/usage": "usage:read",
    _RECEIPTS: "usage:read",
    PAGES: "dashboard",
}
"""Scopes by path; any other path needs `infer`."""


def _route(path: str) -> str:
    """The path, without what differs from call to call."""
    return next((route for route in (_RECEIPTS, PAGES) if path.startswith(f"{route}/")), path)


class Counts(Protocol):
    """Counts calls; see `polar_server.telemetry.metrics.Metrics`."""

    def called(self, path: str, status: int) -> None:
        """A call was answered; `path` is one of the routes."""

    def refused(self) -> None:
        """A budget refused a request."""


class Front:
    """ASGI middleware around the router.

    Args:
        app: The router.
        guard: Checks API keys.
        counts: Hears of every call; None = nobody does.
    """

    def __init__(self, app: ASGIApp, guard: KeyGuard, counts: Counts | None) -> None:
        self._app, self._guard, self._counts = app, guard, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call, whatever happens in it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange.of(scope)

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message["headers"], *raw_headers(_headers(exchange))]
            await send(message)

        try:
            if exchange.path not in _OPEN:
                needed, browser = _SCOPES.get(route := _route(exchange.path), "infer"), route == PAGES
                exchange.key = await self._guard.check(exchange.headers, needed, peer=exchange.peer, browser=browser)
            await self._app(scope, receive, send_on)
        except ClientLeftError:
            exchange.status = exchange.status or ClientLeftError().status
        except Exception as error:
            if not isinstance(error, PolarError):  # nobody raised it on purpose
                _faults.error("a request failed", exc_info=error)
            if self._counts is not None and isinstance(error, BudgetExceededError):
                self._counts.refused()
            if exchange.status is not None:
                raise  # half an answer is sent; the server closes the connection
            failed = api_error(error)
            await send_json(send_on, failed.body, status=failed.status, headers=failed.headers)
        finally:
            self._ended(exchange)

    def _ended(self, exchange: Exchange) -> None:
        route = _route(exchange.path)
        path = route if route in _PATHS or route in {_RECEIPTS, PAGES} else "other"
        status = exchange.status or 0
        if self._counts is not None:
            self._counts.called(path, status)
        _log.info(
            "%s %s %s",
            exchange.method,
            path,
            status,
            extra={
                "polar": {
                    "method": exchange.method,
                    "path": path,
                    "status": status,
                    "request_id": exchange.request_id,
                    "client_request_id": exchange.client_request_id,
                    "key": None if exchange.key is None else exchange.key.key_id,
                    "ms": round(exchange.elapsed_ms, 3),
                    **exchange.facts,
                }
            },
        )


def _headers(exchange: Exchange) -> dict[str, str]:
    headers = {"x-request-id": exchange.request_id, "openai-processing-ms": f"{exchange.elapsed_ms:.0f}"}
    if exchange.client_request_id is not None:
        headers["x-client-request-id"] = exchange.client_request_id
    return {**headers, **exchange.answer_headers}


async def unrouted(request: Request, error: Exception) -> Response:
    """Paths and methods that do not exist get a JSON error, like everything else."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path[:200], request.method[:20]
    if error.status_code == 404:
        found = ApiError(f"there is no {path!r}; GET /openapi.json lists all paths.", status=404, code="not_found")
    elif error.status_code == 405:
        found = ApiError(f"{path!r} does not accept {method}.", status=405, code="method_not_allowed")
    else:
        found = ApiError(str(error.detail), status=error.status_code)
    return JSONResponse(found.body, found.status, error.headers)
