"""`polar drift`: state and history of promises, and savings by kind and length."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from polar_billing.errors import QueryError
from polar_billing.metering.meter import Meter
from polar_billing.testing import audit, usage_record

if TYPE_CHECKING:
    from collections.abc import Callable

    from typer.testing import Result

    from polar_billing.ledger.ledger import Ledger

NOW = datetime.now(UTC)


@pytest.fixture
def audited(ledger: Ledger) -> Ledger:
    """A promise that is broken and one that is not, and requests of two kinds and lengths, one of them long ago."""
    with Meter(ledger) as meter:
        for n in range(20):
            meter.audited(audit(tier="economy", promise="cd" * 32, lost=n >= 8, at=NOW - timedelta(hours=20 - n)))
            meter.audited(audit())
        skipping: dict[str, Any] = {"path": (0, 1, 2, 5), "started_at": NOW - timedelta(days=1)}
        for kind, prompt, count in (("code", 100, 3), ("chat", 600, 2)):
            for _ in range(count):
                meter.emit(usage_record(prompt=prompt, tags={"kind": kind}, tier="economy", **skipping))
        meter.emit(usage_record(tier="standard", started_at=NOW - timedelta(days=1)))
        meter.emit(usage_record(tier="economy", started_at=NOW - timedelta(days=30)))
    return ledger


@pytest.mark.usefixtures("audited")
def test_it_shows_state_history_and_savings(ok: Callable[..., str]) -> None:
    said: dict[str, Any] = json.loads(ok("drift", "--json"))
    economy, premium = said["promises"]
    assert (economy["tier"], economy["state"], economy["audits"], economy["losses"]) == ("economy", "at risk", 20, 12)
    assert [change["state"] for change in economy["history"]] == ["in force", "at risk"]
    assert economy["low"] > economy["alpha"]  # what was seen is not what was promised
    assert (premium["state"], premium["losses"], premium["low"]) == ("in force", 0, 0.0)
    rows = [(row["tier"], row["kind"], row["tokens_max"], row["requests"]) for row in said["saved"]]
    assert rows == [("economy", "chat", 2048, 2), ("economy", "code", 128, 3), ("standard", None, 128, 1)]
    assert [float(row["saved"]) > 0.2 for row in said["saved"]] == [True, True, False]
    shown = ok("drift")
    assert all(words in shown for words in ("economy", "at risk", "code", "cdcdcdcdcdcd"))
    only = json.loads(ok("drift", "--tier", "standard", "--since", "2020-01-01", "--json"))
    assert (only["promises"], len(only["saved"])) == ([], 1)


def test_a_ledger_without_audits_says_so(ok: Callable[..., str], polar: Callable[..., Result]) -> None:
    assert "No promise was audited yet." in ok("drift")
    refused = polar("drift", "--by", 'a"b')
    assert isinstance(refused.exception, QueryError)
