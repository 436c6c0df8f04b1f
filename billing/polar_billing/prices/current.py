"""The prices that a meter, a budget or a quote goes by: a book that is named, or what is in force in the ledger.

In this order: the book or file given, the file that POLAR_PRICE_BOOK names, the books that were put in force in the
ledger (`polar price add`, see `pricing.in_force`), the example book. What is in force is looked up again once a second,
so a book put in force elsewhere is charged by a second later at the latest. Knows no usage and no rates.
"""

from __future__ import annotations

import itertools
import os
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from polar_billing.errors import StoreError
from polar_billing.prices.book import PRICE_BOOK_VARIABLE, PriceBook
from polar_billing.prices.in_force import InForce

if TYPE_CHECKING:
    from pathlib import Path

    from polar_billing.ledger.contract import LedgerStorage


_LOOK_EVERY_S: Final = 1.0
_changes = itertools.count(1)
_last_change = 0
"""Rises with every book that this process puts in force, so that each `Prices` in it looks again at once."""


def say_changed() -> None:
    """Say that a book was put in force in some ledger."""
    global _last_change  # noqa: PLW0603  (one number per process is the point)
    _last_change = next(_changes)


class Prices:
    """What uses in one ledger are charged by. Safe in several threads.

    Args:
        ledger: Whose books in force.
        named: A book or its file, which then charges everything; None for what the top of this module says.
    """

    def __init__(self, ledger: LedgerStorage, named: PriceBook | str | Path | None = None) -> None:
        self._ledger = ledger
        self._named = named
        self._book: PriceBook | None = None
        self._in_force: InForce | None = None
        self._failure: StoreError | None = None
        self._looked_at = float("-inf")
        self._looked_after = 0

    def of(self, tenant: str | None, moment: datetime | None = None) -> PriceBook:
        """What a tenant's use is charged by.

        Args:
            tenant: Who; None for any that no book names.
            moment: The time of use; None for now.

        Raises:
            PriceBookError: The file that is named is missing or wrong.
            StoreError: The ledger cannot be read, and never was, so what is in force is not known.
        """
        if (named := self._one()) is not None:
            return named
        found = self._look().book(tenant, moment or datetime.now(UTC))
        return _example() if found is None else found

    def _one(self) -> PriceBook | None:
        """The book that charges everything, read once; None where the ledger says."""
        if self._book is None and (self._named is not None or os.environ.get(PRICE_BOOK_VARIABLE)):
            self._book = self._named if isinstance(self._named, PriceBook) else PriceBook.load(self._named)
        return self._book

    def _look(self) -> InForce:
        now, after = time.monotonic(), _last_change
        if now - self._looked_at >= _LOOK_EVERY_S or self._looked_after != after:
            try:
                choices = tuple(self._ledger.price_choices())
            except StoreError as error:  # what was in force a moment ago is the best there is
                self._failure = error
            else:
                if self._in_force is None or self._in_force.choices != choices:
                    self._in_force = InForce(choices)
            self._looked_at, self._looked_after = now, after
        if self._in_force is None:
            assert self._failure is not None
            raise self._failure
        return self._in_force


_examples: list[PriceBook] = []


def _example() -> PriceBook:
    if not _examples:
        _examples.append(PriceBook.example())
    return _examples[0]
