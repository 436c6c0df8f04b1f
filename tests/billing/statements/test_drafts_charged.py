"""Compute of drafts beyond what answers needed is charged where the price book says so, and nowhere else."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest

from polar_billing.dashboard.charges import Books, Cost
from polar_billing.ledger.books import add_book
from polar_billing.ledger.ledger import Ledger
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.prices.quote import quote_offers
from polar_billing.prices.rating import cost_of, rate
from polar_billing.proof.verify import verify_ledger
from polar_billing.reports.explanation import explain_line
from polar_billing.reports.report import build_report
from polar_billing.statements.issue import issue_statement
from polar_billing.testing import usage_record
from polar_billing.values.periods import Period
from polar_sdk.usage import Offer, UsageBound

if TYPE_CHECKING:
    from pathlib import Path

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
