"""Records of requests that end badly: dropped to the garbage collector, interrupted, or open at the exit.

What would hang runs in a thread of its own, so that a failure is a failure.
"""

from __future__ import annotations

import dis
import gc
import itertools
import json
import os
import subprocess
import sys
import textwrap
import threading
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import ref

import pytest

from polar_sdk.errors import InvalidRequestError, SinkError
from polar_sdk.request import generation, recorder
from polar_sdk.testing import tiny_model
from polar_sdk.usage import ListSink

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path
    from types import FrameType

    from torch import Tensor

    from polar_sdk.model import PolarModel
    from polar_sdk.request.generation import Chunk
    from polar_sdk.usage import UsageRecord

LONG = 400
"""Tokens of an answer that no test waits for."""
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
FORK_WARNING = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> Iterator[None]:
    """The collector leaves alone what there was before, so that it is quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """Garbage is collected where a test says so."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for a record."""
    monkeypatch.setattr(recorder, "_PATIENCE_SECONDS", 0.1)


class Chat:
    """An everyday cycle: it holds a stream, and a method of its own."""

    def __init__(self, stream: Generator[Any, None, None]) -> None:
        self.stream = stream
        next(stream)
        self.callback = self.done

    def done(self) -> None:
        """Nothing to do."""


def wrapped(chunks: Generator[Chunk, None, None]) -> Generator[str, None, None]:
    """A Python generator that closes ours, as frameworks and users write it."""
    with closing(chunks):
        for chunk in chunks:
            yield chunk.text


def delegating(chunks: Generator[Chunk, None, None]) -> Generator[Chunk, None, None]:
    yield from chunks


WAYS = pytest.mark.parametrize(
    "way", [lambda chunks: chunks, wrapped, delegating], ids=["ours", "wrapped", "delegating"]
)


def within(call: Callable[[], object], seconds: float = 20) -> None:
    """Run a call that must end."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"it hangs: not done after {seconds} s"
    if errors:
        raise errors[0]


def collecting(tokens: object, logits: Tensor) -> Tensor:
    """A logits hook: the collector runs in the engine's thread."""
    gc.collect()
    return logits


@WAYS
def test_a_stream_collected_in_the_engines_thread_hangs_nobody_and_is_recorded(way: Any) -> None:
    sink = ListSink()
    model = tiny_model(sink=sink)
    Chat(way(model.stream("hello", max_tokens=LONG, request_id="dropped")))
    within(lambda: model.generate("other", max_tokens=3, logits_hook=collecting, request_id="other"))
    assert recorder.flush()
    assert sorted(record.request_id for record in sink.records) == ["dropped", "other"]
    (dropped,) = [record for record in sink.records if record.request_id == "dropped"]
    assert (dropped.outcome, dropped.error) == ("cancelled", None)
    assert 1 <= dropped.tokens.output <= 6
    within(lambda: model.generate("again", max_tokens=3))


@WAYS
def test_a_stream_collected_by_a_thread_that_holds_the_engine(way: Any, impatient: None) -> None:
    sink = ListSink()
    model = tiny_model(sink=sink)
    Chat(way(model.stream("hello", max_tokens=LONG)))

    def collect() -> None:
        assert model.scheduler.hold_for_fork()
        gc.collect()
        model.scheduler.go_on_after_fork()

    within(collect)
    assert recorder.flush()
    assert [record.outcome for record in sink.records] == ["cancelled"]


@WAYS
def test_a_stream_collected_inside_its_sink(way: Any, impatient: None) -> None:
    """The sink holds a lock, which the record of the stream needs: who collects goes on without it."""

    class Locking(ListSink):
        lock = threading.Lock()

        def emit(self, record: UsageRecord) -> None:
            with self.lock:
                gc.collect()
                super().emit(record)

    sink = Locking()
    model = tiny_model(sink=sink)
    Chat(way(model.stream("hello", max_tokens=LONG)))
    within(lambda: model.generate("other", max_tokens=2))
    assert recorder.flush()
    assert sorted(record.outcome for record in sink.records) == ["cancelled", "completed"]


def test_a_hook_may_close_a_stream_of_its_model() -> None:
    sink = ListSink()
    model = tiny_model(sink=sink)
    stream = model.stream("hello", max_tokens=LONG, request_id="closed")
    next(stream)

    def closes(tokens: object, logits: Tensor) -> Tensor:
        stream.close()
        return logits

    within(lambda: model.generate("other", max_tokens=2, logits_hook=closes))
    assert recorder.flush()
    assert sorted((record.request_id == "closed", record.outcome) for record in sink.records) == [
        (False, "completed"),
        (True, "cancelled"),
    ]


def test_a_hook_that_asks_its_own_model_is_told_so() -> None:
    model = tiny_model()
    stream = model.stream("hello", max_tokens=LONG)
    next(stream)

    def asks(tokens: object, logits: Tensor) -> Tensor:
        model.generate("and this?")
        return logits

    def reads(tokens: object, logits: Tensor) -> Tensor:
        list(stream)
        return logits

    for hook in (asks, reads):
        with pytest.raises(InvalidRequestError):
            within(lambda hook=hook: model.generate("other", max_tokens=2, logits_hook=hook))  # type: ignore[misc]
    within(lambda: model.generate("again", max_tokens=2))


def test_leaving_a_loop_stores_the_record_at_once() -> None:
    sink = ListSink()
    for _ in tiny_model(sink=sink).stream("hello", max_tokens=LONG):
        break
    assert [record.outcome for record in sink.records] == ["cancelled"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_record_of_a_dropped_stream_that_cannot_be_stored_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Full(ListSink):
        def emit(self, record: UsageRecord) -> None:
            raise SinkError("the disk is full.")

    Chat(tiny_model(sink=Full()).stream("hello", max_tokens=LONG))
    gc.collect()
    assert recorder.flush()
    assert "could not be stored" in caplog.text
    assert "the disk is full." in caplog.text


def test_a_closed_stream_is_at_its_end(tiny: PolarModel, records: ListSink) -> None:
    stream = tiny.stream("hello", max_tokens=LONG)
    next(stream)
    stream.close()
    stream.close()
    assert list(stream) == []
    assert [record.outcome for record in records.records] == ["cancelled"]


def test_an_error_thrown_into_a_stream_is_recorded_and_raised(tiny: PolarModel, records: ListSink) -> None:
    stream = tiny.stream("hello", max_tokens=LONG)
    next(stream)
    with pytest.raises(KeyError, match="mine"):
        stream.throw(KeyError("mine"))
    assert [(record.outcome, record.error) for record in records.records] == [("cancelled", None)]


def test_a_sink_that_hangs_holds_nobody_up_for_long(impatient: None) -> None:
    go = threading.Event()

    class Hanging(ListSink):
        def emit(self, record: UsageRecord) -> None:
            assert go.wait(20)
            super().emit(record)

    sink = Hanging()
    stream = tiny_model(sink=sink).stream("hello", max_tokens=LONG)
    next(stream)
    within(stream.close)
    assert sink.records == []
    go.set()
    assert recorder.flush()
    assert [record.outcome for record in sink.records] == ["cancelled"]


LEFT_OPEN = """
    import gc, sys
    from polar_sdk import JsonlSink
    from polar_sdk.testing import tiny_model

    class Chat:
        def __init__(self, name):
            self.stream = model.stream("hello", max_tokens=3000, request_id=name)
            next(self.stream)
            self.me = self

    model = tiny_model(sink=JsonlSink(sys.argv[1]), context_window=4096)
    gc.disable()
    kept = Chat("kept")
    Chat("dropped")
"""


def test_streams_left_open_are_recorded_when_the_process_ends(tmp_path: Path) -> None:
    path = tmp_path / "records"
    subprocess.run([sys.executable, "-c", textwrap.dedent(LEFT_OPEN), str(path)], check=True, timeout=120)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["request_id"]: line["outcome"] for line in found} == {"kept": "cancelled", "dropped": "cancelled"}


class Begun(ListSink):
    """Notes the requests that a record is due for."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: set[str] = set()

    def watch(self, tenant: str, request_id: str, end: Callable[[Exception], None]) -> None:
        self.begun.add(request_id)

    def recorded(self) -> set[str]:
        """Requests that have a record, each of them one; the same may be offered again."""
        found = {record.request_id: record for record in self.records}
        assert all(record == found[record.request_id] for record in self.records)
        return set(found)


LOOKS = {
    dis.opmap[name] for name in ("RESUME", "JUMP_BACKWARD", "CALL", "CALL_KW", "CALL_FUNCTION_EX") if name in dis.opmap
}
"""Instructions after which CPython looks for signals."""


@contextmanager
def raising(steps: set[int]) -> Iterator[None]:
    """Raise KeyboardInterrupt at some of the places of an answer and its recorder where a signal may, counted from one.

    CPython takes a trace function away once it has raised; a profile function puts it back, at the next call or return.
    """
    counter = itertools.count(1)
    files = {generation.__file__, recorder.__file__}
    before: dict[int, int] = {}

    def meet(frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = True
        if event in ("call", "exception"):
            before.pop(id(frame), None)
        elif event == "opcode":
            last = before.get(id(frame))
            before[id(frame)] = frame.f_code.co_code[frame.f_lasti]
            if last in LOOKS and next(counter) in steps:
                raise KeyboardInterrupt
        return meet

    def arm(frame: FrameType, event: str, arg: object) -> None:
        sys.settrace(meet)

    traced, profiled = sys.gettrace(), sys.getprofile()
    sys.settrace(meet)
    sys.setprofile(arm)
    try:
        yield
    finally:
        sys.setprofile(profiled)
        sys.settrace(traced)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # steps of a finaliser
@pytest.mark.parametrize(
    ("again", "stride"),
    [(None, 3), (2, 3), *(pytest.param(again, 1, marks=pytest.mark.long) for again in (None, 1, 2, 3, 5, 9))],
)
def test_a_stream_that_is_interrupted_at_any_step_is_recorded(again: int | None, stride: int) -> None:
    """By then, after one signal; a further one may come before the record is stored."""
    sink = Begun()
    model = tiny_model(sink=sink)
    for step in itertools.count(1, stride):
        pieces = 0
        try:
            with raising({step, step + (again or 0)}):
                for _ in model.stream("hello", max_tokens=4, request_id=f"r{step}"):
                    pieces += 1
        except KeyboardInterrupt:
            if again is None:
                assert sink.begun <= sink.recorded()
        else:
            break
        assert recorder.flush()
        assert sink.begun <= sink.recorded()
    assert pieces > 2
    assert len(sink.begun) > 20 // stride


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # steps of a finaliser
@pytest.mark.parametrize("again", [0, 1, 2, 3])
def test_a_stream_whose_end_is_interrupted_at_any_step_is_recorded(again: int) -> None:
    """Also where signals come before the records were left to the thread."""
    sink = ListSink()
    model = tiny_model(sink=sink)
    for step in itertools.count(1):
        stream = model.stream("hello", max_tokens=LONG, request_id=f"r{step}")
        next(stream)
        with raising({step, step + again}):  # until the traceback is gone, too, and with it the last of the call
            try:
                stream.close()
            except KeyboardInterrupt:
                del stream
            else:
                break
        assert recorder.flush()
        assert f"r{step}" in {record.request_id for record in sink.records}
    assert step > 1


@pytest.mark.parametrize("flushed", [True, False], ids=["awaited", "found"])
def test_no_finaliser_is_needed_for_a_record(flushed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two signals: one at the first step of what ends a call, one at that of a finaliser, which drops it and ends."""
    stored = threading.Event()

    class Told(ListSink):
        def emit(self, record: UsageRecord) -> None:
            super().emit(record)
            stored.set()

    def interrupted(self: object, *_: object) -> None:
        raise KeyboardInterrupt

    for kind in (recorder.Recorder, recorder.Recording):
        monkeypatch.setattr(kind, "__exit__", interrupted, raising=False)
        monkeypatch.setattr(kind, "__del__", lambda _: None, raising=False)
    sink = Told()
    stream = tiny_model(sink=sink).stream("hello", max_tokens=LONG)
    next(stream)
    try:
        stream.close()
    except KeyboardInterrupt:
        del stream
    else:
        pytest.fail("nothing was interrupted")
    assert recorder.flush() if flushed else stored.wait(20)
    assert [record.outcome for record in sink.records] == ["cancelled"]


def test_a_model_ends_with_its_last_request() -> None:
    model = tiny_model(sink=ListSink())
    loaded = ref(model.loaded)
    model.generate("hello", max_tokens=2)
    for _ in model.stream("hello", max_tokens=LONG):
        break
    assert recorder.flush()
    model.scheduler.close()
    del model
    gc.collect()
    assert loaded() is None
