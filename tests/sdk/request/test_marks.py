"""Marks of answers that run: what they say has been executed, to the FLOP, and none comes after the record."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import torch

from polar_sdk.engine.forward import next_logits
from polar_sdk.engine.row import Row
from polar_sdk.errors import SinkError
from polar_sdk.programs.program import Program
from polar_sdk.request import record as record_module
from polar_sdk.request.record import Marker
from polar_sdk.testing import tiny_model, tiny_tokenizer
from polar_sdk.usage import ListSink, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.model import PolarModel
    from polar_sdk.serving.job import Progress
    from polar_sdk.usage import UsageRecord

NEVER = 10**18
LETTER = tiny_tokenizer().encode("A", add_special_tokens=False)[0]


class MarkSink(ListSink):
    """Keeps marks and records in the order in which they come."""

    wants_marks = True

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[UsageRecord] = []
        self.gate = threading.Event()
        """Marks wait for it."""
        self.gate.set()
        self.asked = threading.Semaphore(0)

    def mark(self, record: UsageRecord) -> None:
        self.asked.release()
        assert self.gate.wait(60)
        self.marks.append(record)


@pytest.fixture
def sink() -> MarkSink:
    return MarkSink()


@pytest.fixture
def model(sink: MarkSink) -> PolarModel:
    return tiny_model(sink=sink, context_window=4096)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Progress]:
    """How far jobs have come, each time that they say so."""
    found: list[Progress] = []
    note = Marker.note

    def noting(self: Marker, progress: Progress) -> None:
        found.append(progress)
        note(self, progress)

    monkeypatch.setattr(Marker, "note", noting)
    return found


def go_on(_: Sequence[int], logits: Tensor) -> Tensor:
    """The letter A for as long as the answer may be."""
    logits[LETTER] += 1e3
    return logits


def answer(model: PolarModel, tokens: int, prompt: str = "hello", program: str = "0-5") -> UsageRecord:
    """An answer of exactly so many tokens."""
    found = model.generate(prompt, program=program, max_tokens=tokens, logits_hook=go_on).usage
    assert found.tokens.output == tokens
    return found


def executed(model: PolarModel, record: UsageRecord) -> int:
    """FLOPs that a request has executed by its last token, as the plan has it."""
    tokens, program = record.tokens, Program.of(record.program)
    return model.decoder.cost.request(program, tokens.input, tokens.output, cached=tokens.cached).total


def test_every_64_tokens(
    model: PolarModel, sink: MarkSink, told: list[Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "MARK_NS", NEVER)
    answer(model, 64)
    assert (told, sink.marks) == ([], []), "a short answer is not marked"
    answer(model, 200)
    assert [progress.output for progress in told] == [64, 128, 192]
    assert {mark.tokens.output for mark in sink.marks} <= {64, 128, 192}


@pytest.mark.parametrize("program", ["0-5", "0 2-5", "0 3-5"])
def test_a_mark_says_what_was_executed(
    model: PolarModel, sink: MarkSink, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "MARK_NS", 0)
    record = answer(model, 150, program=program)
    assert len(sink.marks) > 1
    for mark in sink.marks:
        assert mark.flops.total == executed(model, mark)
        assert mark.identity_flops == model.cost("0-5", prompt=mark.tokens.input, output=mark.tokens.output).total
        assert (mark.outcome, mark.finish_reason) == (Outcome.CANCELLED, "cancelled")
        same = {"request_id", "tenant", "tags", "model", "program", "started_at", "queue_ns", "device"}
        assert mark.model_dump(include=same) == record.model_dump(include=same)
    outputs = [mark.tokens.output for mark in sink.marks]
    assert outputs == sorted(set(outputs))
    assert outputs[-1] < record.tokens.output


def test_a_long_prompt_is_marked_piece_by_piece(
    model: PolarModel, told: list[Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "MARK_NS", 0)
    prompt = "x" * 1_500
    record = answer(model, 2, prompt)
    pieces = [progress for progress in told if progress.output == 0]
    assert len(pieces) == record.tokens.input // 512
    for number, progress in enumerate(pieces, 1):
        assert progress.work.visits().prefill == (number,) * 6
        assert 0 < progress.work.total < record.flops.layers_prefill


def test_what_runs_again_is_not_marked_again(model: PolarModel) -> None:
    """A row that gave its pages up counts apart until it is where it was; a mark says what counts for the request."""
    tokens = model.encode("hello there")
    row = Row(model.decoder, Program.of("0-5"), prompt=len(tokens))
    with torch.inference_mode():
        next_logits(model.decoder, [row], [tokens])
        counted = row.metered.copy()
        assert counted.total == model.cost("0-5", prompt=len(tokens), output=1).total
        row.drop_pages()
        next_logits(model.decoder, [row], [tokens[:4]], [False])
    assert 0 < row.work.total < counted.total
    assert (row.metered.total, row.metered.visits()) == (counted.total, counted.visits())
    row.page_table.release()


def test_a_paused_reader_is_marked_once(
    model: PolarModel, told: list[Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While tokens are computed ahead of it, and then not, however long it pauses."""
    monkeypatch.setattr(record_module, "MARK_NS", 0)
    stream = model.stream("hello", program="0-5", max_tokens=100, logits_hook=go_on)
    next(stream)
    rounds = threading.Semaphore(0)
    count = model.scheduler._places.begin_round

    def counting() -> None:
        count()
        rounds.release()

    monkeypatch.setattr(model.scheduler._places, "begin_round", counting)
    for _ in range(8):
        assert rounds.acquire(timeout=60)
    before = len(told)
    for _ in range(4):
        assert rounds.acquire(timeout=60)
    assert len(told) == before
    stream.close()


def test_a_slow_sink_gets_the_latest_and_nothing_after_the_record(
    model: PolarModel, sink: MarkSink, told: list[Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "MARK_NS", NEVER)
    sink.gate.clear()
    stream = model.stream("hello", program="0-5", max_tokens=400, logits_hook=go_on)
    for _ in range(300):
        next(stream)
    assert sink.asked.acquire(timeout=60)
    sink.gate.set()
    list(stream)
    assert [progress.output for progress in told] == [64, 128, 192, 256, 320, 384]
    outputs = [mark.tokens.output for mark in sink.marks]
    assert outputs == sorted(set(outputs))
    assert len(sink.records) == 1


def test_a_mark_that_comes_after_the_record_is_dropped(
    model: PolarModel, sink: MarkSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[tuple[Marker, Progress]] = []
    note = Marker.note
    monkeypatch.setattr(Marker, "note", lambda self, progress: late.append((self, progress)))
    answer(model, 150)
    for marker, progress in late:
        note(marker, progress)
        marker.mark()
    assert late
    assert sink.marks == []


def test_a_mark_that_fails_harms_nobody(
    model: PolarModel, sink: MarkSink, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(record: UsageRecord) -> None:
        sink.asked.release()
        raise SinkError("full.")

    monkeypatch.setattr(record_module, "MARK_NS", 0)
    monkeypatch.setattr(sink, "mark", full)
    record = answer(model, 150)
    assert record.outcome is Outcome.COMPLETED
    assert sink.records == [record]
    warnings = [line.getMessage() for line in caplog.records if "marked" in line.getMessage()]
    assert warnings == [f"request {record.request_id!r} could not be marked (full.)"], "once"


def test_who_keeps_no_marks_gets_none(told: list[Progress], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "MARK_NS", 0)
    answer(tiny_model(sink=ListSink()), 100)
    assert told == []
