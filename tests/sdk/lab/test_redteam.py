"""Red-teaming: the search makes prompts look easy, a run counts what breaks a promise, and defences are measured."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import pytest
import torch

from polar_sdk import Program, lab
from polar_sdk.errors import DataError, RouterError
from polar_sdk.lab.items import PromptItem
from polar_sdk.lab.redteam.search import Surface, mutants, suffixes
from polar_sdk.lab.rewards.cache import RewardCache
from polar_sdk.programs.floors import Floor
from polar_sdk.router.certificate import Certificate, Counts, tier_promise
from polar_sdk.router.learned import Margin, RouterFacts
from polar_sdk.router.menu import MenuRouter
from polar_sdk.router.network import Familiar, FeatureReader, Network
from polar_sdk.testing import tiny_model, tiny_policy

if TYPE_CHECKING:
    from polar_sdk.model import PolarModel

TREES = ("ash", "birch", "cedar", "elm", "fir", "gum", "hazel", "ivy")
PROMPTS = [f"{word} {number}. Then {word}!" for number, word in enumerate(TREES)]


def reading_router(*, limits: bool = True) -> MenuRouter:
    """A certified router of the tiny model that reads prompts; its program changes most answers."""
    model = tiny_model()
    menu = [Program.identity(6), Program.parse("0 4-5")]
    reader = FeatureReader(model.decoder, "edges", model.template_separators)
    features = reader.stack([model.prompt_tokens(prompt) for prompt in PROMPTS])
    generator = torch.Generator().manual_seed(1)
    network = Network.fresh(features, (), 1, seed=0)
    weight = torch.randn(1, features.shape[1], generator=generator) / 40
    network = replace(network, scale=torch.ones(features.shape[1]), weights=(weight,))
    facts = RouterFacts(model="tiny", fingerprint=model.fingerprint, depth=6, dial=(0.0, 0.4, 0.6))
    facts = facts.model_copy(update={"features": "edges", "separators": model.template_separators})
    if limits:
        network = replace(network, familiar=Familiar.around(features, features, network))
    bound = MenuRouter(facts, network, menu).bind(model.decoder, model.fingerprint)
    counts = Counts(n=1000, lost={"differs": (0, 10, 40)})
    certificate = Certificate(
        subject=bound.subject,
        data="",
        delta=0.1,
        thetas=(0.0, 0.4, 0.6),
        kinds={"prompt": counts},
        saved={"text": (0.0, 0.1, 0.2)},
    )
    return bound.with_certificate(tier_promise(certificate, "economy", (0.1, "differs", None)))  # type: ignore[arg-type]


def attacked(**settings: Any) -> PolarModel:
    policy = tiny_policy(6).model_copy(update=settings.pop("policy", {}))
    return tiny_model(router=settings.pop("router", None) or reading_router(), policy=policy, **settings)


def run(model: PolarModel, cache: RewardCache | None = None, **options: Any) -> lab.RedTeam:
    items = [PromptItem(prompt=prompt) for prompt in PROMPTS]
    return lab.redteam(model, items, cache=cache or RewardCache(), **{"attempts": 12, "seeds": 8, **options})


class TestSearch:
    @pytest.mark.parametrize("method", ["gradient", "suffix"])
    def test_words_are_appended_that_make_a_prompt_look_easier(self, method: str) -> None:
        model = attacked(router=reading_router(limits=False))
        surface = Surface(model, model.router, guarded=False)  # type: ignore[arg-type]
        (found,) = islice(suffixes(surface, PROMPTS[0], 1, method, random.Random(1)), 1)
        assert found.startswith(PROMPTS[0]) and len(found) > len(PROMPTS[0])
        ease = surface.ease(surface.features([model.prompt_tokens(text) for text in (PROMPTS[0], found)]), 1)
        assert ease[1] > ease[0]

    def test_who_knows_the_limits_stays_inside(self) -> None:
        model = attacked()
        router: Any = model.router
        rows = []
        for guarded in (False, True):
            surface = Surface(model, router, guarded=guarded)
            texts = [next(suffixes(surface, prompt, 1, "suffix", random.Random(3))) for prompt in PROMPTS]
            features = surface.features([model.prompt_tokens(text) for text in texts])
            rows.append(router.network.familiar.strangeness(features, router.network).mean())
        assert rows[1] < rows[0]

    def test_mutants_are_other_prompts_the_easiest_first(self) -> None:
        model = attacked()
        surface = Surface(model, model.router, guarded=False)  # type: ignore[arg-type]
        made = list(mutants(surface, PROMPTS[0], 1, PROMPTS, random.Random(0)))
        assert PROMPTS[0] not in made and len(set(made)) == len(made) > 5
        ease = surface.ease(surface.features([model.prompt_tokens(text) for text in made]), 1).tolist()
        assert ease == sorted(ease, reverse=True)


class TestRun:
    def test_what_is_counted_is_what_was_sent(self) -> None:
        model = attacked()
        found = run(model)
        (tier,) = found.tiers
        assert found.reads_prompts and found.defences == ("unlikeness", "margin", "audits")
        assert [len(found.sent[name]) for name in ("without", "defended")] == [12, 12]
        assert tier.without == sum(sent.kept["economy"] < 0.75 for sent in found.sent["without"]) > 0
        assert tier.alone["unlikeness"] == sum(sent.kept["economy"] < 0.75 for sent in found.sent["defended"])
        assert sum(tier.by_method.values()) == tier.without <= tier.strict_without
        for sent in found.sent["defended"]:
            assert model.request(sent.prompt, compute="economy").program.text == sent.programs["economy"]

    def test_a_second_run_measures_nothing_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, cache = attacked(), RewardCache()
        first = run(model, cache)
        monkeypatch.setattr(cache, "put", lambda *_: pytest.fail("it was measured before"))
        assert run(model, cache) == first

    def test_a_floor_for_all_leaves_nothing_to_break(self) -> None:
        floor = Floor(name="all", floor="exact", tenants=("*",))
        (tier,) = run(attacked(policy={"floors": (floor,)})).tiers
        assert (tier.alone["floors"], tier.defended, tier.fewer) == (0, 0, 1.0) and tier.without

    def test_audits_of_all_requests_end_the_tier(self) -> None:
        (tier,) = run(attacked(), attempts=40, audit_share=1.0).tiers
        assert 0 < tier.alone["audits"] < tier.without

    def test_where_a_router_reads_nothing_prompts_are_mutated(self) -> None:
        router = reading_router(limits=False)
        blind = replace(router.network, weights=(torch.zeros_like(router.network.weights[0]),))
        model = tiny_model()
        bound = MenuRouter(router.facts, blind, router.programs).bind(model.decoder, model.fingerprint)
        assert router.certificate is not None
        certificate = router.certificate.model_copy(update={"subject": bound.subject})
        found = run(attacked(router=bound.with_certificate(certificate)))
        assert not found.reads_prompts and found.defences == ("audits",)
        assert {sent.method for sent in found.sent["without"]} == {"mutation"}

    def test_without_a_promise_there_is_nothing_to_attack(self) -> None:
        with pytest.raises(RouterError, match="polar fit"):
            run(tiny_model())
        with pytest.raises(DataError, match="at least 4"):
            lab.redteam(attacked(), [PromptItem(prompt="a")], cache=RewardCache())


class TestMargin:
    THETAS = (0.0, 0.1, 0.2, 0.3, 0.4)

    def test_it_lowers_theta_to_one_that_was_certified(self) -> None:
        margin = Margin(0.9, b"key", self.THETAS)
        drawn = [margin.lowered(0.4, [number]) for number in range(50)]
        assert set(drawn) <= set(self.THETAS) and len(set(drawn)) > 2 and max(drawn) <= 0.4
        assert drawn == [margin.lowered(0.4, [number]) for number in range(50)]
        assert drawn != [Margin(0.9, b"other", self.THETAS).lowered(0.4, [number]) for number in range(50)]

    def test_a_policy_with_one_serves_fewer_cheap_programs(self) -> None:
        router = reading_router(limits=False)
        plain, careful = attacked(router=router), attacked(router=router, policy={"margin": 0.9})
        prompts = [f"{prompt} {number}" for prompt in PROMPTS for number in range(4)]
        cheap, fewer = (
            {prompt for prompt in prompts if model.request(prompt, compute="economy").program.text == "0 4-5"}
            for model in (plain, careful)
        )
        assert fewer < cheap
        assert all(careful.request(prompt, compute="economy").tier == "economy" for prompt in prompts)
