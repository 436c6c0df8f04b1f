"""The choice of the price book that usage is charged by: the one named, or the one in force.

In this order: the book or file given, the file that POLAR_PRICE_BOOK names, the books that were put in force in the
ledger (`polar price add`), the example book.

Of the books in force, one that lists the tenant among its customers comes before the others; of several such books, the
one put in force last. Every other tenant is charged by the book that is in force for all. A book put in force later
does not change charges for earlier usage; only the first book also applies to the time before it, when there was none.

The books in force are looked up again once a second, so a book put in force elsewhere applies within a second. Knows no
usage, no rates and no ledger: the books in force are passed in.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Final

from polar_billing.errors import StoreError
from polar_billing.prices.book import PRICE_BOOK_VARIABLE, PriceBook
from polar_billing.values.cached import CachedValue, Changes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path


_SEEN_WITHIN_S: Final = 1.0
_changes: Final = Changes()


def say_changed() -> None:
    """Say that a book was put in force in some ledger."""
    _changes.announce()


@dataclass(frozen=True)
class Choice:
    """A book, or a revision of one, put in force."""

    book: PriceBook
    for_all: bool
    """Also for tenants that no book names."""
    put_at: datetime


class InForce:
    """The books in force over time."""

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.choices = tuple(choices)
        self._moments = [choice.put_at for choice in choices]
        self._states = list(_states(choices))

    def book(self, tenant: str | None, moment: datetime) -> PriceBook | None:
        """The book that charges a use at a moment; None if no book was ever put in force.

        A tenant of None stands for any that no book names.
        """
        if not self._states:
            return None
        named, for_all = self._states[max(bisect_right(self._moments, moment) - 1, 0)]
        if tenant is None:
            return for_all
        return next((book for book in named if book.customer_at(moment, tenant) is not None), for_all)

    def books(self) -> tuple[PriceBook, ...]:
        """The books that are in force now, for whomever."""
        named, for_all = self._states[-1] if self._states else ((), None)
        return named if for_all is None or for_all in named else (*named, for_all)


def _states(choices: Sequence[Choice]) -> Iterator[tuple[tuple[PriceBook, ...], PriceBook]]:
    """After each choice: the books with customers, the latest first, and the book for all."""
    latest: dict[str, PriceBook] = {}
    main = ""
    for choice in choices:
        book = choice.book
        latest.pop(book.id, None)
        latest[book.id] = book
        if choice.for_all or not main:
            main = book.id
        yield tuple(book for book in reversed(latest.values()) if book.customers), latest[main]


class Prices:
    """Finds the book that charges each use in one ledger. Safe in several threads.

    `choices` reads the books put in force, in order. A book that is `named`, or its file, charges everything.
    """

    def __init__(self, choices: Callable[[], Sequence[Choice]], named: PriceBook | str | Path | None = None) -> None:
        self._read_choices = choices
        self._named = named
        self._book: PriceBook | None = None
        """The book that charges everything, read once; None if the ledger says."""
        self._in_force = CachedValue(self._read, _changes)

    def of(self, tenant: str | None, moment: datetime | None = None) -> PriceBook:
        """Find the book that charges a tenant's use, by default now; None for any tenant that no book names.

        Raises:
            PriceBookError: The file that is named is missing or wrong.
            StoreError: The ledger cannot be read, and never was, so what is in force is not known.
        """
        if self._book is None and (self._named is not None or os.environ.get(PRICE_BOOK_VARIABLE)):
            self._book = self._named if isinstance(self._named, PriceBook) else PriceBook.load(self._named)
        if self._book is not None:
            return self._book
        with suppress(StoreError):  # what was in force a moment ago is the best there is
            self._in_force.refresh(_SEEN_WITHIN_S)
        return self._in_force.known().book(tenant, moment or datetime.now(UTC)) or _example()

    def books(self) -> tuple[PriceBook, ...]:
        """The books that charge somebody's use now.

        Raises:
            PriceBookError: The file that is named is missing or wrong.
            StoreError: The ledger cannot be read, and never was.
        """
        main = self.of(None)
        if self._book is not None:
            return (main,)
        return self._in_force.known().books() or (main,)

    def _read(self) -> InForce:
        choices, known = tuple(self._read_choices()), self._in_force.value
        return known if known is not None and known.choices == choices else InForce(choices)


@cache
def _example() -> PriceBook:
    return PriceBook.example()
