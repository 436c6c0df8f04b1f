"""Suites: files in the data sets' own fields, how problems are asked and judged, and tiers beside full depth."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from polar_sdk import lab
from polar_sdk.errors import DataError, InvalidRequestError
from polar_sdk.lab.items import PromptItem, item_id
from polar_sdk.lab.rewards.cache import RewardCache
from polar_sdk.lab.suites.evaluate import SUITES, evaluate_suite
from polar_sdk.lab.suites.gsm8k import Gsm8k, Gsm8kProblem, final_number
from polar_sdk.lab.suites.humaneval import HumanEval, HumanEvalProblem
from polar_sdk.lab.suites.letters import Arc, ArcProblem, Mmlu, MmluProblem
from polar_sdk.lab.suites.rendering import group_rows, notes, rows, to_html
from polar_sdk.lab.suites.results import Request
from polar_sdk.lab.training.outcomes import used
from polar_sdk.programs.program import Program
from polar_sdk.testing import random_fill, scripted_model, tiny_model
from tests.sdk.command import polar

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from polar_sdk.lab.suites.results import SuiteEvaluation
    from polar_sdk.model import PolarModel

MMLU: list[dict[str, Any]] = [
    {"question": "How many legs has a spider?", "subject": "zoo_facts", "choices": ["2", "4", "6", "8"], "answer": 3},
    {"question": "Which is a metal?", "subject": "chemistry", "choices": ["iron", "salt", "wood", "air"], "answer": 0},
    {
        "question": "What do bees make?",
        "subject": "zoo_facts",
        "choices": ["silk", "honey", "wool", "oil"],
        "answer": "B",
    },
]
ARC: list[dict[str, Any]] = [
    {
        "question": "What warms the Earth?",
        "choices": {"text": ["the Moon", "the Sun", "the wind"], "label": ["1", "2", "3"]},
        "answerKey": "2",
    },
    {
        "question": "What do plants take in?",
        "choices": {"text": ["light", "sand", "iron", "glass", "salt"], "label": ["A", "B", "C", "D", "E"]},
        "answerKey": "A",
    },
]
GSM8K: list[dict[str, Any]] = [
    {"question": "Tom has 3 bags of 4 nuts. How many nuts?", "answer": "3 * 4 = <<3*4=12>>12\n#### 12"},
    {"question": "A car costs 1,200 and a bike 34. Together?", "answer": "1200 + 34 = 1234\n#### 1,234"},
]
HUMANEVAL: list[dict[str, Any]] = [
    {
        "task_id": "Own/0",
        "prompt": 'import math\n\n\ndef double(x):\n    """Twice x."""\n',
        "entry_point": "double",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    },
    {
        "task_id": "Own/1",
        "prompt": 'def root(x):\n    """Square root of x."""\n',
        "entry_point": "root",
        "test": "def check(candidate):\n    assert candidate(9) == 3\n",
    },
]
ROWS = {"mmlu": MMLU, "arc": ARC, "gsm8k": GSM8K, "humaneval": HUMANEVAL}


def written(folder: Path, rows: Sequence[dict[str, Any]], name: str = "data") -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def evaluated(model: PolarModel, suite: str, folder: Path, **options: Any) -> SuiteEvaluation:
    options = {"cache": RewardCache(), "run_code": True, **options}
    return evaluate_suite(model, suite, written(folder, ROWS[suite]), **options)


class TestFiles:
    @pytest.mark.parametrize("suite", ROWS)
    def test_a_line_has_the_data_sets_own_fields(self, suite: str, tmp_path: Path) -> None:
        rows = [{**row, "other": 1} for row in ROWS[suite]]
        assert len(SUITES[suite]().read(written(tmp_path, rows))) == len(rows)
        assert len(SUITES[suite]().read(written(tmp_path, rows), 1)) == 1

    @pytest.mark.parametrize(("suite", "field"), [(suite, field) for suite, rows in ROWS.items() for field in rows[0]])
    def test_a_missing_field_is_named_with_its_line(self, suite: str, field: str, tmp_path: Path) -> None:
        rows = [ROWS[suite][0], {name: value for name, value in ROWS[suite][0].items() if name != field}]
        with pytest.raises(DataError) as caught:
            SUITES[suite]().read(written(tmp_path, rows))
        assert "data.jsonl:2: " in str(caught.value) and field in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("suite", "change", "word"),
        [
            ("mmlu", {"answer": 4}, "not an index"),
            ("mmlu", {"answer": "E"}, "not an index"),
            ("mmlu", {"answer": "yes"}, "answer"),
            ("mmlu", {"choices": ["one"]}, "choices"),
            ("arc", {"answerKey": "D"}, "not one of the labels"),
            ("arc", {"choices": {"text": ["a", "b"], "label": ["A"]}}, "1 labels"),
            ("gsm8k", {"answer": "twelve"}, "####"),
            ("humaneval", {"test": ""}, "test"),
        ],
    )
    def test_a_wrong_value_is_named_with_its_line(
        self, suite: str, change: dict[str, Any], word: str, tmp_path: Path
    ) -> None:
        with pytest.raises(DataError) as caught:
            SUITES[suite]().read(written(tmp_path, [{**ROWS[suite][0], **change}]))
        assert "data.jsonl:1: " in str(caught.value) and word in str(caught.value)

    @pytest.mark.parametrize("text", ["", "\n\n", "[1]\n", "{\n"])
    def test_a_file_without_problems(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "data.jsonl").write_text(text)
        with pytest.raises(DataError, match=r"data\.jsonl"):
            Mmlu().read(tmp_path / "data.jsonl")

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="cannot be read"):
            Arc().read(tmp_path / "none.jsonl")


class TestPrompts:
    def test_mmlu(self) -> None:
        problems = [MmluProblem.model_validate(row) for row in MMLU]
        assert Mmlu().shots(problems[0], problems, 1) == [problems[2]]
        asked = Mmlu().ask(problems[0], [problems[2]], chat=False)
        assert asked.text == (
            "The following are multiple choice questions (with answers) about zoo facts.\n\n"
            "What do bees make?\nA. silk\nB. honey\nC. wool\nD. oil\nAnswer: B\n\n"
            "How many legs has a spider?\nA. 2\nB. 4\nC. 6\nD. 8\nAnswer:"
        )
        assert asked.choices == (" A", " B", " C", " D")
        assert Mmlu().ask(problems[0], [], chat=True).choices == ("A", "B", "C", "D")
        with pytest.raises(DataError, match="1 solved problems of 'zoo_facts'"):
            Mmlu().shots(problems[0], problems, 5)

    def test_arc_shows_letters_for_any_labels(self) -> None:
        problem = ArcProblem.model_validate(ARC[0])
        asked = Arc().ask(problem, [], chat=True)
        assert "A. the Moon\nB. the Sun\nC. the wind\nAnswer:" in asked.text
        assert asked.choices == ("A", "B", "C")
        assert Arc().judge(problem, 1) == "" and Arc().judge(problem, 0) == "A"

    def test_gsm8k(self) -> None:
        one, two = (Gsm8kProblem.model_validate(row) for row in GSM8K)
        assert "boxed" in Gsm8k().ask(one, [], chat=True).text
        asked = Gsm8k().ask(one, [two], chat=True)
        assert asked.text.endswith("#### 1,234\n\nQuestion: Tom has 3 bags of 4 nuts. How many nuts?\nAnswer:")
        assert asked.stops == ("Question:",)

    def test_as_many_examples_as_there_is_room_for(self, tmp_path: Path) -> None:
        """A window for one example: the text is still whole, and one that does not fit alone is left out."""
        long = {**MMLU[0], "question": "legs " * 200}
        data = written(tmp_path, [MMLU[0], long])
        solved = written(tmp_path, [{**MMLU[0], "question": f"Question {n}?"} for n in range(5)], "solved")
        model = tiny_model(context_window=400)
        found = evaluate_suite(model, "mmlu", data, shots=5, shots_from=solved, template="raw", cache=RewardCache())
        assert (found.problems, found.does_not_fit) == (1, 1)
        assert 200 < found.prompt_tokens <= 398


class TestJudging:
    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("so 3 * 4 = 12\n#### 12", "12"),
            ("It is \\boxed{12}. Check: 3 + 9 = 12, not 13", "12"),
            ("\\boxed{$1{,}2$}", "2"),
            ("First 5, then 7.", "7"),
            ("-3.50 dollars", "-3.50"),
            ("1,234 in all", "1,234"),
            ("none", ""),
        ],
    )
    def test_the_number_of_an_answer(self, text: str, number: str) -> None:
        assert final_number(text) == number

    def test_numbers_are_compared_by_value(self) -> None:
        problem = Gsm8kProblem.model_validate(GSM8K[1])
        assert Gsm8k().judge(problem, "that is $1,234.00") == ""
        assert Gsm8k().judge(problem, "#### 1235") == "1235"
        assert Gsm8k().judge(problem, "who knows") == "no number"

    @pytest.mark.parametrize(
        ("answer", "flaw"),
        [
            ("def double(x):\n    return 2 * x", ""),
            ("from math import prod\ndef double(x):\n    return prod([x, 2])\ndouble(3", ""),
            ("    return 2 * x\n", ""),
            ("    return int(math.fsum([x, x]))", ""),  # the prompt's own import
            ("def double(x):\n    return x", "AssertionError"),
            ("def other(x):\n    return x", "AssertionError"),
            ("def double(x):\n    while True: pass", "ended early"),
            ("import os\nos._exit(0)\ndef double(x): pass", "ended early"),
            ("", "AssertionError"),
        ],
    )
    def test_code_is_run_with_its_tests(self, answer: str, flaw: str) -> None:
        found = HumanEval().judge(HumanEvalProblem.model_validate(HUMANEVAL[0]), answer)
        assert found == flaw or (flaw, found) == ("ended early", "timeout")  # on a busy machine, the clock is first


class TestEvaluation:
    def test_letters_are_those_that_full_depth_and_each_program_prefer(self, tmp_path: Path) -> None:
        """As `score_batch` has them, one prompt after the other."""
        model = tiny_model()
        found = evaluated(model, "mmlu", tmp_path, template="raw", programs=["0 3-5"])
        assert [tier.name for tier in found.tiers] == ["exact", "0 3-5"]
        problems = [MmluProblem.model_validate(row) for row in MMLU]
        for tier, program in (("exact", None), ("0 3-5", "0 3-5")):
            flaws = []
            for problem in problems:
                asked = Mmlu().ask(problem, [], chat=False)
                scores = model.score(asked.text, asked.choices, program=program)
                best = max(range(4), key=scores.__getitem__)
                flaws.append("" if best == problem.answer else "ABCD"[best])
            assert found.flaws[tier] == tuple(flaws)
        right = sum(not flaw for flaw in found.flaws["exact"])
        assert found.baseline.accuracy.value == right / 3
        assert set(found.baseline.groups) == {"chemistry", "zoo_facts"}

    def test_what_is_spent_is_what_requests_of_these_lengths_cost(self, tmp_path: Path) -> None:
        model = tiny_model()
        found = evaluated(model, "arc", tmp_path)
        economy = next(tier for tier in found.tiers if tier.name == "economy")
        assert [tier.name for tier in found.tiers] == ["exact", "economy", "standard", "premium"]
        lengths = [
            len(model.prompt_tokens(Arc().ask(ArcProblem.model_validate(row), [], chat=True).text)) for row in ARC
        ]
        full, ours = (
            sum(model.cost(program, prompt=length, output=1).total for length in lengths) for program in (None, "0 3-5")
        )
        assert economy.flops_saved == pytest.approx(1 - ours / full)
        assert economy.compute_units_per_1000 == pytest.approx(1000 * ours / 2 / 1e12)
        assert [economy.layers_used, economy.layers_share] == pytest.approx([4, 4 / 6])
        assert found.baseline.layers_used == 6 and found.baseline.flops_saved == 0
        premium = found.tiers[-1]
        assert (premium.accuracy_drop.value, premium.mcnemar_p, premium.layers_used) == (0, 1, 6)
        assert found.prompt_tokens == sum(lengths) / 2 and found.template_tokens == 2

    def test_a_filled_visit_counts_by_its_flops(self) -> None:
        model = tiny_model()
        model.decoder.set_fills({(3, 5): random_fill(model.decoder, (3, 5))})
        cost = model.decoder.cost
        program = Program.parse("0-2 (3-5:4)")
        request = Request(program, prompt=20, output=3, flaw="")
        mapped = cost.fills[3, 5] / cost.layers[3].linear
        # 20 tokens run three layers; of the prompt the first and the last four run the others too, as does the answer.
        expected = 20 * 3 + 5 * 3 + 15 * mapped + 2 * 6
        assert request.layers(cost) == pytest.approx(expected)
        assert Request(Program.identity(6), 20, 3, "").layers(cost) == (20 + 2) * 6

    def test_texts_are_written_until_a_stop_and_judged(self, tmp_path: Path) -> None:
        model = scripted_model(lambda _: "3 * 4 is 12\n#### 12\n\nQuestion: and 5?", context_window=2048)
        found = evaluated(model, "gsm8k", tmp_path, template="raw", compute=["standard"])
        assert found.flaws == {"exact": ("", "12"), "standard": ("", "12")}
        assert found.baseline.answer_tokens == len("3 * 4 is 12\n#### 12\n\nQuestion:")
        standard = found.tiers[1]
        assert standard.flops_saved == pytest.approx(standard.same_tokens_flops_saved)
        assert standard.layers_used == 5

    def test_code_is_judged_by_running_it(self, tmp_path: Path) -> None:
        model = scripted_model(lambda _: "def double(x):\n    return x * 2\n```\nDone.", context_window=2048)
        found = evaluated(model, "humaneval", tmp_path, compute=["premium"])
        assert found.flaws["exact"] == ("", "AssertionError") and found.chat
        assert found.baseline.accuracy.value == 0.5

    def test_nothing_is_measured_twice(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache, model = RewardCache(), scripted_model(lambda _: "#### 12", context_window=2048)
        first = evaluated(model, "gsm8k", tmp_path, cache=cache)
        monkeypatch.setattr(type(model), "greedy_answers", lambda *_, **__: pytest.fail("it was written already"))
        assert evaluated(model, "gsm8k", tmp_path, cache=cache) == first

    def test_what_a_router_was_trained_on_is_known(self) -> None:
        items = [Gsm8kProblem.model_validate(row).item for row in GSM8K]
        assert items[0] == PromptItem(prompt=GSM8K[0]["question"])
        assert used(items, {"calibrated": item_id(items[1])[:8]}) == [False, True]
        assert used(items, {}) == [False, False]

    def test_rows_notes_and_a_page(self, tmp_path: Path) -> None:
        found = evaluated(tiny_model(), "mmlu", tmp_path)
        table = rows(found)
        assert [row[0] for row in table] == ["exact", "economy", "standard", "premium"]
        assert table[1][5] == "4.0 of 6"
        assert [row[0] for row in group_rows(found)] == ["chemistry", "zoo facts"]
        assert "3 problems" in next(iter(notes(found)))
        page = to_html(found)
        assert page.count("<tr>") == 5 + 3 and "zoo facts" in page
        assert lab.SuiteEvaluation.model_validate_json(found.model_dump_json()) == found

    @pytest.mark.parametrize(
        ("options", "word"),
        [
            ({"suite": "mnlu"}, "did you mean 'mmlu'"),
            ({"suite": "humaneval", "run_code": False}, "--run-code"),
            ({"suite": "humaneval", "shots": 1}, "takes no examples"),
            ({"suite": "mmlu", "shots": 5}, "--shots-from"),
            ({"suite": "mmlu", "template": "chatty"}, "chatty"),
            ({"suite": "mmlu", "thetas": [0.5]}, "learned router"),
            ({"suite": "mmlu", "compute": [0.5]}, "tolerance"),
        ],
    )
    def test_options_that_cannot_be(self, options: dict[str, Any], word: str, tmp_path: Path) -> None:
        data = written(tmp_path, ROWS.get(options["suite"], MMLU))
        with pytest.raises(InvalidRequestError, match=word):
            evaluate_suite(tiny_model(), data=data, cache=RewardCache(), **{"run_code": True, **options})

    def test_a_window_too_small_for_all(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="2 exceed the context window of 64"):
            evaluated(tiny_model(context_window=64), "gsm8k", tmp_path)


class TestCommand:
    def test_a_suite_as_a_table_as_json_and_as_a_page(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("polar_sdk.cli.options.load_model", lambda *_, **__: tiny_model())
        monkeypatch.setenv("POLAR_CACHE", str(tmp_path / "cache"))
        words = ["evaluate", "--suite", "arc", "--data", written(tmp_path, ARC), "-c", "economy", "-p", "0-3 5"]
        result = polar(*words, "--json", "--html", tmp_path / "page.html")
        assert result.exit_code == 0, result.output
        found = lab.SuiteEvaluation.model_validate_json(result.stdout)
        assert [tier.name for tier in found.tiers] == ["exact", "economy", "0-3 5"]
        assert "0-3 5" in (tmp_path / "page.html").read_text()
        table = polar(*words)
        assert "economy" in table.stdout and "2 problems" in table.stdout

    @pytest.mark.parametrize(
        ("words", "word"),
        [
            (["--suite", "mmlu"], "--data"),
            (["--suite", "mmlu", "--data", "none.jsonl"], "cannot be read"),
            (["--suite", "humaneval", "--data", "none.jsonl"], "--run-code"),
            (["--suite", "nothing", "--data", "none.jsonl"], "choose from"),
            (["--program", "0-5"], "--suite"),
        ],
    )
    def test_mistakes_are_one_line_before_a_model_is_loaded(
        self, words: list[str], word: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("polar_sdk.cli.options.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
        result = polar("evaluate", *words)
        assert result.exit_code == 2 and word in result.stderr
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
