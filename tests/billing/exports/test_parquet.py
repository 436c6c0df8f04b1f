from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from polar_billing.errors import OutputError
from polar_billing.exports.focus import focus_rows
from polar_billing.exports.parquet import write_focus, write_report, write_usage
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.reports.energy import read_energy
from polar_billing.reports.report import build_report
from polar_billing.statements.period import statements_of_period
from tests.billing.exports.conftest import OCTOBER

if TYPE_CHECKING:
    from pathlib import Path

    from polar_billing.ledger.ledger import Ledger

parquet = pytest.importorskip("pyarrow.parquet")


def rows(path: Path) -> list[dict[str, Any]]:
    read: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return read


def test_usage_is_the_ledgers(billed: Ledger, tmp_path: Path) -> None:
    selection, path = Selection(ALL_TENANTS), tmp_path / "usage.parquet"
    stored = list(billed.read(selection))
    assert write_usage(path, billed.read(selection), billed.price_books) == len(stored)
    for row, each in zip(rows(path), stored, strict=True):
        record = each.record
        assert (row["sequence"], row["request_id"], row["tier"]) == (each.seq, record.request_id, record.tier)
        assert (row["flops"], row["flops_saved"]) == (record.flops.total, record.flops_saved)
        drafts = (row["tokens_drafted"], row["tokens_accepted"], row["flops_drafts"])
        assert drafts == (record.tokens.drafted, record.tokens.accepted, record.flops.drafts)
        assert row["compute_units"] == Decimal(record.flops.total) / 10**12
        assert (row["cost"], row["unrated"]) == (each.cost, each.unrated)
        assert row["started_at"] == record.started_at
        assert tuple(row["visits_decode"]) == record.visits.decode
        assert dict(row["tags"]) == dict(record.tags)


def test_energy_is_marked_as_modelled(billed: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "usage.parquet"
    write_usage(path, billed.read(Selection("acme")), billed.price_books, read_energy("2e9", "sheet", None, None, None))
    for row in rows(path):
        assert (row["energy_basis"], row["energy_source"], row["carbon_grams"]) == ("modelled", "sheet", None)
        assert abs(row["energy_joules"] * 2_000_000_000 - row["flops"] - row["flops_drafts"]) <= 1_000


def test_the_report_sums_to_its_total(billed: Ledger, tmp_path: Path) -> None:
    report = build_report(billed, Selection(ALL_TENANTS, OCTOBER))
    path = tmp_path / "report.parquet"
    written = rows(path) if write_report(path, report) else []
    assert sum(row["charge"] or 0 for row in written) == report.total
    assert sum(row["compute_units"] or 0 for row in written) == report.figures.compute_units
    assert sum(row["requests"] or 0 for row in written) == report.figures.requests


def test_focus_rows_sum_to_what_is_due(billed: Ledger, tmp_path: Path) -> None:
    statements = statements_of_period(billed, ALL_TENANTS, lambda _: OCTOBER)
    path = tmp_path / "focus.parquet"
    assert write_focus(path, focus_rows(statements)) == len(list(focus_rows(statements)))
    written = rows(path)
    assert sum(row["BilledCost"] for row in written) == sum(each.statement.due for each in statements)
    for row in written:
        if row["PricingQuantity"] is not None:
            assert abs(row["PricingQuantity"] * row["ListUnitPrice"] - row["ListCost"]) <= Decimal("5e-19")


def test_a_folder_that_is_not_there_is_one_clear_error(billed: Ledger, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        write_usage(tmp_path / "no" / "x.parquet", billed.read(Selection(ALL_TENANTS)), billed.price_books)
