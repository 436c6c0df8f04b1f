"""The storage contract: what every ledger store promises, whatever the database.

`tests/billing/test_storage_contract.py` holds each backend to it. Knows no SQL.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from polar_billing.periods import ALL_TIME, Period

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime
    from decimal import Decimal
    from types import TracebackType

    from polar_billing.price_book import PriceBook
    from polar_billing.rating import Rating
    from polar_sdk.usage import UsageRecord

__all__ = ["ALL_TENANTS", "AllTenants", "LedgerStorage", "Selection", "StoredUsage", "content_hash"]


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


@dataclass(frozen=True)
class StoredUsage:
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
    def read(self, selection: Selection, *, newest: int | None = None) -> Iterator[StoredUsage]:
        """Read usage in the order it was served (service time, then seq), from one state of the store.

        Args:
            selection: Which records.
            newest: Only so many of the latest, latest first.
        """

    @abstractmethod
    def price_books(self) -> dict[str, PriceBook]:
        """Every book that ever rated a record, by content hash."""

    @abstractmethod
    def close(self) -> None:
        """Release connections; the store can be used again and then opens new ones."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def content_hash(record: UsageRecord) -> str:
    """SHA-256 over a record's canonical JSON: equal for an identical replay, in any order of its tags."""
    text = json.dumps(record.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
