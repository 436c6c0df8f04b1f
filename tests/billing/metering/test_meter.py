from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest

from polar_billing.errors import ConflictError, PriceBookError
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.metering.meter import Meter, open_meter
from polar_billing.metering.spool import recover_abandoned
from polar_billing.prices.book import PRICE_BOOK_VARIABLE, PriceBook
from polar_billing.testing import usage_record
from polar_sdk.errors import InvalidRequestError

if TYPE_CHECKING:
    from pathlib import Path

EVERYTHING = Selection(ALL_TENANTS)


def test_a_receipt_says_what_was_executed_and_what_it_cost(ledger: Ledger) -> None:
    record = usage_record("r", tier="premium", path=(0, 1, 2, 2, 3, 4, 5))
    receipt = Meter(ledger).emit(record)
    units = Decimal(record.flops.total).scaleb(-12)
    assert json.loads(json.dumps(receipt)) == {
        "cost": f"{(units * Decimal('0.0005')).quantize(Decimal('1E-12')):f}",
        "currency": "USD",
        "compute_units": f"{units:.12f}",
        "price_book": "polar-example",
        "price_book_hash": PriceBook.example().content_hash,
        "tier": "premium",
        "lines": [
            {
                "name": "compute",
                "quantity": f"{units:.12f}",
                "unit": "CU",
                "unit_price": "0.0005",
                "amount": receipt["cost"],
            }
        ],
        "unrated": None,
    }


@pytest.mark.parametrize("tier", ["economy", "gold"])
def test_a_receipt_may_be_had_before_its_record_is_stored(ledger: Ledger, tier: str) -> None:
    meter, record = Meter(ledger), usage_record(tier=tier)
    receipt = meter.receipt(record)
    assert list(ledger.read(Selection("acme"))) == []
    assert meter.emit(record) == receipt


def test_lines_of_a_receipt_sum_to_its_cost(ledger: Ledger) -> None:
    text = """
        id = "many"
        currency = "JPY"
        [[prices]]
        effective_from = 2026-01-01
        per_compute_unit = 0.000001
        per_million_input_tokens = 0.000001
        per_million_output_tokens = 0.000001
        per_request = 0.000000000001
        tiers = {standard = 0.333333}
    """
    meter = Meter(ledger, prices=PriceBook.from_toml(text))
    receipts = [meter.emit(usage_record(prompt=prompt)) for prompt in range(1, 30)]
    for receipt in receipts:
        assert sum(Decimal(line["amount"]) for line in receipt["lines"]) == Decimal(receipt["cost"])
    assert any(line["name"] == "rounding" for receipt in receipts for line in receipt["lines"])


def test_an_unrated_receipt_has_no_cost_but_a_reason(ledger: Ledger) -> None:
    receipt = Meter(ledger).emit(usage_record(tier="gold"))
    assert receipt["cost"] is None
    assert receipt["lines"] == []
    assert "no price for tier 'gold'" in receipt["unrated"]


def test_a_replay_gets_the_first_receipt_even_under_other_prices(ledger: Ledger, book: PriceBook) -> None:
    record = usage_record("same")
    first = Meter(ledger).emit(record)
    dearer = PriceBook.from_document(book.document.replace('"0.0004"', '"4"'))
    assert Meter(ledger, prices=dearer).emit(usage_record("other"))["cost"] != first["cost"]
    assert Meter(ledger, prices=dearer).emit(record) == first
    with pytest.raises(ConflictError):
        Meter(ledger).emit(record.model_copy(update={"decode_ns": 1}))


def test_a_wrong_price_book_is_told_before_compute(
    tmp_path: Path, ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PRICE_BOOK_VARIABLE, str(tmp_path / "missing.toml"))
    with pytest.raises(PriceBookError, match=r"missing\.toml"):
        Meter(ledger_url).check()
    assert list(tmp_path.iterdir()) == []


def test_one_meter_per_ledger_is_shared_and_lazy(tmp_path: Path, ledger_url: str) -> None:
    meter = open_meter(None)
    assert meter is open_meter(ledger_url)
    assert meter is not open_meter(str(tmp_path / "other.sqlite3"))
    assert list(tmp_path.iterdir()) == []
    meter.emit(usage_record("a"))
    meter.close()
    meter.emit(usage_record("b"))  # closing releases; it does not break those who share it
    meter.close()


WORKER = """
import sys
from polar_billing.metering.meter import open_meter
from polar_billing.testing import usage_record
meter = open_meter(None)
for n in range(30):
    meter.check()
    meter.emit(usage_record(f"{sys.argv[1]}-{n}"))
    meter.emit(usage_record(f"shared-{n}"))
"""


def test_four_processes_begin_together_on_a_new_ledger(ledger_url: str) -> None:
    workers = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", WORKER, str(n)], stderr=subprocess.PIPE)
        for n in range(4)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors.decode()
    found = [stored.record.request_id for stored in Ledger(ledger_url).read(EVERYTHING)]
    assert len(found) == len(set(found)) == 4 * 30 + 30


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_meters_on_connections_of_its_own(ledger_url: str, ledger: Ledger) -> None:
    script = """
import os, sys
from polar_billing.metering.meter import open_meter
from polar_billing.testing import usage_record
meter = open_meter(None)
meter.emit(usage_record("parent before"))
child = os.fork()
meter.emit(usage_record("child" if child == 0 else "parent after"))
if child == 0:
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    recover_abandoned(ledger)  # the child's, which ended without storing it
    found = {stored.record.request_id for stored in ledger.read(EVERYTHING)}
    assert found == {"parent before", "child", "parent after"}


# --- The name of the service. ---


def test_a_source_is_named_by_argument_or_environment(ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Meter(ledger_url) as unnamed:
        assert unnamed.source == "polar"
    monkeypatch.setenv("POLAR_SOURCE", "chat")
    with Meter(ledger_url) as plain, Meter(ledger_url, source="own") as named:
        assert (plain.source, named.source) == ("chat", "own")
    for source in ("chat", "search", "search"):
        monkeypatch.setenv("POLAR_SOURCE", source)
        with contextlib.closing(open_meter(ledger_url)) as meter:
            assert isinstance(meter, Meter)
            assert meter.source == source
            meter.emit(usage_record("same"))
    with Ledger(ledger_url) as ledger:
        assert sorted(one.source for one in ledger.read(Selection("acme"))) == ["chat", "search"]


@pytest.mark.parametrize(
    ("name", "flaw"),
    [
        (" chat", "begins or ends with white space"),
        ("a\nb", "contains the control character U+000A"),
        ("x" * 201, "201"),
    ],
)
def test_a_source_that_is_no_name_is_refused(name: str, flaw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLAR_SOURCE", name)
    for make in (Meter, open_meter):
        with pytest.raises(InvalidRequestError, match=re.escape(flaw)):
            make("sqlite://")
