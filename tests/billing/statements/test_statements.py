"""Statements: issued once, booked, traced, checked, corrected; by many at once, after pruning, and tampered with."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext
from functools import partial
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import func, select, text

from polar_billing.errors import AmountError, ConflictError, CurrencyMixError, PeriodError, PriceBookError, QueryError
from polar_billing.ledger.audits import Audits
from polar_billing.ledger.books import add_book
from polar_billing.ledger.postings import Account, balances
from polar_billing.ledger.records import ALL_TENANTS
from polar_billing.ledger.schema import statement_table, transaction_table
from polar_billing.prices.book import EXAMPLE_PLANS, PriceBook
from polar_billing.proof.verify import verify_ledger
from polar_billing.statements.draft import draft_statement
from polar_billing.statements.issue import credit_note, credit_notes, issue_statement, issued_statements
from polar_billing.statements.period import reprice
from polar_billing.statements.retention import count_uncharged, prune
from polar_billing.statements.tracing import lines_of_usage, recheck, usage_of_line
from polar_billing.testing import audit
from polar_billing.values.money import exact_sum
from polar_billing.values.periods import ALL_TIME, Period
from polar_sdk.usage import Outcome, TokenUsage

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.statements.issued import IssuedStatement
    from polar_billing.statements.statement import Statement

NOVEMBER, DECEMBER = Period.month("2026-11"), Period.month("2026-12")
END = datetime(2026, 12, 1, tzinfo=UTC)
LATER = datetime(2027, 1, 1, tzinfo=UTC)
PLANS = PriceBook.example(EXAMPLE_PLANS)


def adds_up(statement: Statement) -> bool:
    decimals = statement.decimals
    lines = exact_sum([*(line.amount for line in statement.lines), statement.rounding], decimals)
    paid = exact_sum((use.used for use in statement.credits), decimals)
    return lines == statement.total and exact_sum((statement.due, paid), decimals) == statement.total


def audit_premium(ledger: Ledger, lost: int, audits: int) -> None:
    Audits(ledger, "test").store([audit(tenant="globex", tier="premium", lost=n < lost) for n in range(audits)])


def test_a_statement_sums_what_receipts_said_by_tier(store: Ledger, put: Callable[..., int]) -> None:
    for number, tier in enumerate(["economy", "standard", "standard", None, "gold"]):
        put(store, f"r{number}", tier=tier, units=1_000)
    statement = draft_statement(store, "someone", NOVEMBER)
    assert adds_up(statement)
    compute = {line.tier: (line.quantity, line.amount) for line in statement.lines if line.item == "compute"}
    assert compute == {
        "economy": (Decimal(1_000), Decimal("0.36")),
        "standard": (Decimal(2_000), Decimal("0.8")),
        None: (Decimal(1_000), Decimal("0.4")),
    }
    assert statement.unrated == {"price book 'polar-example-plans' of 2024-01-01 has no price for tier 'gold'": 1}
    assert statement.requests == 5
    assert [(tier.tier, tier.requests, tier.compute_units) for tier in statement.usage] == [
        ("economy", 1, Decimal(1_000)),
        ("standard", 2, Decimal(2_000)),
        ("gold", 1, Decimal(1_000)),
        (None, 1, Decimal(1_000)),
    ]
    assert issued_statements(store, "someone") == []  # a draft leaves nothing behind


def test_issued_once_and_for_ever_booked_and_provable(store: Ledger, put: Callable[..., int]) -> None:
    for number in range(4):
        put(store, f"r{number}", tier=["premium", "standard"][number % 2], tenant="globex", units=200_000)
    period = Period.month("2026-11", "America/New_York")
    audit_premium(store, 10, 100)
    issued = issue_statement(store, "globex", period, now=LATER)
    assert adds_up(issued.statement)
    kinds = [line.kind for line in issued.statement.lines]
    assert kinds.count("pool") == 2
    assert {"discount", "service credit"} <= set(kinds)
    put(store, "late", tier="standard", tenant="globex")
    again = issue_statement(store, "globex", period, now=LATER + timedelta(days=1))
    assert again == issued
    assert recheck(store, issued) == []
    with store.snapshot() as connection:
        booked = balances(connection, "globex")
    assert booked[Account.RECEIVABLE, "USD"] == issued.statement.due
    assert exact_sum(booked.values(), 12) == 0
    discount = exact_sum((line.amount for line in issued.statement.lines if line.kind == "discount"), 4)
    assert booked[Account.DISCOUNTS, "USD"] == -discount


def test_a_narrow_decimal_context_of_the_caller_touches_nothing(ledger: Ledger, put: Callable[..., int]) -> None:
    for tenant, tier in (("globex", "premium"), ("initech", "standard")):
        put(ledger, "r", tenant=tenant, tier=tier, units=1_234_567)
    audit_premium(ledger, 4, 101)
    expected = [draft_statement(ledger, tenant, NOVEMBER) for tenant in ("globex", "initech")]
    with localcontext(prec=2):
        for statement in expected:
            issued = issue_statement(ledger, statement.tenant, NOVEMBER, now=LATER)
            assert issued.statement.document == statement.document
            assert recheck(ledger, issued) == []


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/Santiago", "Pacific/Apia", "Australia/Lord_Howe"])
def test_every_use_is_on_the_statement_of_exactly_one_month(ledger: Ledger, zone: str, put: Callable[..., int]) -> None:
    months = [Period.month(f"2026-{month:02}", zone) for month in range(1, 13)]
    borders = [period.since for period in months if period.since is not None]
    for place, border in enumerate(borders[1:]):
        for step in (-1, 0, 1):
            put(ledger, f"{place} {step}", tier="standard", started_at=border + timedelta(microseconds=step))
    drafts = [draft_statement(ledger, "someone", period) for period in months]
    assert [draft.requests for draft in drafts] == [1, *[3] * 10, 2]


def test_lines_lead_to_usage_and_usage_to_lines(store: Ledger, put: Callable[..., int]) -> None:
    numbers = {
        "a": put(store, "a", tier="standard"),
        "b": put(store, "b", tier="standard", outcome=Outcome.ERROR, error="X"),
        "c": put(store, "c", tier=None),
        "d": put(store, "d", tier="gold"),
        "e": put(store, "e", tier="standard", started_at=END),
        "f": put(store, "f", tier="standard", tenant="other"),
    }
    issued = issue_statement(store, "someone", NOVEMBER, now=LATER)
    traced = {(line.tier, line.item): usage_of_line(store, issued, line) for line in issued.statement.lines}
    assert traced["standard", "compute"] == traced["standard", "requests"] == [numbers["a"]]
    assert traced["standard", "compute (error, free)"] == [numbers["b"]]
    assert traced[None, "compute"] == [numbers["c"]]
    for name in "abc":
        for charged_on, line in lines_of_usage(store, "someone", numbers[name]):
            assert charged_on == issued
            assert numbers[name] in usage_of_line(store, issued, line)
    assert [line.item for _, line in lines_of_usage(store, "someone", numbers["a"])] == ["compute", "requests"]
    assert lines_of_usage(store, "someone", numbers["d"]) == []  # unrated
    assert lines_of_usage(store, "someone", numbers["e"]) == []  # not on a statement yet
    with pytest.raises(QueryError):
        lines_of_usage(store, "someone", numbers["f"])


def test_late_usage_is_a_correction_on_the_next_statement_and_nothing_is_lost(
    store: Ledger, put: Callable[..., int]
) -> None:
    put(store, "on time", tenant="globex", tier="standard", units=90_000)
    november = issue_statement(store, "globex", NOVEMBER, now=END)
    late = put(store, "late", tenant="globex", tier="standard", units=50_000)  # crosses a band
    put(store, "december", tenant="globex", tier="standard", units=1_000, started_at=END)
    december = issue_statement(store, "globex", DECEMBER, now=LATER)
    statement = december.statement
    corrections = [line for line in statement.lines if line.corrects is not None]
    assert {line.corrects for line in corrections} == {november.statement.id}
    assert (statement.requests, statement.requests_late) == (1, 1)
    pooled = [line for line in corrections if line.kind == "pool"]
    assert [line.quantity for line in pooled] == [10_000, 40_000]
    assert usage_of_line(store, december, pooled[0]) == [late]
    assert {entry.number for entry, _ in lines_of_usage(store, "globex", late)} == {december.number}
    assert recheck(store, november) == recheck(store, december) == []
    assert adds_up(statement)
    # The two statements come to what one over everything would have, up to the rounding of their lines.
    whole = draft_statement(store, "globex", NOVEMBER)
    assert whole.id == november.statement.id
    alone = exact_sum((line.amount for line in statement.lines if line.corrects is None), 4)
    both = exact_sum((november.statement.total, statement.total, -alone), 4)
    assert abs(both - whole.total) <= Decimal("0.0005")
    january = issue_statement(store, "globex", Period.month("2027-01"), now=datetime(2027, 2, 1, tzinfo=UTC))
    assert january.late == ()  # charged once


def test_credits_pay_by_priority_until_used_up_or_expired(store: Ledger, put: Callable[..., int]) -> None:
    put(store, "november", tenant="initech", tier="standard", units=100_000)
    put(store, "december", tenant="initech", tier="standard", units=100_000, started_at=END)
    first = issue_statement(store, "initech", NOVEMBER, now=END).statement
    assert [(use.id, use.before, use.used, use.after) for use in first.credits] == [
        ("initech-welcome", Decimal(25), Decimal(25), Decimal(0)),
        ("initech-2026", Decimal(500), first.total - 25, 525 - first.total),
    ]
    assert first.due == 0
    second = issue_statement(store, "initech", DECEMBER, now=LATER)
    (use,) = second.statement.credits
    assert (use.id, use.before) == ("initech-2026", 525 - first.total)
    assert use.expired == use.before - use.used
    assert use.after == 0
    assert recheck(store, second) == []
    put(store, "january", tenant="initech", tier="standard", units=1_000, started_at=LATER)
    third = issue_statement(store, "initech", Period.month("2027-01"), now=datetime(2027, 2, 1, tzinfo=UTC)).statement
    assert third.credits == ()
    assert third.due == third.total > 0
    with store.snapshot() as connection:
        booked = balances(connection, "initech")
    assert booked[Account.CREDITS, "USD"] == 0
    assert booked[Account.CASH, "USD"] == 525
    assert booked[Account.EXPIRED_CREDITS, "USD"] == -use.expired
    assert booked[Account.RECEIVABLE, "USD"] == third.due


def test_a_customer_without_usage_still_owes_the_fee(ledger: Ledger) -> None:
    add_book(ledger, PLANS)
    berlin = Period.month("2026-11", "Europe/Berlin")
    issued = issue_statement(ledger, "acme", berlin, now=LATER)
    assert [(line.kind, line.amount) for line in issued.statement.lines] == [("fee", Decimal(19))]
    assert recheck(ledger, issued) == []


def test_credit_notes_take_off_at_most_what_was_asked_for(store: Ledger, put: Callable[..., int]) -> None:
    put(store, "r", tier="standard", units=100_000)
    issued = issue_statement(store, "someone", NOVEMBER, now=LATER)
    total = issued.statement.total
    note = credit_note(store, "someone", issued.statement.id, Decimal(15), reason="outage", reference="n1")
    again = credit_note(store, "someone", issued.statement.id, Decimal(15), reason="outage", reference="n1")
    assert note == again
    assert credit_notes(store, "someone") == credit_notes(store, ALL_TENANTS) == [note]
    assert credit_notes(store, "other") == []
    with pytest.raises(ConflictError):
        credit_note(store, "someone", issued.statement.id, Decimal(14), reason="outage", reference="n1")
    for amount in ("0", "-1", "NaN", "Infinity", "0.00001", str(total)):
        with pytest.raises(AmountError):
            credit_note(store, "someone", issued.statement.id, Decimal(amount), reason="x", reference="n2")
    with pytest.raises(QueryError):
        credit_note(store, "other", issued.statement.id, Decimal(1), reason="x", reference="n3")
    with store.snapshot() as connection:
        assert balances(connection, "someone")[Account.RECEIVABLE, "USD"] == total - 15
    assert recheck(store, issued) == []


def test_reprice_shows_the_difference_per_tenant(ledger: Ledger, put: Callable[..., int]) -> None:
    put(ledger, "a", tier="standard", units=1_000)
    put(ledger, "b", tier="standard", tenant="other", units=3_000)
    expensive = PriceBook.from_document(
        PLANS.document.replace('"0.0004"', '"0.0008"').replace("example-plans", "expensive")
    )
    rows = reprice(ledger, ALL_TENANTS, NOVEMBER, expensive)
    assert [(row.tenant, row.charged, row.other, row.difference) for row in rows] == [
        ("other", Decimal("1.2"), Decimal("2.4"), Decimal("1.2")),
        ("someone", Decimal("0.4"), Decimal("0.8"), Decimal("0.4")),
    ]
    steps: list[int] = []
    assert reprice(ledger, ALL_TENANTS, NOVEMBER, expensive, progress=lambda _, done, __: steps.append(done)) == rows
    assert steps == [0, 1, 2]
    assert [row.tenant for row in reprice(ledger, "other", NOVEMBER, expensive)] == ["other"]
    euros = PriceBook.from_document(PLANS.document.replace('"USD"', '"EUR"'))
    with pytest.raises(CurrencyMixError, match="USD"):
        reprice(ledger, ALL_TENANTS, NOVEMBER, euros)


def test_mistakes_are_refused_and_store_nothing(ledger: Ledger, put: Callable[..., int]) -> None:
    put(ledger, "r", tier="standard", units=1_000)
    with pytest.raises(QueryError, match="'nobody'"):
        draft_statement(ledger, "nobody", NOVEMBER)
    with pytest.raises(PeriodError, match="all time"):
        draft_statement(ledger, "someone", ALL_TIME)
    with pytest.raises(PeriodError):
        issue_statement(ledger, "someone", NOVEMBER, now=END - timedelta(microseconds=1))
    assert issued_statements(ledger, "someone") == []
    issue_statement(ledger, "someone", NOVEMBER, now=LATER)
    with pytest.raises(PeriodError):
        issue_statement(ledger, "someone", Period.month("2026-11", "Asia/Tokyo"), now=LATER)
    euros = PriceBook.from_document(PLANS.document.replace('"USD"', '"EUR"').replace("example-plans", "euros"))
    with pytest.raises(CurrencyMixError, match="USD"):
        issue_statement(ledger, "someone", DECEMBER, book=euros, now=LATER)
    put(ledger, "euro", book=euros, tier="standard", started_at=END)
    put(ledger, "dollar", tier="standard", started_at=END)
    with pytest.raises(PriceBookError, match="'polar-euros' and 'polar-example-plans'"):
        draft_statement(ledger, "someone", DECEMBER)
    assert len(issued_statements(ledger, "someone")) == 1


def test_a_past_rate_cannot_change(ledger: Ledger, put: Callable[..., int]) -> None:
    assert add_book(ledger, PLANS, now=END)
    assert not add_book(ledger, PLANS, now=END)
    edited = PriceBook.from_document(PLANS.document.replace('"0.0004"', '"0.0005"'))
    with pytest.raises(PriceBookError, match=r"0\.0004 → 0\.0005"):
        add_book(ledger, edited, now=END)
    assert edited.content_hash not in ledger.price_books()
    # A meter with an edited file: its receipts stand, and the statement refuses to contradict them.
    put(ledger, "a", tier="standard")
    put(ledger, "b", tier="standard", book=edited)
    with pytest.raises(PriceBookError):
        draft_statement(ledger, "someone", NOVEMBER)


def test_a_revision_in_force_charges_by_the_time_of_use(ledger: Ledger, put: Callable[..., int]) -> None:
    add_book(ledger, PLANS, now=datetime(2026, 11, 1, tzinfo=UTC))
    change = datetime(2026, 11, 20, tzinfo=UTC)
    content = PLANS.model_dump(mode="json")
    raised = {"effective_from": change.isoformat(), "per_compute_unit": "0.0008"}
    content["prices"].append({**content["prices"][0], **raised})
    revised = PriceBook.model_validate(content)
    add_book(ledger, revised, now=datetime(2026, 11, 2, tzinfo=UTC))
    put(ledger, "before", tier="standard", units=1_000, started_at=change - timedelta(microseconds=1))
    put(ledger, "after", tier="standard", units=1_000, started_at=change, book=revised)
    lines = [line for line in draft_statement(ledger, "someone", NOVEMBER).lines if line.item == "compute"]
    assert [(line.since.day, line.quantity, line.amount) for line in lines] == [
        (1, Decimal(1_000), Decimal("0.4")),
        (20, Decimal(1_000), Decimal("0.8")),
    ]


def test_latency_promises_are_measured_on_completed_requests(store: Ledger, put: Callable[..., int]) -> None:
    for number in range(20):
        slow = number < 2
        put(
            store,
            f"r{number}",
            tenant="globex",
            tier="premium",
            units=10_000,
            prefill_ns=(3_000 if slow else 100) * 10**6,
            decode_ns=0,
        )
    statement = draft_statement(store, "globex", NOVEMBER)
    (given,) = [line for line in statement.lines if line.kind == "service credit"]
    assert given.note == "p95 latency 3000.0 ms, promised 2000 ms"
    charged = exact_sum((line.amount for line in statement.lines if line.kind in ("pool", "usage", "discount")), 4)
    assert abs(given.amount + charged / 10) <= Decimal("0.0001")


def test_token_volume_and_own_rates(ledger: Ledger, put: Callable[..., int]) -> None:
    tokens = TokenUsage(input=10**6, output=60 * 10**6)
    put(ledger, "r", tenant="initech", tier="premium", tokens=tokens, units=0)
    statement = draft_statement(ledger, "initech", NOVEMBER)
    amounts = {line.item: line.amount for line in statement.lines}
    assert amounts["output tokens (volume, beyond)"] == Decimal("1.08")  # 60 × 0.015 × 1.2
    assert amounts["input tokens"] == Decimal("0.012")


def test_recheck_names_what_does_not_follow(ledger: Ledger, put: Callable[..., int]) -> None:
    put(ledger, "r", tier="standard", units=1_000)
    issued = issue_statement(ledger, "someone", NOVEMBER, now=LATER)
    with ledger.transaction() as connection:
        connection.execute(text("DROP TRIGGER polar_usage_no_update"))
        connection.execute(text("UPDATE polar_usage SET flops_total = flops_total + 1"))
    differences = recheck(ledger, issued)
    assert [word for differing in differences for word in ("usage is", "line 1 is") if word in differing] == [
        "usage is",
        "line 1 is",
    ]
    with ledger.transaction() as connection:
        connection.execute(text("UPDATE polar_usage SET flops_total = flops_total - 1"))
        connection.execute(text("DROP TRIGGER polar_statement_no_update"))
        connection.execute(text("""UPDATE polar_statement SET document = replace(document, '"0.4000"', '"0.3000"')"""))
    (forged,) = issued_statements(ledger, "someone")
    told_all = " ".join(recheck(ledger, forged))
    assert "books other amounts" in told_all
    assert "due is 0.3000, and the usage makes it 0.4000" in told_all


NOVEMBER, DECEMBER = Period.month("2026-11"), Period.month("2026-12")
END, LATER = datetime(2026, 12, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)


@pytest.fixture
def put(put: Callable[..., int]) -> Callable[..., int]:
    """As for all statements, with 1,000 CU."""
    return partial(put, units=1_000)


def in_threads(work: Callable[[], object], count: int) -> list[BaseException]:
    """Run the same work several times at once; what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_many_who_issue_the_same_statement_get_one(store: Ledger, put: Callable[..., int]) -> None:
    put(store, "r")
    issued: list[IssuedStatement] = []
    assert in_threads(lambda: issued.append(issue_statement(store, "someone", NOVEMBER, now=LATER)), 6) == []
    assert len({entry.number for entry in issued}) == 1
    with store.snapshot() as connection:
        assert connection.execute(select(func.count()).select_from(statement_table)).scalar() == 1
        assert connection.execute(select(func.count()).select_from(transaction_table)).scalar() == 1


def test_two_periods_issued_at_once_charge_late_usage_once(store: Ledger, put: Callable[..., int]) -> None:
    put(store, "november")
    issue_statement(store, "someone", NOVEMBER, now=END)
    put(store, "late")
    periods = [Period.month("2026-12"), Period.month("2027-01"), Period.month("2027-02")]
    waiting = iter(periods)
    after = datetime(2027, 3, 1, tzinfo=UTC)
    assert in_threads(lambda: issue_statement(store, "someone", next(waiting), now=after), 3) == []
    issued = issued_statements(store, "someone")
    assert len(issued) == 4
    assert sum(entry.statement.requests_late for entry in issued) == 1
    assert [difference for entry in issued for difference in recheck(store, entry)] == []


def test_usage_stored_while_a_statement_is_issued_is_on_it_or_late_never_lost(
    store: Ledger, put: Callable[..., int]
) -> None:
    put(store, "first")
    numbers = iter(range(1_000))

    def meter() -> None:
        for _ in range(10):
            put(store, f"r{next(numbers)}")

    work = iter([meter, lambda: issue_statement(store, "someone", NOVEMBER, now=END), meter])
    assert in_threads(lambda: next(work)(), 3) == []  # noqa: PLW0108  (each takes its own)
    (november,) = issued_statements(store, "someone")
    december = issue_statement(store, "someone", DECEMBER, now=LATER)
    assert november.statement.requests + december.statement.requests_late == 21
    on_lines = [
        number for entry in (november, december) for number in usage_of_line(store, entry, entry.statement.lines[0])
    ]
    assert sorted(on_lines) == sorted(set(on_lines))
    assert len(on_lines) == 21


def test_verify_makes_every_statement_again(ledger: Ledger, put: Callable[..., int]) -> None:
    put(ledger, "r", tenant="globex")
    issue_statement(ledger, "globex", NOVEMBER, now=END)
    assert verify_ledger(ledger).sound
    with ledger.transaction() as connection:
        connection.execute(text("DROP TRIGGER polar_usage_no_update"))
        connection.execute(text("UPDATE polar_usage SET tier = 'economy'"))
    findings = " ".join(str(finding) for finding in verify_ledger(ledger).findings)
    assert "and the usage makes it" in findings


def test_pruned_usage_is_never_missing_from_a_statement_in_silence(store: Ledger, put: Callable[..., int]) -> None:
    put(store, "r")
    issued = issue_statement(store, "someone", NOVEMBER, now=END)
    put(store, "december", started_at=END)
    with store.transaction() as connection:
        prune(connection, "someone", LATER)
    assert recheck(store, issued) == []  # its sums and bookings; the chain stands for the rest
    assert issue_statement(store, "someone", NOVEMBER, now=LATER) == issued
    with pytest.raises(PeriodError):
        draft_statement(store, "someone", DECEMBER)
    with pytest.raises(PeriodError):
        issue_statement(store, "someone", DECEMBER, now=LATER)
    assert verify_ledger(store).sound


def test_late_usage_that_came_to_no_line_may_be_pruned_as_well(store: Ledger, put: Callable[..., int]) -> None:
    put(store, "r")
    issue_statement(store, "someone", NOVEMBER, now=END)
    late = datetime(2026, 11, 20, tzinfo=UTC)
    put(store, "late", tier="gold", started_at=late)
    with store.snapshot() as connection:
        assert [count_uncharged(connection, "someone", before) for before in (late, END)] == [0, 1]
    december = issue_statement(store, "someone", DECEMBER, now=LATER)
    with store.snapshot() as connection:
        assert count_uncharged(connection, "someone", END) == 0
    assert (december.statement.requests_late, december.statement.lines) == (1, ())
    assert recheck(store, december) == []
    with store.transaction() as connection:
        prune(connection, "someone", END)
    assert recheck(store, december) == []
    assert verify_ledger(store).sound


def test_a_plan_in_another_book_than_the_receipts_is_not_passed_over(ledger: Ledger, put: Callable[..., int]) -> None:
    put(ledger, "r", tenant="acme", book=PriceBook.example())
    assert draft_statement(ledger, "acme", NOVEMBER).price_book == "polar-example"
    add_book(ledger, PLANS)
    with pytest.raises(PriceBookError, match="'polar-example' and 'polar-example-plans'"):
        draft_statement(ledger, "acme", NOVEMBER)
    assert [line.kind for line in draft_statement(ledger, "acme", NOVEMBER, book=PLANS).lines][-1] == "fee"
