"""The cost model: the closed form is the sum of its steps, exactly, and more work never costs less."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_sdk.errors import MissingMapError
from polar_sdk.programs.cost import CostModel, LayerCost, Piece, size
from polar_sdk.programs.program import Program, Step

DEPTH = 7
numbers = st.integers(0, 10**9)
layer_costs = st.tuples(numbers, st.integers(0, 10**5), numbers).map(
    lambda it: LayerCost(linear=it[0] + it[2], attention=it[1], keys_values=it[2])
)
costs = st.builds(CostModel, layers=st.lists(layer_costs, min_size=DEPTH, max_size=DEPTH).map(tuple), head=numbers)
programs = st.lists(st.integers(0, DEPTH - 1), min_size=1, max_size=12).map(lambda path: Program(tuple(path)))
prompts = st.integers(1, 300)
outputs = st.integers(0, 60)


@given(costs, programs, prompts, outputs, numbers)
def test_a_request_is_the_sum_of_its_steps(
    cost: CostModel, program: Program, prompt: int, output: int, router: int
) -> None:
    *others, last = program.layers
    prefill = sum(cost.layers[layer].flops(prompt, prompt) for layer in others)
    prefill += cost.layers[last].flops(1, prompt) + cost.layers[last].keys_values * (prompt - 1)
    decode = 0
    for step in range(1, output):  # the first output token comes out of the prefill
        decode += sum(cost.layers[layer].flops(1, prompt + step) for layer in program.layers)
    flops = cost.request(program, prompt, output, router=router)
    assert flops.layers_prefill == prefill
    assert flops.layers_decode == decode
    assert flops.head == cost.head * output
    assert flops.router == router
    assert flops.total == prefill + decode + cost.head * output + router


@given(costs, programs, prompts, st.integers(0, 40), st.integers(0, 40))
def test_decode_steps_add_up(cost: CostModel, program: Program, prompt: int, first: int, more: int) -> None:
    together = cost.decode(program, prompt, first + more)
    assert together == cost.decode(program, prompt, first) + cost.decode(program, prompt + first, more)


PIECES = st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(0, 60), st.integers(0, 40)).map(
    lambda it: Piece(it[0], it[0] + it[1], it[2], min(it[0] + it[1], it[0] + it[3]))
)


@given(PIECES, st.integers(0, 8), st.integers(-1, 1))
def test_each_token_of_a_pass_does_one_thing(piece: Piece, fill: int, after: int) -> None:
    """The ranges of `parts`, token by token, by the definition in words."""
    step, last = Step(3, 3, fill=fill), 7
    parts = piece.parts(step, last + after, last)
    for position in range(piece.start, piece.end):
        runs, leaves, filled = (
            any(start <= position < end for start, end in ranges)
            for ranges in (parts.running, parts.leaving, parts.filled)
        )
        wanted = position >= piece.wanted
        if after > 0:
            assert (runs, leaves, filled) == (wanted, False, False)
            continue
        visited = not fill or position == 0 or position >= piece.prompt - fill
        assert filled == (not visited)
        assert runs == (visited and (after < 0 or wanted))
        assert leaves == (visited and not runs)
    for ranges in parts:
        assert all(start < end for start, end in ranges)
        assert size(ranges) <= piece.end - piece.start


def test_a_fill_costs_its_map_for_filled_tokens_and_the_layers_for_the_others() -> None:
    cost = CostModel((LayerCost(1000, 10, 100),) * 4, 50).with_fills({(2, 3): 60})
    program, identity = Program.parse("0-1 (2-3:2)"), Program.identity(4)
    filled, plain = (
        [share.flops for share in cost.shares(chosen, Piece(0, 10, 10, 9))] for chosen in (program, identity)
    )
    assert plain == [11_000, 11_000, 11_000, 1000 + 10 * 10 + 100 * 9]
    assert filled == [11_000, 11_000, 1000 * 3 + 10 * 30 + 60 * 7, 1000 + 10 * 10 + 100 * 2]
    assert cost.prefill(program, 3) == cost.prefill(identity, 3)  # too short for anything to be filled
    assert cost.decode(program, 10, 5) == cost.decode(identity, 10, 5)


def test_a_fill_that_the_model_lacks() -> None:
    cost = CostModel((LayerCost(1000, 10),) * 4, 50).with_fills({(3, 3): 60})
    with pytest.raises(MissingMapError, match=r"no fill for layers 2-3; this model has: \(3-3\)"):
        cost.prefill(Program.parse("0-1 (2-3)"), 10)
