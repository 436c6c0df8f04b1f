"""The menu router: the cheapest program that is good enough, and what it costs to ask."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from polar_sdk.engine.maps import Bridge, Fill
from polar_sdk.errors import RouterError, RouterModelError
from polar_sdk.model import PolarModel
from polar_sdk.programs.program import Program
from polar_sdk.router.artifact import load_router, save_router
from polar_sdk.router.certificate import FORMS, Setting
from polar_sdk.router.learned import AtSetting, RouterFacts
from polar_sdk.router.menu import MenuRouter, Pricing, cheapest, menu_dial, needed_theta
from polar_sdk.router.network import Familiar, FeatureKind, FeatureReader, Network
from polar_sdk.testing import tiny_model
from polar_sdk.usage import ListSink
from tests.sdk.fixed_router import fixed_router
from tests.sdk.router.conftest import certified_router

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = (5, 80, 33, 7, 120)


def test_the_cheapest_good_enough_program_runs(router: MenuRouter) -> None:
    texts = [router.choose(TOKENS, theta).program.text for theta in (0.05, 0.2, 0.6)]
    assert texts == ["0-5", "0-1 3-5", "0-1 4-5"]


@given(logits=st.lists(st.floats(-5, 5), min_size=2, max_size=2), low=st.floats(0, 1), high=st.floats(0, 1))
def test_a_looser_dial_never_costs_more(logits: list[float], low: float, high: float) -> None:
    needed = needed_theta(torch.tensor([logits]))
    costs = torch.tensor([1.0, 0.8, 0.6])
    tight, loose = (int(cheapest(needed, costs, theta)) for theta in sorted((low, high)))
    assert costs[loose] <= costs[tight]
    assert needed[0, loose] <= max(low, high)


def test_at_zero_the_router_is_not_asked(router: MenuRouter) -> None:
    route = router.at(Setting()).route(TOKENS)
    assert route.program == Program.identity(6) and route.flops == 0


def test_one_prompt_and_many_are_decided_alike(router: MenuRouter) -> None:
    outputs = torch.randn((40, 2), generator=torch.Generator().manual_seed(1))
    for theta in (0.0, 0.2, 0.5, 0.9):
        assert router.choose_all(outputs, theta) == [router.decide(row, theta) for row in outputs]


def test_programs_for_choices_are_for_requests_with_choices() -> None:
    """However much the prompt of another one looks like such a question: a bridge hardly keeps a text."""
    menu = tuple(map(Program.parse, ("0-5", "0-1 [2-3] 4-5", "0-2 4-5")))
    model = tiny_model()
    hidden = model.decoder.family.hidden
    model.decoder.set_bridges({(2, 3): Bridge((torch.eye(hidden),), torch.zeros(hidden), torch.zeros(hidden))})
    router = fixed_router(model, menu, [0.99, 0.95], default_theta=0.5, forms=(None, "choice", None))
    engine = PolarModel(model.loaded, router=router, sink=ListSink())
    assert engine.generate("which one?", choice=["yes", "no"]).usage.program == menu[1].text
    assert engine.generate("which one? yes or no?", max_tokens=2).usage.program == menu[2].text
    assert [record.usage.program for record in engine.generate_batch(["a", "b"], max_tokens=1)] == [menu[2].text] * 2
    outputs = torch.zeros((3, 2), requires_grad=True)  # as in training, also once the router has served
    (gradient,) = torch.autograd.grad(router.allowed(outputs, "text")[:, 1].sum(), outputs)
    assert gradient.tolist() == [[0.0, 1.0]] * 3
    router = fixed_router(model, menu, [0.99, 0.95], default_theta=0.5)  # of bridges that were fitted to texts
    engine = PolarModel(model.loaded, router=router, sink=ListSink())
    assert engine.generate("which one? yes or no?", max_tokens=2).usage.program == menu[1].text


def test_a_more_expensive_program_is_never_chosen(model: PolarModel) -> None:
    menu = (Program.identity(6), Program.looping(6, {2: 2}))
    assert fixed_router(model, menu, [0.9]).choose(TOKENS, 1.0).program == menu[0]


def test_a_form_of_answers_that_was_not_calibrated_runs_full_depth(model: PolarModel, certified: MenuRouter) -> None:
    full = certified.programs[0].text
    for router, calibrated in ((certified, "text"), (certified_router(certified, "choice"), "choice")):
        served = router.serving("economy").router
        assert isinstance(served, AtSetting)
        for form in FORMS:
            route = served.answering(form).route(TOKENS)
            assert (route.program.text != full) == (route.flops > 0) == (form == calibrated)
    engine = PolarModel(model.loaded, router=certified, sink=ListSink())
    assert engine.generate("which one?", compute="economy", max_tokens=1).usage.program != full
    chosen = engine.generate("which one?", compute="economy", choice=["yes", "no"]).usage
    assert (chosen.program, chosen.tier) == (full, "economy")


@pytest.mark.parametrize(("kind", "hidden"), [("embedding", ()), ("ending", (16,)), ("edges", (16,))])
def test_flops_are_those_that_run(model: PolarModel, kind: FeatureKind, hidden: tuple[int, ...]) -> None:
    reader = FeatureReader(model.decoder, kind)
    network = Network.fresh(reader.stack([TOKENS, TOKENS[:3]]), hidden, 2, seed=0)
    facts = RouterFacts(model="tiny", fingerprint=model.fingerprint, depth=6, features=kind)
    menu = (Program.identity(6), Program.skipping(6, [2]), Program.skipping(6, [3]))
    router = MenuRouter(facts, network, menu).bind(model.decoder, model.fingerprint)
    with FlopCounterMode(display=False) as counter:
        route = router.choose(TOKENS, 0.5)
    assert route.flops == counter.get_total_flops() > 0


def test_the_ending_is_read_beside_the_whole(model: PolarModel) -> None:
    """Prompts of the same tokens differ by which of them stand at the end, however long they are."""
    reader = FeatureReader(model.decoder, "ending")
    question, text = [7, 8, 9] * 3, [11, 12, 13] * 100
    first, last, other = (reader(tokens) for tokens in (question + text, text + question, text[3:] + question))
    torch.testing.assert_close(first[:48], last[:48])
    assert not torch.allclose(first[48:96], last[48:96], atol=1e-2)
    torch.testing.assert_close(last[48:96], other[48:96])
    assert torch.equal(reader([5])[:48], reader([5])[48:96])
    assert len(first) == reader.size == 97


def test_the_last_message_is_read_from_its_beginning(model: PolarModel) -> None:
    """Whatever stands before it, and however long it is; an empty answer that begins is no message."""
    mark, question, text = 2, [7, 8, 9] * 4, [11, 12, 13] * 100
    reader = FeatureReader(model.decoder, "edges", (mark,))
    begins = [mark, *question, *text, mark, 5, 6]
    alone, after, between = (reader([*before, *begins])[96:144] for before in ([], [30] * 40, [mark, 30, *text]))
    torch.testing.assert_close(alone, after)
    torch.testing.assert_close(alone, between)
    assert not torch.allclose(alone, reader([mark, *text, *question, mark, 5, 6])[96:144], atol=1e-2)
    without = FeatureReader(model.decoder, "edges")
    torch.testing.assert_close(without([*question, *text])[96:144], reader([*question, *text])[96:144])
    assert torch.equal(reader([5])[:48], reader([5])[96:144])
    assert len(reader([5])) == reader.size == 145


def test_another_model_is_refused(router: MenuRouter, model: PolarModel) -> None:
    with pytest.raises(RouterModelError, match="tiny"):
        router.bind(model.decoder, "another")


def test_an_unbound_router_says_so(router: MenuRouter) -> None:
    unbound = MenuRouter(router.facts, router.network, router.programs)
    with pytest.raises(RouterError):
        unbound.at(Setting.to(0.2)).route(TOKENS)


def test_the_dial_begins_at_identity(router: MenuRouter) -> None:
    dial = menu_dial(needed_theta(torch.randn(50, 2)), [2, 1])
    assert dial[0] == 0 and list(dial) == sorted(set(dial))
    assert isinstance(router.at(Setting.to(dial[-1])), AtSetting)


def filled(model: PolarModel, **facts: Any) -> MenuRouter:
    """Cuts 4 and 2 of 6 layers, predicted to be lost with 0.1 and 0.3 whatever the prompt."""
    family = model.decoder.family
    for first in (4, 2):
        bias = torch.zeros(6 - first, 2, family.kv_heads, family.head_dim)
        fill = Fill((torch.zeros(family.hidden, bias.numel()),), bias)
        model.decoder.set_fills({**model.decoder.fills, (first, 5): fill})
    menu = (Program.identity(6), Program.filling(6, [(4, 5)]), Program.filling(6, [(2, 5)]))
    return fixed_router(model, menu, (0.9, 0.7), **facts)


def test_a_long_prompt_may_take_a_deeper_cut_at_the_same_dial() -> None:
    model = tiny_model()
    router, fixed = filled(model, own_length=True), filled(model)
    short, long = [1] * 12, [1] * 450
    assert (router.choose(short, 0.28).program.text, router.choose(long, 0.28).program.text) == (
        "0-3 (4-5)",
        "0-1 (2-5)",
    )
    assert {fixed.choose(tokens, 0.28).program.text for tokens in (short, long)} == {"0-3 (4-5)"}
    pricing = Pricing(router.programs, model.decoder.cost, own_length=True)
    assert pricing.favour([128]).tolist() == [[1.0, 1.0]]
    assert (pricing.favour([12]) > 1).all()
    assert (pricing.favour([450]) < 1).all()


def test_the_cheapest_is_the_cheapest_at_the_prompts_own_length() -> None:
    """A skip saves as much of a short answer as of a long prompt; a fill saves of the prompt alone."""
    model = tiny_model()
    cuts = filled(model, own_length=True)
    menu = (Program.identity(6), Program.skipping(6, [3]), cuts.programs[2])
    pricing = Pricing(menu, model.decoder.cost, own_length=True, answer=48)
    cheapest_at = [int(pricing.costs([length])[0].argmin()) for length in (4, 450)]
    assert cheapest_at == [1, 2]


def test_a_prompt_unlike_all_that_were_seen_runs_at_full_depth(tmp_path: Path) -> None:
    model = tiny_model()
    dice = random.Random(0)
    prompts = [[dice.randrange(65, 91) for _ in range(dice.randint(10, 60))] for _ in range(300)]
    reader = FeatureReader(model.decoder)
    seen, held_out = reader.stack(prompts[:200]), reader.stack(prompts[200:250])
    router = filled(model)
    network = Network.fresh(seen, (), 2, seed=0)
    network.biases[-1].copy_(torch.logit(torch.tensor([0.9, 0.7])))
    knowing = replace(network, familiar=Familiar.around(seen, held_out, network))
    router = MenuRouter(router.facts, knowing, router.programs).bind(model.decoder, model.fingerprint)
    like = [router.choose(tokens, 0.2).program.text for tokens in prompts[250:]]
    assert like.count("0-3 (4-5)") >= 48
    for unlike in ([200] * 30, [140] * 20, [65, 90] * 200, [70]):  # other letters, too long, too short
        assert router.choose(unlike, 0.99).program == Program.identity(6)
    outputs = router.outputs(reader.stack([[200] * 30, prompts[0]]))
    assert router.choose_all(outputs, 1.0, [30, len(prompts[0])])[0] == Program.identity(6)
    save_router(router, tmp_path)
    again = load_router(tmp_path)
    assert isinstance(again, MenuRouter)
    assert again.version == router.version
    assert again.bind(model.decoder, model.fingerprint).choose([200] * 30, 0.99).program == Program.identity(6)


def test_losses_count_from_the_quality_that_is_as_good_as_identity() -> None:
    quality = torch.tensor([[0.6, 0.5, 0.4, 0.0001]])
    needed = needed_theta(quality.logit(), par=0.5)[0]
    assert needed[0] == 0  # identity alone runs at 0, also beside programs that gain more than they lose
    assert needed[1:].tolist() == pytest.approx([0.001, 0.001, 0.2, 0.9998], abs=1e-4)
    halved = needed_theta(quality.logit(), torch.full((1, 4), 0.5), par=0.5)[0]
    assert halved[1:].tolist() == pytest.approx((needed[1:] / 2).tolist())
