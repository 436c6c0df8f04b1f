"""Ledgers whose values were changed past this package, and names that no file has: one line, no traceback."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from polar_billing.budgets.budget import Budget
from polar_billing.budgets.enforcement import Budgets
from polar_billing.errors import LedgerUrlError, StoreError
from polar_billing.ledger.ledger import Ledger
from polar_billing.metering.meter import Meter
from polar_billing.testing import usage_record
from polar_sdk.cli.main import app

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("table", "change", "command"),
    [
        ("polar_usage", "started_at = 9223372036854775807", "usage --requests"),
        ("polar_usage", "visits_prefill = '01'", "explain r"),
        ("polar_receipt", "cost = 'NaN of money'", "report"),
        ("polar_receipt", "price_book_hash = x'00'", "usage --requests"),
        ("polar_usage_hour", "tier = x'eda080'", "usage"),
        ("polar_budget", "time_window = 'decade'", "budget show"),
    ],
)
def test_a_value_that_means_nothing_is_an_error_of_one_line(
    ledger_url: str, tmp_path: Path, table: str, change: str, command: str
) -> None:
    with Meter(ledger_url) as meter:
        Budgets(meter.ledger).set(Budget("acme", Decimal(1)))
        meter.emit(usage_record("r", tenant="acme"))
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite3", isolation_level=None)) as stranger:
        for (name,) in stranger.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            stranger.execute(f"DROP TRIGGER {name}")
        stranger.execute(f"UPDATE {table} SET {change}")
    result = CliRunner().invoke(app, [*command.split(), "--ledger", ledger_url])
    assert isinstance(result.exception, SystemExit), result.output
    assert result.exit_code != 0
    assert len(result.stderr.splitlines()) == 1
    assert "polar verify" in result.stderr


def test_an_argument_that_is_no_text_is_an_error_of_one_line(ledger_url: str) -> None:
    with Meter(ledger_url) as meter:
        meter.emit(usage_record("r"))
    result = CliRunner().invoke(app, ["usage", "--tenant", "acme\udce8", "--ledger", ledger_url])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "is not valid utf-8" in result.stderr


@pytest.mark.parametrize("name", ["/tmp/\udce8", "sqlite:////tmp/\udce8", "/tmp/a\0b"])
def test_a_ledger_whose_name_is_no_text_is_refused(name: str) -> None:
    with pytest.raises(LedgerUrlError, match="UTF-8"):
        Ledger(name)


def test_a_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / ("a" * 3_000)))
    with pytest.raises(StoreError):
        ledger.check()
    assert ledger.price_books() == {}  # as of one that does not exist yet
