"""The operations page by path: requests from a web server, and the responses to them. Knows no web framework.

A page is rendered at most every 0.4 seconds, so many readers cost no more than one.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from polar_billing.dashboard.templates import KINDS, Templates
from polar_billing.dashboard.view import Looks, receipt_of
from polar_billing.errors import StoreError
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS
from polar_billing.values.periods import load_zone
from polar_sdk.errors import PolarError

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from polar_sdk.engine_state import Look


FRESH_S: Final = 0.4
"""Age at which a page is rendered again. Unit: seconds."""
_REQUESTS: Final = "requests/"
_HTML: Final = "text/html"
_MAX_SEQ: Final = 2**63 - 1


class Answer(NamedTuple):
    """A response to send."""

    status: int
    """Status code of HTTP."""
    kind: str
    """MIME type; the content is UTF-8."""
    content: bytes
    keep: bool = False
    """Whether a browser may keep it: its address changes when it does."""


class Dashboard:
    """The operations page of one ledger. Safe in several threads; an answer takes as long as its questions.

    Args:
        ledger: A ledger, a URL or the path of a SQLite file; None for `POLAR_LEDGER` or the default file.
        zone: IANA time zone in whose calendar today is, and in which moments are written.
        clock: Returns the time, UTC; None for this machine's.

    Raises:
        MissingExtraError: jinja2 is not installed.
        PeriodError: No such zone.
    """

    def __init__(
        self, ledger: Ledger | str | None = None, *, zone: str = "UTC", clock: Callable[[], datetime] | None = None
    ) -> None:
        load_zone(zone)
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
        self.zone = zone
        self._templates = Templates()
        self._looks = Looks(self.ledger, clock)
        self._looking, self._checking = threading.Lock(), threading.Lock()
        self._page: tuple[float, bytes] | None = None

    def check(self) -> None:
        """Raise where the ledger cannot be read; one that does not exist yet can."""
        with self.ledger.snapshot():
            pass

    def answer(self, path: str, live: Look | None = None) -> Answer:
        """Answer a `GET`.

        Args:
            path: Below where the page is: empty for the page itself, `requests/NUMBER`, or a file of it.
            live: What the engine does now; None if there is none.
        """
        files = self._templates.files
        if path in files:
            return Answer(200, KINDS[path], files[path], keep=True)
        try:
            if not path:
                return Answer(200, _HTML, self._operations(live))
            if path.startswith(_REQUESTS):
                return self._request(path.removeprefix(_REQUESTS))
        except PolarError as error:
            status = 503 if isinstance(error, StoreError) else 500
            base = "../" if path else ""
            return self._error(status, "The ledger cannot be read", str(error), base)
        return self._error(404, "There is no such page", "The operations page is one level up.", "")

    def _operations(self, live: Look | None) -> bytes:
        with self._looking:
            if self._page is None or time.monotonic() - self._page[0] >= FRESH_S:
                view = self._looks.look(self.zone, live)
                self._page = (time.monotonic(), self._templates.operations(view).encode())
            return self._page[1]

    def _request(self, written: str) -> Answer:
        seq = int(written) if written.isascii() and written.isdigit() and len(written) < 20 else 0
        found = None
        if 0 < seq <= _MAX_SEQ:
            with self._checking, self.ledger.snapshot() as connection:
                found = receipt_of(connection, ALL_TENANTS, seq)
        if found is None:
            return self._error(404, "There is no such request", "The ledger has no request with this number.", "../")
        return Answer(200, _HTML, self._templates.receipt(found, self.zone).encode())

    def _error(self, status: int, title: str, message: str, base: str) -> Answer:
        return Answer(status, _HTML, self._templates.error(title, message, base).encode())


def open_pages(url: str | None, zone: str = "UTC") -> Dashboard:
    """The operations page of a ledger, for a server that found this function by its entry point."""
    return Dashboard(url, zone=zone)
