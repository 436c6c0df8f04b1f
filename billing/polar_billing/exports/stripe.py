"""Charged usage as Stripe meter events: whole numbers, with identifiers that a second run repeats.

One event per request and meter, as `POST /v1/billing/meter_events` takes it. A meter counts one item of one tier, so
that each can have its own price. Compute is counted in thousandths of a CU (10^9 FLOPs), tokens and requests singly.

Rounding is carried over. Within one tenant, meter and calendar month, usage is taken in the order it was stored, and a
request's value is the number of whole units by which it increases the sum. So the values of a month sum to the whole
units of that month's total, and less than one unit is left over, which `Leftover` states. An event is the same for any
exported period and in every run: usage stored later comes after, and changes no earlier event. Unrated and free usage
is in no event.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from polar_billing.errors import QueryError
from polar_billing.ledger.books import books_in_force, read_books
from polar_billing.prices.rating import COMPUTE, ITEMS, Counts, charged_flops, rate
from polar_billing.statements.retention import check_kept
from polar_billing.values.money import from_scaled
from polar_billing.values.periods import Period, Window
from polar_sdk import reading

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from datetime import datetime
    from decimal import Decimal
    from pathlib import Path

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import AllTenants, StoredUsage
    from polar_billing.prices.book import PriceBook
    from polar_sdk.usage import UsageRecord


FLOPS_PER_UNIT: Final = 10**9
MAX_AGE_DAYS: Final = 35
"""Stripe refuses older events."""
_MAX_NAME: Final = 100
_PLAIN: Final = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789")
_CUSTOMER: Final = re.compile(r"cus_[A-Za-z0-9]+")


@dataclass(frozen=True)
class Leftover:
    """A rest of less than one unit, which a month's events leave out of a meter."""

    tenant: str
    meter: str
    month: str
    quantity: Decimal
    """Unit: CU."""


@dataclass
class MeterEvents:
    """Makes events, and knows afterwards what is left over.

    Args:
        books: The books to charge by, by the content hash of a receipt's book.
        customers: Stripe's customer of each tenant; a tenant whose name is one needs none.
        period: Only events of usage served in it are made. Usage of the whole months that it touches is needed.
    """

    books: Mapping[str, PriceBook]
    customers: Mapping[str, str]
    period: Period
    unrated: int = 0
    """Requests of the period without a price."""
    oldest: datetime | None = None
    """Service time of the oldest usage in an event."""
    _sums: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    _month: Period | None = None
    """The last one that was met: usage comes roughly by time."""

    def of(self, usage: Iterable[StoredUsage]) -> Iterator[dict[str, Any]]:
        """The events of usage, which comes in the order it was stored."""
        for stored in usage:
            moment = stored.record.started_at
            wanted = self.period.contains(moment)
            for item, count in self._charged(stored, wanted):
                value = self._grow(stored.record, item, count)
                if value and wanted:
                    self.oldest = moment if self.oldest is None else min(moment, self.oldest)
                    yield self._event(stored, item, value)

    def leftovers(self) -> Iterator[Leftover]:
        """The rests of less than one unit, by tenant, meter and month; nothing if a rest is 0."""
        for (tenant, meter, month), flops in sorted(self._sums.items()):
            if rest := flops % FLOPS_PER_UNIT:
                yield Leftover(tenant, meter, month, from_scaled(rest, COMPUTE.decimals))

    def _charged(self, stored: StoredUsage, wanted: bool) -> Iterator[tuple[str, int]]:
        """The items that a request is charged for, with their counts."""
        record, book = stored.record, self.books[stored.price_book_hash]
        rating = rate(record, book, counterfactuals=False)
        if rating.unrated is not None:
            self.unrated += wanted
            return
        if record.outcome in book.free_outcomes:
            return
        counts = {line.item.name: line.count for line in rating.lines}
        _, terms = book.terms_at(record.started_at, record.tenant)
        used = Counts(1, charged_flops(record, book), record.tokens.input, record.tokens.output)
        for item in () if terms is None else terms.items:  # which the plan prices over the period
            counts[ITEMS[item.per].name] = used.by_item[item.per]
        yield from sorted(counts.items())

    def _grow(self, record: UsageRecord, item: str, count: int) -> int:
        """Add to a sum; by how many whole units it has grown."""
        if item != COMPUTE.name:
            return count
        key = (record.tenant, meter_name(item, record.tier), self._month_of(record.started_at))
        before = self._sums[key]
        self._sums[key] = before + count
        return (before + count) // FLOPS_PER_UNIT - before // FLOPS_PER_UNIT

    def _month_of(self, moment: datetime) -> str:
        zone = self.period.zone
        if self._month is None or not self._month.contains(moment):
            self._month = Period.containing(moment, Window.MONTH, zone)
        begin = self._month.since or moment
        return f"{self._month.local_date(begin):%Y-%m}"

    def _event(self, stored: StoredUsage, item: str, value: int) -> dict[str, Any]:
        record, meter = stored.record, meter_name(item, stored.record.tier)
        identity = [record.tenant, stored.source, record.request_id, meter]
        return {
            "event_name": meter,
            "identifier": f"polar-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()}",
            "timestamp": int(record.started_at.timestamp()),
            "payload": {"stripe_customer_id": self._customer(record.tenant), "value": str(value)},
        }

    def _customer(self, tenant: str) -> str:
        customer = self.customers.get(tenant) or (tenant if _CUSTOMER.fullmatch(tenant) else None)
        if customer is None:
            raise QueryError(
                f"tenant {tenant!r} has no Stripe customer.",
                hint='Add a line like acme = "cus_…" to the file of --customers.',
            )
        return customer


@lru_cache(maxsize=1024)
def meter_name(item: str, tier: str | None) -> str:
    """The `event_name` of one item of one tier: `polar_compute_standard`; tiers that differ have names that differ.

    Whatever is no small letter or digit is written as an underscore and two hexadecimal digits per byte; a name that
    Stripe would find too long ends in a hash.
    """
    base = f"polar_{item.replace(' ', '_')}"
    if tier is None:
        return f"{base}__by_hand"  # no tier begins with a single underscore and a letter that is no digit
    written = tier.encode("utf-8", "surrogatepass")
    name = f"{base}_{''.join(chr(byte) if byte in _PLAIN else f'_{byte:02x}' for byte in written)}"
    return name if len(name) <= _MAX_NAME else f"{base}_h_{hashlib.sha256(written).hexdigest()[:32]}"


def whole_months(period: Period) -> Period:
    """The calendar months that a period touches, in its zone."""
    since = None if period.since is None else Period.containing(period.since, Window.MONTH, period.zone).since
    if period.until is None:
        return Period(since, None, period.zone)
    last = Period.containing(period.until, Window.MONTH, period.zone)
    return Period(since, period.until if last.since == period.until else last.until, period.zone)


def charging_books(ledger: Ledger) -> dict[str, PriceBook]:
    """The revision in force of the book of each receipt, by the content hash of the receipt's book.

    Statements charge by it, and it agrees with the receipts about the past.
    """
    ledger.price_books()  # records on their way bring in their books
    with ledger.snapshot() as connection:
        in_force = books_in_force(connection)
        return {digest: in_force[book.id] for digest, book in read_books(connection).items()}


def check_whole(ledger: Ledger, tenant: str | AllTenants, period: Period) -> None:
    """Refuse a period of which retention has deleted usage."""
    with ledger.snapshot() as connection:
        check_kept(connection, tenant, period)


def read_customers(path: Path | None) -> dict[str, str]:
    """Stripe's customers by tenant, from a TOML file with a line per tenant.

    Raises:
        QueryError: The file cannot be read, or is not such a file.
    """
    if path is None:
        return {}
    try:
        customers = reading.parse_toml(reading.read_text(path, reading.MAX_TOML_BYTES))
    except (OSError, reading.Unreadable) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise QueryError(f"file {str(path)!r} of --customers cannot be read ({reason}).") from error
    for tenant, customer in customers.items():
        if not isinstance(customer, str) or not _CUSTOMER.fullmatch(customer):
            raise QueryError(
                f"file {str(path)!r} of --customers: {reading.shown(tenant)} = {reading.shown(str(customer))} is not "
                "a Stripe customer.",
                hint='Write it like acme = "cus_NciAYcXfLnqBoz".',
            )
    return customers
