"""Late usage of a period that was pruned costs what it would have cost without pruning."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from shutil import copyfile
from typing import TYPE_CHECKING, Any

import pytest

from polar_billing.errors import PeriodError
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, AllTenants, Selection
from polar_billing.prices.book import EXAMPLE_PLANS, PriceBook
from polar_billing.proof.verify import verify_ledger
from polar_billing.reports.report import build_report
from polar_billing.statements.draft import draft_statement
from polar_billing.statements.issue import issue_statement, issued_statements
from polar_billing.statements.period import reprice
from polar_billing.statements.retention import prune
from polar_billing.statements.tracing import recheck
from polar_billing.testing import usage_record
from polar_billing.values.periods import ALL_TIME, Period
from polar_sdk.usage import FlopUsage, Outcome, TokenUsage
from tests.billing.storing import store_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import Connection

    from polar_billing.statements.statement import Statement

    Usage = list[dict[str, Any]]

NOVEMBER, DECEMBER, JANUARY = (Period.month(month) for month in ("2026-11", "2026-12", "2027-01"))
MIDDLE, END, LATER = (datetime(*day, tzinfo=UTC) for day in ((2026, 11, 16), (2026, 12, 1), (2027, 2, 1)))
DAYS = [MIDDLE + timedelta(days=days) for days in (-12, -4, 0, 9)]
HALF_AN_HOUR = datetime(2026, 11, 10, 0, 30, tzinfo=UTC)
SLOW = {"prefill_ns": 3_000 * 10**6, "decode_ns": 0}

PLANS = PriceBook.example(EXAMPLE_PLANS)
RATES = PLANS.prices[0].model_dump()
EXPENSIVE = PriceBook.model_validate({**PLANS.model_dump(), "prices": [{**RATES, "per_compute_unit": 1}]})
CHANGED = PriceBook.model_validate(
    {
        **PLANS.model_dump(),
        "charge_drafts": True,
        "prices": [RATES, {**RATES, "effective_from": HALF_AN_HOUR, "per_compute_unit": 2}],
    }
)
"""Charges drafts, and changes a rate within an hour."""


def issue(
    ledger: Ledger, tenant: str, parts: list[Usage], prunings: list[datetime], book: PriceBook
) -> list[Statement]:
    """The statements of three months, with usage of November before each of them, and a pruning after each."""
    found = []
    for place, (period, usage) in enumerate(zip((NOVEMBER, DECEMBER, JANUARY), parts, strict=True)):
        for number, one in enumerate(usage):
            fields = {"tenant": tenant, "started_at": MIDDLE - timedelta(days=1), "units": 1, **one}
            flops = fields.pop("units") * 10**12
            drafts = fields["tokens"].drafted * 10**12 if "tokens" in fields else 0
            fields["flops"] = FlopUsage(head=flops, total=flops, drafts=drafts)
            store_record(ledger, usage_record(f"{place}-{number}", **fields), book)
        issued = issue_statement(ledger, tenant, period, book=book, now=LATER)
        assert recheck(ledger, issued) == []
        found.append(issued.statement)
        if prunings:
            with ledger.transaction() as connection:
                assert prune(connection, tenant, prunings[place])
    assert verify_ledger(ledger).sound
    return found


TOKENS = TokenUsage(input=10**6, output=30 * 10**6, drafted=9, accepted=4)
BANDS: list[Usage] = [
    [{"tier": "standard", "units": 30_000, "started_at": day} for day in DAYS],
    [{"tier": "economy", "units": 50_000}, {"tier": "premium", "units": 1_000}],
    [{"tier": "standard", "units": 900_000, "started_at": day} for day in DAYS],
]
SEVERAL: Usage = [{"outcome": Outcome.ERROR, "error": "X", "tier": "standard"}, {"tier": "gold"}, {"tier": "standard"}]
WITHIN_AN_HOUR: Usage = [
    {"tier": "standard", "tokens": TOKENS, "started_at": HALF_AN_HOUR + timedelta(minutes=minutes)}
    for minutes in (-20, -1, 0, 20)
]
CASES: dict[str, tuple[str, list[Usage], PriceBook]] = {
    "graduated bands": ("globex", BANDS, PLANS),
    "a minimum": ("globex", [[{"tier": "standard", "units": units}] for units in (9, 99, 999_999)], PLANS),
    "packages": ("acme", [[{"tier": "exact"}] * 3, [{}], [{"tier": "economy"}] * 999], PLANS),
    "volume bands": ("initech", [[{"tier": "premium", "tokens": TOKENS}]] * 3, PLANS),
    "free and unrated": ("someone", [SEVERAL] * 3, PLANS),
    "a missed promise": ("globex", [[{"tier": "premium", "units": n * 10_000, **SLOW}] for n in (8, 9, 1)], PLANS),
    "beyond a receipt": ("someone", [[{"tier": "exact", "units": 9 * 10**n} for n in (6, 3)]] * 3, EXPENSIVE),
    "drafts": ("someone", [WITHIN_AN_HOUR] * 3, CHANGED),
}


@pytest.mark.parametrize("prunings", [[END] * 3, [MIDDLE, END, END]], ids=["whole", "in parts"])
@pytest.mark.parametrize("name", CASES)
def test_statements_are_the_same_with_and_without_pruning(
    tmp_path: Path, sqlite_template: Path, name: str, prunings: list[datetime]
) -> None:
    tenant, parts, book = CASES[name]
    found = []
    for file, prune_at in (("whole", []), ("pruned", prunings)):
        with Ledger(str(copyfile(sqlite_template, tmp_path / file))) as ledger:
            found.append(issue(ledger, tenant, parts, prune_at, book))
    whole, pruned = found
    assert pruned == whole
    assert any(line.corrects for statement in whole[1:] for line in statement.lines)


def test_late_usage_of_pruned_usage_is_charged_on_every_database(store: Ledger) -> None:
    _, december, january = issue(store, "globex", BANDS, [END] * 3, PLANS)
    assert [line.quantity for line in december.lines if line.kind == "pool"] == [46_250]  # in the second band
    assert january.requests_late == len(DAYS)


def test_a_promise_stays_as_it_was_settled_before_pruning(ledger: Ledger) -> None:
    slow: Usage = [{"tier": "premium", "units": 200_000, **SLOW}]
    quick: Usage = [{"tier": "premium", "units": 1}] * 40
    _, december, _ = issue(ledger, "globex", [slow, quick, slow], [END] * 3, PLANS)
    assert [line.amount < 0 for line in december.lines if line.kind == "service credit"] == [True]


def test_only_a_period_of_which_usage_was_pruned_is_refused(ledger: Ledger, put: Callable[..., int]) -> None:
    put(ledger, "november")
    put(ledger, "december", started_at=END + timedelta(days=20))
    with ledger.transaction() as connection:
        assert prune(connection, "someone", END + timedelta(days=10)) == 1
    with pytest.raises(PeriodError):
        draft_statement(ledger, "someone", NOVEMBER)
    with pytest.raises(PeriodError):
        reprice(ledger, ALL_TENANTS, NOVEMBER, PLANS)
    assert draft_statement(ledger, "someone", DECEMBER).requests == 1
    assert [row.requests for row in reprice(ledger, ALL_TENANTS, DECEMBER, PLANS)] == [1]


def test_a_report_counts_what_was_pruned_of_its_selection(ledger: Ledger, put: Callable[..., int]) -> None:
    put(ledger, "november", tier="standard")
    put(ledger, "december", started_at=END + timedelta(days=20))
    with ledger.transaction() as connection:
        prune(connection, "someone", END + timedelta(days=10))

    def pruned(period: Period, tenant: str | AllTenants = ALL_TENANTS, tier: str | None = None) -> int:
        return build_report(ledger, Selection(tenant, period, tier)).pruned

    assert (pruned(NOVEMBER), pruned(DECEMBER), pruned(ALL_TIME)) == (1, 0, 1)
    assert (pruned(NOVEMBER, tier="standard"), pruned(NOVEMBER, tier="economy")) == (1, 0)
    assert (pruned(NOVEMBER, tenant="someone"), pruned(NOVEMBER, tenant="acme")) == (1, 0)


def test_a_statement_is_not_stored_over_usage_that_was_pruned_while_it_was_computed(
    ledger: Ledger, put: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(ledger, "november")
    snapshot = ledger.snapshot

    @contextmanager
    def pruned_after() -> Iterator[Connection]:
        with snapshot() as connection:
            yield connection
        with ledger.transaction() as connection:
            prune(connection, "someone", END)

    with monkeypatch.context() as patched, pytest.raises(PeriodError):
        patched.setattr(ledger, "snapshot", pruned_after)
        issue_statement(ledger, "someone", NOVEMBER, now=LATER)
    assert issued_statements(ledger, "someone") == []
