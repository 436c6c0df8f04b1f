"""The app under uvicorn, and how the process ends.

The first SIGTERM lets answers finish: `/ready` and new requests get 503, and the socket stays open meanwhile, so that
clients receive it. A second signal stops them at once. Either way every record is stored before the process ends.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import TYPE_CHECKING, Any, Final

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from polar_sdk.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from starlette.applications import Starlette

    from polar_server.server import Server

_IDLE_CONNECTION_S: Final = 75
"""Longer than what balancers in front keep a connection, so that they close it first."""
HEADERS_S: Final = 30.0
"""Time for the headers of a request, and for its beginning on a new connection. Unit: seconds."""
_LAST_WORDS_S: Final = 5
"""How long connections have, when all answers are recorded, to take the end of theirs. Unit: seconds."""


class _Protocol(H11Protocol):
    """HTTP whose headers must end within a time: a connection on which they never do would be held for ever."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._await_no_more()
        elif self._patience is None and self.conn.trailing_data[0]:  # the next request has begun
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._await_no_more()
        super().connection_lost(exc)

    def _await_headers(self) -> None:
        self._patience = self.loop.call_later(HEADERS_S, self.transport.close)

    def _await_no_more(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


def listening(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address.

    Raises:
        InvalidRequestError: It cannot be, as where another process listens there.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        why = "is in use" if in_use else f"cannot be listened on ({error.strerror})"
        how = "name another, or 0 for any that is free" if in_use else "name another host or port"
        raise InvalidRequestError(f"--port {port} of --host {host} {why}; {how}.") from error
    return bound


class PlainServer(uvicorn.Server):
    """uvicorn without its own log, which says when it listens."""

    def __init__(self, app: Starlette, *, host: str, port: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=_Protocol,  # h11 bounds what a request's headers may take; httptools does not
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_IDLE_CONNECTION_S,
                timeout_graceful_shutdown=_LAST_WORDS_S,
            )
        )
        self.on_start: Callable[[str], object] | None = None
        """Called with the URL when the socket listens."""

    def run(self, sockets: Any = None) -> None:
        """Serve until a signal comes.

        Raises:
            InvalidRequestError: Nothing can listen there.
        """
        super().run(sockets or [listening(self.config.host, self.config.port)])

    @property
    def url(self) -> str:
        """The URL, once the server has started."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def startup(self, sockets: Any = None) -> None:
        """Open the socket."""
        await super().startup(sockets)
        if self.started and self.on_start is not None:
            self.on_start(self.url)


class UvicornServer(PlainServer):
    """uvicorn, which waits for answers rather than for connections."""

    def __init__(self, app: Starlette, *, host: str, port: int) -> None:
        super().__init__(app, host=host, port=port)
        self._served: Server = app.state.server
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None

    async def serve(self, sockets: Any = None) -> None:
        """Serve until a signal has come and every answer is recorded."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came: end in order, or at the second one at once."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.end)

    def end(self) -> None:
        """Act on a signal, in the event loop."""
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end())
        else:
            self._served.answers.stop()

    async def _end(self) -> None:
        await self._served.answers.drain(self._served.settings.drain)
        self.should_exit = True
