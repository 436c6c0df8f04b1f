"""Answers in text: figures by hand, by length and by kind, and texts that were written freely."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from polar_sdk.engine.scoring import score_programs
from polar_sdk.lab.evaluation.evaluate import Subjects, evaluate_texts
from polar_sdk.lab.evaluation.judge import Judge
from polar_sdk.lab.evaluation.rendering import text_rows
from polar_sdk.lab.evaluation.text_answers import (
    Answer,
    FreeRunner,
    TextRun,
    chrf,
    f1,
    free_figures,
    repeated,
)
from polar_sdk.lab.items import AnswerItem, ChoiceItem, PromptItem
from polar_sdk.lab.rewards.cache import RewardCache
from polar_sdk.lab.rewards.tasks import make_tasks
from polar_sdk.lab.training.outcomes import Bench, PromptOutcome
from polar_sdk.programs.program import Program
from polar_sdk.router.certificate import Setting
from polar_sdk.serving.prefixes import common_start
from tests.sdk.fixed_router import fixed_router

if TYPE_CHECKING:
    from polar_sdk.model import PolarModel
    from polar_sdk.router.menu import MenuRouter


def run_of(shares: list[float], lengths: list[int], classes: list[str]) -> TextRun:
    return TextRun(
        outcomes=[PromptOutcome(share >= 0.75, share, False, 60) for share in shares],
        spent=[60.0, 50.0, 40.0],
        full=[100.0] * 3,
        floor=[PromptOutcome(True, 0.98, False, 100)] * 3,
        lengths=lengths,
        classes=classes,
    )


def test_figures_are_counted_by_length_and_by_kind() -> None:
    whole = run_of([1.0, 0.96, 0.7], [99, 100, 501], ["chat", "notes", "notes"]).whole()
    assert (whole.prompts, whole.flops_saved) == (3, 0.5)
    assert whole.tokens_kept == pytest.approx(2.66 / 3)
    low, high = whole.tokens_kept_interval
    assert [low, high] == pytest.approx([2.66 / 3 - 1.96 * 0.16289 / 3**0.5, 1], abs=1e-4)
    shares = [whole.strict_kept, whole.three_quarters_kept, whole.noise_floor]
    assert shares == pytest.approx([2 / 3, 2 / 3, 0.98])
    assert {name: part.prompts for name, part in whole.by_length.items()} == {
        "under_100": 1,
        "100_to_500": 1,
        "over_500": 1,
    }
    assert whole.by_length["over_500"].flops_saved == pytest.approx(0.6)
    assert whole.worst_kind == "notes"
    assert whole.by_kind["notes"].tokens_kept == pytest.approx(0.83)
    assert list(whole.by_kind["chat"].tokens_kept_interval) == [0, 1]
    assert [row[4] for row in text_rows({"economy": whole})] == [
        "88.7% ± 18.4", "100.0%", "96.0% ± 96.0", "70.0% ± 70.0", "83.0% ± 25.5",
    ]  # fmt: skip
    wide = run_of([1.0, 0.96, 0.7], [99, 100, 501], ["chat", "notes, short", "notes, long"]).whole()
    assert {name: part.prompts for name, part in wide.by_kind.items()} == {
        "chat": 1, "notes": 2, "notes, long": 1, "notes, short": 1,
    }  # fmt: skip
    alone = run_of([1.0, 1.0, 1.0], [5, 6, 7], ["", "", ""]).whole()
    assert (list(alone.by_length), alone.by_kind, alone.worst_kind) == (["under_100"], {}, None)


def test_texts_are_compared_as_a_reader_would() -> None:
    assert common_start((1, 2, 3), (1, 2, 4, 5)) == 2
    assert repeated((1, 2, 3, 4, 1, 2, 3, 4)) == pytest.approx(1 / 5)
    assert repeated((1, 2)) == 0
    assert f1("It is the red house.", "red house") == pytest.approx(2 * (2 / 5) * 1 / (2 / 5 + 1))
    assert (f1("no", "yes"), f1("Yes!", "yes")) == (0, 1)
    assert (chrf("the same text", "the same text"), chrf("abc", "xyz")) == (1, 0)
    assert 0 < chrf("the cat sat on the mat", "the cat sat on a mat") < 1
    assert chrf("a cat", "a cat and a dog and more") < chrf(
        "a cat and a dog and more, and so on", "a cat and a dog and more"
    )
    ours, identity = [Answer((1, 2), "red"), Answer((5,), "no")], [Answer((1, 3), "red"), Answer((5,), "no")]
    found = free_figures(ours, identity, {0: "red", 1: "blue"}, kl=0.01)
    assert (found.same_text, found.first_divergence, found.gold_f1) == (0.5, 1.0, 0.5)
    assert found.gold_f1_drop is not None
    assert found.gold_f1_drop.value == 0
    assert free_figures(ours, identity, {}, kl=0.0).gold_f1_drop is None


@pytest.fixture
def router(model: PolarModel) -> MenuRouter:
    """Skips two layers at θ of 0.2 and more."""
    menu = (Program.identity(6), Program.skipping(6, [2, 3]))
    return fixed_router(model, menu, [0.9], dial=(0.0, 0.2), default_theta=0.2)


def test_exact_diverges_nowhere_and_another_program_does(model: PolarModel, router: MenuRouter) -> None:
    items = [AnswerItem(prompt=f"say {word}", answer="x") for word in ("one", "two", "three")]
    tasks = make_tasks(model, items, RewardCache())
    found = FreeRunner(model, router).figures(tasks, {"economy": Setting.to(0.2), "exact": Setting()})
    exact, economy = found["exact"], found["economy"]
    assert (exact.same_text, exact.chrf, exact.kl_per_token) == (1, 1, 0)
    assert exact.first_divergence == sum(len(task.question.continuations[0]) for task in tasks) / 3
    assert economy.kl_per_token > 0
    assert economy.first_divergence < exact.first_divergence


def test_an_evaluation_has_every_tier_and_exact_under_texts(model: PolarModel, router: MenuRouter) -> None:
    items = [PromptItem(prompt=f"tell me of {word}", task="chat") for word in "pears boats trains clouds".split()]  # noqa: SIM905
    items += [PromptItem(prompt=f"tell me of {word}", task="facts") for word in "stones birds maps songs".split()]  # noqa: SIM905
    evaluation = Judge(model, router, RewardCache()).evaluate({"data": items}, timed=0, free=2)
    plain = evaluation.plain()["texts"]
    assert set(plain) == {"uncalibrated", "exact"}
    assert (plain["exact"]["flops_saved"], plain["exact"]["tokens_kept"]) == (0, 1)
    assert 0 < plain["uncalibrated"]["flops_saved"] < 1
    assert plain["uncalibrated"]["free"]["prompts"] == 2
    assert set(plain["exact"]["by_kind"]) == {"chat", "facts"}
    assert plain["exact"]["noise_floor"] == 1  # in float32 identity repeats itself


def test_nothing_is_said_of_texts_where_there_are_none(model: PolarModel, router: MenuRouter) -> None:
    items = [ChoiceItem(question=f"which {word}?", choices=("red", "blue"), answer=0) for word in ("one", "two")]
    bench = Bench(model, cache=RewardCache())
    tasks = bench.tasks(items)
    subjects = Subjects(
        router=router,
        points={"main": Setting.to(0.2)},
        outputs=router.outputs(router.reader.stack([task.question.prompt for task in tasks])),
        outcomes=bench.outcomes(tasks, router.programs),
        static=list(router.programs),
        policy=model.policy,
        cost=model.decoder.cost,
    )
    assert evaluate_texts(subjects, {"main": Setting.to(0.2)}) == {}


def test_a_program_that_no_text_would_get_is_not_measured(model: PolarModel, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: set[Program] = set()

    def counted(decoder: Any, pack: Any, programs: Any, *rest: Any) -> Any:
        measured.update(programs)
        return score_programs(decoder, pack, programs, *rest)

    monkeypatch.setattr("polar_sdk.lab.rewards.measure.score_programs", counted)
    menu = (Program.identity(6), Program.skipping(6, [2]), Program.skipping(6, [2, 3]))
    router = fixed_router(model, menu, (0.9, 0.3), dial=(0.0, 0.2), default_theta=0.2)
    items = [PromptItem(prompt=f"tell me of {word}") for word in ("pears", "boats", "trains")]
    evaluation = Judge(model, router, RewardCache()).evaluate({"data": items}, timed=0)
    assert measured == {menu[0], menu[1]}
    assert evaluation.sets[0].main.programs == {menu[1].text: 1.0}
