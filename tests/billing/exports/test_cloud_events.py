from __future__ import annotations

import json
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import jsonschema

from polar_billing.exports.cloud_events import batch_text, event_schema
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.metering.meter import Meter
from polar_billing.reports.energy import read_energy
from polar_billing.reports.query import usage_rows
from polar_billing.testing import usage_record
from tests.billing.exports.conftest import OCTOBER

if TYPE_CHECKING:
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
