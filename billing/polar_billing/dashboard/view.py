"""The contents of the page at one moment, read from the ledger in one transaction, and requests with their receipts.

A key's last use is a usage record with its id as the tag `key`. Searching for them reads every record once: the newest
first, some at a time, so that no page waits for it, and later only new ones. The page never shows a key's secret, not
even its hash. Knows no HTML.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import func, select

from polar_billing.access.keys import latest_keys
from polar_billing.budgets.counters import tag_of
from polar_billing.budgets.enforcement import Budgets
from polar_billing.dashboard.charges import Books, Cost
from polar_billing.dashboard.layers import Heat, heat_of
from polar_billing.dashboard.service import LedgerHealth, SpoolHealth, ledger_health, spool_health
from polar_billing.ledger.append import joined
from polar_billing.ledger.records import ALL_TENANTS, Selection, from_row
from polar_billing.ledger.rollups import read_sums, usage_of
from polar_billing.ledger.schema import usage_table
from polar_billing.metering.spool import recover_abandoned
from polar_billing.proof.receipts import ReceiptCheck, check_receipt, make_receipt
from polar_billing.proof.verify import MALFORMED
from polar_billing.reports.drift import KIND_TAG, promises_of, saved_by
from polar_billing.values.periods import Period, Window

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import Connection

    from polar_billing.access.keys import ApiKey
    from polar_billing.budgets.offers import Standing
    from polar_billing.ledger.audits import Watched
    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import AllTenants, StoredUsage
    from polar_billing.prices.book import PriceBook
    from polar_billing.reports.drift import PromiseDrift, Saved
    from polar_billing.reports.summary import Summary
    from polar_sdk.engine_state import Look

MAX_REQUESTS: Final = 100
_LATELY: Final = timedelta(hours=1)
_MINUTE: Final = timedelta(minutes=1)
_WEEK: Final = timedelta(days=7)
_WEEK_KEPT: Final = timedelta(minutes=5)
_MAX_IN_WEEK: Final = 200_000
_AT_A_TIME: Final = 20_000
"""Older records that one look reads."""
_LATE: Final = 1_000
"""Newer records that are read again: on PostgreSQL another transaction's lower number may be committed later."""


class Ended(NamedTuple):
    """Usage stored within the last minute."""

    requests: int
    tokens_input: int
    tokens_output: int

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens."""
        return self.tokens_output / _MINUTE.total_seconds()


class Receipt(NamedTuple):
    """A request, its receipt as the ledger has it, and whether the ledger still agrees with itself about it."""

    stored: StoredUsage
    receipt: dict[str, Any]
    check: ReceiptCheck


@dataclass(frozen=True)
class KeyUse:
    """A key, and what is known of its use."""

    key: ApiKey
    state: str
    """`active`, or why it opens nothing."""
    last_used: datetime | None
    """When its latest request was served; None if none is known."""
    is_known: bool
    """False while older records have not been read yet, so that None does not mean never."""


class LastUses:
    """When each key was last used, as far as records have been read. For one caller at a time."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], datetime] = {}
        self._read: tuple[int, int] | None = None
        """First and last number that were read."""

    def refresh(self, connection: Connection) -> None:
        """Read what is new, and some of what is older."""
        newest: int = connection.execute(select(func.max(usage_table.c.seq))).scalar() or 0
        first, last = self._read or (newest + 1, newest)
        self._look(connection, last - _LATE, newest)
        older = max(first - _AT_A_TIME, 1)
        self._look(connection, older - 1, first - 1)
        self._read = (min(older, first), newest)

    def _look(self, connection: Connection, after: int, until: int) -> None:
        if after >= until:
            return
        usage, key = usage_table.c, tag_of(connection, "key").label("key_id")
        query = select(usage.tenant, key, func.max(usage.started_at).label("served"))
        query = query.where(usage.seq > after, usage.seq <= until, key.is_not(None)).group_by(usage.tenant, key)
        for tenant, key_id, served in connection.execute(query):
            known = self._known.get((tenant, key_id))
            self._known[tenant, key_id] = served if known is None else max(known, served)

    @property
    def complete(self) -> bool:
        """Whether every record has been read."""
        return self._read is not None and self._read[0] <= 1

    def of(self, key: ApiKey) -> datetime | None:
        """The last use of a key that is known."""
        return self._known.get((key.tenant, key.key_id))


def keys_of(connection: Connection, tenant: str | AllTenants, uses: LastUses, now: datetime) -> list[KeyUse]:
    """The keys of a tenant or of all, those that open something first, then by tenant and name."""
    keys = latest_keys(connection, tenant)
    if not keys:
        return []
    uses.refresh(connection)
    rows = [
        KeyUse(key, key.state(now), served, served is not None or uses.complete)
        for key in keys
        for served in [uses.of(key)]
    ]
    return sorted(rows, key=lambda row: row.state not in {"active", "not yet valid"})  # stable


@dataclass(frozen=True)
class View:
    """The page's contents."""

    at: datetime
    """UTC."""
    ledger: str
    today: Period
    live: Look | None
    """None if the page's server runs no engine."""
    ended: Ended
    charges: Sequence[Summary]
    """Today's charges, one summary per currency."""
    heat: Sequence[Heat]
    """Layers of the last hour."""
    requests: Sequence[StoredUsage]
    """The latest, the last first."""
    books: Books
    budgets: Sequence[Standing]
    keys: Sequence[KeyUse]
    promises: Sequence[PromiseDrift]
    week: Sequence[Saved] | None
    """Savings of tiers in the last seven days by kind and length; None if there are too many requests to add up."""
    ledger_health: LedgerHealth
    spool: SpoolHealth

    def book_of(self, stored: StoredUsage) -> PriceBook:
        """The book of a request's receipt."""
        return self.books[stored.price_book_hash]


class Looks:
    """Looks at a ledger, one after another; remembers what cannot change. For one caller at a time.

    Args:
        ledger: What to look at.
        clock: Returns the time, UTC; None for this machine's, and the database's where budgets begin and end.
    """

    def __init__(self, ledger: Ledger, clock: Callable[[], datetime] | None = None) -> None:
        self._ledger, self._clock = ledger, clock
        self._budgets = Budgets(ledger)
        self._books = Books()
        self._cost = Cost(self._books)
        self._uses = LastUses()
        self._watched: dict[str, Watched] = {}
        self._week: tuple[datetime, Sequence[Saved] | None] | None = None

    def look(self, zone: str, live: Look | None) -> View:
        """Ask everything; today is in the calendar of `zone`."""
        now = datetime.now(UTC) if self._clock is None else self._clock()
        today, lately = Period.containing(now, Window.DAY, zone), Period(now - _LATELY, None, zone)
        spool = spool_health(self._ledger)  # first: what is stored meanwhile is at worst counted in both
        recover_abandoned(self._ledger)
        with self._ledger.snapshot() as connection:
            return View(
                at=now,
                ledger=self._ledger.location,
                today=today,
                live=live,
                ended=_ended(connection, now),
                charges=self._cost.of(connection, ALL_TENANTS, today),
                heat=heat_of(connection, Selection(ALL_TENANTS, lately)),
                requests=latest_requests(connection, ALL_TENANTS, MAX_REQUESTS),
                books=self._books,
                budgets=self._budgets.standings_in(connection, ALL_TENANTS, None if self._clock is None else now),
                keys=keys_of(connection, ALL_TENANTS, self._uses, now),
                promises=promises_of(connection, self._watched),
                week=self._saved_in_week(connection, now, live),
                ledger_health=ledger_health(connection),
                spool=spool,
            )

    def _saved_in_week(self, connection: Connection, now: datetime, live: Look | None) -> Sequence[Saved] | None:
        """Added up anew every few minutes, as it reads each request."""
        if self._week is None or not now - _WEEK_KEPT < self._week[0] <= now:
            week = Selection(ALL_TENANTS, Period(now - _WEEK, None))
            requests = sum(one.quantities[0] for one in read_sums(connection, week, hourly=False))
            certified = {tier.name: Decimal(repr(tier.saved)) for tier in (() if live is None else live.tiers)}
            few = requests <= _MAX_IN_WEEK
            self._week = (now, saved_by(connection, week, KIND_TAG, certified) if few else None)
        return self._week[1]


def _ended(connection: Connection, now: datetime) -> Ended:
    """Count usage stored within the last minute, of that served within the last hour."""
    usage = usage_table.c
    sums: list[Any] = [func.count(), func.sum(usage.tokens_input), func.sum(usage.tokens_output)]
    where = usage_of(Selection(ALL_TENANTS, Period(now - _LATELY)))
    row = connection.execute(select(*sums).where(*where, usage.stored_at > now - _MINUTE)).one()
    return Ended(*(int(value or 0) for value in row))


def latest_requests(connection: Connection, tenant: str | AllTenants, count: int) -> list[StoredUsage]:
    """The latest requests by service time, the last first."""
    usage = usage_table.c
    query = joined().where(*usage_of(Selection(tenant)))
    query = query.order_by(usage.started_at.desc(), usage.seq.desc()).limit(count)
    return list(map(from_row, connection.execute(query)))


def receipt_of(connection: Connection, tenant: str | AllTenants, seq: int) -> Receipt | None:
    """A stored request by its number, its receipt, and what checking that finds: values, row, and chain to the head.

    None if there is no such request, or its tenant is another one.
    """
    query = joined().where(usage_table.c.seq == seq, *usage_of(Selection(tenant)))
    row = connection.execute(query).first()
    if row is None:
        return None
    stored = from_row(row)
    try:
        receipt = make_receipt(connection, stored.record.tenant, stored.record.request_id, source=stored.source)
        return Receipt(stored, receipt, check_receipt(connection, receipt))
    except MALFORMED as error:  # its price book or its link is gone, or was changed past this package
        return Receipt(stored, {}, ReceiptCheck(str(error)))
