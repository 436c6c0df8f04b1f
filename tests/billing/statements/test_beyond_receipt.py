"""Use beyond a receipt is unrated on every side, and drafts are charged where a book says so."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from polar_billing.dashboard.charges import Books, Cost
from polar_billing.ledger.books import add_book
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import Selection
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.prices.quote import quote_offers
from polar_billing.prices.rating import always_within_receipt, cost_of, rate
from polar_billing.proof.verify import verify_ledger
from polar_billing.reports.explanation import explain_line
from polar_billing.reports.query import usage_rows
from polar_billing.reports.report import build_report
from polar_billing.statements.draft import draft_statement
from polar_billing.statements.issue import issue_statement
from polar_billing.statements.tracing import lines_of_usage, recheck, usage_of_line
from polar_billing.testing import usage_record
from polar_billing.values.periods import Period
from polar_sdk.cli.main import app
from polar_sdk.usage import FlopUsage, Offer, TokenUsage, UsageBound

if TYPE_CHECKING:
    from pathlib import Path

    from polar_sdk.usage import UsageRecord

CU = 10**12
OCTOBER, NOVEMBER = Period.month("2026-10"), Period.month("2026-11")
EXPENSIVE = PriceBook.from_toml(
    """
    id = "expensive"
    currency = "USD"
    [[prices]]
    effective_from = 2024-01-01
    per_compute_unit = 1000
    per_million_output_tokens = 100000
    tiers = {standard = 1, premium = 2}
    """
)


def served(request_id: str, compute_units: int, day: int = 5, month: int = 10, **changes: Any) -> UsageRecord:
    flops = compute_units * CU
    work: dict[str, Any] = {"flops": FlopUsage(head=flops, total=flops), "tokens": TokenUsage(input=1, output=0)}
    return usage_record(request_id, started_at=datetime(2026, month, day, tzinfo=UTC), **{**work, **changes})


@pytest.fixture
def meter(store: Ledger) -> Meter:
    return Meter(store, prices=EXPENSIVE)


def test_it_is_unrated_on_every_side(meter: Meter) -> None:
    ledger = meter.ledger
    receipts = {
        record.request_id: meter.emit(record)
        for record in (
            served("small", 1),
            served("large", 9_000),
            served("larger", 10_000),
            served("premium", 5_000, tier="premium"),
            served("long", 0, tokens=TokenUsage(input=1, output=10**8)),
        )
    }
    assert {name for name, receipt in receipts.items() if receipt["cost"] is None} == {"larger", "premium", "long"}
    (standard, premium) = usage_rows(ledger, Selection("acme"), by=["tier"])
    assert (standard.cost, sum(standard.unrated.values())) == (Decimal(9_001_000), 2)
    assert sum(premium.unrated.values()) == 1
    statement = draft_statement(ledger, "acme", OCTOBER)
    assert statement.total == Decimal(9_001_000)
    assert (statement.requests, sum(statement.unrated.values())) == (5, 3)
    assert set(statement.unrated) == {str(receipt["unrated"]) for receipt in receipts.values() if receipt["unrated"]}
    issued = issue_statement(ledger, "acme", OCTOBER, now=datetime(2026, 11, 5, tzinfo=UTC))
    assert issued.statement.document == statement.document
    assert recheck(ledger, issued) == []
    stored = {usage.record.request_id: usage.seq for usage in ledger.read(Selection("acme"))}
    compute = next(line for line in issued.statement.lines if line.item == "compute" and line.amount)
    assert usage_of_line(ledger, issued, compute) == [stored["small"], stored["large"]]
    assert [line for _, line in lines_of_usage(ledger, "acme", stored["larger"])] == []
    assert compute in [line for _, line in lines_of_usage(ledger, "acme", stored["large"])]
    assert verify_ledger(ledger).sound


def test_late_ones_are_unrated_on_the_correction(meter: Meter) -> None:
    ledger = meter.ledger
    meter.emit(served("on time", 1))
    issue_statement(ledger, "acme", OCTOBER, now=datetime(2026, 11, 5, tzinfo=UTC))
    meter.emit(served("late", 2))
    meter.emit(served("late and larger", 10_000))
    meter.emit(served("next", 3, month=11))
    issued = issue_statement(ledger, "acme", NOVEMBER, now=datetime(2026, 12, 5, tzinfo=UTC))
    assert issued.statement.total == Decimal(5_000)
    assert sum(issued.statement.unrated.values()) == 1
    assert recheck(ledger, issued) == []


def test_the_commands_say_so(ledger: Ledger, ledger_url: str) -> None:
    with Meter(ledger, prices=EXPENSIVE) as meter:
        meter.emit(served("small", 1))
        meter.emit(served("larger", 10_000))
    for command in ("usage", "report", "statement --tenant acme --month 2026-10"):
        result = CliRunner().invoke(app, [*command.split(), "--ledger", ledger_url])
        assert result.exit_code == 0, result.output
        assert "1 unrated, not in the amounts above" in result.output, command


@given(
    flops=st.integers(0, 2**63 - 1),
    tokens=st.tuples(st.integers(0, 10**12), st.integers(0, 10**12)),
    tier=st.sampled_from(["standard", "premium"]),
)
def test_what_is_not_looked_at_surely_fits(flops: int, tokens: tuple[int, int], tier: str) -> None:
    (entry,) = EXPENSIVE.prices
    limits = always_within_receipt(entry)
    within = [min(count, limit) for count, limit in zip((flops, *tokens), limits, strict=True)]
    work = FlopUsage(head=within[0], total=within[0])
    record = usage_record(tier=tier, flops=work, tokens=TokenUsage(input=within[1], output=within[2]))
    assert rate(record, EXPENSIVE).unrated is None


ENTRY = {"effective_from": datetime(2026, 1, 1, tzinfo=UTC), "per_compute_unit": 2, "tiers": {"standard": 1}}
NEEDED, BEYOND = 10**12, 3 * 10**11


def book(**changes: object) -> PriceBook:
    return PriceBook.model_validate({"id": "b", "currency": "USD", "decimals": 6, "prices": [ENTRY], **changes})


USEFUL, EXECUTED = book(), book(charge_drafts=True)


def test_a_book_that_does_not_charge_drafts_is_the_book_it_was() -> None:
    assert "charge_drafts" not in USEFUL.document
    assert book(charge_drafts=False).content_hash == USEFUL.content_hash != EXECUTED.content_hash
    assert PriceBook.from_document(EXECUTED.document).charge_drafts


def test_a_request_costs_what_the_book_counts() -> None:
    record = usage_record("r", drafts=(9, 4, BEYOND))
    needed = Decimal(record.flops.total) * 2 / 10**12
    assert rate(record, USEFUL).cost == cost_of(record, USEFUL)[0] == needed
    assert rate(record, EXECUTED).cost == cost_of(record, EXECUTED)[0] == needed + Decimal("0.6")
    assert rate(record, EXECUTED).full_depth_lines == rate(record, USEFUL).full_depth_lines
    assert record.flops_saved == usage_record("r").flops_saved


def test_a_bound_holds_the_worst_case_that_may_be_charged() -> None:
    offer = Offer(tier="standard", program="0-5", flops_bound=NEEDED, drafts_bound=BEYOND)
    at = datetime(2026, 11, 15, tzinfo=UTC)
    bound = UsageBound(request_id="r", tenant="acme", offers=(offer,), tokens_input=1, tokens_output_max=1, at=at)
    amounts = [quoted.amount for book in (USEFUL, EXECUTED) for quoted in quote_offers(book, bound)]
    assert amounts == [Decimal(2), Decimal("2.6")]


@pytest.mark.parametrize(("prices", "extra"), [(USEFUL, 0), (EXECUTED, BEYOND)])
def test_statement_line_report_and_proof_agree(tmp_path: Path, prices: PriceBook, extra: int) -> None:
    with Ledger(str(tmp_path / "ledger.sqlite3")) as ledger:
        add_book(ledger, prices)
        meter = Meter(ledger)
        records = [usage_record(f"r{n}", drafts=(9, 4, BEYOND) if n % 2 else (0, 0, 0)) for n in range(5)]
        costs = [Decimal(str(meter.emit(record)["cost"])) for record in records]
        charged = sum(record.flops.total for record in records) + 2 * extra
        assert sum(costs) == Decimal(charged) * 2 / 10**12
        issued = issue_statement(ledger, "acme", Period.month("2026-11"), now=datetime(2027, 1, 1, tzinfo=UTC))
        (line,) = issued.statement.lines
        assert line.quantity == Decimal(charged).scaleb(-12)
        explained = explain_line(ledger, f"{issued.statement.id}/1")
        assert (explained.flops, explained.counted) == (charged, line.quantity)
        figures = build_report(ledger).figures
        assert (figures.tokens_drafted, figures.tokens_accepted) == (18, 8)
        assert figures.compute_units_drafts == Decimal(2 * BEYOND).scaleb(-12)
        assert figures.compute_units == Decimal(sum(record.flops.total for record in records)).scaleb(-12)
        assert figures.charge == round(sum(costs), 6)
        with ledger.snapshot() as connection:
            (shown,) = Cost(Books()).of(connection, "acme", Period.month("2026-11"))
        assert shown.figures.charge == figures.charge
        assert verify_ledger(ledger).sound
