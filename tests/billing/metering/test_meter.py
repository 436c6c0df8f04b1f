from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest

from polar_billing.budgets.budget import Budget
from polar_billing.budgets.enforcement import Budgets
from polar_billing.errors import ConflictError, PriceBookError
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, REUSED_TAG, Selection
from polar_billing.metering import meter as meter_module
from polar_billing.metering.meter import Meter, open_meter
from polar_billing.metering.spool import Spool, recover_abandoned
from polar_billing.prices.book import PRICE_BOOK_VARIABLE, PriceBook
from polar_billing.proof.verify import verify_ledger
from polar_billing.statements.retention import prune
from polar_billing.testing import usage_record
from polar_sdk.errors import InvalidRequestError
from polar_sdk.testing import tiny_model
from tests.billing.storing import bound_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from polar_billing.ledger.records import StoredUsage
    from polar_billing.metering.meter import Durability
    from polar_sdk.model import PolarModel

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


DURABILITIES: list[Durability] = ["spool", "commit"]


def stored(ledger: Ledger) -> list[StoredUsage]:
    recover_abandoned(ledger)
    return list(ledger.read(Selection("acme")))


@pytest.fixture(params=DURABILITIES)
def meter(request: pytest.FixtureRequest, store: Ledger) -> Iterator[Meter]:
    with Meter(store, durability=request.param) as made:
        yield made


@pytest.fixture
def model(meter: Meter) -> PolarModel:
    return tiny_model(sink=meter, tenant="acme")


def test_fifty_answers_under_one_id(model: PolarModel, meter: Meter) -> None:
    answers = refused = 0
    for n in range(50):
        try:
            model.generate(f"prompt {n}", request_id="same", max_tokens=2)
            answers += 1
        except ConflictError:
            refused += 1
    assert (answers, refused) == (1, 49)
    assert [one.record.request_id for one in stored(meter.ledger)] == ["same"]
    model.generate("prompt", request_id="other", max_tokens=2)
    assert verify_ledger(meter.ledger).sound


def test_eight_threads_under_one_id(model: PolarModel, meter: Meter) -> None:
    def answer(n: int) -> str | None:
        try:
            return model.generate(f"prompt {n}", request_id="same", max_tokens=4).usage.request_id
        except ConflictError:
            return None

    with ThreadPoolExecutor(8) as pool:
        answers = [found for found in pool.map(answer, range(40)) if found is not None]
    assert len(answers) == len(stored(meter.ledger)) == 1


def test_a_refused_request_computes_nothing(model: PolarModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model.generate("prompt", request_id="same", max_tokens=2)
    open_stream = model.stream("prompt", request_id="open", max_tokens=9)
    next(open_stream)

    def never(*_: object) -> None:
        raise AssertionError("a job was made")

    with monkeypatch.context() as patched:
        patched.setattr("polar_sdk.request.generation.Job", never)
        for request_id in ("same", "open"):
            with pytest.raises(ConflictError, match=request_id):
                model.generate("prompt", request_id=request_id, max_tokens=2)
            with pytest.raises(ConflictError, match=request_id):
                next(model.stream("prompt", request_id=request_id, max_tokens=2))
    open_stream.close()


def test_what_this_process_has_forgotten_the_ledger_knows(store: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter_module, "_REMEMBERED_IDS", 1)
    with Meter(store) as meter:
        for name in ("a", "b"):
            meter.reserve(bound_of(name))
            meter.emit(usage_record(name))
        with pytest.raises(ConflictError, match="acme"):
            meter.reserve(bound_of("a"))
        meter.reserve(bound_of("a", tenant="globex"))  # another tenant's id is its own


def test_a_request_that_never_began_gives_its_id_back(meter: Meter) -> None:
    record = usage_record("a")
    for _ in range(2):
        meter.reserve(bound_of("a"))
        with pytest.raises(ConflictError):
            meter.reserve(bound_of("a"))
        meter.release("acme", "a")
    meter.reserve(bound_of("a"))
    meter.emit(record)
    meter.emit(record)  # an honest replay
    assert len(stored(meter.ledger)) == 1


def test_where_the_lookup_is_not_certain_the_second_use_is_charged(store: Ledger) -> None:
    """Two meters that know nothing of each other, as two processes at the same moment."""
    with Meter(store) as one, Meter(store) as other:
        first, second = usage_record("same"), usage_record("same", output=9)
        one.reserve(bound_of("same"))
        other.reserve(bound_of("same"))
        one.emit(first)
        for _ in range(3):  # an honest replay adds nothing
            assert other.emit(second)["cost"] is not None
        found = {usage.record.tokens.output: usage for usage in stored(store)}
    assert found[4].record == first
    renamed = found[9].record
    assert renamed.tags == {REUSED_TAG: "same"}
    assert renamed.model_copy(update={"request_id": "same", "tags": {}}) == second
    assert found[9].cost is not None
    assert len(found) == 2
    assert verify_ledger(store).sound


def test_two_processes_under_one_id(tmp_path: Path) -> None:
    """Each answer is charged, whichever process gave it."""
    url = f"sqlite:///{tmp_path / 'ledger.sqlite3'}"
    script = """
import sys
from polar_billing.errors import ConflictError
from polar_sdk.testing import tiny_model
model = tiny_model(ledger=sys.argv[1], tenant="acme")
print("ready", flush=True)
sys.stdin.readline()
answers = 0
for n in range(20):
    try:
        model.generate(f"{sys.argv[2]} {n}", request_id=f"same {n}", max_tokens=2)
        answers += 1
    except ConflictError:
        pass
print(answers)
"""
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen([sys.executable, "-c", script, url, name], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        for name in ("left", "right")
    ]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    answers = 0
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in both:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        answers += int(out)
    with Ledger(url) as ledger:
        records = [usage.record for usage in stored(ledger)]
        assert verify_ledger(ledger).sound
    assert len(records) == answers >= 20
    first_ids = Counter(record.tags.get(REUSED_TAG, record.request_id) for record in records)
    assert set(first_ids) == {f"same {n}" for n in range(20)}


def test_a_left_over_file_stored_twice_charges_a_second_use_once(ledger_url: str, tmp_path: Path) -> None:
    with Ledger(ledger_url) as ledger, Meter(ledger) as meter:
        meter.emit(usage_record("same"))
        second = usage_record("same", output=9)
        for _ in range(2):  # as after a crash between storing the file and deleting it
            waiting = Spool(tmp_path / "ledger.sqlite3.spool")
            segment = waiting.segment()
            segment.append([meter.entry(second)])
            waiting.keep(segment)
            waiting.close()
            assert sorted(usage.record.tokens.output for usage in stored(ledger)) == [4, 9]


def test_a_new_id_needs_no_lookup(model: PolarModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> bool:
        raise AssertionError("the ledger was asked")

    monkeypatch.setattr(Ledger, "is_stored", never)
    model.generate("prompt", max_tokens=2)
    with pytest.raises(AssertionError, match="the ledger was asked"):
        model.generate("prompt", max_tokens=2, request_id="given")


@pytest.mark.parametrize("budgeted", [False, True])
def test_a_second_use_after_retention_is_refused_too(store: Ledger, budgeted: bool) -> None:
    record = usage_record("old", started_at=datetime(2025, 1, 1, tzinfo=UTC))
    if budgeted:
        Budgets(store).set(Budget("acme", Decimal(1_000)))
    with Meter(store) as meter:
        meter.emit(record)
        with store.transaction() as connection:
            prune(connection, "acme", datetime(2025, 2, 1, tzinfo=UTC))
        assert stored(store) == []
        with pytest.raises(ConflictError):
            meter.reserve(bound_of("old"))
