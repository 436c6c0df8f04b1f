from __future__ import annotations

import csv
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from polar_billing.errors import OutputError, PeriodError
from polar_billing.metering.meter import Meter
from polar_billing.testing import usage_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from typer.testing import Result

    from polar_billing.ledger.ledger import Ledger

NOVEMBER = ("--month", "2026-11")


@pytest.fixture(autouse=True)
def usage(ledger: Ledger) -> None:
    with Meter(ledger) as meter:
        for tenant in ("cus_1", "=cus"):
            meter.emit(usage_record(f"r-{tenant}", tenant=tenant, prompt=10_000))
        meter.emit(usage_record("old", tenant="cus_1", started_at=datetime(2025, 1, 1, tzinfo=UTC)))


def test_text_goes_to_standard_output_or_a_file(ok: Callable[..., str], ledger: Ledger, tmp_path: Path) -> None:
    for kind in ("focus", "cloudevents", "stripe"):
        words = ("export-billing", "--ledger", ledger.location, "--format", kind, *NOVEMBER, "--tenant", "cus_1")
        printed = ok(*words)
        ok(*words, "--out", str(tmp_path / kind))
        assert (tmp_path / kind).read_text() == printed
        assert "cus_1" in printed


def test_the_formats(ok: Callable[..., str], ledger: Ledger) -> None:
    rows = list(
        csv.DictReader(ok("export-billing", "--ledger", ledger.location, "--format", "focus", *NOVEMBER).splitlines())
    )
    assert {row["BillingAccountId"] for row in rows} == {"'=cus", "cus_1"}
    events = json.loads(ok("export-billing", "--ledger", ledger.location, "--format", "cloudevents", *NOVEMBER))
    assert [event["subject"] for event in events] == ["cus_1", "=cus"]


def test_parquet_needs_a_file(
    polar: Callable[..., Result], ok: Callable[..., str], ledger: Ledger, tmp_path: Path
) -> None:
    for kind in ("focus-parquet", "usage-parquet", "report-parquet"):
        words = ("export-billing", "--ledger", ledger.location, "--format", kind, *NOVEMBER)
        assert "--out" in str(polar(*words).exception)
        ok(*words, "--out", str(tmp_path / kind))
        assert (tmp_path / kind).read_bytes()[:4] == b"PAR1"


def test_an_export_that_fails_leaves_what_was_there(
    polar: Callable[..., Result], ledger: Ledger, tmp_path: Path
) -> None:
    file = tmp_path / "events.jsonl"
    words = ("export-billing", "--ledger", ledger.location, "--format", "stripe", *NOVEMBER, "--out", str(file))
    assert "'=cus' has no Stripe customer" in str(polar(*words).exception)
    assert list(tmp_path.glob("*.jsonl")) == []
    file.write_text("of yesterday", encoding="utf-8")
    assert "'=cus' has no Stripe customer" in str(polar(*words).exception)
    assert file.read_text() == "of yesterday"
    gone = polar(*words, "--tenant", "cus_1", "--out", str(tmp_path / "none" / "events.jsonl"))
    assert isinstance(gone.exception, OutputError)


def test_a_period_needs_both_ends(polar: Callable[..., Result], ledger: Ledger) -> None:
    for kind in ("focus", "stripe"):
        result = polar("export-billing", "--ledger", ledger.location, "--format", kind, "--since", "2026-11-01")
        assert isinstance(result.exception, PeriodError)
