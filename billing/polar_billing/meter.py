"""The meter: the sink that stores every usage record in a ledger and answers what it cost.

The engine finds it through the entry point `polar_sdk.sinks`, so nobody imports this package to be metered.
Knows neither the database nor how prices are applied.
"""

from __future__ import annotations

import atexit
import os
import threading
from typing import TYPE_CHECKING, Any, Final

from polar_billing.ledger import Ledger
from polar_billing.location import resolve
from polar_billing.money import from_scaled, plain
from polar_billing.price_book import PRICE_BOOK_VARIABLE, PriceBook
from polar_billing.rating import COMPUTE, rate
from polar_billing.storage import LedgerStorage
from polar_sdk.usage import UsageSink

if TYPE_CHECKING:
    from decimal import Decimal
    from pathlib import Path

    from polar_billing.rating import Rating
    from polar_sdk.usage import UsageRecord

__all__ = ["Meter", "open_meter", "receipt_of"]

DEFAULT_SOURCE: Final = "polar"


class Meter(UsageSink):
    """Stores usage records durably, exactly once each, and answers with a receipt. Safe in several threads.

    Constructing one opens nothing: the ledger is made at the first `check` or `emit`.

    Args:
        ledger: A store, a URL or the path of a SQLite file; None for `POLAR_LEDGER` or the default file.
        prices: A price book or its file; None for `POLAR_PRICE_BOOK` or the example book. Read once, at first
            use.
        source: Who meters; request ids are unique per (tenant, source).
    """

    def __init__(
        self,
        ledger: LedgerStorage | str | None = None,
        *,
        prices: PriceBook | str | Path | None = None,
        source: str = DEFAULT_SOURCE,
    ) -> None:
        self.ledger = ledger if isinstance(ledger, LedgerStorage) else Ledger(ledger)
        self.source = source
        self._prices = prices
        self._book: PriceBook | None = None
        self._older_books: dict[str, PriceBook] = {}

    @property
    def price_book(self) -> PriceBook:
        """The price book in force.

        Raises:
            PriceBookError: Its file is missing or wrong.
        """
        if self._book is None:
            self._book = self._prices if isinstance(self._prices, PriceBook) else PriceBook.load(self._prices)
        return self._book

    def check(self) -> None:
        """Raise if a record could not be priced and stored now.

        Raises:
            PriceBookError: The price book's file is missing or wrong.
            StoreError: The ledger is missing, read-only, full, locked or damaged.
        """
        _ = self.price_book
        self.ledger.check()

    def emit(self, record: UsageRecord) -> dict[str, Any]:
        """Store one record and its receipt; both are durable when this returns.

        A record emitted again with the same content stores nothing and gets the receipt of the first time.

        Returns:
            The receipt: cost as exact decimal text (None where unrated), currency, compute units, charge
            lines.

        Raises:
            ConflictError: The ledger holds this request id of this tenant with other content.
            StoreError: The record could not be stored.
        """
        book = self.price_book
        rating = rate(record, book)
        stored = self.ledger.append(record, source=self.source, book=book, rating=rating)
        if stored.price_book_hash != book.content_hash:  # a replay, first rated under another book
            book = self._older_book(stored.price_book_hash)
            rating = rate(record, book)
        return receipt_of(record, book, rating)

    def _older_book(self, content_hash: str) -> PriceBook:
        if content_hash not in self._older_books:
            self._older_books = self.ledger.price_books()
        return self._older_books[content_hash]

    def close(self) -> None:
        """Release the ledger's connections; using the meter again opens new ones."""
        self.ledger.close()


def receipt_of(record: UsageRecord, book: PriceBook, rating: Rating) -> dict[str, Any]:
    """What a request cost, JSON-like; the lines sum to the cost to the last of its 12 decimals."""
    rounded = rating.rounded()
    lines = [
        _line(line.item.name, line.quantity, line.item.unit, line.unit_price, amount)
        for line, amount in zip(rating.lines, rounded.amounts, strict=True)
    ]
    if rounded.residue:
        lines.append(
            {
                "name": "rounding",
                "quantity": None,
                "unit": None,
                "unit_price": None,
                "amount": f"{rounded.residue:f}",
            }
        )
    return {
        "cost": None if rating.cost is None else f"{rating.cost:f}",
        "currency": rating.currency,
        "compute_units": f"{from_scaled(record.flops.total, COMPUTE.decimals):f}",
        "price_book": book.id,
        "price_book_hash": book.content_hash,
        "tier": record.tier,
        "lines": lines,
        "unrated": rating.unrated,
    }


def _line(name: str, quantity: Decimal, unit: str, unit_price: Decimal, amount: Decimal) -> dict[str, Any]:
    return {
        "name": name,
        "quantity": f"{quantity:f}",
        "unit": unit,
        "unit_price": plain(unit_price),
        "amount": f"{amount:f}",
    }


_open: dict[tuple[str, str | None], Meter] = {}
_opening = threading.Lock()


def open_meter(url: str | None = None) -> UsageSink:
    """The meter of a ledger; one per ledger and price book in a process, shared by all who ask for it.

    Args:
        url: As for `Meter`.

    Raises:
        LedgerUrlError: The URL names no supported store.
    """
    key = (resolve(url).render_as_string(hide_password=False), os.environ.get(PRICE_BOOK_VARIABLE))
    with _opening:
        if key not in _open:
            _open[key] = Meter(key[0])
        return _open[key]


@atexit.register
def _close_all() -> None:
    for meter in _open.values():
        meter.close()
