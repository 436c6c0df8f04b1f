"""FOCUS rows: they tie to statements, and quantity times unit price is cost. `make focus-check` asks the validator."""

from __future__ import annotations

import csv
import io
import json
import re
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from polar_billing.exports.focus import COLUMNS, OWN_COLUMNS, focus_csv, focus_rows
from polar_billing.ledger.records import ALL_TENANTS
from polar_billing.metering.meter import Meter
from polar_billing.statements.draft import draft_statement
from polar_billing.statements.issue import credit_note, issue_statement
from polar_billing.statements.period import StatementOfPeriod, statements_of_period
from polar_billing.testing import usage_record
from polar_billing.values.money import exact_sum
from polar_billing.values.periods import Period
from polar_sdk.usage import AS_STORED, UsageRecord
from tests.billing.exports.conftest import NOVEMBER, OCTOBER

if TYPE_CHECKING:
    from polar_billing.ledger.ledger import Ledger
    from polar_billing.prices.book import PriceBook

PRODUCTS = [("ListUnitPrice", "ListCost"), ("ContractedUnitPrice", "ContractedCost")]


def of(ledger: Ledger, period: Period = OCTOBER) -> list[StatementOfPeriod]:
    return statements_of_period(ledger, ALL_TENANTS, lambda _: period)


def written(statements: list[StatementOfPeriod]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(focus_csv(focus_rows(statements)))))


def test_issued_statements_come_before_drafts(billed: Ledger) -> None:
    acme, globex = of(billed)
    assert (acme.statement.tenant, acme.issued_at is None) == ("acme", False)
    assert (globex.statement, globex.issued_at) == (draft_statement(billed, "globex", OCTOBER), None)
    assert acme.statement.requests == 49  # without the late one


@pytest.mark.parametrize("period", [OCTOBER, NOVEMBER])
def test_the_billed_cost_of_an_invoice_is_what_is_due(billed: Ledger, period: Period) -> None:
    statements = of(billed, period)
    rows = written(statements)
    assert {row["InvoiceId"] for row in rows} == {each.statement.id for each in statements}
    for each in statements:
        costs = [Decimal(row["BilledCost"]) for row in rows if row["InvoiceId"] == each.statement.id]
        assert exact_sum(costs, 6) == each.statement.due


def test_an_export_sums_to_what_is_due_less_credit_notes(billed: Ledger) -> None:
    issue_statement(billed, "globex", OCTOBER)
    before = of(billed)
    rows = written(before)
    for each in before:
        statement = each.statement
        for number, amount in enumerate((Decimal("0.000001"), statement.total / 2)):
            units = amount.quantize(Decimal("0.000001"))
            credit_note(billed, statement.tenant, statement.id, units, reason="=outage", reference=f"n{number}")
    after = of(billed)
    notes = [row for row in written(after) if row["x_LineKind"] == "credit note"]
    assert [row for row in written(after) if row not in notes] == rows
    for each in after:
        own = [row for row in notes if row["InvoiceId"] == each.statement.id]
        assert [-Decimal(row["BilledCost"]) for row in own] == [note.amount for note in each.credit_notes]
        assert len(own) == 2
    due = exact_sum((each.statement.due for each in after), 6)
    taken = exact_sum((note.amount for each in after for note in each.credit_notes), 6)
    assert exact_sum((Decimal(row["BilledCost"]) for row in written(after)), 6) == due - taken
    for row in notes:
        kind = [row[name] for name in ("ChargeCategory", "ChargeClass", "ChargeFrequency")]
        assert kind == ["Credit", "Correction", "One-Time"]
        assert (row["x_Corrects"], row["x_Note"]) == (row["InvoiceId"], "'=outage")
        assert {row[name] for name in ("ListCost", "ContractedCost", "EffectiveCost")} == {row["BilledCost"]}
        assert not row["PricingQuantity"]


def test_quantity_times_unit_price_is_cost(billed: Ledger) -> None:
    rows = [row for row in written(of(billed)) if row["PricingQuantity"]]
    assert len(rows) > 20
    for row in rows:
        for price, cost in PRODUCTS:
            assert Decimal(row["PricingQuantity"]) * Decimal(row[price]) == Decimal(row[cost])


def test_bands_are_rows_of_their_own_beside_the_list_price(billed: Ledger) -> None:
    rows = [row for row in written(of(billed)) if row["x_LineItem"].startswith("compute (graduated")]
    assert {(row["x_Tier"], row["ListUnitPrice"].rstrip("0")) for row in rows} >= {
        ("economy", "0.24"),
        ("premium", "0.68"),
    }
    below = [row for row in rows if Decimal(row["ContractedUnitPrice"]) < Decimal(row["ListUnitPrice"])]
    assert {row["x_LineItem"] for row in below} == {"compute (graduated, up to 0.005)", "compute (graduated, beyond)"}
    assert len({row["SkuPriceId"] for row in rows}) == len(rows)
    assert len({row["SkuId"] for row in rows}) == 4


def test_what_has_no_quantity_costs_the_same_in_every_column(billed: Ledger) -> None:
    rows = [row for row in written(of(billed)) if row["ChargeCategory"] != "Usage"]
    assert {row["x_LineKind"] for row in rows} == {"discount", "minimum", "rounding", "prepaid"}
    for row in rows:
        assert {row[name] for name in ("ListCost", "ContractedCost", "EffectiveCost")} == {row["BilledCost"]}
        assert not (row["PricingQuantity"] or row["SkuId"] or row["ConsumedUnit"])


def test_late_usage_is_a_correction(billed: Ledger) -> None:
    rows = [row for row in written(of(billed, NOVEMBER)) if row["ChargeClass"]]
    (october,) = [each.statement for each in of(billed) if each.statement.tenant == "acme"]
    assert {(row["ChargeClass"], row["x_Corrects"]) for row in rows} == {("Correction", october.id)}


def test_columns_are_those_of_focus_then_our_own(billed: Ledger) -> None:
    rows = written(of(billed))
    assert list(rows[0]) == [*COLUMNS, *OWN_COLUMNS]
    assert list(COLUMNS) == sorted(COLUMNS)
    assert all(name.startswith("x_") for name in OWN_COLUMNS)
    for row in rows:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["ChargePeriodStart"])
        assert json.loads(row["SkuPriceDetails"] or "null") is None or row["SkuPriceId"]


@pytest.mark.parametrize("name", ["=cmd()", "+1", "-1", "@SUM(1)", "\t=1+1", 'a,"b"'])
def test_hostile_names_neither_run_nor_break_rows(ledger: Ledger, book: PriceBook, name: str) -> None:
    fields: dict[str, Any] = usage_record("r1").model_dump(mode="json") | {"tenant": name, "tier": name}
    with Meter(ledger, prices=book) as meter:
        meter.emit(UsageRecord.model_validate(fields, context=AS_STORED))
        meter.emit(usage_record("r2", tenant=name.strip()))
    rows = written(statements_of_period(ledger, ALL_TENANTS, lambda _: NOVEMBER))
    cells = [cell for row in rows for column, cell in row.items() if not re.fullmatch(r"-?[\d.]*", cell)]
    assert cells
    assert not [cell for cell in cells if cell.lstrip().startswith(("=", "+", "-", "@", "\t"))]


def test_a_tenant_without_anything_to_say_is_left_out(billed: Ledger) -> None:
    tenants = [each.statement.tenant for each in of(billed, Period.month("2025-10"))]
    assert tenants == ["acme"]  # whose late usage goes to whatever statement comes next; globex has no plan yet
