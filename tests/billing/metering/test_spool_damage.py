"""Spool files with lines that cannot be read: the good ones are stored, the others kept aside and counted."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from polar_billing.errors import StoreError
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.metering.meter import Meter
from polar_billing.metering.spool import Spool, recover_abandoned, warning_of
from polar_billing.prices.book import PriceBook
from polar_billing.testing import usage_record

if TYPE_CHECKING:
    from pathlib import Path

DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def line(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:16].encode() + b" " + content


def held(url: str) -> list[str]:
    with Ledger(url) as ledger:
        recover_abandoned(ledger)
        return sorted(stored.record.request_id for stored in ledger.read(Selection(ALL_TENANTS)))


def left_over(url: str, tmp_path: Path, *, known_book: bool) -> tuple[Path, list[bytes]]:
    """A spool file of a process that has ended, and its lines: the book, then the records `a` and `b`."""
    meter = Meter(url, prices=PriceBook.example())
    if known_book:
        meter.emit(usage_record("stored"))
    spool = Spool(tmp_path / "ledger.sqlite3.spool")
    segment = spool.segment()
    segment.append([meter.entry(usage_record("a")), meter.entry(usage_record("b"))])
    path = spool.keep(segment)
    spool.close()
    meter.close()
    return path, path.read_bytes().splitlines()


def changed(record: bytes, **values: object) -> bytes:
    content = json.loads(record.partition(b" ")[2])
    content["record"].update({name: value for name, value in values.items() if name in content["record"]})
    content.update({name: value for name, value in values.items() if name in content})
    return line(json.dumps(content).encode())


@pytest.mark.parametrize(
    "bad",
    [
        lambda record: changed(record, schema_version=4),
        lambda record: changed(record, cost="0e-999999999"),
        lambda record: changed(record, by="0" * 64),
        lambda record: changed(record, kv_bytes_peak=10**40),
        lambda _: line(b"{}"),
        lambda _: line(b'{"book": 1}'),
        lambda _: line(b'{"book": "\\ud800"}'),
        lambda _: line(DEEP),
        lambda _: line(b"\xff"),
        lambda record: record[:-2] + b"??",
    ],
)
def test_one_unreadable_line_is_set_aside_and_the_others_are_stored(
    ledger_url: str, tmp_path: Path, bad: object
) -> None:
    path, (book, first, second) = left_over(ledger_url, tmp_path, known_book=True)
    assert callable(bad)
    path.write_bytes(b"\n".join([book, bad(first), second]) + b"\n")
    with Ledger(ledger_url) as ledger:
        assert warning_of(ledger) is not None  # counting what waits reads the same lines
    with Meter(ledger_url) as meter:
        meter.emit(usage_record("new"))
    assert held(ledger_url) == ["b", "new", "stored"]
    assert not path.exists()
    assert bad(first) in path.with_suffix(".damaged").read_bytes().splitlines()
    with Ledger(ledger_url) as ledger:
        assert "1 line(s) are damaged" in str(warning_of(ledger))


@pytest.mark.parametrize("known_book", [True, False])
def test_records_whose_book_line_is_damaged_are_stored_where_the_ledger_has_the_book(
    ledger_url: str, tmp_path: Path, known_book: bool
) -> None:
    path, (book, first, second) = left_over(ledger_url, tmp_path, known_book=known_book)
    path.write_bytes(b"\n".join([book[:-1] + b"?", first, second]) + b"\n")
    with Meter(ledger_url) as meter:
        meter.recover()
        meter.recover()  # nothing is set aside twice
    aside = path.with_suffix(".damaged").read_bytes().splitlines()
    assert (held(ledger_url), len(aside)) == ((["a", "b", "stored"], 1) if known_book else ([], 3))


def test_a_record_of_a_newer_version_keeps_its_price_book_beside_it(ledger_url: str, tmp_path: Path) -> None:
    path, (book, first, second) = left_over(ledger_url, tmp_path, known_book=False)
    newer = changed(first, schema_version=4)
    path.write_bytes(b"\n".join([book, newer, second]) + b"\n")
    assert held(ledger_url) == ["b"]
    assert path.with_suffix(".damaged").read_bytes().splitlines() == [newer, book]
    with Ledger(ledger_url) as ledger:
        assert "1 line(s) are damaged" in str(warning_of(ledger))


def test_lines_that_cannot_be_set_aside_keep_their_file_and_say_why(ledger_url: str, tmp_path: Path) -> None:
    path, (book, first, second) = left_over(ledger_url, tmp_path, known_book=True)
    path.write_bytes(b"\n".join([book, first[:-2] + b"??", second]) + b"\n")
    path.with_suffix(".damaged").mkdir()  # as good as a full disk
    with Meter(ledger_url) as meter, pytest.raises(StoreError):
        meter.recover()
    assert path.exists()
    path.with_suffix(".damaged").rmdir()
    assert held(ledger_url) == ["b", "stored"]


def test_a_refused_record_that_cannot_be_kept_aside_stays_in_the_spool(ledger_url: str, tmp_path: Path) -> None:
    path, _ = left_over(ledger_url, tmp_path, known_book=True)
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite3")) as stranger:
        stranger.execute("CREATE TRIGGER no_more BEFORE INSERT ON polar_usage BEGIN SELECT RAISE(ABORT, 'no'); END")
    (path.parent / "rejected.jsonl").mkdir()
    with Meter(ledger_url) as meter, pytest.raises(StoreError):
        meter.recover()
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite3")) as stranger:
        stranger.execute("DROP TRIGGER no_more")
    assert held(ledger_url) == ["a", "b", "stored"]
