"""The router that ships for the default model: found, certified, and at work."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from polar_sdk import PolarModel
from polar_sdk.lab.fit.synthetic import notes
from polar_sdk.promises.novelty import Novelty, Usualness
from polar_sdk.router.certificate import Setting
from polar_sdk.router.learned import AtSetting
from polar_sdk.router.menu import MenuRouter

pytestmark = pytest.mark.model
QUESTION = "Question: Which gas do plants take from the air to make sugar?\nAnswer:"


@pytest.fixture(scope="module")
def model() -> PolarModel:
    return PolarModel.from_pretrained(precision="bf16", ledger=None)


@pytest.fixture(scope="module")
def router(model: PolarModel) -> MenuRouter:
    assert isinstance(model.router, MenuRouter)
    return model.router


def test_it_serves_where_nothing_is_named_and_its_promises_hold(model: PolarModel, router: MenuRouter) -> None:
    assert router.certified
    assert router.certificate is not None and set(router.certificate.tiers) == {"economy", "standard", "premium"}
    usage = model.generate("Name a colour.", max_tokens=2).usage
    assert (usage.tier, usage.router) == ("standard", "menu")
    assert usage.flops.router > 0


def test_it_saves_a_third_of_a_choice_question_in_economy(model: PolarModel, router: MenuRouter) -> None:
    assert router.certificate is not None
    tokens = model.encode(QUESTION)
    economy = router.at(router.certificate.tiers["economy"].setting)
    assert isinstance(economy, AtSetting)
    program = economy.answering("choice").route(tokens).program
    cost = model.decoder.cost
    full = cost.prefill(router.programs[0], len(tokens))
    assert cost.prefill(program, len(tokens)) < full * 2 / 3
    assert router.at(Setting()).route(tokens).program == router.programs[0]


def test_the_default_tier_fills_most_of_a_long_prompt_and_none_of_a_short_one(
    model: PolarModel, router: MenuRouter
) -> None:
    assert router.certificate is not None
    standard = router.at(router.certificate.tiers["standard"].setting)
    (asked,) = notes(1, seed=3, facts=(30, 30))
    long = standard.route(model.prompt_tokens(asked.prompt)).program
    assert long.fills and not long.bridges
    assert standard.route(model.prompt_tokens("Name a colour.")).program == router.programs[0]
    usage = model.generate(asked.prompt, max_tokens=2).usage
    assert sum(usage.visits.prefill_filled) > 0
    assert usage.flops.total < 0.9 * usage.identity_flops


def test_another_precision_is_not_certified_and_falls_back_to_the_policy() -> None:
    whole = PolarModel.from_pretrained(precision="fp32", ledger=None)
    assert whole.router is None
    assert whole.generate("Name a colour.", max_tokens=1).usage.tier == "premium"


def test_it_is_small() -> None:
    folder = Path(str(resources.files("polar_sdk") / "shipped" / "routers" / "smollm2-135m-instruct"))
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 12_000_000


def test_short_prompts_that_run_all_layers_are_never_unusual(model: PolarModel, router: MenuRouter) -> None:
    assert router.certificate is not None
    usual = router.certificate.usual["prompt"]
    watching, blind = Novelty(usual), Novelty(usual)
    served = router.serving("standard")
    fallen = router.serving("standard", at_risk=bool)  # full depth serves in its place, and what was asked for counts
    assert (served.tier, fallen.tier) == ("standard", "exact")
    for serving in (served, fallen):
        for number in range(40):
            likeness = serving.router.route(model.prompt_tokens(f"Name colour {number}.")).likeness
            assert likeness is not None and likeness.harmless
            assert watching.observe(likeness) is Usualness.USUAL
            blind.observe(likeness._replace(harmless=False))
    assert blind.found is Usualness.UNUSUAL
    (asked,) = notes(1, seed=3, facts=(30, 30))
    for serving in (served, fallen):
        route = serving.router.route(model.prompt_tokens(asked.prompt))
        assert route.likeness is not None and not route.likeness.harmless
