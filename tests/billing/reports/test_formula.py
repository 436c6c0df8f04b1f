"""The FLOPs of a bill as products: what the engine counted while it ran, worked out again from sizes and lengths."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from polar_billing.reports.formula import Formula, work_out
from polar_billing.testing import usage_record
from polar_sdk.engine.work import Work
from polar_sdk.errors import ProgramDepthError
from polar_sdk.programs.cost import CostModel, LayerCost, Piece, pieces
from polar_sdk.programs.program import Program
from polar_sdk.testing import random_fill, tiny_model
from polar_sdk.usage import FlopUsage, ListSink, Outcome, TokenUsage, UsageRecord

if TYPE_CHECKING:
    from polar_sdk.model import PolarModel

COST = CostModel(
    (LayerCost(1009, 11, 103), LayerCost(1013, 13, 107), *[LayerCost(1019, 11, 103)] * 4),
    head=5003,
    bridges={(2, 3): 97},
    fills={(3, 5): 61, (4, 4): 67},
)
PROGRAMS = ("0-5", "0 2-5", "0-1 [2-3] 4-5", "0 1x3 2-5", "0-2 (3-5:2)", "0-3 (4) 5", "0 2 4 [2-3]", "0 1~2 5")


@pytest.fixture(scope="module")
def model() -> PolarModel:
    """With a window of more than two pieces of a prompt, and a filled segment."""
    made = tiny_model(context_window=1600)
    made.decoder.set_fills({(3, 5): random_fill(made.decoder, (3, 5))})
    made._maker = replace(made._maker, cost=made.decoder.cost)
    return made


@pytest.mark.parametrize("prompt", [1, 30, 1100])
@pytest.mark.parametrize("program", ["0-5", "0 3-5", "0 1x2 3-5", "0-2 (3-5)", "0-2 (3-5:4)"])
def test_products_add_up_to_what_the_engine_counted(model: PolarModel, program: str, prompt: int) -> None:
    usage = model.generate("x" * prompt, program=program, max_tokens=5, template="raw").usage
    formula = work_out(usage, model.decoder.cost)
    assert usage.tokens.input == prompt
    assert (formula.total, formula.difference, formula.note) == (usage.flops.total, 0, None)
    flops = usage.flops
    assert parts(formula) == Counter(prompt=flops.layers_prefill, answer=flops.layers_decode, head=flops.head)


def test_a_shared_beginning_is_not_counted_again(model: PolarModel) -> None:
    text = "y" * 600
    records = [model.generate(text + end, program="0-5", max_tokens=3, template="raw").usage for end in "ab"]
    for usage in records:
        assert work_out(usage, model.decoder.cost).difference == 0
    assert records[1].tokens.cached >= 512


def test_a_stream_that_was_left_is_counted_to_its_last_token(model: PolarModel) -> None:
    sink = ListSink()
    left = tiny_model(sink=sink)
    with closing(left.stream("hello", program="0 2-5", max_tokens=50)) as stream:
        next(iter(stream))
    (usage,) = sink.records
    assert usage.outcome is Outcome.CANCELLED
    formula = work_out(usage, left.decoder.cost)
    assert (formula.total, formula.difference) == (usage.flops.total, 0)


@pytest.mark.parametrize("text", PROGRAMS)
def test_a_request_that_ended_after_any_step_is_followed_to_it(text: str) -> None:
    program = Program.parse(text)
    for whole in range(3):
        for more in range(len(program)):
            work = Work(COST, program)
            _run(work, program, 700, whole, more)
            record = _record(work, program, 700)
            formula = work_out(record, COST)
            assert formula.difference == 0, (text, whole, more, formula)
            assert parts(formula)["prompt"] == record.flops.layers_prefill
            assert parts(formula)["answer"] == record.flops.layers_decode
            ended = whole < len(pieces(700)) or (whole == len(pieces(700)) and more > 0)
            assert (formula.note is not None) == ended


def _run(work: Work, program: Program, prompt: int, whole: int, more: int) -> None:
    """Passes of prompt and answer: so many whole ones, and some steps of another."""
    passes = [*pieces(prompt), *(Piece(prompt + n, prompt + n + 1, prompt, prompt + n) for n in range(3))]
    for place, piece in enumerate(passes[: whole + 1]):
        if place == len(pieces(prompt)):
            work.head()
            work.end_prefill()
        if place < whole:
            work.steps(piece, range(len(program)))
            work.finish_pass()
        else:
            work.steps(piece, range(more))


def _record(work: Work, program: Program, prompt: int) -> UsageRecord:
    tokens = TokenUsage(input=prompt, output=work.flops().head // COST.head)
    return usage_record(program=program.text, tokens=tokens, flops=work.flops(7), visits=work.visits())


def parts(formula: Formula) -> Counter[str]:
    summed: Counter[str] = Counter()
    for term in formula.terms:
        assert term.flops == term.quantity * term.flops_each
        summed[term.part] += term.flops
    return summed


def test_other_sizes_give_another_sum_and_say_so(model: PolarModel) -> None:
    usage = model.generate("hello", program="0-5", max_tokens=3).usage
    more = usage.model_copy(update={"flops": FlopUsage(head=usage.flops.total + 5, total=usage.flops.total + 5)})
    formula = work_out(more, model.decoder.cost)
    assert formula.difference == formula.recorded - formula.total != 0
    assert formula.note is not None
    assert "do not give what was recorded" in formula.note
    stopped = work_out(more.model_copy(update={"loops_stopped": 2}), model.decoder.cost)
    assert "the guard stopped 2 loops" in str(stopped.note)


def test_a_program_of_a_deeper_model_is_refused() -> None:
    with pytest.raises(ProgramDepthError, match="9"):
        work_out(usage_record(program="0-9"), COST)
