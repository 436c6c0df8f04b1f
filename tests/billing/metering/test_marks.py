"""Marks of requests that still run: what a killed process had executed is stored, once, and never beside its record."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer
from typer.testing import CliRunner

from polar_billing.budgets.budget import Budget
from polar_billing.budgets.enforcement import Budgets
from polar_billing.cli.statement import register
from polar_billing.errors import StoreError, StoreLockedError
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import INTERRUPTED_TAG, REUSED_TAG, Selection
from polar_billing.metering.meter import Meter, open_meter
from polar_billing.metering.spool import recover_abandoned, spool_folder
from polar_billing.metering.spool_file import InterimUsage, Unfinished
from polar_billing.prices.book import PriceBook
from polar_billing.prices.rating import rate
from polar_billing.proof.verify import verify_ledger
from polar_billing.statements.retention import prune
from polar_billing.testing import usage_record
from polar_sdk.errors import InvalidRequestError
from polar_sdk.programs.program import Program
from polar_sdk.testing import tiny_model
from polar_sdk.usage import Outcome
from tests.billing.storing import NOON as BEGUN
from tests.billing.storing import bound_of

if TYPE_CHECKING:
    from polar_billing.ledger.records import StoredUsage
    from polar_sdk.usage import UsageRecord


def mark_of(request_id: str, output: int, **changes: Any) -> UsageRecord:
    """The use of a request after so many tokens."""
    return usage_record(request_id, output=output, outcome=Outcome.CANCELLED, **changes)


def run_and_kill(url: str, work: str) -> None:
    """Run some work on a meter of its own process, which SIGKILL ends."""
    script = f"""
import os, signal, sys, threading
from datetime import UTC, datetime
from polar_billing.metering.meter import Meter
from polar_billing.metering.writer import Writer
from polar_billing.testing import usage_record
from polar_sdk.usage import Outcome
def mark_of(request_id, output, **changes):
    return usage_record(request_id, output=output, outcome=Outcome.CANCELLED, **changes)
meter = Meter(sys.argv[1], durability="spool")
{work}
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script, url], check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL


def stored(url: str) -> list[StoredUsage]:
    with Ledger(url) as ledger:
        recover_abandoned(ledger)
        found = list(ledger.read(Selection("acme")))
        if found:
            assert verify_ledger(ledger).sound
    return found


def folder_of(url: str) -> Path:
    with Ledger(url) as ledger:
        folder = spool_folder(ledger.url)
    assert folder is not None
    return folder


# --- After a SIGKILL. ---


def test_the_last_mark_of_a_killed_process_becomes_a_record(url: str) -> None:
    run_and_kill(
        url,
        """
for output in (64, 128, 192):
    meter.mark(mark_of("a", output, tags={"user": "ann"}))
    meter.mark(mark_of("b", output + 1))
meter.emit(usage_record("whole"))
""",
    )
    found = {one.record.tags.get(INTERRUPTED_TAG): one for one in stored(url)}
    assert set(found) == {None, "a", "b"}
    last, one = mark_of("a", 192), found["a"]
    assert one.record.flops == last.flops
    assert (one.record.tokens, one.record.visits, one.record.outcome) == (last.tokens, last.visits, Outcome.CANCELLED)
    assert one.record.tags == {"user": "ann", INTERRUPTED_TAG: "a"}
    assert one.record.request_id.startswith("interrupted-")
    assert one.cost == rate(last, PriceBook.example()).rounded.total
    with Meter(url) as meter:
        meter.recover()
    assert len(stored(url)) == 3
    assert not folder_of(url).exists()


@pytest.mark.parametrize("committed", [True, False])
def test_a_mark_whose_record_exists_is_ignored(url: str, *, committed: bool) -> None:
    """In the ledger, or in the spool: the process was killed before it could forget the mark."""
    wait = "meter.flush()" if committed else "Writer._store = lambda self, tickets, segment: threading.Event().wait()"
    run_and_kill(
        url,
        f"""
Writer.end_marks = lambda self, identity: None
meter.mark(mark_of("a", 64))
{"" if committed else wait}
meter.emit(usage_record("a", output=100))
{wait if committed else ""}
""",
    )
    (one,) = stored(url)
    assert (one.record.request_id, one.record.tokens.output) == ("a", 100)


def test_a_mark_whose_record_is_stored_under_another_id_is_ignored(url: str) -> None:
    """The id was taken; what was marked is in the record that was stored instead."""
    with Meter(url) as meter:
        meter.emit(usage_record("a", output=1, started_at=BEGUN.replace(hour=3)))
    run_and_kill(
        url,
        """
Writer.end_marks = lambda self, identity: None
meter.mark(mark_of("a", 64))
meter.emit(usage_record("a", output=100))
meter.flush()
""",
    )
    first, second = stored(url)
    assert (first.record.request_id, second.record.tags) == ("a", {REUSED_TAG: "a"})


def test_who_tries_again_gets_an_answer_and_both_are_billed(url: str) -> None:
    """Under the same id: before what was left over is stored, and after."""
    run_and_kill(url, 'meter.mark(mark_of("a", 64))')
    with Meter(url) as meter:
        meter.reserve(bound_of("a", at=BEGUN.replace(hour=13)))
        meter.emit_many([usage_record("a", output=7, started_at=BEGUN.replace(hour=13))])  # which looks at no spool
    found = stored(url)
    assert [one.record.tokens.output for one in found] == [64, 7]
    run_and_kill(url, 'meter.mark(mark_of("b", 65))')
    assert len(stored(url)) == 3
    with Meter(url) as meter:
        meter.reserve(bound_of("b", at=BEGUN.replace(hour=14)))
        meter.emit(usage_record("b", output=8, started_at=BEGUN.replace(hour=14)))
    assert [one.record.tokens.output for one in stored(url)] == [64, 65, 7, 8]


def test_marks_that_come_back_add_nothing(url: str, tmp_path: Path) -> None:
    """Deleted files do, after a power cut: those of recorded requests, and older marks of those that were recovered."""
    run_and_kill(url, 'meter.mark(mark_of("a", 64))\nmeter.mark(mark_of("a", 128))')
    folder = folder_of(url)
    (file,) = folder.glob("*.marks")
    copy = shutil.copy(file, tmp_path / file.name)
    assert len(stored(url)) == 1
    for lines in (3, 2):  # the price book, and one or two marks
        folder.mkdir(exist_ok=True)
        file.write_bytes(b"".join(Path(copy).read_bytes().splitlines(keepends=True)[:lines]))
        (one,) = stored(url)
        assert one.record.tokens.output == 128
        assert not file.exists()


def test_a_mark_of_a_request_that_retention_deleted_is_ignored(url: str) -> None:
    run_and_kill(
        url,
        """
Writer.end_marks = lambda self, identity: None
meter.mark(mark_of("a", 64))
meter.emit(usage_record("a", output=100))
meter.flush()
""",
    )
    with Ledger(url) as ledger, ledger.transaction() as connection:
        prune(connection, "acme", BEGUN.replace(year=2027))
    assert stored(url) == []


def test_a_mark_that_was_cut_off_leaves_the_one_before(url: str) -> None:
    run_and_kill(url, 'meter.mark(mark_of("a", 64))\nmeter.mark(mark_of("a", 128))')
    (file,) = folder_of(url).glob("*.marks")
    file.write_bytes(file.read_bytes()[:-9])
    (one,) = stored(url)
    assert one.record.tokens.output == 64


def test_marks_wait_for_the_records_of_their_process(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger that takes no records takes no marks either: it could not know which of them count."""
    run_and_kill(
        url,
        """
Writer.end_marks = lambda self, identity: None
Writer._store = lambda self, tickets, segment: threading.Event().wait()
meter.mark(mark_of("a", 64))
meter.emit(usage_record("a", output=100))
""",
    )

    def locked(self: Ledger, entries: object, settle: object) -> None:
        raise StoreLockedError("locked.")

    with Meter(url) as meter, monkeypatch.context() as patched:
        patched.setattr(Ledger, "append_many", locked)
        with pytest.raises(StoreLockedError):
            meter.recover()
    assert len(list(folder_of(url).glob("*.marks"))) == 1
    assert [one.record.tokens.output for one in stored(url)] == [100]


def test_what_a_killed_process_held_is_free_at_once(url: str) -> None:
    """Its use counts as it is marked; the rest of its hold does not wait until it expires."""
    budgets, used = Budgets(url), mark_of("a", 64).flops.total
    budgets.set(Budget("acme", Decimal(1)))
    with Meter(url) as meter:
        meter.reserve(bound_of("other", 1_000_000))
    run_and_kill(
        url,
        f"""
from polar_sdk.usage import UsageBound
meter.reserve(UsageBound.model_validate_json({bound_of("a", 1_000_000).model_dump_json()!r}))
meter.mark(mark_of("a", 64))
""",
    )
    assert len(budgets.holds("acme")) == 2
    assert len(stored(url)) == 1
    assert [hold.request_id for hold in budgets.holds("acme")] == ["other"]
    (standing,) = budgets.standings("acme", BEGUN)
    assert (standing.spent, standing.held) == (used, 1_000_000)
    assert budgets.recheck("acme") == []
    budgets.ledger.close()


# --- While the process lives. ---


def marks_in(url: str) -> list[int]:
    """Tokens of every mark in the files of living processes."""
    with Ledger(url) as ledger:
        files = [Unfinished(path) for path in folder_of(url).glob("*.marks")]
        return [entry.record.tokens.output for file in files for entry in file.entries(ledger.find_books)]


def test_marks_of_a_process_that_lives_are_its_own(ledger_url: str) -> None:
    with Meter(ledger_url, durability="spool") as meter, Meter(ledger_url) as other:
        meter.mark(mark_of("a", 64))
        other.recover()
        assert stored(ledger_url) == []
        assert marks_in(ledger_url) == [64]


@pytest.mark.parametrize("durability", ["commit", "spool"])
def test_the_file_is_empty_when_no_marked_request_runs(ledger_url: str, durability: Any) -> None:
    with Meter(ledger_url, durability=durability) as meter:
        for request_id in ("a", "b"):
            meter.mark(mark_of(request_id, 64))
        meter.emit(usage_record("unmarked"))
        meter.emit(usage_record("a"))
        assert marks_in(ledger_url) == [64, 64], "one of them still runs"
        meter.emit(usage_record("b"))
        assert marks_in(ledger_url) == []
        meter.mark(mark_of("c", 65))
        assert marks_in(ledger_url) == [65], "a file that was emptied names its price book again"
    assert not folder_of(ledger_url).exists()
    assert len(stored(ledger_url)) == 3


def test_a_meter_that_closes_leaves_no_marks(ledger_url: str) -> None:
    """Its streams may be read to their end afterwards: then their records count."""
    meter = Meter(ledger_url)
    meter.mark(mark_of("a", 64))
    meter.close()
    assert not folder_of(ledger_url).exists()
    meter.emit(usage_record("a", output=100))
    meter.mark(mark_of("b", 65))
    assert marks_in(ledger_url) == [65]
    meter.close()
    assert [one.record.tokens.output for one in stored(ledger_url)] == [100]


def test_a_file_that_grows_is_written_anew_with_what_still_runs(tmp_path: Path) -> None:
    meter, path = Meter("sqlite://"), tmp_path / "1-abc.marks"
    marks = InterimUsage(path, limit=20_000)
    sizes = []
    for output in range(200):
        marks.write(meter.entry(mark_of("long", output)))
        marks.write(meter.entry(mark_of("short", output, started_at=BEGUN.replace(minute=output % 60))))
        marks.end(("acme", "polar", "short"))
        sizes.append(path.stat().st_size)
    assert max(sizes) < 25_000
    entries = Unfinished(path).entries(lambda _: {})
    assert [entry.record.tokens.output for entry in entries if entry.record.request_id == "long"][-1] == 199
    assert [path.name for path in tmp_path.iterdir()] == ["1-abc.marks"]


def test_a_mark_that_does_not_fit_leaves_the_one_before(ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Meter(ledger_url) as meter:
        meter.mark(mark_of("a", 64))
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full)
            with pytest.raises(StoreError, match="No space left on device"):
                meter.mark(mark_of("a", 128))
        assert marks_in(ledger_url) == [64]
        meter.mark(mark_of("a", 192))
        assert marks_in(ledger_url) == [64, 192]
        meter.emit(usage_record("a"))


def test_a_forked_child_leaves_the_marks_of_its_parent(ledger_url: str) -> None:
    script = """
import os, sys
from polar_billing.metering.meter import Meter
from polar_billing.testing import usage_record
meter = Meter(sys.argv[1])
meter.mark(usage_record("parent", output=64))
if os.fork() == 0:
    meter.mark(usage_record("child", output=65))
    meter.emit(usage_record("child", output=100))
    meter.close()
    os._exit(0)
assert os.wait()[1] == 0
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script, ledger_url], check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL
    found = {one.record.tags.get(INTERRUPTED_TAG): one.record.tokens.output for one in stored(ledger_url)}
    assert found == {None: 100, "parent": 64}


def test_a_mark_is_one_append(ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mark costs one write of a line: no flush, no seek, no other file."""
    calls: list[tuple[str, int]] = []
    for name in ("write", "fsync", "open", "ftruncate", "lseek"):
        real = getattr(os, name)

        def noting(*arguments: Any, _name: str = name, _real: Any = real) -> Any:
            calls.append((_name, len(arguments[1]) if _name == "write" else 0))
            return _real(*arguments)

        monkeypatch.setattr(os, name, noting)
    with Meter(ledger_url) as meter:
        meter.mark(mark_of("a", 64))  # creates the file
        calls.clear()
        for output in (128, 192, 256):
            meter.mark(mark_of("a", output))
        assert [name for name, _ in calls] == ["write"] * 3
        assert max(size for _, size in calls) < 1_500
        meter.emit(usage_record("a"))


# --- Turned off. ---


def test_marks_can_be_turned_off(ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for meter in (Meter(ledger_url, marks=False), Meter("sqlite://")):
        assert not meter.wants_marks
        meter.mark(mark_of("a", 64))
        meter.close()
    assert not folder_of(ledger_url).exists()
    for setting, wanted in (("", True), ("on", True), ("off", False)):
        monkeypatch.setenv("POLAR_MARKS", setting)
        assert open_meter(ledger_url).wants_marks is wanted
    monkeypatch.setenv("POLAR_MARKS", "no")
    with pytest.raises(InvalidRequestError, match="POLAR_MARKS"):
        open_meter(ledger_url)


KILLED = """
import json, os, signal, sys, threading
from polar_billing.metering.meter import Meter
from polar_sdk.testing import tiny_model, tiny_tokenizer

class Marking(Meter):
    # Says on standard output what it has marked, once that is written.
    def mark(self, record):
        super().mark(record)
        os.write(1, (json.dumps([record.request_id, record.flops.total, record.tokens.output]) + "\\n").encode())

letter = tiny_tokenizer().encode("A", add_special_tokens=False)[0]

def go_on(_, logits):
    logits[letter] += 1e3
    return logits

def answer(name, tokens):
    for _ in model.stream("hello " + name, program="0-5", max_tokens=tokens, request_id=name, logits_hook=go_on):
        pass

model = tiny_model(sink=Marking(sys.argv[1], durability=sys.argv[2]), tenant="acme", context_window=4096)
answer("whole", 100)
answer("short", 10)
threads = [threading.Thread(target=answer, args=(name, 4_000), daemon=True) for name in ("a", "b", "c")]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def killed_in_mid_answer(url: str, durability: str, marks: int) -> list[list[Any]]:
    """Kill a process that answers, once each of its long answers has so many marks; the marks that it told of."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, url, durability], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        told = []
        for line in process.stdout:
            told.append(json.loads(line))
            if all([mark[0] for mark in told].count(name) >= marks for name in ("a", "b", "c")):
                break
        process.send_signal(signal.SIGKILL)
        told += [json.loads(line) for line in process.stdout if line.endswith("\n")]
    assert process.returncode == -signal.SIGKILL
    return told


@pytest.mark.parametrize(("url", "durability"), [("sqlite", "spool"), ("postgresql", "commit")], indirect=["url"])
def test_a_kill_in_mid_answer_is_billed_to_the_last_mark(url: str, durability: str) -> None:
    with Ledger(url) as ledger:
        budgets = Budgets(ledger)
        budgets.set(Budget("acme", Decimal(1_000)))
        told = killed_in_mid_answer(url, durability, marks=3)
        recover_abandoned(ledger)
        stored = list(ledger.read(Selection("acme")))
        names = {one.record.tags.get(INTERRUPTED_TAG, one.record.request_id): one for one in stored}
        assert len(names) == len(stored) == 5
        assert {name for name, one in names.items() if one.record.outcome is Outcome.COMPLETED} == {"whole", "short"}
        cost = tiny_model().decoder.cost
        for name in ("a", "b", "c"):
            one = names[name]
            tokens, marks = one.record.tokens, [mark[1:] for mark in told if mark[0] == name]
            assert [one.record.flops.total, tokens.output] >= (marks[-1] if marks else [0, 0]), "what was told is kept"
            assert one.record.flops.total == cost.request(Program.of("0-5"), tokens.input, tokens.output).total
            assert one.record.outcome is Outcome.CANCELLED
            assert one.cost == rate(one.record, PriceBook.example()).rounded.total
        assert list(ledger.read(Selection("acme"))) == stored, "once"
        assert verify_ledger(ledger).sound
        assert budgets.holds("acme") == []
        (standing,) = budgets.standings("acme")
        assert standing.spent == sum(one.record.flops.total for one in stored)
        assert budgets.recheck("acme") == []
    month = f"{stored[0].record.started_at:%Y-%m}"
    shown = typer.Typer()
    register(shown)
    drafted = CliRunner().invoke(shown, ["statement", "--tenant", "acme", "--month", month, "--ledger", url, "--json"])
    assert drafted.exit_code == 0, drafted.output
    bill = json.loads(drafted.output)
    assert (bill["requests"], bill["unrated"]) == (5, {})
    (line,) = bill["usage"]
    assert Decimal(line["compute_units"]) * 10**12 == sum(one.record.flops.total for one in stored)
