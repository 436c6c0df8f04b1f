"""The sinks of usage: which sink is found for which ledger, and the log file that several threads write."""

from __future__ import annotations

import threading
from functools import partial
from importlib.metadata import EntryPoint, EntryPoints
from io import FileIO
from typing import TYPE_CHECKING, Any

import pytest

from polar_billing.testing import usage_record
from polar_sdk import sinks
from polar_sdk.errors import SinkError, SinkNotFoundError
from polar_sdk.sinks import JsonlSink, find_sink
from polar_sdk.testing import tiny_model
from polar_sdk.usage import ListSink, NullSink, Outcome, UsageRecord, UsageSink

if TYPE_CHECKING:
    from pathlib import Path


class RecordedUrl(ListSink):
    """Stands for a registered meter: keeps the URL its factory was called with."""

    def __init__(self, url: str | None) -> None:
        super().__init__()
        self.url = url


def registered(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Register `value` as the default sink, or nothing."""
    entries = () if value is None else (EntryPoint("default", value, sinks.GROUP),)
    monkeypatch.setattr(sinks, "entry_points", lambda **criteria: EntryPoints(entries).select(**criteria))


def url_of(sink: UsageSink) -> str | None:
    assert isinstance(sink, RecordedUrl)
    return sink.url


class TestWithAMeter:
    @pytest.fixture(autouse=True)
    def meter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The factory is found where an entry point finds it: as an attribute of an importable module.
        monkeypatch.setattr(sinks, "RecordedUrl", RecordedUrl, raising=False)
        registered("polar_sdk.sinks:RecordedUrl", monkeypatch)

    def test_auto_takes_the_variable(self, ledger_url: str) -> None:
        assert url_of(find_sink()) == url_of(find_sink("auto")) == ledger_url

    @pytest.mark.parametrize("value", [None, ""])
    def test_auto_without_the_variable_lets_the_meter_choose(
        self, value: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if value is None:
            monkeypatch.delenv("POLAR_LEDGER")
        else:
            monkeypatch.setenv("POLAR_LEDGER", value)
        assert url_of(find_sink()) is None

    def test_a_url_comes_before_the_variable(self) -> None:
        assert url_of(find_sink("sqlite:///other.db")) == "sqlite:///other.db"

    def test_none_turns_metering_off(self) -> None:
        assert isinstance(find_sink(None), NullSink)

    @pytest.mark.parametrize("ledger", ["auto", None, "sqlite:///other.db"])
    def test_a_sink_at_hand_comes_before_all(self, ledger: str | None) -> None:
        mine = ListSink()
        assert find_sink(ledger, mine) is mine


@pytest.mark.parametrize("value", [None, "a_package_that_is_not_installed:meter"])
class TestWithoutAMeter:
    @pytest.fixture(autouse=True)
    def no_meter(self, value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        registered(value, monkeypatch)

    def test_auto_keeps_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("POLAR_LEDGER")
        assert isinstance(find_sink(), NullSink)
        assert isinstance(find_sink(None), NullSink)

    def test_a_ledger_that_was_named_is_an_error(self, ledger_url: str) -> None:
        for ledger in ("auto", "sqlite:///x.db"):
            with pytest.raises(SinkNotFoundError):
                find_sink(ledger)
        with pytest.raises(SinkNotFoundError, match=r"ledger 'sqlite:///x\.db'"):
            find_sink("sqlite:///x.db")

    def test_a_model_says_so_before_it_answers(self) -> None:
        with pytest.raises(SinkNotFoundError):
            tiny_model(ledger="auto")


def test_the_real_meter_is_found(ledger_url: str) -> None:
    from polar_billing import Meter

    model = tiny_model(ledger="auto")
    assert isinstance(model.sink, Meter)
    done = model.generate("hello", max_tokens=2)
    assert done.receipt is not None
    assert done.receipt["tier"] == "standard"


class Forgetful(ListSink):
    """Stores the record, but the answer gets lost once: what a connection that breaks at the end of a commit does."""

    def emit(self, record: UsageRecord) -> None:
        super().emit(record)
        if len(self.records) == 1:
            raise SinkError("the connection is gone.")


def test_a_record_is_offered_again_unchanged() -> None:
    """So that a sink that keys by request id stores it once, with the facts of a completed answer."""
    sink = Forgetful()
    with pytest.raises(SinkError):
        tiny_model(sink=sink).generate_batch(["one", "two"], max_tokens=1)
    first, second, other = sink.records
    assert first == second
    assert (first.outcome, other.outcome) == (Outcome.COMPLETED, Outcome.ERROR)
    assert first.request_id != other.request_id


class TestJsonl:
    def test_a_line_per_record(self, tmp_path: Path) -> None:
        sink = JsonlSink(tmp_path / "usage.jsonl")
        model = tiny_model(sink=sink)
        done = [model.generate(prompt, max_tokens=3) for prompt in ("one", "two\nlines", "héllo €")]
        lines = sink.path.read_text(encoding="utf-8").splitlines()
        assert [UsageRecord.model_validate_json(line) for line in lines] == [answer.usage for answer in done]
        assert [answer.receipt for answer in done] == [None] * 3

    def test_check_writes_nothing(self, tmp_path: Path) -> None:
        sink = JsonlSink(str(tmp_path / "usage.jsonl"))
        sink.check()
        assert sink.path.read_bytes() == b""

    def test_a_record_that_ctrl_c_cut_off_is_there_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before the line was written, and after."""
        sink, write = JsonlSink(tmp_path / "usage.jsonl"), JsonlSink._write

        def cut_off(first: bool, *arguments: Any) -> None:
            if not first:
                write(sink, *arguments)
            raise KeyboardInterrupt

        for n, first in enumerate((True, False)):
            made = usage_record(f"r{n}")
            with monkeypatch.context() as patched:
                patched.setattr(sink, "_write", partial(cut_off, first))
                with pytest.raises(KeyboardInterrupt):
                    sink.emit(made)
            JsonlSink(sink.path).emit(usage_record(f"other {n}"))  # another process
            for _ in range(3):
                sink.emit(made)
        lines = sink.path.read_text(encoding="utf-8").splitlines()
        ids = [UsageRecord.model_validate_json(line).request_id for line in lines]
        assert ids == ["other 0", "r0", "r1", "other 1"]

    def test_a_full_disk_leaves_no_half_line(self, tmp_path: Path) -> None:
        sink = JsonlSink(tmp_path / "usage.jsonl")
        sink.emit(usage_record("first"))

        class Full(FileIO):
            def write(self, line: Any, /) -> int:
                return super().write(line[:10])

        with Full(sink.path, "a+") as file, pytest.raises(OSError, match="No space left"):
            sink._write(file, b"x" * 100, file.seek(0, 2))
        (line,) = sink.path.read_text(encoding="utf-8").splitlines()
        assert UsageRecord.model_validate_json(line).request_id == "first"

    def test_lines_of_many_threads_stay_whole(self, tmp_path: Path) -> None:
        sink = JsonlSink(tmp_path / "usage.jsonl")

        def write(thread: int) -> None:
            for number in range(50):
                sink.emit(usage_record(f"{thread}-{number}", tags={"note": "x" * 3000}))

        threads = [threading.Thread(target=write, args=(thread,)) for thread in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ids = [
            UsageRecord.model_validate_json(line).request_id
            for line in sink.path.read_text(encoding="utf-8").splitlines()
        ]
        assert sorted(ids) == sorted(f"{thread}-{number}" for thread in range(8) for number in range(50))

    @pytest.mark.parametrize("where", ["absent/usage.jsonl", "."])
    def test_a_place_that_cannot_be_written(self, tmp_path: Path, where: str) -> None:
        sink = JsonlSink(tmp_path / where)
        with pytest.raises(SinkError):
            sink.check()
        with pytest.raises(SinkError):
            sink.emit(usage_record("r"))

    def test_nothing_runs_that_cannot_be_recorded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model(sink=JsonlSink(tmp_path / "absent" / "usage.jsonl"))
        monkeypatch.setattr(model.decoder, "embed", None)  # a call would be a TypeError
        with pytest.raises(SinkError) as caught:
            model.generate("hello")
        assert caught.value.exit_code == 1
        assert isinstance(caught.value, OSError)
        with pytest.raises(SinkError):
            next(model.stream("hello"))
