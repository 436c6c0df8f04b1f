"""The cost model: the closed form is the sum of its steps, exactly, and more work never costs less."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from polar_sdk.programs.cost import CostModel, LayerCost
from polar_sdk.programs.program import Program

DEPTH = 7
numbers = st.integers(0, 10**9)
costs = st.builds(
    CostModel,
    layers=st.lists(
        st.builds(LayerCost, linear=numbers, attention=st.integers(0, 10**5)),
        min_size=DEPTH,
        max_size=DEPTH,
    ).map(tuple),
    head=numbers,
)
programs = st.lists(st.integers(0, DEPTH - 1), min_size=1, max_size=12).map(lambda path: Program(tuple(path)))
prompts = st.integers(1, 300)
outputs = st.integers(0, 60)


@given(costs, programs, prompts, outputs, numbers)
def test_a_request_is_the_sum_of_its_steps(
    cost: CostModel, program: Program, prompt: int, output: int, router: int
) -> None:
    prefill = sum(cost.layers[layer].flops(prompt, prompt) for layer in program.layers)
    decode = 0
    for step in range(1, output):  # the first output token comes out of the prefill
        decode += sum(cost.layers[layer].flops(1, prompt + step) for layer in program.layers)
    flops = cost.request(program, prompt, output, router=router)
    assert flops.layers_prefill == prefill
    assert flops.layers_decode == decode
    assert flops.head == cost.head * output
    assert flops.router == router
    assert flops.total == prefill + decode + cost.head * output + router


@given(costs, programs, st.integers(0, DEPTH - 1), prompts, outputs)
def test_one_more_visit_never_costs_less(
    cost: CostModel, program: Program, layer: int, prompt: int, output: int
) -> None:
    longer = Program((*program.layers, layer))
    assert cost.request(longer, prompt, output).total >= cost.request(program, prompt, output).total


@given(costs, programs, prompts, outputs)
def test_more_tokens_never_cost_less(cost: CostModel, program: Program, prompt: int, output: int) -> None:
    base = cost.request(program, prompt, output).total
    assert cost.request(program, prompt + 1, output).total >= base
    assert cost.request(program, prompt, output + 1).total >= base


@given(costs, programs, prompts, outputs)
def test_cost_depends_on_visits_not_on_their_order(cost: CostModel, program: Program, prompt: int, output: int) -> None:
    backwards = Program(program.layers[::-1])
    assert cost.request(backwards, prompt, output) == cost.request(program, prompt, output)


@given(costs, programs, prompts, st.integers(0, 40), st.integers(0, 40))
def test_decode_steps_add_up(cost: CostModel, program: Program, prompt: int, first: int, more: int) -> None:
    together = cost.decode(program, prompt, first + more)
    assert together == cost.decode(program, prompt, first) + cost.decode(program, prompt + first, more)
