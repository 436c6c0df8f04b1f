"""Loops: damping by the formula, the guard that stops a loop which runs away, and what the record says of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from polar_sdk.engine.decoder import build_decoder, damp
from polar_sdk.engine.forward import advance, next_logits
from polar_sdk.engine.row import Row
from polar_sdk.programs.policy import LoopGuard, Policy
from polar_sdk.programs.program import Program
from polar_sdk.testing import tiny_llama, tiny_model
from polar_sdk.usage import ListSink

if TYPE_CHECKING:
    from polar_sdk.engine.decoder import Decoder

TOKENS = list(range(30, 70))
STRICT = LoopGuard(max_step=1e-6, min_cosine=0.9999999)
"""Stops every loop."""
LOOSE = LoopGuard(max_step=1e9, min_cosine=-1.0)
"""Stops none."""


@pytest.fixture
def decoder() -> Decoder:
    return build_decoder(tiny_llama())


def states(decoder: Decoder, text: str, guard: LoopGuard | None = None) -> torch.Tensor:
    with torch.inference_mode():
        return advance(decoder, [Row(decoder, Program.parse(text), guard)], [TOKENS])


def test_damped_visits_move_by_their_share(decoder: Decoder) -> None:
    before = states(decoder, "0-2")
    half_way = damp(before, states(decoder, "0-3"), 2)
    # The second half step starts where the first ended; its layer is the same.
    model: Any = tiny_llama()
    with torch.inference_mode():
        positions = torch.arange(len(TOKENS)).unsqueeze(0)
        rotary = model.model.rotary_emb(before, positions)
        mask = torch.full((len(TOKENS), len(TOKENS)), float("-inf")).triu(1)[None, None]
        second = model.model.layers[3](half_way.unsqueeze(0), position_embeddings=rotary, attention_mask=mask)[0]
    expected = damp(half_way, second.view_as(half_way), 2)
    assert (states(decoder, "0-2 3~2") - expected).abs().max() < 1e-4


def test_a_guard_that_is_not_breached_changes_nothing(decoder: Decoder) -> None:
    assert torch.equal(states(decoder, "0-2 3x3 4-5", LOOSE), states(decoder, "0-2 3x3 4-5"))


def test_a_stopped_loop_is_the_program_without_it(decoder: Decoder) -> None:
    stopped, plain = Row(decoder, Program.parse("0-2 3x3 4-5"), STRICT), Row(decoder, Program.parse("0-5"))
    with torch.inference_mode():
        for tokens in (TOKENS, [5], [6]):  # decoding, too, runs without the loop
            ours = next_logits(decoder, [stopped], [tokens])
            assert (ours - next_logits(decoder, [plain], [tokens])).abs().max() < 1e-5
    visits = stopped.work.visits()
    assert visits.prefill == (1, 1, 1, 2, 1, 1)  # the visit that breached ran and is counted, the third never did
    assert visits.decode == (2, 2, 2, 2, 2, 2)
    assert stopped.loops_stopped == 1


def test_a_guard_stops_its_own_row_only(decoder: Decoder) -> None:
    rows = [Row(decoder, Program.parse("0-2 3x2 4-5"), guard) for guard in (STRICT, LOOSE)]
    with torch.inference_mode():
        ours = next_logits(decoder, rows, [TOKENS, TOKENS])
        alone = [next_logits(decoder, [Row(decoder, Program.parse(p))], [TOKENS])[0] for p in ("0-5", "0-2 3x2 4-5")]
    assert (ours - torch.stack(alone)).abs().max() < 1e-5
    assert [row.loops_stopped for row in rows] == [1, 0]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_state_that_is_no_number_breaches(broken: float) -> None:
    before = torch.ones(1, 4)
    assert LOOSE.breached(before, torch.full((1, 4), broken)).all()
    assert not LOOSE.breached(before, before).any()


def test_the_record_tells_of_stopped_loops() -> None:
    sink = ListSink()
    bounds = {"protected": (), "cost_ceiling": 9.0}
    for guard in (STRICT, None):
        policy = Policy(**bounds, loop_guard=guard)
        tiny_model(policy=policy, sink=sink).generate("hello", program="0-1 2x2 3-4 5x2", max_tokens=3)
    stopped, free = sink.records
    assert (stopped.loops_stopped, free.loops_stopped) == (2, 0)
    assert stopped.program == free.program == "0-1 2x2 3-4 5x2"
    assert stopped.visits.total < free.visits.total
