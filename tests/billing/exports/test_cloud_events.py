"""Exports of usage as CloudEvents and Parquet: every request, to the last digit."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from polar_billing.errors import OutputError
from polar_billing.exports.cloud_events import batch_text, event_schema
from polar_billing.exports.focus import focus_rows
from polar_billing.exports.parquet import write_focus, write_report, write_usage
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.metering.meter import Meter
from polar_billing.reports.energy import read_energy
from polar_billing.reports.query import usage_rows
from polar_billing.reports.report import build_report
from polar_billing.statements.period import statements_of_period
from polar_billing.testing import usage_record
from tests.billing.exports.conftest import OCTOBER

if TYPE_CHECKING:
    from pathlib import Path

    from polar_billing.ledger.ledger import Ledger


def events(ledger: Ledger, selection: Selection) -> Any:
    return json.loads("".join(batch_text(ledger.read(selection), ledger.price_books)))


def test_every_event_matches_the_schema_of_the_package(billed: Ledger) -> None:
    schema = event_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    made = events(billed, Selection(ALL_TENANTS))
    assert len(made) == 99
    for event in made:
        validator.validate(event)
        assert event["dataschema"] == schema["$id"]
    for key in ("cost", "flops", "tenant"):
        broken = made[0] | {"data": {name: value for name, value in made[0]["data"].items() if name != key}}
        assert not validator.is_valid(broken)


def test_source_and_id_tell_requests_apart(ledger: Ledger) -> None:
    for source in ("a/b", "a%2Fb"):
        with Meter(ledger, source=source) as meter:
            for tenant in ("acme", "acme/x"):
                meter.emit(usage_record("same", tenant=tenant))
    made = events(ledger, Selection(ALL_TENANTS))
    assert len({(event["source"], event["id"]) for event in made}) == 4
    assert made == events(ledger, Selection(ALL_TENANTS))


def test_totals_are_those_of_the_usage_query(billed: Ledger) -> None:
    for row in usage_rows(billed, Selection(ALL_TENANTS, OCTOBER)):
        data = [
            event["data"]
            for event in events(billed, Selection(ALL_TENANTS, OCTOBER))
            if {name: event["data"][name] for name in row.group} == row.group
        ]
        assert len(data) == row.requests
        assert sum(each["flops"] for each in data) == row.flops
        assert sum(Decimal(each["compute_units"]) for each in data) == row.compute_units
        assert sum(each["tokens_output"] for each in data) == row.tokens_output
        assert all(each["tokens_accepted"] <= each["tokens_drafted"] for each in data)
        costs = [Decimal(each["cost"]) for each in data if each["cost"] is not None]
        assert (sum(costs) if costs else None) == row.cost


def test_nothing_is_an_empty_batch(ledger: Ledger) -> None:
    assert events(ledger, Selection(ALL_TENANTS)) == []


def test_energy_is_marked_as_modelled(billed: Ledger) -> None:
    basis = read_energy("2e9", "a data sheet", None, "400", "the national average")
    made = json.loads("".join(batch_text(billed.read(Selection("acme", OCTOBER)), billed.price_books, basis)))
    validator = jsonschema.Draft202012Validator(event_schema())
    for event in made:
        validator.validate(event)
        energy = event["data"]["energy"]
        assert energy["basis"] == "modelled"
        executed = event["data"]["flops"] + event["data"]["flops_drafts"]
        assert abs(Decimal(energy["joules"]) - Decimal(executed) / 2_000_000_000) <= Decimal("5e-7")
    assert any(event["data"]["flops_drafts"] for event in made)


def test_names_are_kept_as_they_are(ledger: Ledger) -> None:
    tenants = ["=1+1", '"},{"', "<script>", "ü €"]
    with Meter(ledger) as meter:
        for tenant in tenants:
            meter.emit(usage_record("r", tenant=tenant, tags={"k": tenant}))
    made = events(ledger, Selection(ALL_TENANTS))
    assert [(event["subject"], event["data"]["tags"]) for event in made] == [(name, {"k": name}) for name in tenants]


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


def test_energy_has_columns_of_its_own(billed: Ledger, tmp_path: Path) -> None:
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
    with pytest.raises(OutputError):
        write_usage(tmp_path / "no" / "x.parquet", billed.read(Selection(ALL_TENANTS)), billed.price_books)
