"""A ledger with a bit of everything, for the tests that change it past the package."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from polar_billing.access.alerts import Alerts, Webhook
from polar_billing.access.keys import ApiKeys
from polar_billing.access.rates import Rates
from polar_billing.access.replies import Replies
from polar_billing.budgets.budget import Budget
from polar_billing.budgets.enforcement import Budgets
from polar_billing.ledger.audits import Audits
from polar_billing.ledger.books import add_book
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.postings import Account, Line, post
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.statements.issue import credit_note, issue_statement
from polar_billing.statements.retention import prune
from polar_billing.testing import audit, usage_record
from polar_billing.values.periods import Period
from polar_sdk.usage import Offer, UsageBound

if TYPE_CHECKING:
    from collections.abc import Iterator

EARLIER, NOON = datetime(2026, 10, 20, 12, tzinfo=UTC), datetime(2027, 4, 20, 12, tzinfo=UTC)
TENANTS = ("acme", "globex")


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def full_ledger(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    """A ledger with a bit of everything: holds that expired, usage that was pruned or came late."""
    if request.param == "postgresql":
        url = request.getfixturevalue("new_module_postgres")(request.getfixturevalue("postgres_template"))
    else:
        url = str(tmp_path_factory.mktemp("full") / "ledger.sqlite3")
    with Ledger(url) as ledger:
        fill(ledger, EARLIER)
        Budgets(ledger, clock=lambda: NOON).expire()
        Meter(ledger).emit_many(usage_record(f"late-{name}", tenant=name, started_at=EARLIER) for name in TENANTS)
        fill(ledger, NOON)
        assert Alerts(ledger, Webhook("http", "127.0.0.1", 9, "/", b"nobody listens there")).deliver() == 0
        with ledger.transaction() as connection:
            for days in (6, 16):
                for tenant in TENANTS:
                    assert prune(connection, tenant, EARLIER + timedelta(days=days))
        yield ledger


def hold_and_use(meter: Meter, tenant: str, at: datetime) -> None:
    """A settled hold, one that is released, and one that is open."""
    tags = {"user": "ann"}
    offers = (Offer(tier="standard", program="0-5", flops_bound=1),)
    for request_id in (f"settled-{at}", f"released-{at}", f"open-{at}"):
        names = {"request_id": request_id, "tenant": tenant}
        meter.reserve(UsageBound(**names, at=at, tags=tags, tokens_input=1, tokens_output_max=1, offers=offers))
    meter.emit(usage_record(f"settled-{at}", tenant=tenant, tags=tags, started_at=at))
    meter.release(tenant, f"released-{at}")


def make_keys(ledger: Ledger, mark: str) -> None:
    replies = Replies(ledger.url.render_as_string(hide_password=False))
    for tenant, n in product(TENANTS, (1, 2)):
        limits: dict[str, Any] = {"requests_per_minute": 60, "tokens_per_minute": 600, "parallel": 2}
        key, _ = ApiKeys(ledger).create(tenant, f"{mark}-{n}", tags={"team": "search"}, max_tokens=n, **limits)
        Rates(ledger).update([key])
        replies.claim(tenant, f"{mark}-{n}", "f" * 64)
    replies.keep(TENANTS[0], f"{mark}-1", b"answer")
    replies.close()  # or it would renew the claims that are left


def fill(ledger: Ledger, noon: datetime) -> None:
    """Two rows or more in every chained table, of both tenants wherever that can be."""
    book, mark = PriceBook.example(), f"{noon:%Y-%m}"
    for name in (f"other-{mark}", f"further-{mark}"):
        add_book(ledger, PriceBook.model_validate({**book.model_dump(), "id": name}), for_all=True)
    meter = Meter(ledger, prices=book)
    meter.emit_many(
        usage_record(
            f"{mark}-{n}",
            tenant=TENANTS[n % 2],
            started_at=noon + timedelta(days=5 * n),
            output=50 + n,
            tags={"n": str(n)},
        )
        for n in range(6)
    )
    meter.emit(usage_record(f"{mark}-unrated", tier="gold", started_at=noon + timedelta(days=17)))
    for tenant in TENANTS:
        for money in (5, 6):
            Budgets(ledger).set(Budget(tenant, Decimal(money), "USD"))
        hold_and_use(meter, tenant, noon + timedelta(days=18))
    with ledger.transaction() as connection:
        for tenant in TENANTS:
            for n in (1, 2):
                lines = [Line(Account.CASH, Decimal(n), "USD"), Line(Account.RECEIVABLE, Decimal(-n), "USD")]
                first = post(connection, tenant, "payment", f"{mark}-{n}", lines, noon, note="paid")
            post(connection, tenant, "correction", mark, lines[::-1], noon, corrects=first)
    make_keys(ledger, mark)
    promises = {TENANTS[0]: "ab" * 32, TENANTS[1]: "cd" * 32}
    audited = [(tenant, n) for tenant in TENANTS for n in range(8)]
    Audits(ledger, "polar").store(
        [
            audit(f"{mark}-{n}", tenant=tenant, promise=promises[tenant], lost=True, at=noon + timedelta(hours=n))
            for tenant, n in audited
        ]
    )
    for tenant in TENANTS:
        for month in (mark, f"{noon + timedelta(days=30):%Y-%m}"):
            one = issue_statement(ledger, tenant, Period.month(month), now=noon + timedelta(days=90)).statement
            credit_note(ledger, tenant, one.id, one.total, reason="sorry", reference=month)
