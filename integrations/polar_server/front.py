"""What every call passes first and last: the headers of its answer, and its errors as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_server.errors import ClientLeftError, api_error
from polar_server.exchange import Exchange, raw_headers, send_json

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from polar_server.server import Server


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
            await self._app(scope, receive, send_on)
        except ClientLeftError:
            exchange.status = exchange.status or ClientLeftError().status
        except Exception as error:
            self._server.log_unknown(error)
            if exchange.status is not None:
                raise  # half an answer is sent; the server closes the connection
            failed = api_error(error)
            await send_json(send_on, failed.body, status=failed.status, headers=failed.headers)


def _headers(exchange: Exchange) -> dict[str, str]:
    headers = {"x-request-id": exchange.request_id, "openai-processing-ms": f"{exchange.elapsed_ms:.0f}"}
    if exchange.client_request_id is not None:
        headers["x-client-request-id"] = exchange.client_request_id
    return {**headers, **exchange.answer_headers}
