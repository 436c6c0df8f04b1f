"""`polar budget`: what it prints, and what it exits with."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import update
from typer.testing import Result

from polar_billing.budgets.budget import Budget, Level
from polar_billing.budgets.enforcement import Budgets
from polar_billing.ledger.schema import counter_table
from polar_billing.metering.meter import Meter
from polar_billing.testing import usage_record
from polar_sdk.usage import Offer, UsageBound

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from polar_billing.ledger.ledger import Ledger


@pytest.fixture
def polar(polar: Callable[..., Result]) -> Callable[..., Result]:
    """`polar budget`."""
    return partial(polar, "budget")


@pytest.fixture
def filled(ledger: Ledger) -> Budgets:
    """Two tenants with budgets; one has used some and holds some."""
    budgets = Budgets(ledger)
    budgets.set(Budget("acme", Decimal(1), "USD", zone="Europe/Berlin"))
    budgets.set(Budget("acme", Decimal("0.5"), "CU", Level.USER, "[red]ann"))
    budgets.set(Budget("globex", Decimal(3)))
    with_meter = Meter(ledger)
    now = datetime.now(UTC)
    tags = {"user": "[red]ann"}
    with_meter.emit(usage_record("used", started_at=now, tags=tags))
    offers = (Offer(tier="standard", program="0-5", flops_bound=10**11),)
    with_meter.reserve(
        UsageBound(
            request_id="running", tenant="acme", tags=tags, tokens_input=1, tokens_output_max=1, offers=offers, at=now
        )
    )
    with_meter.close()
    return budgets


def test_set_says_what_is_left(ledger: Ledger, polar: Callable[..., Result]) -> None:
    Meter(ledger, source="import").emit(usage_record("before", started_at=datetime.now(UTC)))
    done = polar("set", "acme", "0.1", "CU", "--window", "week", "--zone", "Asia/Tokyo")
    assert done.exit_code == 0, done.output
    assert done.output.startswith("The week's budget of tenant 'acme' is 0.1 CU; 0.09")
    (budget,) = Budgets(ledger).in_force("acme")
    assert (budget.window, budget.zone, budget.over_budget) == ("week", "Asia/Tokyo", "refuse")
    done = polar("set", "acme", "5", "USD", "--key", "k1", "--over-budget", "shallower")
    assert done.output == "The month's budget of key 'k1' of tenant 'acme' is 5 USD; 5 USD left.\n"


def test_the_tenants_zone_stands_in_the_price_book(
    ledger: Ledger, tmp_path: Path, polar: Callable[..., Result]
) -> None:
    book = tmp_path / "book.toml"
    book.write_text(
        """
        id = "zoned"
        currency = "USD"
        [[prices]]
        effective_from = 2024-01-01
        per_compute_unit = 1
        tiers = {standard = 1}
        [[customers]]
        tenant = "acme"
        effective_from = 2024-01-01
        zone = "Asia/Kolkata"
        """,
        encoding="utf-8",
    )
    for tenant in ("acme", "globex"):
        assert polar("set", tenant, "1", "USD", "--prices", str(book)).exit_code == 0
    assert [budget.zone for tenant in ("acme", "globex") for budget in Budgets(ledger).in_force(tenant)] == [
        "Asia/Kolkata",
        "UTC",
    ]


def test_show_prints_every_figure_three_ways(filled: Budgets, polar: Callable[..., Result]) -> None:
    rows = json.loads(polar("show", "--json").output)
    assert [(row["tenant"], row["level"], row["unit"]) for row in rows] == [
        ("acme", "tenant", "USD"),
        ("acme", "user", "CU"),
        ("globex", "tenant", "CU"),
    ]
    first = rows[0]
    assert Decimal(first["limit"]) - Decimal(first["spent"]) - Decimal(first["held"]) == Decimal(first["left"])
    assert Decimal(first["spent"]) > 0
    assert Decimal(first["held"]) == Decimal("0.1") * Decimal("0.0004")
    assert rows[1]["held"] == "0.1"
    resets = datetime.fromisoformat(first["resets_at"])
    assert (resets.day, resets.hour) == (1, 0)
    table = polar("show").output
    assert "[red]ann" in table
    assert first["resets_at"] in table
    read = list(csv.DictReader(io.StringIO(polar("show", "--csv", "-").output)))
    assert [{key: value or None for key, value in row.items()} for row in read] == rows
    assert "globex" not in polar("show", "--tenant", "acme").output
    assert polar("show", "--tenant", "nobody").output == "No budgets of tenant 'nobody' in the ledger.\n"


def test_holds_are_shown_and_expire(filled: Budgets, polar: Callable[..., Result]) -> None:
    (hold,) = json.loads(polar("holds", "--json").output)
    assert (hold["tenant"], hold["request_id"], hold["user"]) == ("acme", "running", "[red]ann")
    assert hold["compute_units_bound"] == "0.1"
    assert datetime.fromisoformat(hold["expires_at"]) > datetime.now(UTC)
    assert "running" in polar("holds", "--expire").output  # not yet
    late = Budgets(filled.ledger, clock=lambda: datetime.now(UTC) + timedelta(hours=1))
    assert late.expire("globex") == 0
    assert late.expire("acme") == 1
    assert polar("holds").output == "Nothing is held.\n"


def test_close_lifts_a_budget(filled: Budgets, polar: Callable[..., Result]) -> None:
    done = polar("close", "acme", "CU", "--user", "[red]ann")
    assert done.output == "The month's budget of user '[red]ann' of tenant 'acme', 0.5 CU, is closed.\n"
    assert [budget.unit for budget in filled.in_force("acme")] == ["USD"]


def test_recheck_finds_what_is_wrong(filled: Budgets, polar: Callable[..., Result]) -> None:
    assert polar("recheck").output == "Every counter agrees with holds and usage.\n"
    with filled.ledger.transaction() as connection:
        connection.execute(update(counter_table).where(counter_table.c.level == "user").values(held=7))
    wrong = polar("recheck", "--tenant", "acme")
    assert wrong.exit_code == 1
    assert "user '[red]ann' of tenant 'acme'" in wrong.output
    assert "held 0.000000000007 CU, should be 0.1 CU" in wrong.output
    repaired = polar("recheck", "--repair", "--json")
    assert repaired.exit_code == 0
    assert [row["should_be"]["held"] for row in json.loads(repaired.output)] == ["0.1"]
    assert json.loads(polar("recheck", "--json").output) == []
