"""`polar verify`, `receipt`, `prune` and `migrate`: what they print, refuse and leave behind."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from typer.testing import Result

from polar_billing.errors import (
    LedgerUnsoundError,
    OutputError,
    PeriodError,
    QueryError,
    SchemaVersionError,
    StoreNotFoundError,
)
from polar_billing.ledger.schema import SCHEMA_VERSION
from polar_billing.metering.meter import Meter
from polar_billing.testing import usage_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from polar_billing.ledger.ledger import Ledger

OLD, NEW = datetime(2025, 12, 31, 23, 59, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def filled(ledger: Ledger) -> Ledger:
    with Meter(ledger) as meter:
        for name, tenant, at in (("a", "acme", OLD), ("b", "acme", NEW), ("c", "globex", NEW)):
            meter.emit(usage_record(name, tenant=tenant, started_at=at))
    return ledger


def change(ledger: Ledger, statement: str) -> None:
    with closing(sqlite3.connect(str(ledger.url.database), isolation_level=None)) as stranger:
        stranger.execute("DROP TRIGGER polar_usage_no_update")
        stranger.execute(statement)


def test_a_sound_ledger_prints_its_heads(filled: Ledger, polar: Callable[..., Result]) -> None:
    result = polar("verify")
    assert result.exit_code == 0
    assert result.output.startswith(f"The ledger {filled.location} is sound: 4 links of 3 chains.")
    assert "acme: number 2, hash " in result.output
    verified = json.loads(polar("verify", "--tenant", "acme", "--json").output)
    assert (verified["sound"], verified["findings"], verified["heads"]["acme"]["number"]) == (True, [], 2)


def test_a_changed_ledger_names_the_first_bad_number(filled: Ledger, polar: Callable[..., Result]) -> None:
    change(filled, "UPDATE polar_usage SET tokens_output = tokens_output + 1 WHERE request_id = 'b'")
    result = polar("verify")
    assert isinstance(result.exception, LedgerUnsoundError)
    assert "is not as it was written" in str(result.exception)
    verified = polar("verify", "--json")
    assert isinstance(verified.exception, LedgerUnsoundError)
    findings = json.loads(verified.output)["findings"]
    assert (findings[0]["tenant"], findings[0]["number"]) == ("acme", 2)


def test_a_receipt_is_checked_against_the_chain(filled: Ledger, tmp_path: Path, polar: Callable[..., Result]) -> None:
    printed = polar("receipt", "b", "--tenant", "acme")
    assert printed.exit_code == 0
    file = tmp_path / "receipt.json"
    file.write_text(printed.output, encoding="utf-8")
    result = polar("verify", "--receipt", str(file))
    assert result.output == f"The receipt {file} agrees with the ledger {filled.location}.\n"
    file.write_text(json.dumps({**json.loads(printed.output), "cost": "0.000000000001"}), encoding="utf-8")
    assert isinstance(polar("verify", "--receipt", str(file)).exception, LedgerUnsoundError)


@pytest.mark.usefixtures("filled")
def test_a_receipt_that_is_none_is_refused(tmp_path: Path, polar: Callable[..., Result]) -> None:
    file = tmp_path / "receipt.json"
    assert isinstance(polar("verify", "--receipt", str(file)).exception, OutputError)
    for content in (
        "{",
        "[]",
        "[" * 100_000,
        '{"format":' + "1" * 5000 + "}",
        '{"format": "polar-receipt-1", "tenant": "\\ud800"}',
    ):
        file.write_text(content, encoding="utf-8")
        assert isinstance(polar("verify", "--receipt", str(file)).exception, QueryError)
    for arguments in (["nothing", "--tenant", "acme"], ["b", "--tenant", "globex"], ["b"]):
        assert isinstance(polar("receipt", *arguments).exception, QueryError)


def test_pruning_asks_and_keeps_the_proof(filled: Ledger, tmp_path: Path, polar: Callable[..., Result]) -> None:
    receipt = polar("receipt", "a", "--tenant", "acme").output
    assert polar("prune", "--before", "2026-01-01", answer="n\n").exit_code == 1
    assert receipt == polar("receipt", "a", "--tenant", "acme").output
    assert "acme: 1 requests pruned." in polar("prune", "--before", "2026-01-01", answer="y\n").output
    assert polar("prune", "--before", "2026-01-01", "--yes").output.startswith("Nothing was served before")
    assert polar("verify").output.startswith(f"The ledger {filled.location} is sound: 5 links of 3 chains.")
    file = tmp_path / "receipt.json"
    file.write_text(receipt, encoding="utf-8")
    checked = polar("verify", "--receipt", str(file))
    assert checked.exit_code == 0
    assert checked.output.endswith(", but compute_units cannot be checked: the facts of the request were pruned.\n")
    assert isinstance(polar("prune", "--before", "yesterday", "--yes").exception, PeriodError)


def test_migrating_says_from_where_to_where(filled: Ledger, tmp_path: Path, polar: Callable[..., Result]) -> None:
    result = polar("migrate")
    assert result.output == f"The ledger {filled.location} already has schema version {SCHEMA_VERSION}.\n"
    for missing, error in (("x.sqlite3", SchemaVersionError), ("none/x.sqlite3", StoreNotFoundError)):
        assert isinstance(polar("migrate", "--ledger", str(tmp_path / missing)).exception, error)
        assert not (tmp_path / missing).exists()
