"""`lab.fit`: from a model and prompts to a registered router; what is planned, interrupted, refused."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polar_sdk import PolarModel, lab
from polar_sdk.errors import DataError
from polar_sdk.lab.evaluation.calibrate import FACTS
from polar_sdk.lab.evaluation.judge import Judge
from polar_sdk.lab.fit.fit import PROMISES, fit_folder
from polar_sdk.lab.fit.frontier import near
from polar_sdk.lab.fit.plan import SHARES, Pace, Workload, cuts_of, make_plan
from polar_sdk.lab.fit.prompts import prompts_of
from polar_sdk.lab.items import AnswerItem, ChoiceItem, PromptItem, item_id, split_of
from polar_sdk.programs.program import Program
from polar_sdk.router.artifact import load_router
from polar_sdk.router.certificate import FORMS, TierPromise
from polar_sdk.router.learned import LearnedRouter
from polar_sdk.router.map_set import MapSet
from polar_sdk.testing import tiny_llama, tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

    from polar_sdk.lab.fit.fit import FitResult
    from polar_sdk.lab.items import Item
    from polar_sdk.lab.program_search.matrix import RewardMatrix
    from polar_sdk.router.certificate import Loss

PROMPTS = 240
LOOSE = {"economy": TierPromise(0.9), "standard": TierPromise(0.6)}
"""Promises that a model of random weights can keep."""


def made_items(count: int = PROMPTS) -> list[Item]:
    """Prompts of two kinds and of several lengths."""
    dice = random.Random(3)
    words = "harbour lantern maple quartz comet juniper falcon pebble orchard beacon saffron glacier".split()  # noqa: SIM905
    return [
        PromptItem(prompt=" ".join(dice.choices(words, k=dice.randint(4, 24))) + f" {place}", task=f"kind {place % 2}")
        for place in range(count)
    ]


def tiny_fresh() -> PolarModel:
    """The tiny model, loaded anew."""
    return PolarModel.from_hf(tiny_llama(), tiny_tokenizer(), ledger=None)


def fitted(model: PolarModel, items: list[Item], **options: Any) -> FitResult:
    return lab.fit(model, items, **{"hours": 1, "promises": LOOSE, "distil": 0, **options})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the tiny model was fitted."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def finished(home: Path) -> FitResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLAR_CACHE", str(home))
        return fitted(tiny_fresh(), made_items(), promises={**LOOSE, "premium": TierPromise(0.01)})


def test_whoever_loads_the_model_gets_the_fitted_tiers(
    finished: FitResult, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLAR_CACHE", str(home))
    assert finished.registered is not None
    served = tiny_fresh()
    answer = served.generate(made_items()[0].prompt, compute="economy", max_tokens=3)  # type: ignore[union-attr]
    assert "(" in answer.usage.program  # something is filled
    assert answer.usage.flops.total < answer.usage.identity_flops
    economy = finished.facts.figures["economy"]["all"]
    assert 0 < economy["flops_saved"] < 1
    assert economy["prompts"] == sum(split_of(item_id(item), SHARES) == "test" for item in made_items())
    assert any("economy" in sentence for sentence in finished.facts.sentences)
    assert "<html" in (finished.folder / "fit.html").read_text(encoding="utf-8")
    assert json.loads((finished.folder / "evaluation.json").read_text(encoding="utf-8"))["certificate_holds"]


def test_a_tier_that_needs_more_prompts_is_left_out(finished: FitResult) -> None:
    assert "premium" not in finished.facts.figures
    assert "premium" in finished.facts.sentences[-1]


def test_right_answers_count_where_a_promise_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the prompts have an answer: full depth's own for every other of them, and one that is wrong."""
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path))
    model, items = tiny_fresh(), made_items()
    texts = [item.prompt for item in items[:120]]  # type: ignore[union-attr]
    written = [model.decode(ids) for ids in model.greedy_answers(texts, max_tokens=64)]
    known: list[Item] = [
        AnswerItem(prompt=text, answer=answer if place % 2 else "never", task="known")
        for place, (text, answer) in enumerate(zip(texts, written, strict=True))
    ]
    promises = {"economy": TierPromise(0.7, "drops"), "standard": TierPromise(0.5, "differs")}
    made = fitted(model, [*known, *items[120:]], promises=promises)
    router = load_router(made.folder / "router")
    assert isinstance(router, LearnedRouter) and router.certificate is not None
    kinds = router.certificate.kinds
    assert set(kinds) == {"answer", "prompt"} and "drops" not in kinds["prompt"].lost
    assert kinds["answer"].lost["drops"][0] == 0 < max(kinds["answer"].lost["drops"]) <= kinds["answer"].n
    assert router.certificate.tiers["economy"].loss == "drops"
    losses: tuple[Loss, ...] = ("drops", "harms")
    for loss in losses:
        with pytest.raises(DataError):
            fitted(model, items, promises={"economy": TierPromise(0.7, loss)}, out=tmp_path / loss)
        assert not (tmp_path / loss / "fills").exists()
    with pytest.raises(DataError):
        fitted(model, [*known, *items[120:]], promises={"economy": TierPromise(0.7, "harms")}, out=tmp_path / "some")


def test_no_tier_loses_more_facts_than_it_promises(
    finished: FitResult, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 40 questions the right answer is full depth's own: every word of it counts."""
    monkeypatch.setenv("POLAR_CACHE", str(home))
    model, router = tiny_fresh(), load_router(finished.folder / "router")
    assert isinstance(router, LearnedRouter) and router.certificate is not None
    model.use_maps(finished.folder / "fills")
    asked = [f"harbour {place} maple {place * 7}" * 3 for place in range(40)]
    written = [model.decode(ids) for ids in model.greedy_answers(asked, max_tokens=64)]
    facts = [AnswerItem(prompt=text, answer=answer) for text, answer in zip(asked, written, strict=True)]
    items = [item for item in made_items() if split_of(item_id(item), SHARES) == "calibration"]
    nearer = 0
    for loose in (0.9, 0.6, 0.5, 0.4, 0.3):
        tiers = {"economy": TierPromise(loose)}
        free = Judge(model, router).calibrate(items, tiers=tiers).certificate
        bound = Judge(model, router, facts=facts).calibrate(items, tiers=tiers).certificate
        assert free is not None and bound is not None
        counted, setting = bound.classes[FACTS], bound.tiers["economy"].setting.text
        assert counted.n == 40 and counted.lost["drops"][0] == 0
        assert counted.lost["differs"][bound.thetas.index(setting)] <= loose * 40
        nearer += setting < free.tiers["economy"].setting.text
        assert setting <= free.tiers["economy"].setting.text
    assert nearer


def test_choices_are_promised_by_their_right_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path))
    dice = random.Random(4)
    asked: list[Item] = [
        ChoiceItem(question=f"{dice.randint(0, 10**9)} or not?", choices=("yes", "no"), answer=dice.randint(0, 1))
        for _ in range(200)
    ]
    model = tiny_fresh()
    for tier, loose in {**LOOSE, "premium": TierPromise(0.05)}.items():  # which takes 45 texts, and 90 choices
        monkeypatch.setitem(PROMISES, tier, loose._replace(strict=0.9))
    made = fitted(model, [*made_items(), *asked], promises=None)
    router = load_router(made.folder / "router")
    assert isinstance(router, LearnedRouter) and router.certificate is not None
    promise = router.certificate.tiers["economy"]
    assert promise.loss == "drops" and set(promise.n) == {"choice", "prompt"}
    assert promise.setting.text > 0 and promise.setting.choice > 0
    tails = {form: {program.tail for program in router.programs_for(form)[1:]} for form in FORMS}
    assert tails["text"] == {16} and 1 in tails["choice"]
    chosen = tiny_fresh().generate("12 or not?", choice=["yes", "no"], compute="economy").usage.program
    assert chosen in {program.text for program in router.programs_for("choice")}
    assert router.facts.training["kinds"]["choice"] > 0
    assert all("right where full depth" in said for said in made.facts.sentences[:2])
    premium = router.certificate.tiers["premium"]
    assert premium.setting.choice == 0 and "choices" in made.facts.sentences[-1], "a promise about texts alone"
    # Of a text, audits know what is lost; of a choice they do not, as they know no right answer.
    terms = router.certificate.audited["economy"]
    assert [term.loss for term in terms] == ["differs", "strict"] and not any(term.choices for term in terms)
    with pytest.raises(DataError, match="text"):
        fitted(model, asked, promises=None, out=tmp_path / "only")


def test_a_finished_fit_is_returned_as_it_is(finished: FitResult, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLAR_CACHE", str(home))
    stages: list[str] = []
    promises = {**LOOSE, "premium": TierPromise(0.01)}
    again = fitted(tiny_fresh(), made_items(), promises=promises, on_progress=lambda stage, *_: stages.append(stage))
    assert again == finished
    assert not stages


def test_a_folder_of_another_fit_is_not_touched(
    finished: FitResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path))
    before = (finished.folder / "fit.json").read_bytes()
    with pytest.raises(DataError):
        fitted(tiny_model(seed=7), made_items(), out=finished.folder)
    with pytest.raises(DataError, match="240 prompts, 1 hours"):
        fitted(tiny_fresh(), made_items(), out=finished.folder, hours=2)
    assert (finished.folder / "fills" / "maps.json").is_file()
    assert (finished.folder / "fit.json").read_bytes() == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("keep me", encoding="utf-8")
    with pytest.raises(DataError):
        fitted(tiny_fresh(), made_items(), out=foreign)


@pytest.mark.long
@pytest.mark.parametrize("distil", [0, 4])
def test_a_fit_that_is_killed_ends_where_an_undisturbed_one_does(
    distil: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polar_sdk.engine import scoring

    passes = 0
    score = scoring.score_programs

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal passes
        passes += 1
        return score(*arguments, **options)

    monkeypatch.setattr("polar_sdk.lab.rewards.measure.score_programs", counted)

    def run(cache: str, kills: list[int]) -> tuple[FitResult, int]:
        nonlocal passes
        passes, calls = 0, 0
        monkeypatch.setenv("POLAR_CACHE", str(tmp_path / cache))
        model = tiny_fresh()

        def disturb(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls in kills:
                raise KeyboardInterrupt

        while True:
            try:
                return fitted(model, made_items(), distil=distil, on_progress=disturb), passes
            except KeyboardInterrupt:
                continue

    quiet, all_passes = run("quiet", [])
    dice = random.Random(1)
    killed, passes_of_killed = run("killed", sorted(dice.sample(range(2, 300), 10)))
    assert killed.facts.figures == quiet.facts.figures
    assert killed.facts.sentences == quiet.facts.sentences
    assert passes_of_killed <= all_passes + 10  # what a kill interrupts is done again, and nothing else


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2"])
def test_other_families_end_in_tiers_or_in_a_plain_word(
    name: str, tiny_family: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path))
    model = PolarModel.from_hf(tiny_family(name), tiny_tokenizer(), ledger=None)
    items: list[Item] = [
        PromptItem(prompt=f"{place} harbour lantern {place * 7} maple " * 2) for place in range(PROMPTS)
    ]
    made = fitted(model, items)
    for tier in LOOSE:
        (said,) = (sentence for sentence in made.facts.sentences if sentence.startswith(tier))
        assert "saves" in said or "nothing could be promised" in said


def test_too_few_prompts_or_hours_are_refused_before_anything_is_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path))
    model, items = tiny_fresh(), made_items()
    with pytest.raises(DataError, match="45"):  # least_prompts(0.05, 0.1)
        fitted(model, items[:100], promises=None)
    with pytest.raises(DataError):
        fitted(model, items[:8])
    with pytest.raises(DataError):
        fitted(model, items, hours=1e-6)
    with pytest.raises(DataError):
        fitted(model, [])
    assert not (fit_folder(model.fingerprint, model.dtype) / "fills").exists()


@given(st.integers(2, 200))
def test_cuts_leave_a_layer_that_runs_and_fill_at_least_one(depth: int) -> None:
    cuts = cuts_of(depth)
    assert cuts == tuple(sorted(set(cuts), reverse=True))
    assert all(1 <= cut < depth for cut in cuts)


def test_a_slower_machine_or_fewer_hours_get_fewer_prompts() -> None:
    model, workload = tiny_model(), Workload(prompts=5000, tokens=2000.0)
    plans = [
        make_plan(model, workload, Pace(read=read, write=read), hours)
        for read, hours in ((400, 0.2), (400, 0.4), (800, 0.4))
    ]
    sizes = [plan.prompts for plan in plans]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert all(sum(plan.minutes.values()) <= 60 * plan.hours for plan in plans)


def test_time_is_kept_for_training_unless_it_is_too_little_to_train_in() -> None:
    model, workload, pace = tiny_model(), Workload(prompts=50_000, tokens=2000.0), Pace(read=400, write=400)
    trained = make_plan(model, workload, pace, 2.0)
    untrained = make_plan(model, workload, pace, 2.0, distil=0)
    assert trained.distil and trained.prompts < untrained.prompts
    assert sum(trained.minutes.values()) <= 120
    assert not make_plan(model, workload, pace, 0.2).distil
    with pytest.raises(DataError, match="hours"):
        make_plan(model, workload, pace, 0.2, distil=10_000)


def test_facts_take_a_share_of_the_hours_or_none() -> None:
    model, pace = tiny_model(), Pace(read=400, write=400)
    workload = Workload(prompts=50_000, tokens=300.0, fact_tokens=600.0)
    plans = [make_plan(model, workload, pace, hours, distil=0) for hours in (0.1, 0.8, 4.0)]
    assert plans[0].facts == 0 < plans[1].facts < plans[2].facts
    for plan in plans:
        assert sum(plan.minutes.values()) <= 60 * plan.hours
        assert plan.minutes.get("facts", 0) <= 12 * plan.hours
    assert make_plan(model, workload._replace(fact_tokens=0.0), pace, 4.0, distil=0).facts == 0


def test_the_search_for_layers_to_spare_comes_before_the_last_prompts() -> None:
    model, workload, pace = tiny_model(), Workload(prompts=50_000, tokens=300.0), Pace(read=1500, write=1500)
    plan = make_plan(model, workload, pace, 0.75)
    assert plan.seek and plan.distil and plan.prompts < workload.prompts
    assert sum(plan.minutes.values()) <= 45
    assert not make_plan(model, workload, pace, 0.2).seek


def test_the_maps_that_decide_what_tiers_save_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path))
    made = fitted(tiny_fresh(), made_items(), distil=4)
    closed, trained, fills = (MapSet.load(made.folder / name) for name in ("closed", "trained", "fills"))
    assert set(trained.maps) < set(closed.maps) == set(fills.maps)
    assert trained.facts.training["distil"] == 4
    for segment, each in fills.maps.items():
        assert each.digest == (trained if segment in trained.maps else closed).maps[segment].digest


def test_a_fit_counts_facts_before_it_trains_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up notes do not fit the tiny model's context window, so shorter questions stand in for them."""
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path))
    model = tiny_fresh()
    asked = [f"harbour {place} maple {place * 7}" for place in range(20)]
    facts = [
        AnswerItem(prompt=text, answer=model.decode(ids))
        for text, ids in zip(asked, model.greedy_answers(asked, max_tokens=24), strict=True)
    ]
    assert "notes" in fitted(model, made_items()).facts.sentences[-1]
    monkeypatch.setattr(sys.modules["polar_sdk.lab.fit.fit"], "fact_items", lambda count: facts)
    made = fitted(tiny_fresh(), made_items(), distil=4, out=tmp_path / "counted")
    router = load_router(made.folder / "router")
    assert isinstance(router, LearnedRouter) and router.certificate is not None
    counted = router.certificate.classes[FACTS]
    assert counted.n == 20 and counted.lost["drops"][0] == 0 < max(counted.lost["drops"])
    for tier, promise in router.certificate.tiers.items():
        assert counted.lost["differs"][router.certificate.thetas.index(promise.setting.text)] <= 20 * promise.alpha
        (said,) = (sentence for sentence in made.facts.sentences if sentence.startswith(tier))
        assert promise.setting.text == 0 or "20 answers" in said


def test_programs_near_the_edge_of_a_promise_decide(matrix: Callable[..., RewardMatrix]) -> None:
    programs = [Program.identity(8), *(Program.filling(8, [(cut, 7)]) for cut in range(7, 0, -1))]
    lost = torch.tensor([[place > edge for place in range(8)] for edge in (2, 4, 4, 7)])  # from some cut on
    measured = replace(
        matrix(len(lost)),
        programs=tuple(programs),
        agree=~lost,
        share=torch.where(lost, 0.5, 1.0),
        margin=torch.zeros(lost.shape),
        right=~lost,
        flops=torch.arange(8, 0, -1).repeat(len(lost), 1),
    )
    assert near(measured, [TierPromise(0.3)]) == programs[4:6]  # a quarter is lost from the third cut on
    assert near(measured, [TierPromise(0.3, strict=0.1)]) == programs[2:4]
    assert near(measured, [TierPromise(0.9), TierPromise(0.1)]) == [*programs[2:4], programs[7]]
    assert near(measured, [TierPromise(0.0)]) == programs[2:4]
    assert near(measured.only([0, *range(3, 8)]), [TierPromise(0.0)]) == [programs[3]]
    facts = dict(zip(programs, (0.0, 0.0, 0.1, 0.2, 1.0, 1.0, 1.0, 1.0), strict=True))
    assert near(measured, [TierPromise(0.3)], facts) == programs[3:5]
    assert near(measured, [TierPromise(0.9), TierPromise(0.1)], facts) == programs[2:5]
    measured = replace(measured, kinds=("prompt",) * 4, classes=("hard", "easy", "easy", "easy"))
    assert near(measured, [TierPromise(0.3)]) == programs[2:4]  # from which the harder class is lost


def test_choices_cost_less_of_the_time_than_texts() -> None:
    model, pace = tiny_model(), Pace(read=400, write=400)
    texts = Workload(prompts=50_000, tokens=2000.0)
    mixed = texts._replace(choices=0.5, choice_tokens=100.0)
    plans = [make_plan(model, workload, pace, 0.4, distil=0) for workload in (texts, mixed)]
    assert 1.5 < plans[1].prompts / plans[0].prompts < 2
    assert plans[1].tokens < 1.1 * plans[0].tokens


def test_three_choices_are_taken_beside_each_text() -> None:
    choices = [ChoiceItem(question=f"question {place}", choices=("a", "b"), answer=place % 2) for place in range(100)]
    texts = made_items(80)
    found = [isinstance(item, ChoiceItem) for item in prompts_of([*choices, *texts])]
    assert found == [False, True, True, True] * 33 + [False, True] + [False] * 46
    alone = [item for item in prompts_of([*choices, *texts]) if not isinstance(item, ChoiceItem)]
    assert alone == prompts_of(texts)


def test_the_first_prompts_are_as_mixed_as_all() -> None:
    everything = prompts_of(None)
    first = prompts_of(None, limit=120)
    assert first == everything[:120]
    assert {item.task for item in first} == {item.task for item in everything}
