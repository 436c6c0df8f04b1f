"""Records that the ledger cannot take now: they wait on the disk, and are stored exactly once."""

from __future__ import annotations

import errno
import hashlib
import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from polar_billing.errors import ConflictError, RecordRefusedError, StoreError, StoreLockedError, StoreReadOnlyError
from polar_billing.ledger import connection
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.metering.meter import Meter, open_meter
from polar_billing.metering.spool import Spool, recover_abandoned, spool_folder, warning_of
from polar_billing.metering.spool_file import Segment
from polar_billing.metering.writer import Ticket, Writer
from polar_billing.prices.book import PriceBook
from polar_billing.testing import usage_record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from polar_billing.metering.meter import Durability

EVERYTHING = Selection(ALL_TENANTS)


def held(url: str) -> list[str]:
    with Ledger(url) as ledger:
        recover_abandoned(ledger)
        return sorted(one.record.request_id for one in ledger.read(EVERYTHING))


@pytest.fixture
def locked(ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[sqlite3.Connection]:
    """A ledger with one record, and the connection of a stranger who holds its write lock."""
    monkeypatch.setattr(connection, "BUSY_TIMEOUT_MS", 20)
    with Meter(ledger_url) as meter:
        meter.emit(usage_record("first"))
    with closing(sqlite3.connect(ledger_url.removeprefix("sqlite:///"), isolation_level=None)) as stranger:
        stranger.execute("BEGIN IMMEDIATE")
        yield stranger


def test_a_record_that_the_kept_file_lacks_is_not_taken_for_safe(
    ledger_url: str, locked: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full for a moment while the ledger is locked: one record is in the file, the next one is not."""
    meter = Meter(ledger_url)
    writer = Writer(meter.ledger, gather_s=60.0)
    first = writer.submit(meter.entry(usage_record("written")))
    assert first.spooled

    def full(self: Segment, entries: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Segment, "append", full)
    second = writer.submit(meter.entry(usage_record("not written")))
    assert not second.spooled
    writer.drain()
    assert first.result() is None
    with pytest.raises(StoreLockedError):
        second.result()
    locked.rollback()
    writer.close()
    assert held(ledger_url) == ["first", "written"]


def test_who_waits_for_records_does_not_wait_for_later_ones(ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(ledger_url)
    writer = Writer(meter.ledger)
    commit, names = writer._commit, count()

    def more_come_meanwhile(tickets: list[Ticket]) -> None:
        commit(tickets)
        writer.submit(meter.entry(usage_record(f"r{next(names)}")))

    monkeypatch.setattr(writer, "_commit", more_come_meanwhile)
    first = writer.submit(meter.entry(usage_record("first")))
    writer.drain()
    assert first.done
    monkeypatch.setattr(writer, "_commit", commit)
    writer.close()
    assert held(ledger_url) == sorted(["first", *(f"r{number}" for number in range(next(names)))])


@pytest.mark.parametrize("durability", ["commit", "spool"])
def test_a_locked_ledger_delays_and_loses_nothing(
    ledger_url: str, locked: sqlite3.Connection, durability: Durability
) -> None:
    meter = Meter(ledger_url, durability=durability)
    for n in range(3):
        meter.check()
        assert meter.emit(usage_record(f"r{n}"))["cost"] is not None
    meter.flush()
    assert meter.spool is not None
    assert meter.spool.waiting == 3
    with Ledger(ledger_url) as ledger:
        assert "3 request(s) wait to be stored" in str(warning_of(ledger))
    with pytest.raises(StoreLockedError):
        meter.recover()
    locked.execute("ROLLBACK")
    meter.recover()
    assert meter.spool.waiting == 0
    assert held(ledger_url) == ["first", "r0", "r1", "r2"]
    meter.close()
    assert not meter.spool.folder.exists()


@pytest.mark.usefixtures("locked")
def test_the_spool_has_a_limit(ledger_url: str) -> None:
    meter = Meter(ledger_url, spool_limit=2)
    for n in range(2):
        meter.check()
        meter.emit(usage_record(f"r{n}"))
    with pytest.raises(StoreLockedError):
        meter.check()
    with pytest.raises(StoreLockedError):
        Meter(ledger_url, spool_limit=0).check()


def test_another_process_stores_what_one_left(ledger_url: str, locked: sqlite3.Connection) -> None:
    script = """
import os, sys
from polar_billing.ledger import connection
connection.BUSY_TIMEOUT_MS = 20
from polar_billing.metering.meter import open_meter
from polar_billing.testing import usage_record
meter = open_meter(sys.argv[1])
meter.emit(usage_record("left").model_copy(update={"tags": {"ä": "\\u2028 \\n"}}))  # as an earlier version took it
meter.flush()
os._exit(1)
"""
    assert subprocess.run([sys.executable, "-c", script, ledger_url], check=False, timeout=120).returncode == 1
    assert held(ledger_url) == ["first"]  # still locked
    locked.execute("ROLLBACK")
    assert held(ledger_url) == ["first", "left"]
    assert held(ledger_url) == ["first", "left"]


def test_a_failure_that_will_not_pass_is_told_and_the_record_is_kept(ledger_url: str, tmp_path: Path) -> None:
    with Meter(ledger_url) as meter:
        meter.emit(usage_record("first"))
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite3")) as stranger:
        stranger.execute("CREATE TRIGGER no_more BEFORE INSERT ON polar_usage BEGIN SELECT RAISE(ABORT, 'full'); END")
    meter = Meter(ledger_url)
    with pytest.raises(RecordRefusedError):
        meter.emit(usage_record("refused"))
    meter.close()
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite3")) as stranger:
        stranger.execute("DROP TRIGGER no_more")
    assert "refused" in (tmp_path / "ledger.sqlite3.spool" / "rejected.jsonl").read_text()


def test_a_full_disk_is_told_and_harms_nothing(tmp_path: Path) -> None:
    """The file may not grow any more, as on a full disk; the error says so, and what is stored stays."""
    script = """
import resource, signal, sys
from polar_billing.errors import StoreError
from polar_billing.metering.meter import Meter
from polar_billing.testing import usage_record
meter = Meter(sys.argv[1])
meter.emit(usage_record("first"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
stored = 0
try:
    for n in range(500):
        meter.emit(usage_record(f"r{n}", tags={"long": "x" * 2000}))
        stored += 1
except StoreError as error:
    print(stored, type(error).__name__)
"""
    url = f"sqlite:///{tmp_path / 'full.sqlite3'}"
    done = subprocess.run([sys.executable, "-c", script, url], check=True, capture_output=True, text=True, timeout=300)
    stored, kind = done.stdout.split()
    assert kind in {"StoreFullError", "StoreError"}
    assert set(held(url)) >= {"first", *(f"r{n}" for n in range(int(stored)))}


@pytest.mark.parametrize("durability", ["commit", "spool"])
def test_a_file_is_emptied_after_its_records_are_stored(
    ledger_url: str, durability: Durability, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed in between has them in the file, and its successor in both: that adds nothing."""
    waiting: list[int] = []
    with Meter(ledger_url, durability=durability) as meter:
        store = meter.ledger.store

        def noting(entries: Any, *rest: Any, **named: Any) -> Any:
            answers = store(entries, *rest, **named)
            assert meter.spool is not None
            waiting.append(meter.spool.waiting - len(entries))
            return answers

        monkeypatch.setattr(meter.ledger, "store", noting)
        for n in range(3):
            meter.emit(usage_record(f"r{n}"))
            meter.flush()
            assert meter.spool is not None
            assert meter.spool.waiting == 0
    assert waiting == [0, 0, 0]


def test_a_report_finds_what_waits(ledger_url: str, tmp_path: Path) -> None:
    """Whoever asks sees what an earlier process acknowledged, without knowing of meters and spools."""
    with Meter(ledger_url) as meter:
        meter.emit(usage_record("stored"))
        waiting = Spool(tmp_path / "ledger.sqlite3.spool")
        segment = waiting.segment()
        segment.append([meter.entry(usage_record("waiting"))])
        waiting.keep(segment)
        waiting.close()
    script = """
import sys
from polar_billing import Ledger, build_report
print(build_report(Ledger(sys.argv[1])).figures.requests)
"""
    run = subprocess.run([sys.executable, "-c", script, ledger_url], check=True, capture_output=True, text=True)
    assert run.stdout == "2\n"


def test_a_record_cut_off_is_dropped_and_a_damaged_one_kept_aside(ledger_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "ledger.sqlite3.spool"
    with Ledger(ledger_url) as ledger:
        ledger.check()
        waiting = Spool(folder)
        segment = waiting.segment()
        meter = Meter(ledger)
        for name in ("whole", "damaged", "cut off"):
            segment.append([meter.entry(usage_record(name))])
        path = waiting.keep(segment)
        waiting.close()
        content = path.read_bytes().replace(b'"request_id":"damaged"', b'"request_id":"damagee"')
        path.write_bytes(content[:-5])
        assert held(ledger_url) == ["whole"]
        assert "1 line(s) are damaged" in str(warning_of(ledger))


def test_a_conflict_found_late_is_charged_under_a_new_id(ledger_url: str, caplog: pytest.LogCaptureFixture) -> None:
    meter = open_meter(ledger_url)
    assert isinstance(meter, Meter)
    meter.emit(usage_record("same"))
    meter.emit(usage_record("same", output=9))
    meter.flush()
    assert "request id 'same' of tenant 'acme' was used again; stored as 'reused-" in caplog.text
    assert meter.spool is not None
    assert meter.spool.rejected == 0
    with pytest.raises(ConflictError):
        Meter(ledger_url).emit(usage_record("same", output=9))
    renamed, first = held(ledger_url)
    assert (renamed[:7], first) == ("reused-", "same")
    meter.close()


def test_where_spools_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.sqlite3"
    assert spool_folder(Ledger(str(file)).url) == tmp_path / "a.sqlite3.spool"
    assert spool_folder(Ledger("sqlite://").url) is None
    monkeypatch.setenv("POLAR_SPOOL", str(tmp_path / "spools"))
    one, other = (spool_folder(Ledger(f"postgresql://u:secret@host/{name}").url) for name in ("a", "b"))
    assert one is not None
    assert one.parent == tmp_path / "spools"
    assert one != other
    assert "secret" not in str(one)


def test_a_ledger_under_a_symbolic_link_has_one_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records that wait under the one name are stored when the ledger is opened by the other."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link to folder").symlink_to("folder")
    true = tmp_path / "folder" / "ledger.sqlite3"
    with Ledger(str(true)) as ledger:
        ledger.check()
    (tmp_path / "link.sqlite3").symlink_to(true)
    names = [str(tmp_path / "link.sqlite3"), str(tmp_path / "link to folder" / "ledger.sqlite3"), str(true)]
    names += [f"sqlite:///{name}" for name in names]
    for n, name in enumerate(names):
        with Meter(name) as meter:
            folder = spool_folder(meter.ledger.url)
            assert folder is not None
            waiting = Spool(folder)
            segment = waiting.segment()
            segment.append([meter.entry(usage_record(f"r{n}"))])
            waiting.keep(segment)
            waiting.close()
        assert f"r{n}" in held(names[n - 1])
    assert len(held(names[0])) == len(names)
    monkeypatch.chdir(tmp_path)
    assert {str(Ledger(name).url) for name in ["link.sqlite3", *names]} == {f"sqlite+pysqlite:///{true.resolve()}"}


def test_a_read_only_ledger_is_no_reason_to_spool(ledger_url: str, tmp_path: Path) -> None:
    with Meter(ledger_url) as meter:
        meter.emit(usage_record("first"))
    with Meter(f"sqlite:///file:{tmp_path / 'ledger.sqlite3'}?mode=ro&uri=true") as meter:
        with pytest.raises(StoreReadOnlyError):
            meter.check()
        with pytest.raises(StoreReadOnlyError):
            meter.emit(usage_record("second"))


DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def line(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:16].encode() + b" " + content


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
