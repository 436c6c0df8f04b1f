"""Early features: the layers that a router reads are taken over by the request, and nothing runs or is billed twice."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from polar_sdk.engine.lead import begins, lead_flops, run_lead
from polar_sdk.errors import InvalidRequestError
from polar_sdk.programs.cost import CHUNK
from polar_sdk.programs.policy import Policy
from polar_sdk.programs.program import Program
from polar_sdk.router.learned import RouterFacts
from polar_sdk.router.menu import MenuRouter
from polar_sdk.router.network import FeatureReader, Network
from polar_sdk.testing import tiny_model
from polar_sdk.usage import ListSink

if TYPE_CHECKING:
    from polar_sdk.model import PolarModel
    from polar_sdk.request.generation import Generation

DEPTH, LAYERS, THETA = 6, 2, 0.3
TEXT = "an early word "
LONG = TEXT * 120
"""More tokens than a prompt runs in one piece."""


def early_router(model: PolarModel, chosen: str) -> MenuRouter:
    """Reads the states behind the second layer, and always chooses that program."""
    features = FeatureReader(model.decoder, "early", LAYERS).stack([[1, 2, 3], [40, 50, 60]])
    network = Network.fresh(features, (), 1, seed=0)
    network.biases[-1].fill_(2.0)
    facts = RouterFacts(
        model="tiny", fingerprint=model.fingerprint, depth=DEPTH, features="early", feature_layers=LAYERS,
        dial=(0.0, THETA), default_theta=THETA,
    )  # fmt: skip
    return MenuRouter(facts, network, (Program.identity(DEPTH), Program.parse(chosen)))


def routed(chosen: str, **options: Any) -> tuple[PolarModel, Generation]:
    """A request through such a router, on a model of its own."""
    model = tiny_model(context_window=4 * CHUNK)
    engine = tiny_model(policy=Policy.permissive(), context_window=4 * CHUNK, router=early_router(model, chosen))
    return engine, engine.generate(**{"prompt": TEXT, "max_tokens": 5, **options})


@pytest.mark.parametrize("prompt", [TEXT, LONG], ids=["one piece", "several"])
@pytest.mark.parametrize("program", ["0-1 3-5", "0-2 4-5", "0 1x2 2 5"])
def test_the_answer_and_the_bill_are_those_of_the_program_by_hand(prompt: str, program: str) -> None:
    engine, ours = routed(program, prompt=prompt)
    by_hand = tiny_model(policy=Policy.permissive(), context_window=4 * CHUNK).generate(
        prompt, program=program, max_tokens=5
    )
    assert ours.token_ids == by_hand.token_ids
    assert ours.usage.program == program
    assert ours.usage.visits == by_hand.usage.visits
    assert ours.usage.flops.router == engine.router.network.flops  # type: ignore[union-attr]
    assert ours.usage.flops.total - ours.usage.flops.router == by_hand.usage.flops.total
    assert ours.usage.identity_flops == by_hand.usage.identity_flops


def test_a_program_that_begins_otherwise_leaves_the_lead_to_the_router() -> None:
    engine, ours = routed("0 2-5")
    cost, tokens = engine.decoder.cost, ours.usage.tokens.input
    assert ours.usage.flops.router == engine.router.network.flops + lead_flops(cost, LAYERS, tokens)  # type: ignore[union-attr]
    assert (
        ours.token_ids == tiny_model(context_window=4 * CHUNK).generate(TEXT, program="0 2-5", max_tokens=5).token_ids
    )


def test_what_is_metered_is_what_ran() -> None:
    model = tiny_model(router=early_router(tiny_model(), "0-1 3-5"))
    with FlopCounterMode(display=False) as counter:
        maker = model._maker.make(TEXT, {"max_tokens": 1})
    lead = maker.route.lead
    assert lead is not None and maker.route.flops + lead.flops == counter.get_total_flops()


def test_a_batch_of_both_kinds_is_answered_as_one_by_one() -> None:
    engine = tiny_model(router=early_router(tiny_model(), "0-1 3-5"))
    prompts = [TEXT, "b", "another one"]
    each: list[Any] = [{}, {"program": "0-5"}, {}]
    together = engine.generate_batch(prompts, each=each, max_tokens=6)
    alone = [
        tiny_model().generate(prompt, program=program, max_tokens=6)
        for prompt, program in zip(prompts, ["0-1 3-5", "0-5", "0-1 3-5"], strict=True)
    ]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


def test_a_cached_start_and_a_lead_go_together() -> None:
    engine = tiny_model(router=early_router(tiny_model(), "0-1 3-5"))
    first, second = (engine.generate(TEXT * 12, max_tokens=4) for _ in range(2))
    assert first.token_ids == second.token_ids
    cached = second.usage.tokens.cached
    assert first.usage.tokens.cached == 0 < cached
    cost, tokens = engine.decoder.cost, second.usage.tokens.input
    rest = sum(layer.flops(tokens - cached, tokens) for layer in cost.layers[3:5])
    rest += cost.layers[5].flops(1, tokens, leaving=tokens - cached - 1)
    assert second.usage.visits.prefill == (1, 1, 0, 1, 1, 1)
    assert second.usage.flops.layers_prefill == lead_flops(cost, LAYERS, tokens) + rest


def test_a_request_that_ends_before_it_ran_is_billed_for_its_lead() -> None:
    sink = ListSink()
    engine = tiny_model(router=early_router(tiny_model(), "0-1 3-5"), sink=sink)
    stream = engine.stream(TEXT, max_tokens=4, cancel=_set())
    list(stream)
    (record,) = sink.records
    assert record.outcome == "cancelled"
    assert record.visits.prefill == (1, 1, 0, 0, 0, 0)
    assert record.flops.layers_prefill == lead_flops(engine.decoder.cost, LAYERS, record.tokens.input)


def _set() -> Any:
    import threading

    event = threading.Event()
    event.set()
    return event


def test_a_full_house_keeps_no_leads() -> None:
    engine = tiny_model(router=early_router(tiny_model(), "0-1 3-5"))
    engine.scheduler.limits = replace(engine.scheduler.limits, max_rows=1)
    answers = engine.generate_batch([TEXT] * 6, max_tokens=3)
    by_hand = tiny_model().generate(TEXT, program="0-1 3-5", max_tokens=3)
    assert {answer.token_ids for answer in answers} == {by_hand.token_ids}
    visits = [answer.usage.visits.prefill for answer in answers]
    assert (2, 2, 0, 1, 1, 1) in visits, "those at the end of the queue run their first layers anew, and say so"


@settings(max_examples=25)
@given(tokens=st.integers(1, 40), layers=st.integers(1, 5))
def test_a_lead_costs_what_it_says(tokens: int, layers: int) -> None:
    decoder = tiny_model().decoder
    with FlopCounterMode(display=False) as counter:
        lead = run_lead(decoder, list(range(tokens)), layers)
    assert lead.flops == counter.get_total_flops() == lead_flops(decoder.cost, layers, tokens)
    assert (lead.tokens, lead.layers) == (tokens, layers)


def test_features_are_those_of_the_states_of_identity() -> None:
    model = tiny_model(context_window=4 * CHUNK)
    tokens = [3 + number % 200 for number in range(CHUNK + 40)]
    features = FeatureReader(model.decoder, "early", LAYERS)(tokens)
    lead = run_lead(model.decoder, tokens, LAYERS)
    text = model.decode(tokens)
    assert features.shape == (2 * 48 + 1,) and text
    torch.testing.assert_close(features[:48], lead.states[1:].mean(0))
    torch.testing.assert_close(features[48:96], lead.states[-1])


@pytest.mark.parametrize(
    ("program", "fits"), [("0-5", True), ("0-1 1-5", True), ("0 2-5", False), ("0 1x2 2-5", True), ("1-5", False)]
)
def test_which_programs_take_a_lead_over(program: str, fits: bool) -> None:
    assert begins(Program.parse(program), LAYERS) is fits


@pytest.mark.parametrize(
    ("options", "error"), [({"prompt": "x" * 600}, "context window"), ({"temperature": -1.0}, "temperature")]
)
def test_a_request_that_is_refused_has_run_nothing(options: dict[str, Any], error: str) -> None:
    engine = tiny_model(router=early_router(tiny_model(), "0-1 3-5"))
    with FlopCounterMode(display=False) as counter, pytest.raises(InvalidRequestError, match=error):
        engine.generate(**{"prompt": TEXT, **options})
    assert counter.get_total_flops() == 0
