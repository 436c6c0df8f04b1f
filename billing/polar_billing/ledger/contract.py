"""The storage contract: what every ledger store promises, whatever the database.

`tests/billing/ledger/test_storage_contract.py` holds each backend to it. Knows no SQL.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from polar_billing.values.canonical import record_json
from polar_billing.values.money import to_units
from polar_billing.values.periods import ALL_TIME, Period

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime
    from decimal import Decimal
    from types import TracebackType

    from polar_billing.errors import ConflictError
    from polar_billing.ledger.rollups import Sum
    from polar_billing.prices.book import PriceBook
    from polar_billing.prices.in_force import Choice
    from polar_billing.prices.rating import Rating
    from polar_sdk.usage import UsageRecord


Identity = tuple[str, str, str]
"""Tenant, source, request id: what a request is stored once by."""


class AllTenants:
    """Stands where a tenant would: the operator's view. A query never spans tenants by omission."""

    def __repr__(self) -> str:
        return "ALL_TENANTS"


ALL_TENANTS: Final = AllTenants()


@dataclass(frozen=True)
class Selection:
    """Which usage to read; every condition must hold."""

    tenant: str | AllTenants
    period: Period = ALL_TIME
    """Over service time."""
    tier: str | None = None
    """None for every tier, requests without one included."""
    model: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


class StoredUsage(NamedTuple):
    """One request as the ledger holds it."""

    seq: int
    """Rises with every record stored; never given twice."""
    source: str
    record: UsageRecord
    stored_at: datetime
    """When the ledger took it in, UTC; service time is `record.started_at`."""
    price_book_hash: str
    """The book that the receipt was made by."""
    cost: Decimal | None
    """What the receipt said, 12 decimals; None where unrated. Unit: currency units of the book."""
    unrated: str | None


@dataclass(frozen=True)
class PrunedUsage:
    """What retention leaves of a request: its number, its content hash and its receipt."""

    seq: int
    source: str
    stored_at: datetime
    price_book_hash: str
    cost: Decimal | None
    unrated: str | None

    def of(self, record: UsageRecord) -> StoredUsage:
        """The stored request again, with the record that a replay brought."""
        return StoredUsage(self.seq, self.source, record, self.stored_at, self.price_book_hash, self.cost, self.unrated)


@dataclass(frozen=True)
class Entry:
    """One record on its way into the ledger, with what its receipt says."""

    record: UsageRecord
    source: str
    book: PriceBook
    """The book that the receipt was made by."""
    cost: Decimal | None
    """None where unrated. Unit: currency units of the book."""
    unrated: str | None = None

    @cached_property
    def identity(self) -> Identity:
        """What it is stored once by."""
        return (self.record.tenant, self.source, self.record.request_id)

    @cached_property
    def cost_units(self) -> int | None:
        """The cost as the ledger holds it. Unit: 10^-12 of a currency unit.

        Raises:
            AmountError: It is beyond what the ledger can hold.
        """
        return None if self.cost is None else to_units(self.cost)

    @cached_property
    def canonical(self) -> bytes:
        """The record's JSON; made once, for the spool and for the hash."""
        return record_json(self.record)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over it, hexadecimal."""
        return hashlib.sha256(self.canonical).hexdigest()


class LedgerStorage(ABC):
    """An append-only store of usage records and receipts. Safe to call from several threads.

    * `append` is durable when it returns, and idempotent by (tenant, source, request id).
    * Nothing stored is ever changed or deleted.
    * Constructing a store opens and creates nothing; reading one that does not exist yet finds it empty.
    """

    @property
    @abstractmethod
    def location(self) -> str:
        """Where the ledger is, for messages; holds no password."""

    @abstractmethod
    def check(self) -> None:
        """Raise StoreError if a record could not be stored now."""

    @abstractmethod
    def append(self, record: UsageRecord, *, source: str, book: PriceBook, rating: Rating) -> StoredUsage:
        """Store one record with its receipt.

        Returns:
            The stored record; for a replay the one stored the first time, with the receipt of that time.

        Raises:
            ConflictError: The same (tenant, source, request id) is stored with other content.
            StoreError: It could not be stored; then nothing was.
        """

    @abstractmethod
    def append_many(self, entries: Sequence[Entry]) -> list[StoredUsage | ConflictError]:
        """Store many records with their receipts in one transaction, in order.

        Returns:
            For each entry what `append` would return, or the conflict that `append` would raise; one that conflicts
            stores nothing and keeps none of the others out.

        Raises:
            StoreError: The store cannot take them; then nothing was stored.
        """

    @abstractmethod
    def read(self, selection: Selection, *, newest: int | None = None) -> Iterator[StoredUsage]:
        """Read usage in the order it was served (service time, then seq), from one state of the store.

        Args:
            selection: Which records.
            newest: Only so many of the latest, latest first.
        """

    @abstractmethod
    def usage_sums(self, selection: Selection, *, hourly: bool, rollups: bool = True) -> Iterator[Sum]:
        """Read usage added up, by tenant, tier, model, source, outcome, price book and reason for no price.

        What retention took the facts of counts in sums of whole hours.

        Args:
            selection: Which usage; its tags are not looked at.
            hourly: Keep hours apart.
            rollups: False to add it all up from usage.
        """

    @abstractmethod
    def price_books(self) -> dict[str, PriceBook]:
        """Every book that ever rated a record, by content hash."""

    def price_choices(self) -> Sequence[Choice]:
        """The price books that were put in force, in order; none where a store keeps no such thing.

        Raises:
            StoreError: It cannot be read.
        """
        return ()

    @abstractmethod
    def close(self) -> None:
        """Release connections; the store can be used again and then opens new ones."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
