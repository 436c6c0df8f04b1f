"""Rewards and the search: checked against doing the same by hand, interrupted, resumed, and told wrong things."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polar_sdk import PolarModel, Policy, Program, lab
from polar_sdk.engine.scoring import score_programs
from polar_sdk.errors import DataError
from polar_sdk.lab.items import AnswerItem, ChoiceItem, Item, PromptItem, Shares
from polar_sdk.lab.program_search.cuts import Edit, Space, evolve
from polar_sdk.lab.program_search.matrix import RewardMatrix
from polar_sdk.lab.program_search.menu import Menu, cover
from polar_sdk.lab.program_search.search import SearchOptions, SearchResult, rewards_path
from polar_sdk.lab.rewards.cache import RewardCache, cache_path
from polar_sdk.lab.rewards.measure import Measurer, is_right, preferred_choice
from polar_sdk.lab.rewards.tasks import make_tasks
from polar_sdk.programs.cost import CostModel, LayerCost
from polar_sdk.promises.losses import SAME_ANSWER
from polar_sdk.serving.places import Limits
from polar_sdk.testing import tiny_llama, tiny_model, tiny_tokenizer
from tests.sdk.command import polar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from polar_sdk.engine.pack import Question

DEPTH = 6
IDENTITY = Program.identity(DEPTH)
SMALL: dict[str, Any] = {
    "budgets": (0.8, 0.6),
    "population": 4,
    "generations": 1,
    "menu": 5,
    "answer_tokens": 5,
    "write_tokens": 4,
}


@pytest.fixture(scope="module")
def all_items(mixed_items: list[Item]) -> list[Item]:
    """Items of all three forms."""
    return [*mixed_items, AnswerItem(prompt="how many moons has the earth?", answer="1")]


@pytest.fixture(scope="module")
def model(all_items: list[Item]) -> PolarModel:
    """A model with two bridges."""
    made = tiny_model(policy=Policy(protected=(0, -1)))
    made.scheduler.limits = Limits(prefix_share=0)  # its figures are those of prompts that run from their beginning
    lab.heal(made, all_items, "1-2;2-4", answer_tokens=4)
    return made


@pytest.fixture(scope="module")
def search(all_items: list[Item]) -> Callable[..., SearchResult]:
    """A small search on all items."""

    def run(model: PolarModel, cache: RewardCache | None = None, **options: Any) -> SearchResult:
        return lab.search(model, all_items, cache=cache, **{**SMALL, **options})

    return run


@pytest.fixture(scope="module")
def found(model: PolarModel, search: Callable[..., SearchResult]) -> SearchResult:
    return search(model)


def test_rewards_are_what_scoring_by_hand_gives(model: PolarModel, all_items: list[Item]) -> None:
    program = Program.parse("0 [1-2] 3 5")
    tasks = make_tasks(model, all_items, RewardCache(), answer_tokens=5)
    reward = Measurer(model, RewardCache()).rewards(tasks, [program])[program]
    for number, item in enumerate(all_items):
        if isinstance(item, ChoiceItem):
            prompt, tails = f"Question: {item.question}\nAnswer:", [f" {choice}" for choice in item.choices]
            scores = [
                [
                    value / len(choice)
                    for value, choice in zip(model.score(prompt, tails, program=one), item.choices, strict=True)
                ]
                for one in (IDENTITY, program)
            ]
            wanted = scores[0].index(max(scores[0]))
            rivals = [score for at, score in enumerate(scores[1]) if at != wanted]
            assert bool(reward.agree[number]) == (scores[1].index(max(scores[1])) == wanted)
            assert float(reward.margin[number]) == pytest.approx(scores[1][wanted] - max(rivals), abs=1e-4)
            assert (float(reward.margin[number]) > 0) == bool(reward.agree[number])
        else:
            answers = [model.generate(item.prompt, program=one, max_tokens=5).token_ids for one in (IDENTITY, program)]
            assert (float(reward.share[number]) == 1) == (answers[0] == answers[1])
            assert bool(reward.agree[number]) == (float(reward.share[number]) >= SAME_ANSWER)
            usage = model.generate(item.prompt, program=program, max_tokens=len(answers[0])).usage
            if usage.tokens.output == len(answers[0]):
                assert int(reward.flops[number]) == usage.flops.total


@pytest.mark.parametrize(
    ("written", "answer", "right"),
    [
        ("The answer is Paris", "the answer is PARIS.", True),
        ("Paris, of course", "Paris", True),
        ("A Parisian, of course", "Paris", False),
        ("It was Rosa who met Castro", "Rosa Castro", False),
        ("3 apples and 4 make 1,007", "1007", True),
        ("It is 12. No, 13", "12", False),
        ("minus -2.50", "-2.5", True),
        ("none at all", "0", False),
    ],
)
def test_what_counts_as_the_right_text(written: str, answer: str, right: bool) -> None:
    assert is_right(written, answer) is right


def test_right_is_read_from_choices_and_from_what_is_written(model: PolarModel, all_items: list[Item]) -> None:
    program = Program.parse("0-1 3-5")
    text = model.generate("write", program=program, max_tokens=4).text
    items: list[Item] = [
        AnswerItem(prompt="write", answer=text),
        AnswerItem(prompt="write", answer=f"{text} not"),
        *all_items,
    ]
    tasks = make_tasks(model, items, RewardCache(), answer_tokens=5)
    right = Measurer(model, RewardCache()).right(tasks, program, max_tokens=4)
    by_hand = []
    for item in all_items:
        if isinstance(item, ChoiceItem):
            values = model.score(
                f"Question: {item.question}\nAnswer:", [f" {c}" for c in item.choices], program=program
            )
            scores = [value / len(choice) for value, choice in zip(values, item.choices, strict=True)]
            by_hand.append(scores.index(max(scores)) == item.answer)
        else:
            by_hand.append(False)
    assert right.tolist() == [True, False, *by_hand]


class Counter:
    """Counts what is really run: pairs of question and program, and prompts that are answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> None:
        self.pairs: list[tuple[Question, Program]] = []
        self.answered: list[tuple[str, str]] = []
        original, answer = score_programs, PolarModel.greedy_answers

        def count(decoder: object, pack: Sequence[Question], programs: Sequence[Program], step: object) -> object:
            if stop_after is not None and len(self.pairs) >= stop_after:
                raise KeyboardInterrupt
            self.pairs += [(question, program) for question in pack for program in programs]
            return original(decoder, pack, programs, step)  # type: ignore[arg-type]

        def write(
            own: PolarModel, prompts: Sequence[str], *, max_tokens: int, program: Program | None = None
        ) -> object:
            self.answered += [(prompt, f"{program} {max_tokens}") for prompt in prompts]
            return answer(own, prompts, max_tokens=max_tokens, program=program)

        monkeypatch.setattr("polar_sdk.lab.rewards.measure.score_programs", count)
        monkeypatch.setattr(PolarModel, "greedy_answers", write)


def test_an_answer_that_would_be_identitys_own_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny_llama(seed=3, eos_token_id=list(range(0, 256, 4)))  # an answer ends after some four tokens
    model, cache = PolarModel.from_hf(hf, tiny_tokenizer(), ledger=None), RewardCache()
    program = Program.parse("0-2 4-5")
    prompts = [f"{place} lanterns" for place in range(40)]
    full, ours = ([*model.greedy_answers(prompts, max_tokens=8, program=one)] for one in (None, program))
    items = [AnswerItem(prompt=text, answer=model.decode(ids) or "-") for text, ids in zip(prompts, full, strict=True)]
    tasks = make_tasks(model, items, cache, answer_tokens=8)
    counter = Counter(monkeypatch)
    right = Measurer(model, cache).right(tasks, program, max_tokens=8)
    wanted = [is_right(model.decode(ids), item.answer) for ids, item in zip(ours, items, strict=True)]
    assert right.tolist() == wanted
    known = {text for text, *both in zip(prompts, full, ours, strict=True) if both[0] == both[1] and len(both[0]) < 8}
    assert 0 < len(known) < len(prompts)
    assert not known & {text for text, _ in counter.answered}


def test_an_interrupted_search_goes_on_and_measures_nothing_twice(
    model: PolarModel,
    found: SearchResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    search: Callable[..., SearchResult],
) -> None:
    file = tmp_path / "rewards.sqlite3"
    with monkeypatch.context() as patch, RewardCache(file) as cache:
        first = Counter(patch, stop_after=60)
        with pytest.raises(KeyboardInterrupt):
            search(model, cache)
    with monkeypatch.context() as patch, RewardCache(file) as cache:
        second = Counter(patch)
        again = search(model, cache)
    assert first.pairs
    assert second.pairs
    everything = first.pairs + second.pairs
    assert len(everything) == len(set(everything))
    assert len(first.answered + second.answered) == len(set(first.answered + second.answered))
    assert again.menu == found.menu
    with monkeypatch.context() as patch, RewardCache(file) as cache:
        third = Counter(patch)
        search(model, cache)
    assert (len(third.pairs), len(third.answered)) == (0, 0)


def test_other_bridges_are_other_programs_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_items: list[Item]
) -> None:
    model = tiny_model(policy=Policy.permissive())
    with RewardCache(tmp_path / "rewards.sqlite3") as cache:
        tasks = make_tasks(model, all_items[:4], cache, answer_tokens=4)
        programs = [Program.parse(text) for text in ("0-5", "0-1 3-5", "0 [1-2] 3-5")]
        for rank, expected in ((2, 3), (3, 1)):
            lab.heal(model, all_items, "1-2", rank=rank, answer_tokens=4)
            with monkeypatch.context() as patch:
                counter = Counter(patch)
                Measurer(model, cache).scores(tasks, programs)
            assert len({program for _, program in counter.pairs}) == expected


def test_the_matrix_holds_what_the_programs_do_on_every_prompt(
    model: PolarModel, found: SearchResult, all_items: list[Item]
) -> None:
    matrix = found.matrix
    assert matrix.programs[0] == IDENTITY
    assert 2 <= len(matrix.programs) <= 5
    assert len(matrix) == len(all_items)
    assert matrix.agree[:, 0].all()
    tasks = make_tasks(model, all_items, RewardCache(), answer_tokens=5)
    assert matrix.ids == tuple(task.id for task in tasks)
    assert matrix.tokens == tuple(task.question.prompt for task in tasks)
    rewards = Measurer(model, RewardCache()).rewards(tasks, matrix.programs)
    for column, program in enumerate(matrix.programs):
        assert torch.equal(matrix.agree[:, column], rewards[program].agree)
        assert torch.equal(matrix.flops[:, column], rewards[program].flops)
    assert torch.equal(matrix.saved[:, 0], torch.zeros(len(all_items), dtype=torch.float64))
    assert matrix.labelled.tolist() == [not isinstance(item, PromptItem) for item in all_items]
    assert not matrix.right[~matrix.labelled].any()
    assert matrix.fingerprint == model.fingerprint


def test_the_menu_has_identity_and_a_program_for_every_budget(model: PolarModel, found: SearchResult) -> None:
    ratios = [one.flops_ratio for one in found.menu.programs]
    assert found.menu.programs[0].program == IDENTITY
    assert (ratios[0], found.menu.programs[0].agreement) == (1.0, 1.0)
    assert ratios[1:] == sorted(ratios[1:], reverse=True)
    slack = Space(model.loaded.decoder.cost, model.policy).slack
    for budget in SMALL["budgets"]:
        assert any(budget - slack <= ratio <= budget for ratio in ratios)
    for one in found.menu.programs:
        model.policy.check(one.program, model.loaded.decoder.cost)


def test_a_search_without_loops_finds_none(model: PolarModel, search: Callable[..., SearchResult]) -> None:
    assert all(one.program.most_visits == 1 for one in search(model, seed=5, loops=False).menu.programs)


def test_labels_as_the_objective_choose_by_what_is_right(
    model: PolarModel, monkeypatch: pytest.MonkeyPatch, all_items: list[Item]
) -> None:
    """With labels that are the choices of one program, a program of the menu is right on all that was searched on."""
    monkeypatch.setattr(
        "polar_sdk.lab.program_search.cuts._RUNGS", (1.0,)
    )  # so few prompts that halving would be chance
    favourite = Program.parse("0 2-5")
    tasks = make_tasks(model, [item for item in all_items if isinstance(item, ChoiceItem)], RewardCache())
    outcomes = Measurer(model, RewardCache()).scores(tasks, [favourite])[favourite]
    items: list[Item] = [
        task.item.model_copy(update={"answer": preferred_choice(outcome, task.characters)})
        for task, outcome in zip(tasks, outcomes, strict=True)
    ]
    everything = Shares(1, 0, 0, 0)
    found = lab.search(model, items, budgets=(0.86,), population=12, objective="labels", loops=False, shares=everything)
    train = found.matrix.of("train")
    assert len(train) == len(items)
    assert train.right[:, 1:].all(0).any()
    assert not train.right[:, 0].all()


def test_saved_matrices_read_back(found: SearchResult, tmp_path: Path) -> None:
    found.save(tmp_path / "deep" / "menu.json")
    assert Menu.load(tmp_path / "deep" / "menu.json") == found.menu
    again = RewardMatrix.load(rewards_path(tmp_path / "deep" / "menu.json"))
    assert (again.ids, again.tokens, again.programs) == (found.matrix.ids, found.matrix.tokens, found.matrix.programs)
    assert (again.kinds, again.splits, again.data) == (found.matrix.kinds, found.matrix.splits, found.matrix.data)
    for name in ("agree", "share", "margin", "right", "labelled", "flops"):
        assert torch.equal(getattr(again, name), getattr(found.matrix, name))


def test_rows_of_a_matrix(found: SearchResult) -> None:
    matrix = found.matrix
    train = matrix.of("train")
    assert set(train.splits) == {"train"}
    assert len(train) == matrix.splits.count("train")
    last = matrix.rows([len(matrix) - 1, 0])
    assert last.ids == (matrix.ids[-1], matrix.ids[0])
    assert torch.equal(last.flops, matrix.flops[[-1, 0]])
    assert set(matrix.of("train", "dev", "calibration", "test", kinds=["answer"]).kinds) == {"answer"}
    assert torch.equal(matrix.rows(matrix.labelled).labelled, torch.ones(int(matrix.labelled.sum()), dtype=torch.bool))
    with pytest.raises(DataError, match="no prompt in train"):
        matrix.rows([]).of("train")


def test_texts_and_choices_have_programs_of_their_own(found: SearchResult, tmp_path: Path) -> None:
    """A program that was not measured on a prompt loses it and saves nothing."""
    every = ("train", "dev", "calibration", "test")
    texts = found.matrix.of(*every, kinds=("prompt", "answer")).only([0, 1])  # type: ignore[arg-type]
    choices = found.matrix.of(*every, kinds=("choice",)).only([0, 2])  # type: ignore[arg-type]
    both = texts.beside(choices, "both")
    assert both.programs == found.matrix.programs[:3] and both.forms == (None, "text", "choice")
    assert both.ids == texts.ids + choices.ids and both.data == "both"
    for form, part, columns in (("text", texts, [0, 1]), ("choice", choices, [0, 2])):
        own = both.rows([both.ids.index(name) for name in part.ids])
        assert own.measured_on([form]) == columns  # type: ignore[list-item]
        for name in ("agree", "share", "margin", "right", "flops"):
            assert torch.equal(getattr(own.only(columns), name), getattr(part, name))
        (other,) = {1, 2} - set(columns)
        assert not own.agree[:, other].any() and not own.saved[:, other].any()
    both.save(tmp_path / "both.safetensors")
    assert RewardMatrix.load(tmp_path / "both.safetensors").forms == both.forms


def test_a_damaged_matrix_is_refused(found: SearchResult, tmp_path: Path) -> None:
    path = found.save(tmp_path / "menu.json")
    whole = path.read_bytes()
    damaged = whole[:100], whole.replace(b"polar-rewards-1", b"polar-rewards-9"), whole.replace(b"splits", b"splats")
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(DataError):
            RewardMatrix.load(path)
    with pytest.raises(DataError):
        RewardMatrix.load(tmp_path / "absent.safetensors")


@given(st.integers(0, 10_000), st.sampled_from([0.9, 0.75, 0.6]))
def test_every_cut_that_is_found_fits_the_budget_and_the_policy(seed: int, budget: float) -> None:
    cost = tiny_cost()
    space = Space(cost, Policy(protected=(0, -1)))
    dice = random.Random(seed)
    cut = space.random_cut(budget, dice)
    for _ in range(3):
        if cut is None:
            return
        assert space.allowed(cut)
        assert budget - space.slack <= space.ratio(cut) <= budget
        program = space.program(cut)
        assert set(program.bridges) == {(edit.first, edit.last) for edit in cut if edit.kind == "bridge"}
        assert set(program.fills) == {(edit.first, edit.last) for edit in cut if edit.kind == "fill"}
        cut = space.neighbour(cut, budget, dice)


def tiny_cost() -> CostModel:
    layers = tuple(LayerCost(1000, 1, keys_values=100) for _ in range(12))
    return CostModel(layers, 500, {(2, 4): 90, (6, 7): 90}, {(8, 11): 300, (10, 11): 150, (5, 7): 200})


def test_cuts_and_their_programs() -> None:
    space = Space(tiny_cost(), Policy())
    cut = frozenset({Edit(2, 4, "bridge"), Edit(6, 7, "skip"), Edit(9, 9, "loop")})
    assert space.program(cut).text == "0-1 [2-4] 5 8 9x2 10-11"
    assert space.program(frozenset()).is_identity(12)
    assert not space.allowed(frozenset({Edit(2, 4, "bridge"), Edit(4, 5, "skip")}))
    both = frozenset({Edit(2, 4, "bridge"), Edit(10, 11, "fill")})
    assert space.program(both).text == "0-1 [2-4] 5-9 (10-11:16)"
    assert space.allowed(both)
    assert space.ratio(both) < space.ratio(frozenset({Edit(2, 4, "bridge")})) < 1
    side_by_side = frozenset({Edit(5, 7, "fill"), Edit(8, 11, "fill")})
    assert not space.allowed(side_by_side)  # one segment, for which there is no map


def test_evolution_finds_the_program_that_it_is_told_to_prefer() -> None:
    """Fitness: how many of layers 3 and 7 are left out; judged on all prompts at the last rung only."""
    space = Space(tiny_cost(), Policy(), loops=False)
    asked: dict[float, int] = {}

    def judge(programs: Sequence[Program], share: float) -> dict[Program, float]:
        asked[share] = asked.get(share, 0) + len(programs)
        return {program: float(len({3, 7} & set(program.skips(12)))) for program in programs}

    best = evolve(space, 0.8, judge, population=8, generations=6, dice=random.Random(0))
    assert max(best.values()) == 2
    assert asked[0.25] > asked[0.5] > asked[1.0] == len(best)


@given(st.lists(st.lists(st.integers(-4, 4), min_size=4, max_size=4), min_size=1, max_size=9), st.integers(1, 4))
def test_the_cover_takes_what_adds_most_and_never_more_than_it_may(rows: list[list[int]], size: int) -> None:
    gains = torch.tensor(rows) / 4  # sums of quarters are exact
    picked = cover(gains, size, must=[2])
    assert picked[0] == 2
    assert len(picked) == len(set(picked)) <= size

    def worth(columns: list[int]) -> float:
        return float(gains[:, columns].amax(1).clamp(min=0).sum())

    for place in range(1, len(picked)):
        best = max(worth([*picked[:place], column]) for column in range(4))
        assert worth(picked[: place + 1]) == pytest.approx(best, abs=1e-5)
        assert worth(picked[: place + 1]) > worth(picked[:place])


@pytest.mark.parametrize(
    "wrong",
    [{"budgets": (1.2,)}, {"budgets": ()}, {"menu": 1}, {"objective": "luck"}, {"prompts": 0},
     {"shares": Shares(1, 1, 0, 0)}],
)  # fmt: skip
def test_options_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=next(iter(wrong))):
        SearchOptions(**wrong)


def test_data_and_policies_that_leave_nothing_to_search(model: PolarModel, all_items: list[Item]) -> None:
    same = [item.model_copy(update={"answer": 0}) for item in all_items if isinstance(item, ChoiceItem)]
    copies: list[Item] = [PromptItem(prompt="a"), PromptItem(prompt="A")]
    for items in ([], copies, same):
        with pytest.raises(DataError):
            lab.search(model, items)
    closed = tiny_model(policy=Policy(protected=tuple(range(DEPTH))))
    with pytest.raises(DataError, match="no program that the policy allows"):
        lab.search(closed, all_items[:6], budgets=(0.5,), answer_tokens=2)


def test_a_cache_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "rewards.sqlite3"
    file.write_text("this is no database, and long enough for SQLite to look at its first page " * 20)
    with pytest.raises(DataError, match="set POLAR_CACHE"):
        RewardCache(file)


def test_the_cache_has_a_file_per_model_and_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path))
    paths = {cache_path(fingerprint, dtype) for fingerprint in ("a" * 64, "b" * 64) for dtype in ("int8", "bfloat16")}
    assert len(paths) == 4
    with RewardCache(paths.pop()) as cache:
        cache.put("0-5", {"x": [1.5, [2]], "y": "text"})
        assert cache.get(["x", "y", "z"], "0-5") == {"x": [1.5, [2]], "y": "text"}
        assert cache.get(["x"], "0-4") == {}


def test_the_command_searches_and_writes_menu_and_rewards(
    model: PolarModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_items: list[Item]
) -> None:
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("polar_sdk.cli.options.load_model", lambda *_, **__: model)
    data, out = tmp_path / "data.jsonl", tmp_path / "menu.json"
    data.write_text("\n".join(item.model_dump_json() for item in all_items))
    command = ["lab", "search", "--data", str(data), "--out", str(out), "--budgets", "0.8,0.6", "--menu", "5"]
    command += ["--population", "4", "--generations", "1", "--answer-tokens", "5", "--write-tokens", "4"]
    result = polar(*command)
    assert result.exit_code == 0, result.output
    assert "programs measured" in result.output
    with monkeypatch.context() as patch:
        counter = Counter(patch)
        told = json.loads(polar(*command, "--json").stdout)
    assert counter.pairs == []  # the second run reads what the first one measured
    assert [one["program"] for one in told["programs"]] == [one.program.text for one in Menu.load(out).programs]
    assert RewardMatrix.load(told["rewards"]).programs[0] == IDENTITY
    wrong = polar(*command[:6], "--budgets", "cheap")
    assert (wrong.exit_code, "not a list of numbers" in wrong.output) == (2, True)


def test_the_menu_is_measured_on_no_more_train_prompts_than_asked_for(
    model: PolarModel, search: Callable[..., SearchResult]
) -> None:
    whole, part = (
        search(model, train=train, menu=2, prompts=4, population=2, generations=0).matrix for train in (1000, 2)
    )
    assert part.splits.count("train") == 2 < whole.splits.count("train")
    assert [one for one in part.splits if one != "train"] == [one for one in whole.splits if one != "train"]
    assert set(part.ids) < set(whole.ids)
