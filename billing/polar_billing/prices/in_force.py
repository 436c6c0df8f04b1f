"""Which price book a use is charged by, of those that were put in force over time. Pure: no clock, no store.

A book that has the tenant among its customers goes before the others; of several such books the one put in force last.
Every other tenant is charged by the book that is in force for all. What is put in force later changes nothing for what
was used before; only the first book also holds for the time before it, when there was none.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from polar_billing.prices.book import PriceBook


@dataclass(frozen=True)
class Choice:
    """A book, or a revision of one, put in force."""

    book: PriceBook
    for_all: bool
    """Also for tenants that no book names."""
    put_at: datetime


class InForce:
    """The books in force over time.

    Args:
        choices: In the order they were made; `put_at` never falls.
    """

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.choices = tuple(choices)
        self._moments = [choice.put_at for choice in choices]
        self._states = list(_states(choices))

    def book(self, tenant: str | None, moment: datetime) -> PriceBook | None:
        """What a use is charged by; None where no book was ever put in force.

        Args:
            tenant: Who used it; None for any that no book names.
            moment: The time of use.
        """
        if not self._states:
            return None
        named, for_all = self._states[max(bisect_right(self._moments, moment) - 1, 0)]
        if tenant is None:
            return for_all
        return next((book for book in named if book.customer_at(moment, tenant) is not None), for_all)


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
        yield tuple(one for one in reversed(latest.values()) if one.customers), latest[main]
