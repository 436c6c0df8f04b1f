"""What every call passes first and last: the headers of its answer, and its errors as JSON."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from polar_sdk.errors import BudgetExceededError
from polar_server.errors import ClientLeftError, api_error
from polar_server.exchange import Exchange, raw_headers, send_json

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from polar_server.server import Server


_log: Final = logging.getLogger("polar_server.access")
_PATHS: Final = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/models",
        "/v1/polar/quote",
        "/v1/polar/usage",
        "/health",
        "/ready",
        "/metrics",
        "/version",
    }
)
"""What the log and the metrics name; other paths are strangers' text."""
_RECEIPTS: Final = "/v1/polar/receipts"
_OPEN: Final = frozenset({"/health", "/ready"})
"""What is answered without a key."""
_SCOPES: Final = {"/metrics": "metrics", "/v1/polar/usage": "usage:read", _RECEIPTS: "usage:read"}
"""What a key must open for a path; any other needs `infer`."""


def _route(path: str) -> str:
    """The path, without what differs from call to call."""
    return _RECEIPTS if path.startswith(f"{_RECEIPTS}/") else path


class Front:
    """ASGI middleware around the router.

    Args:
        app: The router.
        server: What it serves.
    """

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app, self._server = app, server

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
            if self._server.guard is not None and exchange.path not in _OPEN:
                needed = _SCOPES.get(_route(exchange.path), "infer")
                exchange.key = await self._server.guard.check(exchange.headers, needed)
            await self._app(scope, receive, send_on)
        except ClientLeftError:
            exchange.status = exchange.status or ClientLeftError().status
        except Exception as error:
            self._server.log_unknown(error)
            if isinstance(error, BudgetExceededError):
                self._server.metrics.refused()
            if exchange.status is not None:
                raise  # half an answer is sent; the server closes the connection
            failed = api_error(error)
            await send_json(send_on, failed.body, status=failed.status, headers=failed.headers)
        finally:
            self._ended(exchange)

    def _ended(self, exchange: Exchange) -> None:
        route = _route(exchange.path)
        path = route if route in _PATHS or route == _RECEIPTS else "other"
        status = exchange.status or 0
        self._server.metrics.called(path, status)
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
