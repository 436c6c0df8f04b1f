"""Calibration and evaluation: what is counted, the controls, the words, and the page."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from polar_sdk import lab
from polar_sdk.errors import DataError, MissingExtraError, RouterError
from polar_sdk.lab.evaluation.calibrate import HARDER, DialWalk, certify, resplit
from polar_sdk.lab.evaluation.controls import best_static, oracle, random_programs, shuffled
from polar_sdk.lab.evaluation.evaluate import Subjects, evaluate_classes, evaluate_set
from polar_sdk.lab.evaluation.rendering import class_rows, require_report, to_html
from polar_sdk.lab.evaluation.results import Evaluation, verdict
from polar_sdk.lab.items import ChoiceItem, Item, PromptItem, item_id
from polar_sdk.lab.rewards.cache import RewardCache
from polar_sdk.lab.training.examples import losses
from polar_sdk.lab.training.menu_training import MenuSettings
from polar_sdk.lab.training.outcomes import Bench, Outcomes, id_prefixes, unseen
from polar_sdk.lab.training.train import RouterTrainer
from polar_sdk.programs.policy import Policy
from polar_sdk.programs.program import Program
from polar_sdk.router.certificate import Setting, TierPromise
from polar_sdk.testing import tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_sdk.lab.evaluation.results import SetResult
    from polar_sdk.lab.program_search.matrix import RewardMatrix
    from polar_sdk.model import PolarModel
    from polar_sdk.router.menu import MenuRouter

QUICK = MenuSettings(targets=("agreement",), hidden=((),), penalties=(0.1,), seeds=(0,), steps=120, risks=(0.1,))
TIERS: dict[str, Any] = {"economy": (0.15, "differs"), "standard": (0.1, "harms")}


@pytest.fixture(scope="module")
def router(model: PolarModel, matrix: Callable[..., RewardMatrix]) -> MenuRouter:
    """Trained on prompts of which half are easy."""
    return RouterTrainer(model, matrix(), "embedding").menu(QUICK)


@pytest.fixture(scope="module")
def found(model: PolarModel, matrix: Callable[..., RewardMatrix], router: MenuRouter) -> SetResult:
    return judged(model, router, matrix(500, seed=3), 0.3)


def subjects(model: PolarModel, rows: RewardMatrix, router: MenuRouter, points: dict[str, Setting]) -> Subjects:
    return Subjects(
        router=router,
        points=points,
        outputs=router.outputs(router.reader.stack(rows.tokens)),
        outcomes=Outcomes(rows, block=lambda places, programs: _no_skip_agrees(rows, places, programs)),
        static=[Program.parse(one["program"]) for one in router.facts.training["static"]],
        policy=model.policy,
        cost=model.decoder.cost,
    )


def judged(model: PolarModel, router: MenuRouter, rows: RewardMatrix, theta: float) -> SetResult:
    return evaluate_set("synthetic", subjects(model, rows, router, {"main": Setting.to(theta)}))


def _no_skip_agrees(test: RewardMatrix, rows: Any, programs: Any) -> RewardMatrix:
    """Programs off the menu agree nowhere and cost what the second one costs."""
    part = test.rows(list(rows))
    columns = [1] * len(programs)
    tensors = {name: getattr(part, name)[:, columns] for name in ("share", "margin", "right", "flops")}
    return replace(part, programs=tuple(programs), agree=part.agree[:, columns] & False, **tensors)


def test_a_router_that_reads_beats_every_control(found: SetResult) -> None:
    assert found.main.flops_saved.total > 0.1
    beaten = {one.control: one.beaten for one in found.comparisons}
    assert all(beaten.values()), [one for one in found.comparisons if not one.beaten]
    sentences = " ".join(verdict([found]))
    assert "It beats the shuffled router" in sentences and "Use the static program" not in sentences


def test_classes_are_judged_apart(
    model: PolarModel, matrix: Callable[..., RewardMatrix], router: MenuRouter, found: SetResult
) -> None:
    """Over easy and hard prompts together reading earns something; within either of them it cannot."""
    rows = matrix(600, seed=3)
    easy = [at for at, tokens in enumerate(rows.tokens) if max(tokens) < 78]
    hard = [at for at in range(600) if at not in set(easy)]
    classes = {"both": list(range(600)), "easy": easy, "hard": hard}
    by_class = evaluate_classes(subjects(model, rows, router, {"exact": Setting(), "main": Setting.to(0.3)}), classes)
    assert [(one.name, one.point) for one in by_class] == [(n, p) for n in classes for p in ("exact", "main")]
    outcomes = {(one.name, one.point): one.outcome for one in by_class}
    assert outcomes["both", "exact"] == "identity" and outcomes["both", "main"] == "routed"
    assert outcomes["easy", "main"] == "static"
    one = next(one for one in by_class if (one.name, one.point) == ("easy", "main"))
    assert one.prompts == len(easy) and one.program == "0-1 4-5" and one.program_share > 0.9
    chosen = router.choose_all(
        router.outputs(router.reader.stack(rows.tokens)), 0.3, [len(tokens) for tokens in rows.tokens]
    )
    assert one.agreement == sum(bool(rows.agree[at, rows.programs.index(chosen[at])]) for at in easy) / len(easy)
    words = " ".join(verdict([found], by_class))
    assert "main: reading the prompt beats both" in words and "within easy (which it is: 0-1 4-5" in words
    assert "exact: full depth for all of both, easy, hard." in words
    assert len(class_rows(by_class)) == 6


def test_a_shuffled_router_is_never_cheaper(
    model: PolarModel, matrix: Callable[..., RewardMatrix], router: MenuRouter
) -> None:
    """Long prompts at full depth: dealt at random, they would cross instead, so they are dealt among long ones."""
    rows = matrix(400, seed=3)
    tested = subjects(model, rows, router, {})
    for sign in (1, -1):
        programs = [rows.programs[2 if sign * (len(tokens) - 17) > 0 else 0] for tokens in rows.tokens]
        run = tested.run(programs)
        dealt = [sum(one.flops for one in deal.outcomes) for deal in tested.controls(run)[0].deals]
        assert sum(dealt) / len(dealt) > 0.99 * sum(one.flops for one in run.outcomes)


def test_promises_are_tried_on_random_halves(matrix: Callable[..., RewardMatrix], router: MenuRouter) -> None:
    rows = matrix(800, seed=5)
    walk = DialWalk.along(router, router.outputs(router.reader.stack(rows.tokens)), Outcomes(rows))
    whole = certify(router, router.outputs(router.reader.stack(rows.tokens)), Outcomes(rows), tiers=TIERS)
    assert walk.certificate(range(800), TIERS, 0.1) == whole
    found = {(one.tier, one.kind): one for one in resplit(walk, TIERS, 0.1, times=8)}
    assert set(found) == {(tier, kind) for tier in TIERS for kind in ("choice", "any")}
    assert all(one.pooled <= 2 and one.other_half <= 5 for one in found.values())
    loose = walk.router.with_facts(dial=(0.0, 1.0))
    broken = DialWalk.along(loose, router.outputs(router.reader.stack(rows.tokens)), Outcomes(rows))
    none = resplit(broken, {"economy": TierPromise(0.15)}, 0.1, times=5)
    assert [one.pooled for one in none] == [0, 0]  # 42 % are lost at θ = 1, so every half refuses it


def test_a_router_that_reads_nothing_is_told_to_go_static(
    model: PolarModel, matrix: Callable[..., RewardMatrix]
) -> None:
    router = RouterTrainer(model, matrix(learnable=False), "embedding").menu(QUICK)
    found = judged(model, router, matrix(500, seed=3, learnable=False), 0.45)
    assert router.facts.training["utility"] < 0.3
    assert not next(one for one in found.comparisons if one.control == "shuffled router").beaten
    sentences = " ".join(verdict([found]))
    assert "does not beat the shuffled router" in sentences
    static = next(one for one in found.systems if one.name == "best static program")
    assert f"Use the static program instead: {static.note}" in sentences


def test_the_figures_are_those_counted_by_hand(
    matrix: Callable[..., RewardMatrix], router: MenuRouter, found: SetResult
) -> None:
    test = matrix(500, seed=3)
    lengths = [len(tokens) for tokens in test.tokens]
    outputs = router.outputs(router.reader.stack(test.tokens))
    picks = [test.programs.index(one) for one in router.choose_all(outputs, 0.3, lengths)]
    main, identity = found.main, found.systems[0]
    assert main.agreement.value == sum(bool(test.agree[at, pick]) for at, pick in enumerate(picks)) / 500
    assert main.non_identity_rate == sum(pick > 0 for pick in picks) / 500
    assert main.accuracy is not None and main.accuracy_drop is not None and identity.accuracy is not None
    assert main.accuracy_drop.value == pytest.approx(identity.accuracy.value - main.accuracy.value)
    spent = sum(int(test.flops[at, pick]) for at, pick in enumerate(picks)) + 500 * router.network.flops
    assert main.flops_saved.total == pytest.approx(1 - spent / int(test.flops[:, 0].sum()))
    assert identity.flops_saved.total == 0 and identity.agreement.value == 1
    assert not next(one for one in found.systems if one.role == "oracle").deployable
    shuffled_system = next(one for one in found.systems if one.name == "shuffled router")
    assert shuffled_system.non_identity_rate == main.non_identity_rate


def test_calibration_counts_what_is_lost(matrix: Callable[..., RewardMatrix], router: MenuRouter) -> None:
    rows = matrix(300, seed=5)
    outputs = router.outputs(router.reader.stack(rows.tokens))
    certificate = certify(router, outputs, Outcomes(rows), tiers=TIERS)
    at = certificate.thetas.index(certificate.tiers["economy"].setting.choice)
    lengths = [len(tokens) for tokens in rows.tokens]
    picks = [rows.programs.index(one) for one in router.choose_all(outputs, certificate.thetas[at], lengths)]
    counts = certificate.kinds["choice"]
    assert counts.lost["differs"][at] == sum(not rows.agree[row, pick] for row, pick in enumerate(picks))
    assert counts.lost["harms"][at] == sum(
        bool(rows.right[row, 0] and not rows.right[row, pick]) for row, pick in enumerate(picks)
    )
    pairs = [(bool(rows.right[row, 0]), bool(rows.right[row, pick])) for row, pick in enumerate(picks)]
    assert counts.lost["drops"][at] == pairs.count((True, False)) == counts.lost["harms"][at]
    assert counts.gained[at] == pairs.count((False, True))
    assert certificate.tiers["economy"].setting.choice > 0
    assert router.with_certificate(certificate).certified


def test_a_class_with_programs_of_its_own_counts_however_small(
    matrix: Callable[..., RewardMatrix], router: MenuRouter
) -> None:
    rows = matrix(60, seed=5)
    rows = replace(rows, kinds=("prompt",) * 60, classes=("notes",) * 30 + ("few",) * 15 + ("fewer",) * 15)
    own = router.with_facts(training={**router.facts.training, "kinds": {"prompt": 45, "fewer": 15}})
    outputs = router.outputs(router.reader.stack(rows.tokens))
    certificate = certify(own, outputs, Outcomes(rows), tiers={"economy": TierPromise(0.15)})
    assert {name: counts.n for name, counts in certificate.classes.items()} == {"notes": 30, "fewer": 15}


def test_the_harder_kinds_count_together(matrix: Callable[..., RewardMatrix], router: MenuRouter) -> None:
    rows = matrix(60, seed=5)
    names = tuple("abcdef"[row % 6] for row in range(60))  # ten prompts each, too few for a class
    rows = replace(rows, kinds=("prompt",) * 60, classes=names)
    own = router.with_facts(training={**router.facts.training, "harder": ["b", "d", "e"]})
    outputs = router.outputs(router.reader.stack(rows.tokens))
    certificate = certify(own, outputs, Outcomes(rows), tiers={"economy": TierPromise(0.15)})
    assert {name: counts.n for name, counts in certificate.classes.items()} == {HARDER: 30}
    harder = rows.rows([row for row, name in enumerate(names) if name in "bde"])
    alone = certify(own, router.outputs(router.reader.stack(harder.tokens)), Outcomes(harder), tiers={})
    assert certificate.classes[HARDER] == alone.kinds["prompt"]


def test_where_no_right_answer_is_known_an_answer_that_differs_is_lost(matrix: Callable[..., RewardMatrix]) -> None:
    rows = matrix(40, seed=5)
    known = torch.arange(40) % 2 == 0
    mixed = replace(rows, labelled=known)
    programs = [rows.programs[1]] * 40
    values = Outcomes(mixed).losses(range(40), programs, "drops")
    for row, value in enumerate(values):
        drop = int(rows.right[row, 0]) - int(rows.right[row, 1])
        assert value == (drop if known[row] else int(not rows.agree[row, 1]))
    assert losses(mixed, "drops")[:, 1].tolist() == values
    assert losses(mixed, "harms")[:, 1].tolist() == [max(0, value) for value in values]


def test_a_router_may_be_trained_on_the_drop_of_accuracy(
    model: PolarModel, matrix: Callable[..., RewardMatrix]
) -> None:
    """A program that turns as many wrong answers right as right ones wrong is free to use."""
    rows = matrix()
    right = torch.rand(rows.right.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    rows = replace(rows, right=right, labelled=torch.ones(len(rows), dtype=torch.bool))
    strict = RouterTrainer(model, rows).menu(QUICK.model_copy(update={"loss": "harms"}))
    router = RouterTrainer(model, rows).menu(QUICK.model_copy(update={"loss": "drops"}))
    assert router.facts.training["utility"] > strict.facts.training["utility"] + 0.1


def test_what_a_router_has_seen_is_left_out() -> None:
    items: list[Item] = [PromptItem(prompt=f"{word} and {number}") for number, word in enumerate("abcdefgh")]
    seen = {"seen": id_prefixes(map(item_id, items[:3])), "calibrated": id_prefixes([item_id(items[3])])}
    assert unseen(items, seen, calibrating=False) == items[4:]
    assert unseen(items[3:], {}, calibrating=True) == items[3:]
    assert set(unseen([*items * 2, *_many()], seen, calibrating=True)) < set(_many() + items[3:])
    with pytest.raises(DataError, match="all 3 prompts were used to train or calibrate this router"):
        unseen(items[:3], seen, calibrating=False)
    with pytest.raises(DataError, match="copies of one"):
        unseen(items[:1] * 5, {}, calibrating=True)
    with pytest.raises(DataError, match="is index 1"):
        one = [ChoiceItem(question=f"{word} is {at}?", choices=("a", "b"), answer=1) for at, word in enumerate("xyz")]
        unseen(one, {}, calibrating=True)


def _many() -> list[Item]:
    return [PromptItem(prompt=f"number {number} of {number * 7}") for number in range(40)]


def test_static_programs_are_mixed_to_the_cost() -> None:
    whole, half, third = Program.parse("0-5"), Program.parse("0-2"), Program.parse("0-1")
    quality, cost = {whole: 1.0, half: 0.9, third: 0.2}, {whole: 6.0, half: 3.0, third: 2.0}
    assert best_static(quality, cost, 3.0).text == "0-2"
    mixed = best_static(quality, cost, 4.5)
    assert (mixed.cheap, mixed.expensive, mixed.share) == (half, whole, 0.5)
    assert sorted(one.text for one in mixed.deal(4, 0)) == ["0-2", "0-2", "0-5", "0-5"]
    assert best_static(quality, cost, 1.0).cheap == third
    assert best_static(quality, cost, 9.0).expensive == whole


def test_random_programs_have_the_cost_on_average(model: PolarModel) -> None:
    cost = model.decoder.cost
    full = model.cost(prompt=128, output=64).total
    drawn = random_programs(0.7, 40, cost, Policy(protected=(0, -1)), seed=1)
    ratios = [model.cost(one, prompt=128, output=64).total / full for one in drawn]
    assert sum(ratios) / 40 == pytest.approx(0.7, abs=0.01)
    assert all(0 in one.layers and 5 in one.layers for one in drawn)
    assert random_programs(0.7, 40, cost, Policy(protected=(0, -1)), seed=1) == drawn


def test_shuffling_by_size_keeps_the_cost() -> None:
    """All long prompts run identity: dealt among prompts of their size, programs cost what they cost before."""
    whole, half = Program.parse("0-5"), Program.parse("0-2")
    sizes = [float(at) for at in range(160)]
    programs = [whole if size >= 80 else half for size in sizes]

    def cost(dealt: list[Program]) -> float:
        return sum(size * len(one) for size, one in zip(sizes, dealt, strict=True))

    assert sorted(shuffled(programs, 1), key=str) == sorted(programs, key=str)
    assert cost(shuffled(programs, 1, sizes)) == cost(programs)
    assert cost(shuffled(programs, 1)) < cost(programs)


def test_the_oracle_is_the_cheapest_that_agrees(matrix: Callable[..., RewardMatrix]) -> None:
    rows = matrix(40)
    for at, program in enumerate(oracle(Outcomes(rows), rows.programs)):
        agreeing = [int(rows.flops[at, column]) for column in range(3) if rows.agree[at, column]]
        assert int(rows.flops[at, rows.programs.index(program)]) == min(agreeing)


def test_unknown_programs_are_measured_once(model: PolarModel) -> None:
    bench = Bench(model, lambda stage, done, total: None, RewardCache())
    items = [
        ChoiceItem(question=f"what is {word}?", choices=("red", "blue"), answer=at % 2) for at, word in enumerate("abc")
    ]
    tasks = bench.tasks(items)
    outcomes = bench.outcomes(tasks, [])
    skip = Program.skipping(6, [1, 2])
    known = bench.matrix(tasks, [skip])
    found = outcomes.all([skip] * 3)
    assert [one.agree for one in found] == known.agree[:, 1].tolist()
    assert [one.flops for one in found] == known.flops[:, 1].tolist()
    outcomes.block = None
    assert outcomes.all([skip] * 3) == found
    with pytest.raises(DataError, match="is not in the reward matrix"):
        outcomes.all([Program.skipping(6, [1])] * 3)


def test_a_router_without_a_dial_cannot_be_judged(model: PolarModel) -> None:
    with pytest.raises(RouterError):
        lab.evaluate(tiny_model(), [PromptItem(prompt="x")])


def test_the_page_stands_alone_and_escapes(model: PolarModel, router: MenuRouter, found: SetResult) -> None:
    evaluation = Evaluation(
        model="<tiny>",
        fingerprint=model.fingerprint,
        dtype="float32",
        device="cpu",
        router=f"menu {router.version}",
        point="main",
        sets=(found,),
        verdict=tuple(verdict([found])),
        certificate=None,
        certificate_holds=False,
        training={},
    )
    page = to_html(evaluation)
    assert "&lt;tiny&gt;" in page and "<tiny>" not in page
    assert "<svg" in page and "shuffled router" in page
    assert not re.search(r"http://(?!www\.w3\.org|purl\.org|creativecommons\.org)", page)
    assert to_html(evaluation) == page
    plain = json.loads(json.dumps(evaluation.plain()))
    assert plain["flops_saved"] == found.main.flops_saved.total
    assert plain["mcnemar_vs_shuffled_agreement_p"] < 0.01


def test_a_page_without_its_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match="jinja2"):
        require_report()
