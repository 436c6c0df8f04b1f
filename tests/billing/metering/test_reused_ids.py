"""A request id used twice: refused before compute, or charged twice; never free."""

from __future__ import annotations

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
from polar_billing.errors import ConflictError
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import REUSED_TAG, Selection
from polar_billing.ledger.retention import prune
from polar_billing.metering import meter as meter_module
from polar_billing.metering.meter import Meter
from polar_billing.metering.spool import Spool, recover_abandoned
from polar_billing.proof.verify import verify_ledger
from polar_billing.testing import usage_record
from polar_sdk.testing import tiny_model
from polar_sdk.usage import Offer, UsageBound

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from polar_billing.ledger.records import StoredUsage
    from polar_billing.metering.meter import Durability
    from polar_sdk.model import PolarModel
    from polar_sdk.usage import UsageRecord

DURABILITIES: list[Durability] = ["spool", "commit"]


def stored(ledger: Ledger) -> list[StoredUsage]:
    recover_abandoned(ledger)
    return list(ledger.read(Selection("acme")))


def bound_of(record: UsageRecord, **changes: object) -> UsageBound:
    facts = {"request_id": record.request_id, "tenant": record.tenant, "at": record.started_at, "tags": record.tags}
    offers = (Offer(tier="standard", program=record.program, flops_bound=record.flops.total),)
    return UsageBound.model_validate({**facts, "tokens_input": 10, "tokens_output_max": 4, "offers": offers, **changes})


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
            record = usage_record(name)
            meter.reserve(bound_of(record))
            meter.emit(record)
        with pytest.raises(ConflictError, match="acme"):
            meter.reserve(bound_of(usage_record("a")))
        meter.reserve(bound_of(usage_record("a"), tenant="globex"))  # another tenant's id is its own


def test_a_request_that_never_began_gives_its_id_back(meter: Meter) -> None:
    record = usage_record("a")
    for _ in range(2):
        meter.reserve(bound_of(record))
        with pytest.raises(ConflictError):
            meter.reserve(bound_of(record))
        meter.release("acme", "a")
    meter.reserve(bound_of(record))
    meter.emit(record)
    meter.emit(record)  # an honest replay
    assert len(stored(meter.ledger)) == 1


def test_where_the_lookup_is_not_certain_the_second_use_is_charged(store: Ledger) -> None:
    """Two meters that know nothing of each other, as two processes at the same moment."""
    with Meter(store) as one, Meter(store) as other:
        first, second = usage_record("same"), usage_record("same", output=9)
        one.reserve(bound_of(first))
        other.reserve(bound_of(second))
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
            meter.reserve(bound_of(usage_record("old")))
