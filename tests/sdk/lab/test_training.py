"""Training: both kinds of router learn what there is to learn, say so only if it is there, and resume."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pytest
import torch
from scipy.stats import beta

from polar_sdk import lab
from polar_sdk.errors import RouterError, RouterModelError
from polar_sdk.lab.items import PromptItem
from polar_sdk.lab.training.examples import Examples, harder_kinds, kinds_of
from polar_sdk.lab.training.layerwise_training import LayerwiseSettings, LayerwiseTask, fit_layerwise
from polar_sdk.lab.training.menu_training import MenuSettings, frontier
from polar_sdk.lab.training.table_training import fit_table, losses_by_kind
from polar_sdk.lab.training.train import RouterTrainer
from polar_sdk.model import PolarModel
from polar_sdk.programs.policy import Policy
from polar_sdk.programs.program import Program
from polar_sdk.router.artifact import load_router
from polar_sdk.router.certificate import FORMS, Setting
from polar_sdk.router.layerwise import ACTIONS, LayerwiseRouter, program_of
from polar_sdk.router.menu import MenuRouter, Pricing, needed_theta
from polar_sdk.testing import tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from polar_sdk.lab.items import Item
    from polar_sdk.lab.program_search.matrix import RewardMatrix
QUICK = MenuSettings(hidden=((),), penalties=(0.1,), seeds=(0,), steps=120, risks=(0.1,))


@pytest.mark.parametrize("target", ["agreement", "gap"])
@pytest.mark.parametrize("features", ["embedding", "ending"])
def test_a_menu_router_learns_which_prompts_are_easy(
    model: PolarModel, matrix: Callable[..., RewardMatrix], target: str, features: Any
) -> None:
    settings = QUICK.model_copy(update={"targets": (target,)})
    router = RouterTrainer(model, matrix(), features).menu(settings)
    test = matrix(400, seed=9)
    outputs = router.outputs(router.reader.stack(test.tokens))
    lost = [needed_theta(outputs)[:, 2] > 0.3, ~test.agree[:, 2]]
    hit = float((lost[0] == lost[1]).float().mean())
    assert hit > 0.8  # 87 % can be told from which half of the alphabet a prompt uses, and 57 % without reading


def test_a_static_router_reads_nothing_and_saves_less(model: PolarModel, matrix: Callable[..., RewardMatrix]) -> None:
    trainer = RouterTrainer(model, matrix())
    settings = QUICK.model_copy(update={"least": 0.4})  # program 2 loses less than half of the prompts, but not surely
    static, menu = trainer.static(settings), trainer.menu(settings)
    outputs = static.outputs(static.reader.stack(matrix(30, seed=2).tokens))
    for theta in static.facts.dial:
        assert len(set(static.choose_all(outputs, theta))) == 1
    assert static.choose_all(outputs, static.facts.dial[-1])[0] == static.programs[2]
    assert static.facts.training["utility"] < menu.facts.training["utility"]


def _decisions(matrix: Callable[..., RewardMatrix], prompts: int = 900, seed: int = 0) -> RewardMatrix:
    """Texts that lose a few words under both programs, and decisions, a seventh, that program 2 often turns round."""
    made = matrix(prompts * 2, seed=seed)
    hard = torch.tensor([max(tokens) >= 78 for tokens in made.tokens])
    made = made.rows((~hard | (torch.arange(len(made)) % 7 == 0)).nonzero()[:, 0])
    hard = torch.tensor([max(tokens) >= 78 for tokens in made.tokens])
    dice = torch.rand(made.agree.shape, generator=torch.Generator().manual_seed(seed))
    turned = hard[:, None] & (dice < torch.tensor([0.0, 0.01, 0.2]))
    share = torch.where(turned, 0.5, torch.where(~hard[:, None] & (dice < torch.tensor([0.0, 0.1, 0.2])), 0.9, 1.0))
    return replace(
        made,
        kinds=("prompt",) * len(made),  # type: ignore[arg-type]
        classes=tuple(f"decision, {row % 3}" if one else "text" for row, one in enumerate(hard.tolist())),
        agree=~turned,
        share=share,
        labelled=torch.zeros(len(made), dtype=torch.bool),
    )


def test_a_class_that_needs_more_depth_gets_programs_of_its_own(
    model: PolarModel, matrix: Callable[..., RewardMatrix]
) -> None:
    rows = _decisions(matrix)
    assert set(kinds_of(rows)) == {"decision", "text"}
    settings = QUICK.model_copy(update={"strict": 0.1, "own_length": False, "risks": (0.05,), "least": 0.8})
    table = RouterTrainer(model, rows).table(settings)
    assert table.facts.training["kinds"].keys() == {"decision", "text"}
    test = _decisions(matrix, 300, seed=8)
    decides = [name != "text" for name in test.classes]
    chosen = table.choose_all(table.outputs(table.reader.stack(test.tokens)), 0.08)
    deep = [program == test.programs[2] for program in chosen]
    texts, decisions = (
        [one for one, hard in zip(deep, decides, strict=True) if hard == kind] for kind in (False, True)
    )
    assert fmean(texts) > 0.9 and fmean(decisions) < 0.2
    # However loose the dial, no program serves them of which they may lose more than the widest promise.
    for most, allowed in ((0.5, True), (0.1, False), (0.01, False)):
        table = RouterTrainer(model, rows).table(settings.model_copy(update={"most": most}))
        chosen = table.choose_all(table.outputs(table.reader.stack(test.tokens)), 0.4)
        deep = [program == test.programs[2] for program, hard in zip(chosen, decides, strict=True) if hard]
        assert (fmean(deep) > 0.8) == allowed


def test_choices_have_programs_of_their_own_which_the_request_tells(
    model: PolarModel, matrix: Callable[..., RewardMatrix]
) -> None:
    """Prompts that look like texts, whose choices program 2 turns round more often than it loses texts."""
    rows = _decisions(matrix)
    usual = torch.tensor([name == "text" for name in rows.classes])
    chosen = usual & (torch.arange(len(rows)) % 3 == 0)
    agree = rows.agree.clone()
    agree[chosen, 2] = torch.rand(int(chosen.sum()), generator=torch.Generator().manual_seed(1)) < 0.8
    kinds = tuple("choice" if one else "prompt" for one in chosen.tolist())
    rows = replace(rows, agree=agree, kinds=kinds)  # type: ignore[arg-type]
    settings = QUICK.model_copy(update={"strict": 0.1, "own_length": False, "risks": (0.05,), "least": 0.8})
    table = RouterTrainer(model, rows).table(settings)
    used = rows.of("train", "dev")
    classes = [kind if kind == "choice" else name[:8] for kind, name in zip(used.kinds, used.classes, strict=True)]
    assert table.facts.training["kinds"] == Counter(classes)
    tokens = [rows.tokens[place] for place in usual.nonzero()[:40, 0].tolist()]
    outputs = table.outputs(table.reader.stack(tokens))
    texts, choices = (table.choose_all(table.allowed(outputs, form), 0.08) for form in FORMS)
    assert fmean(program == rows.programs[2] for program in texts) > 0.9
    assert fmean(program == rows.programs[1] for program in choices) > 0.9
    hard = [rows.tokens[place] for place in (~usual).nonzero()[:40, 0].tolist()]
    outputs = table.allowed(table.outputs(table.reader.stack(hard)), "choice")
    spared = fmean(program != rows.programs[2] for program in table.choose_all(outputs, 0.3))
    assert spared > 0.9, "a choice of a recognised kind has no program that the kind has not"


def test_prompts_that_were_not_measured_show_what_a_kind_looks_like(
    model: PolarModel, matrix: Callable[..., RewardMatrix]
) -> None:
    settings = QUICK.model_copy(update={"strict": 0.1, "own_length": False, "least": 0.8})
    rows, dice = _decisions(matrix), random.Random(3)
    trainer = RouterTrainer(model, rows)
    texts = ["".join(dice.choices("0123456789", k=20)) for _ in range(90)]
    items = [PromptItem(prompt=text, task="decision, digits") for text in texts[:60]]
    shares = []
    for others in ([], items):
        router = trainer.table(settings, others)
        outputs = router.outputs(router.reader.stack([model.prompt_tokens(text) for text in texts[60:]]))
        careful = [program == rows.programs[1] for program in router.choose_all(outputs, 0.08)]
        shares.append(fmean(careful))
    assert shares[0] < 0.6 and shares[1] > 0.9


def test_wordings_show_how_a_kind_is_told_and_make_no_prompt_familiar(
    model: PolarModel, matrix: Callable[..., RewardMatrix]
) -> None:
    settings = QUICK.model_copy(update={"strict": 0.1, "own_length": False, "least": 0.8})
    rows, dice = _decisions(matrix), random.Random(3)
    trainer = RouterTrainer(model, rows)
    usual = [row for row, name in enumerate(rows.classes) if name == "text"]
    texts = [model.decode(rows.tokens[row]) for row in usual[:120]]
    worded = ["".join(dice.choices("0123456789", k=20)) for _ in texts]
    items = [PromptItem(prompt=text, task="decision, digits") for text in worded[:60]]
    others = [PromptItem(prompt=text) for text in texts[:60]]
    plain, told = trainer.table(settings), trainer.table(settings, wordings=[*items, *others])
    before, after = plain.network, told.network
    assert before.familiar is not None and after.familiar is not None
    for own, new in ((before.mean, after.mean), (before.familiar.centres, after.familiar.centres)):
        assert torch.equal(own, new)
    new = told.reader.stack([model.prompt_tokens(text) for text in worded[60:]])
    careful = [
        fmean(program != rows.programs[2] for program in router.choose_all(outputs, 0.08))
        for router in (plain, told)
        for outputs in (router.network.without_limits()(new),)
    ]
    assert careful[0] < 0.6 and careful[1] > 0.9
    assert plain.facts.training["kinds"] == told.facts.training["kinds"]


def test_losses_of_a_kind_are_no_less_than_few_prompts_prove(matrix: Callable[..., RewardMatrix]) -> None:
    rows = matrix(40)
    agree = torch.ones(40, 3, dtype=torch.bool)
    agree[:10, 1] = False  # ten prompts of thirty lose under program 1 only, and none of the other ten
    kinds = ["a"] * 30 + ["b"] * 10
    found = losses_by_kind(replace(rows, agree=agree, kinds=("choice",) * 40), kinds, "differs", strict=0.5)
    assert list(found) == ["a", "b"]
    # the shares at which as few as were lost are lost in one of ten samples of that size
    assert found["a"][1:].tolist() == pytest.approx([beta.ppf(0.9, 11, 20)] * 2)
    assert found["b"][1:].tolist() == pytest.approx([1 - 0.1 ** (1 / 10)] * 2)


def test_a_walk_comes_by_each_program_of_a_table(matrix: Callable[..., RewardMatrix]) -> None:
    """Though no prompt tells what one loses from what the next one does."""
    rows = matrix(40)
    rows = replace(rows, agree=torch.ones(40, 3, dtype=torch.bool))
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    needed = needed_theta(fit_table(rows, features, ["all"] * 40, "differs")(features))
    deepest_first = rows.flops.sum(0).argsort(descending=True)
    assert (needed[:, deepest_first].diff() > 0).all()


def test_what_another_form_of_answer_runs_says_nothing_of_a_kind(matrix: Callable[..., RewardMatrix]) -> None:
    rows = matrix(40)
    agree = torch.ones(40, 3, dtype=torch.bool)
    agree[:, 1] = False  # was not measured on them, and runs more layers than the other one
    rows = replace(rows, agree=agree, kinds=("prompt",) * 40, forms=(None, "choice", None))
    found = losses_by_kind(rows, ["a"] * 40, "differs")["a"].tolist()
    assert found[1] == 1 and found[2] == pytest.approx(1 - 0.1 ** (1 / 40))


def test_strict_losses_of_texts_count_their_share(matrix: Callable[..., RewardMatrix]) -> None:
    rows = matrix(20)
    share = torch.ones(20, 3)
    share[:10, 1:] = 0.9
    rows = replace(rows, agree=torch.ones(20, 3, dtype=torch.bool), share=share, kinds=("prompt",) * 20)
    assert losses_by_kind(rows, ["a"] * 20, "differs", strict=0.3)["a"][1:].tolist() == pytest.approx([0.15, 0.15])


def test_few_prompts_of_a_class_are_no_kind(matrix: Callable[..., RewardMatrix]) -> None:
    rows = matrix(60)
    classes = tuple(("a, 1", "a, 2", "b", "")[row % 4] for row in range(60))  # thirty of class a, fifteen of b
    assert kinds_of(replace(rows, classes=classes)) == ["a", "a", "choice", "choice"] * 15
    classes = tuple(("a, 1", "b")[row % 2] for row in range(30))
    assert kinds_of(replace(rows.rows(range(30)), classes=classes)) == ["choice"] * 30


def test_the_harder_kinds_are_those_that_lose_most_with_half_of_the_prompts(
    matrix: Callable[..., RewardMatrix],
) -> None:
    rows = matrix(85)
    names = (*("large",) * 20, *("ok",) * 16, *("bad",) * 16, *("worst",) * 9, *("fine",) * 19, *("",) * 5)
    share = torch.ones(85, 3)
    share[36:52, 1], share[52:61, 1:] = 0.9, 0.9  # more than 5 % of their tokens are lost
    share[:20, 1:] = 0.0  # a class of that many prompts is looked at on its own
    rows = replace(rows, kinds=("prompt",) * 85, classes=names, share=share)
    assert harder_kinds(rows) == ["bad", "worst"]
    assert harder_kinds(rows.rows(range(36, 85))) == ["worst"]  # with the next one it would be more than half
    assert harder_kinds(replace(rows, kinds=("choice",) * 85)) == []
    assert harder_kinds(replace(rows, classes=("",) * 85)) == []


def test_the_gradient_alone_learns(model: PolarModel, matrix: Callable[..., RewardMatrix]) -> None:
    """With the regression all but outweighed, the exact policy gradient separates easy from hard prompts."""
    settings = QUICK.model_copy(update={"targets": ("agreement",), "gradient": 1000.0, "temperature": 0.3})
    router = RouterTrainer(model, matrix()).menu(settings)
    assert router.facts.training["utility"] > 0.1


def test_the_frontier_counts_what_is_deployed(model: PolarModel, matrix: Callable[..., RewardMatrix]) -> None:
    rows = matrix(50)
    examples = Examples.of(rows, torch.zeros(50, 3), "differs", Pricing(rows.programs, model.decoder.cost))
    needed = torch.tensor([[0.0, 0.25, 0.5]] * 50)
    walked = frontier(needed, examples, [2, 1], [0.0, 0.25, 0.5])
    assert walked.lost.tolist() == pytest.approx([0.0, *(~rows.agree[:, 1:]).double().mean(0).tolist()])
    full = rows.flops[:, 0].sum()
    assert walked.saved.tolist() == pytest.approx([0.0, *(1 - rows.flops[:, 1:].sum(0) / full).tolist()])
    assert walked.best(1.0) == 2 and walked.best(0.0) == 0


def test_menu_training_resumes_after_an_interruption(
    model: PolarModel, matrix: Callable[..., RewardMatrix], tmp_path: Path
) -> None:
    settings = QUICK.model_copy(update={"seeds": (0, 1, 2), "steps": 20})
    whole = RouterTrainer(model, matrix()).menu(settings)
    trained: list[int] = []

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage.startswith("training"):
            trained.append(done)
            if len(trained) == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RouterTrainer(model, matrix(), checkpoints=tmp_path / "c", on_progress=interrupt).menu(settings)
    assert len(list((tmp_path / "c").iterdir())) == 3
    again = RouterTrainer(model, matrix(), checkpoints=tmp_path / "c").menu(settings)
    assert again.version == whole.version
    assert not (tmp_path / "c").exists()


def test_a_matrix_of_another_model_or_dtype_is_refused(matrix: Callable[..., RewardMatrix]) -> None:
    with pytest.raises(RouterModelError, match="was measured on model tiny"):
        RouterTrainer(tiny_model(seed=4), matrix())
    with pytest.raises(RouterModelError, match="measured in float32"):
        RouterTrainer(
            tiny_model(precision="int8"), replace(matrix(), fingerprint=tiny_model(precision="int8").fingerprint)
        )


def test_training_writes_what_can_be_loaded(
    model: PolarModel, matrix: Callable[..., RewardMatrix], tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    matrix().save(path)
    made = lab.train(model, path, settings=QUICK, out=tmp_path / "router")
    read = load_router(tmp_path / "router")
    assert isinstance(read, MenuRouter) and read.version == made.version
    assert read.facts.training["prompts"] == {"train": 300, "dev": 200}
    with pytest.raises(RouterError):
        lab.train(model, path, settings=LayerwiseSettings())


@pytest.mark.parametrize("labels", [0.5, 0.0])
def test_bridges_that_are_tuned_to_right_choices_serve_requests_with_choices(
    matrix: Callable[..., RewardMatrix], mixed_items: list[Item], tmp_path: Path, labels: float
) -> None:
    """In the process that trained them, too."""
    model = tiny_model(policy=Policy.permissive())
    lab.heal(model, mixed_items, "1-4", out=tmp_path, distil=1, labels=labels, answer_tokens=4)
    skip, bridge = Program.skipping(6, [2]), Program.parse("0 [1-4] 5")
    measured = replace(matrix(), programs=(Program.identity(6), skip, bridge))
    router = lab.train(model, measured, kind="static", settings=QUICK, maps=tmp_path)
    assert router.facts.forms == ((None, None, "choice") if labels else ())
    loosest = router.with_facts(default_theta=1.0)
    engine = PolarModel(model.loaded, router=loosest, policy=Policy.permissive(), ledger=None)
    assert engine.generate("which one?", choice=["yes", "no"]).usage.program == bridge.text
    text = engine.generate("which one? yes or no?", max_tokens=1).usage.program
    assert text == (skip if labels else bridge).text


# -- the article's router ------------------------------------------------------------------------------------------


def rule(features: Tensor) -> Callable[[Sequence[int], Sequence[Program]], tuple[Tensor, Tensor]]:
    """Layer 2 is needed where the first feature is positive, layer 3 always, the others never."""

    def measure(rows: Sequence[int], programs: Sequence[Program]) -> tuple[Tensor, Tensor]:
        lost = [
            3 not in program.layers or (float(features[row, 0]) > 0 and 2 not in program.layers)
            for row, program in zip(rows, programs, strict=True)
        ]
        return torch.tensor(lost), torch.tensor([1 - len(program) / 6 for program in programs])

    return measure


def task(prompts: int = 400, **changes: Any) -> LayerwiseTask:
    features = torch.randn((prompts, 4), generator=torch.Generator().manual_seed(0))
    facts: dict[str, Any] = {
        "features": features,
        "train": range(prompts * 3 // 4),
        "dev": range(prompts * 3 // 4, prompts),
        "depth": 6,
        "free": (1, 2, 3, 4),
        "measure": rule(features),
    }
    return LayerwiseTask(**facts | changes)


LEARN = LayerwiseSettings(price=0.5, epochs=30, patience=30, learning_rate=3e-3, batch=15)


def test_the_policy_gradient_learns_to_read_the_prompt() -> None:
    trained = fit_layerwise(task(), LEARN)
    # Skipping 1 and 4 everywhere saves 1/3; skipping 2 where it is not needed, 1/12 more; without reading, no more.
    assert trained.record["utility"] > 0.36
    facts = {"free_layers": [1, 2, 3, 4]}
    router = _layerwise(trained.network, facts)
    some = torch.tensor([[2.0, 0, 0, 0], [-2.0, 0, 0, 0]])
    needs, needs_not = (router.decide(row, 0.5) for row in trained.network(some))
    assert 2 in needs.layers and 2 not in needs_not.layers
    assert 3 in needs.layers and 3 in needs_not.layers


def _layerwise(network: Any, training: dict[str, Any]) -> LayerwiseRouter:
    from polar_sdk.router.learned import RouterFacts

    facts = RouterFacts(model="t", fingerprint="f", depth=6, training=training)
    return LayerwiseRouter(facts, network, [Program.identity(6)])


def test_a_high_price_keeps_identity() -> None:
    def never(rows: Sequence[int], programs: Sequence[Program]) -> tuple[Tensor, Tensor]:
        whole = Program.identity(6)
        return torch.tensor([one != whole for one in programs]), torch.tensor([1 - len(one) / 6 for one in programs])

    trained = fit_layerwise(task(measure=never), LEARN.model_copy(update={"epochs": 3}))
    assert trained.record["utility"] == 0.0


def test_layerwise_training_resumes_after_an_interruption(tmp_path: Path) -> None:
    settings = LEARN.model_copy(update={"epochs": 4})
    whole = fit_layerwise(task(), settings)

    def interrupt(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_layerwise(task(), settings, checkpoints=tmp_path / "c", on_progress=interrupt)
    started: list[int] = []
    again = fit_layerwise(
        task(), settings, checkpoints=tmp_path / "c", on_progress=lambda stage, done, total: started.append(done)
    )
    assert started[0] == 2
    assert again.record["history"] == whole.record["history"]
    assert all(torch.equal(a, b) for a, b in zip(again.network.trainable, whole.network.trainable, strict=True))


def test_the_dial_of_a_layerwise_router_goes_from_identity_to_everything() -> None:
    trained = fit_layerwise(task(), LEARN.model_copy(update={"epochs": 2}))
    router = _layerwise(trained.network, {"free_layers": [1, 2, 3, 4]})
    outputs = router.outputs(torch.randn(20, 4))
    assert set(router.choose_all(outputs, 0.0)) == {Program.identity(6)}
    left = [sum(one != Program.identity(6) for one in router.choose_all(outputs, theta)) for theta in (0.2, 0.5, 1.01)]
    assert left == sorted(left)
    assert all(len(program) <= 6 for program in router.choose_all(outputs, 1.01))  # loops never outnumber skips


def test_an_action_is_its_number_of_visits() -> None:
    assert [ACTIONS.index(one) for one in ("skip", "execute", "loop")] == [0, 1, 2]
    assert program_of((1, 0, 2, 1)).text == "0 2x2 3"


def test_a_layerwise_router_is_trained_on_a_model(model: PolarModel, tmp_path: Path) -> None:
    from polar_sdk.lab.items import PromptItem
    from polar_sdk.lab.rewards.cache import RewardCache

    items = [PromptItem(prompt=f"say {word} {number}") for number in range(12) for word in ("red", "sea", "owl", "ink")]
    found = lab.search(
        model,
        items,
        budgets=(0.8,),
        population=2,
        generations=0,
        menu=2,
        prompts=4,
        answer_tokens=3,
        cache=RewardCache(),
    )
    settings = LayerwiseSettings(epochs=1, batch=8, samples=2)
    router = RouterTrainer(model, found.matrix).layerwise(items, settings, cache=RewardCache())
    assert isinstance(router, LayerwiseRouter)
    assert router.free == (1, 2, 3, 4)
    route = router.at(Setting.to(0.5)).route([5, 6, 7])
    assert route.flops == router.network.flops
    assert router.facts.training["parameter_share"] > 0
