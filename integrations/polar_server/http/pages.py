"""`/polar/`: the operations page over HTTP. Its content comes from what is registered under `polar_server.pages`.

The page may load only its own style sheet, script and icon, cannot be framed and is not cached. Without a key it
answers only under names of this machine: otherwise a web site whose name was made to point here (DNS rebinding) could
read it. Knows no ledger.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import RedirectResponse
from starlette.routing import Route

from polar_sdk.errors import MissingExtraError
from polar_server.access.keys import LOCAL_HOST
from polar_server.access.stores import find_installed
from polar_server.errors import ApiError
from polar_server.http.exchange import Exchange, send_bytes
from polar_server.http.front import PAGES, Front, unrouted

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from polar_sdk.engine_state import Look
    from polar_server.access.keys import KeyGuard

GROUP: Final = "polar_server.pages"
_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_KEPT_S: Final = 86_400
"""How long a browser keeps what its address names by content. Unit: seconds."""


class PageAnswer(Protocol):
    """A page, or a file of it, to send."""

    @property
    def status(self) -> int:
        """HTTP status."""

    @property
    def kind(self) -> str:
        """MIME type of text in UTF-8."""

    @property
    def content(self) -> bytes:
        """The body."""

    @property
    def keep(self) -> bool:
        """Whether a browser may keep it."""


class PageStore(Protocol):
    """The operations page; see `polar_billing.dashboard.page`. Takes as long as a database does."""

    def answer(self, path: str, live: Look | None = ...) -> PageAnswer:
        """The answer to a `GET` below `/polar/`; `live` is a look at the engine, where there is one."""

    def check(self) -> None:
        """Raise where the ledger cannot be read."""


class LiveSource(Protocol):
    """An engine that can be looked at."""

    def look(self) -> Look:
        """The engine at this moment."""


def find_pages(url: str | None, zone: str = "UTC") -> PageStore:
    """The operations page that is installed.

    Args:
        url: The ledger; None for the default one.
        zone: Time zone of its days and times.

    Raises:
        MissingExtraError: None is, or it lacks what it needs.
    """
    pages: PageStore | None = find_installed(GROUP, url, zone)
    if pages is not None:
        return pages
    raise MissingExtraError(
        "the operations page needs a ledger, and none is installed.",
        hint="Install the extras billing and report of polar-llm, in a clone: `pip install '.[billing,report]'`.",
    )


def page_routes(pages: PageStore, live: LiveSource | None) -> list[Route]:
    """Routes of the page: `/polar/`, and `/polar` leads there."""
    return [
        Route(PAGES, _to_the_page, methods=["GET"]),
        Route(f"{PAGES}/{{path:path}}", _Pages(pages, live), methods=["GET"]),
    ]


def build_pages(pages: PageStore, guard: KeyGuard) -> Starlette:
    """An app of the page alone, without an engine.

    Args:
        pages: The page.
        guard: Checks API keys.
    """
    app = Starlette(
        routes=[*page_routes(pages, None), Route("/", _to_the_page, methods=["GET"])],
        middleware=[Middleware(Front, guard=guard, counts=None)],
        exception_handlers={HTTPException: unrouted},
    )
    app.router.redirect_slashes = False
    return app


async def _to_the_page(request: Request) -> Response:
    """Lead to the page by a relative address, which is right after a proxy that puts a path before ours."""
    return RedirectResponse(f".{PAGES}/")


class _Pages:
    """`GET /polar/…`."""

    def __init__(self, pages: PageStore, live: LiveSource | None) -> None:
        self._pages, self._live = pages, live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send a page, or a file of it.

        Raises:
            ApiError: It was asked for by a name that is not this machine's own.
        """
        exchange = Exchange.of(scope)
        if exchange.key is None and LOCAL_HOST.fullmatch(exchange.headers.get("host", "")) is None:
            raise ApiError(
                "without a key, this page is only at 127.0.0.1 and localhost; create one with the scope "
                "dashboard to reach it by another name.",
                status=403,
                code="host_not_allowed",
            )
        live = None if self._live is None else self._live.look()
        answer = await asyncio.to_thread(self._pages.answer, scope["path_params"]["path"], live)
        kept = f"private, max-age={_KEPT_S}, immutable" if answer.keep else "no-store"
        await send_bytes(
            send,
            answer.content,
            f"{answer.kind}; charset=utf-8",
            status=answer.status,
            headers={**_HEADERS, "cache-control": kept},
        )
