"""The menu router: the cheapest program that is good enough, and what it costs to ask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from polar_sdk.engine.pack import Question
from polar_sdk.engine.scoring import score_programs
from polar_sdk.errors import RouterError, RouterModelError
from polar_sdk.programs.program import Program
from polar_sdk.router.learned import AtTheta, RouterFacts
from polar_sdk.router.menu import MenuRouter, cheapest, menu_dial, needed_theta
from polar_sdk.router.network import FeatureReader, Network

if TYPE_CHECKING:
    from polar_sdk.model import PolarModel

TOKENS = (5, 80, 33, 7, 120)


def test_the_cheapest_good_enough_program_runs(router: MenuRouter) -> None:
    texts = [router.choose(TOKENS, theta).program.text for theta in (0.05, 0.2, 0.6)]
    assert texts == ["0-5", "0-1 3-5", "0-1 4-5"]


@given(logits=st.lists(st.floats(-5, 5), min_size=2, max_size=2), low=st.floats(0, 1), high=st.floats(0, 1))
def test_a_looser_dial_never_costs_more(logits: list[float], low: float, high: float) -> None:
    needed = needed_theta(torch.tensor([logits]))
    order = [2, 1]
    place = {2: 0, 1: 1, 0: 2}
    tight, loose = (int(cheapest(needed, order, theta)) for theta in sorted((low, high)))
    assert place[loose] <= place[tight]


def test_at_zero_the_router_is_not_asked(router: MenuRouter) -> None:
    route = router.at(0.0).route(TOKENS)
    assert route.program == Program.identity(6) and route.flops == 0


def test_one_prompt_and_many_are_decided_alike(router: MenuRouter) -> None:
    outputs = torch.randn((40, 2), generator=torch.Generator().manual_seed(1))
    for theta in (0.0, 0.2, 0.5, 0.9):
        assert router.choose_all(outputs, theta) == [router.decide(row, theta) for row in outputs]


def test_a_dearer_program_is_never_chosen(model: PolarModel) -> None:
    menu = (Program.identity(6), Program.looping(6, {2: 2}))
    network = Network.fresh(torch.randn(4, 49), (), 1, seed=0)
    facts = RouterFacts(model="tiny", fingerprint=model.fingerprint, depth=6)
    router = MenuRouter(facts, network, menu).bind(model.decoder, model.fingerprint)
    assert router.choose(TOKENS, 1.0).program == menu[0]


@pytest.mark.parametrize(
    ("kind", "layers", "hidden"), [("embedding", 0, ()), ("embedding", 0, (16,)), ("early", 2, (8,))]
)
def test_flops_are_those_that_run(model: PolarModel, kind: str, layers: int, hidden: tuple[int, ...]) -> None:
    reader = FeatureReader(model.decoder, kind, layers)  # type: ignore[arg-type]
    network = Network.fresh(reader.stack([TOKENS, TOKENS[:3]]), hidden, 2, seed=0)
    facts = RouterFacts(
        model="tiny", fingerprint=model.fingerprint, depth=6, features=reader.kind, feature_layers=layers
    )
    menu = (Program.identity(6), Program.skipping(6, [2]), Program.skipping(6, [3]))
    router = MenuRouter(facts, network, menu).bind(model.decoder, model.fingerprint)
    with FlopCounterMode(display=False) as counter:
        route = router.choose(TOKENS, 0.5)
    lead = 0 if route.lead is None else route.lead.flops
    assert route.flops + lead == counter.get_total_flops() > 0


def test_early_features_are_the_states_of_the_model(model: PolarModel) -> None:
    """The last state after all six layers predicts what the scorer says of the next token."""
    features = FeatureReader(model.decoder, "early", 6)(TOKENS)
    with torch.inference_mode():
        chances = model.decoder.head(features[48:96].unsqueeze(0)).log_softmax(-1)[0]
    question = Question(TOKENS, ((9,),))
    identity = Program.identity(6)
    score = score_programs(model.decoder, [question], [identity])[identity][0].loglikelihoods[0]
    assert float(chances[9]) == pytest.approx(score, abs=1e-4)


def test_another_model_is_refused(router: MenuRouter, model: PolarModel) -> None:
    with pytest.raises(RouterModelError, match="was trained for model tiny"):
        router.bind(model.decoder, "another")


def test_an_unbound_router_says_so(router: MenuRouter) -> None:
    unbound = MenuRouter(router.facts, router.network, router.programs)
    with pytest.raises(RouterError, match="not bound to a model"):
        unbound.at(0.2).route(TOKENS)


def test_the_dial_begins_at_identity(router: MenuRouter) -> None:
    dial = menu_dial(needed_theta(torch.randn(50, 2)), [2, 1])
    assert dial[0] == 0 and list(dial) == sorted(set(dial))
    assert isinstance(router.at(dial[-1]), AtTheta)
