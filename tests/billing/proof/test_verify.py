"""Tampering with a ledger past this package: every change is found, and the first bad number is named."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tracemalloc
from contextlib import closing
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from polar_billing.budgets.budget import Budget
from polar_billing.budgets.enforcement import Budgets
from polar_billing.budgets.settlement import settle
from polar_billing.errors import QueryError
from polar_billing.ledger.chain import Head, digest_of, hash_of, raw_rows
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.postings import Account, Line, post
from polar_billing.ledger.records import Entry
from polar_billing.ledger.schema import CHAINED
from polar_billing.metering.meter import Meter
from polar_billing.prices.rating import rate
from polar_billing.proof.receipts import ReceiptCheck, check_receipt, make_receipt
from polar_billing.proof.verify import Verification, check_head, verify_ledger
from polar_billing.statements.issue import credit_note, issue_statement
from polar_billing.statements.retention import prune
from polar_billing.testing import usage_record
from polar_billing.values.canonical import canonical_json
from polar_billing.values.periods import Period

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polar_billing.prices.book import PriceBook

NOON = datetime(2026, 11, 15, 12, tzinfo=UTC)
REQUESTS = 12


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of two tenants with usage, pruned usage, transactions, a budget, statement and credit note; one file."""
    file = tmp_path_factory.mktemp("sound") / "ledger.sqlite3"
    with Ledger(str(file)) as ledger:
        meter = Meter(ledger)
        meter.emit_many(
            usage_record(f"r{n}", tenant=("acme", "globex")[n % 2], started_at=NOON + timedelta(days=n), output=n)
            for n in range(REQUESTS)
        )
        Budgets(ledger).set(Budget("acme", Decimal(5), "USD"))
        with ledger.transaction() as connection:
            for n in range(3):
                lines = [Line(Account.CASH, Decimal(n + 1), "USD"), Line(Account.RECEIVABLE, Decimal(-n - 1), "USD")]
                post(connection, "acme", "payment", f"p{n}", lines, NOON, note="paid")
            prune(connection, "acme", NOON + timedelta(days=3))
        issued = issue_statement(ledger, "globex", Period.month("2026-11"), now=NOON + timedelta(days=60))
        assert issued.statement.total > 0
        credit_note(ledger, "globex", issued.statement.id, issued.statement.total, reason="sorry", reference="n1")
    with closing(sqlite3.connect(file)) as fold:
        fold.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        fold.execute("PRAGMA journal_mode = DELETE")
    return file


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sound, tmp_path / "copy.sqlite3"))


def verified(file: Path) -> Verification:
    with Ledger(str(file)) as ledger:
        return verify_ledger(ledger)


class Stranger:
    """Changes a file past this package: without triggers, foreign keys and manners."""

    def __init__(self, file: Path) -> None:
        self.connection = sqlite3.connect(file, isolation_level=None)
        for (name,) in self.connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            self.connection.execute(f"DROP TRIGGER {name}")

    def __enter__(self) -> sqlite3.Connection:
        self.connection.execute("BEGIN")
        return self.connection

    def __exit__(self, *_: object) -> None:
        self.connection.execute("COMMIT")
        self.connection.close()


def test_a_sound_ledger_is_sound(sound: Path) -> None:
    found = verified(sound)
    assert found.findings == []
    # one book, the requests, three payments, one pruning, one budget, a statement and a credit note, both booked
    assert found.links == 1 + REQUESTS + 3 + 1 + 1 + 2 + 2
    assert set(found.heads) == {"", "acme", "globex"}


@pytest.fixture
def usage_only(tmp_path: Path) -> Path:
    """A ledger whose chains end with usage."""
    file = tmp_path / "usage.sqlite3"
    with Meter(str(file)) as meter:
        meter.emit_many(usage_record(f"r{n}", tenant="globex", started_at=NOON) for n in range(3))
    return file


def test_a_chain_cut_off_at_its_end_is_found_by_its_head(usage_only: Path) -> None:
    with Stranger(usage_only) as connection:
        last = connection.execute("SELECT max(number) FROM polar_chain_link WHERE tenant = 'globex'").fetchone()[0]
        key = connection.execute(
            "SELECT key FROM polar_chain_link WHERE tenant = 'globex' AND number = ?", (last,)
        ).fetchone()[0]
        connection.execute("DELETE FROM polar_chain_link WHERE tenant = 'globex' AND number = ?", (last,))
        connection.execute("DELETE FROM polar_receipt WHERE usage_seq = ?", (key,))
        connection.execute("DELETE FROM polar_usage WHERE seq = ?", (key,))
    first = verified(usage_only).findings[0]
    assert (first.tenant, first.number) == ("globex", last)


def test_what_only_a_head_kept_elsewhere_can_tell(usage_only: Path) -> None:
    """A tail taken back with its head is a ledger as it once was: sound by itself, and yet not the one that was."""
    kept = verified(usage_only).heads["globex"]
    with Stranger(usage_only) as connection:
        link = "polar_chain_link WHERE tenant = 'globex' AND number"
        key = connection.execute(f"SELECT key FROM {link} = ?", (kept.number,)).fetchone()[0]
        number, own = connection.execute(f"SELECT number, hash FROM {link} = ?", (kept.number - 1,)).fetchone()
        connection.execute(f"DELETE FROM {link} = ?", (kept.number,))
        connection.execute("UPDATE polar_chain_head SET number = ?, hash = ? WHERE tenant = 'globex'", (number, own))
        connection.execute("DELETE FROM polar_receipt WHERE usage_seq = ?", (key,))
        connection.execute("DELETE FROM polar_usage WHERE seq = ?", (key,))
        connection.execute("DELETE FROM polar_usage_hour")
    assert {finding.number for finding in verified(usage_only).findings} == {
        None
    }  # no more than the rollups, which can be redone
    with Ledger(str(usage_only)) as ledger, ledger.snapshot() as connection_:
        found = check_head(connection_, "globex", kept)
        assert found is not None
        assert found.number == kept.number
        assert check_head(connection_, "globex", Head(number, own)) is None


def test_a_row_and_its_link_hashed_anew_are_found_by_the_next_link(copy: Path) -> None:
    with Stranger(copy) as connection:
        (seq,) = connection.execute("SELECT seq FROM polar_usage WHERE request_id = 'r5'").fetchone()
        connection.execute("UPDATE polar_usage SET device = 'tpu' WHERE request_id = 'r5'")
    with Ledger(str(copy)) as ledger, ledger.snapshot() as stored:
        rows = raw_rows(stored, CHAINED["usage"], [seq])[str(seq)]
    with Stranger(copy) as connection:
        link = "polar_chain_link {} WHERE subject = 'usage' AND key = ?"
        number, previous = connection.execute(f"SELECT number, previous FROM {link.format('')}", [str(seq)]).fetchone()
        digest = digest_of("usage", rows)
        forged = hash_of("globex", number, "usage", str(seq), digest, previous)
        connection.execute(f"UPDATE {link.format('SET digest = ?, hash = ?')}", [digest, forged, str(seq)])
    (finding,) = verified(copy).findings
    assert (finding.tenant, finding.number) == ("globex", number + 1)


def test_receipts_whose_price_book_went_with_its_chain_are_found(copy: Path) -> None:
    with Stranger(copy) as connection:
        connection.execute("DELETE FROM polar_price_book")
        for table in ("polar_chain_link", "polar_chain_head"):
            connection.execute(f"DELETE FROM {table} WHERE tenant = ''")
    assert any("receipts name price book" in str(finding) for finding in verified(copy).findings)


def test_a_wrong_rollup_is_found(copy: Path) -> None:
    with Stranger(copy) as connection:
        connection.execute("UPDATE polar_usage_hour SET flops_rest = flops_rest + 1 WHERE tenant = 'acme'")
    (finding,) = verified(copy).findings
    assert finding.tenant == "acme"
    assert "rollup" in finding.what


def test_rollups_that_traded_ids_are_found_before_usage_is_added_to_them(copy: Path) -> None:
    with Stranger(copy) as connection:
        ids = dict(connection.execute("SELECT tenant, id FROM polar_usage_hour").fetchall())
        for tenant, id_ in (("acme", b"x" * 32), ("globex", ids["acme"]), ("acme", ids["globex"])):
            old = ids[tenant] if id_ != ids["globex"] else b"x" * 32
            connection.execute("UPDATE polar_usage_hour SET id = ? WHERE id = ?", (id_, old))
    findings = verified(copy).findings
    assert [finding.tenant for finding in findings] == ["acme", "globex"]
    assert all("under another id than its own" in finding.what for finding in findings)


@pytest.fixture
def receipt(copy: Path) -> Iterator[dict[str, Any]]:
    with Ledger(str(copy)) as ledger, ledger.snapshot() as connection:
        yield json.loads(json.dumps(make_receipt(connection, "globex", "r5")))


def checked(file: Path, receipt: dict[str, Any]) -> ReceiptCheck:
    with Ledger(str(file)) as ledger, ledger.snapshot() as connection:
        return check_receipt(connection, receipt)


def told(file: Path, receipt: dict[str, Any]) -> str | None:
    return checked(file, receipt).wrong


def prune_all(file: Path) -> None:
    with Ledger(str(file)) as ledger, ledger.transaction() as connection:
        assert prune(connection, "globex", NOON + timedelta(days=30)) == REQUESTS // 2


def test_a_receipt_agrees_with_its_ledger_also_after_pruning(copy: Path, receipt: dict[str, Any]) -> None:
    assert checked(copy, receipt) == ReceiptCheck(None)
    prune_all(copy)
    assert checked(copy, receipt) == ReceiptCheck(None, ("compute_units",))
    assert verified(copy).findings == []


def test_after_pruning_compute_units_are_said_to_be_unchecked(copy: Path, receipt: dict[str, Any]) -> None:
    prune_all(copy)
    assert checked(copy, {**receipt, "compute_units": "9"}) == ReceiptCheck(None, ("compute_units",))
    assert "compute_units is 9 on the receipt" in str(told(copy, {**receipt, "compute_units": 9}))
    without = {name: value for name, value in receipt.items() if name != "compute_units"}
    assert "compute_units is missing from the receipt" in str(told(copy, without))
    with Ledger(str(copy)) as ledger, ledger.snapshot() as connection:
        later = make_receipt(connection, "globex", "r5")
    assert later["compute_units"] is None
    assert checked(copy, later) == ReceiptCheck(None)  # it says nothing of compute units, and so does the ledger


@pytest.mark.parametrize("pruned", [False, True])
def test_a_receipt_has_every_field_and_no_other(copy: Path, receipt: dict[str, Any], pruned: bool) -> None:
    if pruned:
        prune_all(copy)
    named = {"format", "tenant", "source", "request_id"}  # without these it is not a receipt
    for field in receipt.keys() - named:
        without = {name: value for name, value in receipt.items() if name != field}
        assert str(told(copy, without)).startswith(f"{field} is missing from the receipt"), field
        if receipt[field] is not None and not (pruned and field == "compute_units"):
            assert str(told(copy, {**receipt, field: None})).startswith(f"{field} is None on the receipt"), field
        assert f"{field} is " in str(told(copy, {**receipt, field: [receipt[field]]})), field
    for field in named:
        for wrong in ({**receipt, field: None}, {name: value for name, value in receipt.items() if name != field}):
            with pytest.raises(QueryError, match=field):
                told(copy, wrong)
    chain = receipt["chain"]
    for field in chain:
        without = {name: value for name, value in chain.items() if name != field}
        assert f"chain.{field} is missing from the receipt" in str(told(copy, {**receipt, "chain": without}))
        assert f"chain.{field} is None" in str(told(copy, {**receipt, "chain": {**chain, field: None}}))
    assert "'discount' is on the receipt" in str(told(copy, {**receipt, "discount": None}))
    assert "chain.'more' is on the receipt" in str(told(copy, {**receipt, "chain": {**chain, "more": 1}}))
    assert "chain.number" in str(told(copy, {**receipt, "chain": {**chain, "number": float(chain["number"])}}))


def test_whatever_a_receipt_holds_is_told_in_one_short_line(copy: Path, receipt: dict[str, Any]) -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    for value in (nested, {"a": nested}, "\ud800", "x" * 10**6, 10**4000, float("nan"), "\x00", b"\xff"):
        for field in receipt:
            try:
                said = str(told(copy, {**receipt, field: value}))
            except QueryError as error:
                said = str(error)
            assert said != "None", field
            assert len(said.encode()) < 500, field
            assert "\n" not in said
        assert len(str(told(copy, {**receipt, "chain": {**receipt["chain"], "number": value}}))) < 500
        assert told(copy, {**receipt, "more": value}) is not None
    with Ledger(str(copy)) as ledger, ledger.snapshot() as connection, pytest.raises(QueryError):
        make_receipt(connection, "\ud800", "r5")


def test_every_value_of_a_receipt_is_checked(copy: Path, receipt: dict[str, Any]) -> None:
    for name in receipt:
        if name not in {"format", "chain"}:
            assert told(copy, {**receipt, name: "other"}) is not None, name
    for name in receipt["chain"]:
        assert told(copy, {**receipt, "chain": {**receipt["chain"], name: "other"}}) is not None, name


def test_a_receipt_finds_a_changed_request_and_a_changed_successor(copy: Path, receipt: dict[str, Any]) -> None:
    with Stranger(copy) as connection:
        connection.execute("UPDATE polar_usage SET device = 'tpu' WHERE request_id = 'r5'")
    assert "changed after it was stored" in str(told(copy, receipt))
    with Stranger(copy) as connection:
        connection.execute("UPDATE polar_usage SET device = 'none' WHERE request_id = 'r5'")
        connection.execute("UPDATE polar_chain_link SET key = '77' WHERE tenant = 'globex' AND number = 5")
    assert "number 5 of the chain" in str(told(copy, receipt))


OCTOBER = datetime(2026, 10, 1, 12, tzinfo=UTC)
MANY = {"largest": 2_000, **{f"tenant {n}": 500 for n in range(6)}}


def test_the_memory_of_verify_is_bounded_by_the_largest_tenant(store: Ledger, book: PriceBook) -> None:
    for tenant, count in MANY.items():
        records = (
            usage_record(f"r{n}", tenant=tenant, started_at=OCTOBER + timedelta(minutes=n)) for n in range(count)
        )
        store.append_many([Entry(record, "polar", book, rate(record, book).cost, None) for record in records], settle)
        issue_statement(store, tenant, Period.month("2026-10"), now=OCTOBER + timedelta(days=60))
    with store.snapshot() as connection:
        rows = connection.execute(text("SELECT * FROM polar_usage WHERE tenant = 'largest'")).all()
        stored = sum(len(canonical_json(tuple(row))) for row in rows)
    del rows
    assert verify_ledger(store).sound  # what is built once for all ledgers does not count
    tracemalloc.start()
    try:
        verified = verify_ledger(store)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert verified.links > sum(MANY.values())
    assert peak < 2.5 * stored, f"{peak:,} bytes, and the largest tenant has {stored:,}"
