"""The figures of the documents are those of the files in `benchmarks/results`, which are as benchmarks write them."""

from __future__ import annotations

import datetime
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from benchmarks.peers import alternate
from benchmarks.results import RESULTS, Figure, Machine, Recorder, Results

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"
FILES = {path.name: Results.read(path) for path in sorted(RESULTS.glob("*.json"))}
FIGURES = [figure for results in FILES.values() for figure in results.figures]
NUMBER = re.compile(r"(?<![\w.`-])[−+-]?\d[\d,]*(?:\.\d+)?(?:e-\d+)?")


def quotes(number: str, exact: float) -> bool:
    """Whether a number is another one, rounded to fewer digits; a half may go either way."""
    text = number.replace("−", "-").replace(",", "")
    digits = len(text.partition(".")[2])
    return abs(exact - float(text)) <= 0.5 / 10.0**digits + 1e-9


class TestDocuments:
    def test_every_file_is_as_it_would_be_written(self) -> None:
        for name, results in FILES.items():
            assert name == f"{results.topic}.json"
            assert (RESULTS / name).read_text(encoding="utf-8") == results.text, name

    def test_every_row_of_the_page_quotes_the_files_of_its_section(self) -> None:
        """The first cell of a row is the name of a figure, or begins those of a table's row."""
        rows = 0
        for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
            files = [FILES[name] for name in re.findall(r"`([\w-]+\.json)`", section)]
            assert files, section
            for line in re.findall(r"^\| (?!-)(.+) \|$(?!\n\| ---)", section, re.MULTILINE):
                label, *cells = line.split(" | ")
                own = [
                    one
                    for file in files
                    for one in file.figures
                    if re.match(rf"{re.escape(label)}(: |, time ÷|$)", one.name)
                ]
                quoted = [number for cell in cells for number in NUMBER.findall(cell)]
                known = [number for one in own for number in [*one.numbers, *note_numbers(one)]]
                assert own or not quoted, line
                for number in quoted:
                    assert any(quotes(number, exact) for exact in known), f"{number} in: {line}"
                rows += bool(quoted)
        assert rows > 50  # the expressions find the tables

    @pytest.mark.parametrize(
        ("line", "topics"),
        [
            ("Multiple-choice questions", {"choices", "seeds"}),
            ("Answers in text", {"answers", "long-texts"}),
            ("Decoding speed", {"engine", "engine-amx"}),
        ],
    )
    def test_the_readme_quotes_files(self, line: str, topics: set[str]) -> None:
        """Numbers with decimals of a line between the markers."""
        block = (ROOT / "README.md").read_text(encoding="utf-8").partition("<!-- figures: start -->")[2]
        (text,) = re.findall(rf"^- \*\*{line}\*\*.*$", block, re.MULTILINE)
        numbers = [number for number in NUMBER.findall(text) if "." in number]
        assert len(numbers) > 5
        known = [number for one in FIGURES if one.topic in topics for number in [*one.numbers, *note_numbers(one)]]
        assert not [number for number in numbers if not any(quotes(number, exact) for exact in known)]


def note_numbers(figure: Figure) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.?\d*", figure.note or "")]


class TestRecorder:
    def test_a_run_replaces_what_it_measures_again(self, tmp_path: Path) -> None:
        first = Recorder("engine", tmp_path)
        first.run = first.run.model_copy(update={"date": datetime.date(2026, 1, 1)})
        first.add("speed", 123.456, "tokens/s", low=123.111, high=124.0, interval="rounds", goal=100)
        first.add("size", 1234.5, "MiB", topic="memory")
        second = Recorder("engine", tmp_path)
        second.add("speed", 200.0, "tokens/s")
        results = Results.read(tmp_path / "engine.json")
        found = {one.name: (one.topic, one.value, results.runs[one.run]) for one in results.figures}
        assert found == {"speed": ("engine", 200.0, second.run), "size": ("memory", 1234.0, first.run)}
        second.add("size", 1.0, "MiB", topic="memory")
        assert Results.read(tmp_path / "engine.json").runs == (second.run,)

    def test_a_comparison_is_the_median_of_the_ratios_of_rounds(self, tmp_path: Path) -> None:
        calls: list[str] = []
        runs = {"ours": iter([9.0, 2.0, 6.0, 8.0]), "theirs": iter([9.0, 4.0, 2.0, 4.0])}

        def run(name: str) -> float:
            calls.append(name)
            return next(runs[name])

        ours, theirs = alternate(3, partial(run, "ours"), partial(run, "theirs"))
        assert calls == ["ours", "theirs"] * 4
        recorder = Recorder("engine", tmp_path)
        assert recorder.compare("speed", ours, theirs, "tokens/s", peer="them") == 2.0
        (figure,) = recorder.figures
        assert (figure.value, figure.low, figure.high, figure.peer_value, figure.ratio) == (6.0, 2.0, 8.0, 4.0, 2.0)

    def test_another_model_or_kernel_has_a_file_of_its_own(self, tmp_path: Path) -> None:
        recorder = Recorder("engine", tmp_path, model="org/Tiny_Model-0.5B")
        assert recorder.add("size", 1.0, "MiB", topic="memory").topic == "memory-tiny-model-0-5b"
        assert recorder.path == tmp_path / "engine-tiny-model-0-5b.json"
        assert Recorder("engine", tmp_path, kernels="amx").topic == "engine-amx"
        here = Machine.here()
        assert here.model_copy(update={"isa": "avx2 avx512_bf16 amx_bf16"}).kernels == "amx"
        assert here.model_copy(update={"isa": "avx2 avx512_bf16"}).kernels == ""


class TestFigure:
    def test_half_a_figure_is_refused(self) -> None:
        interval = {"low": 3.0, "high": 4.0, "interval": "95%"}
        for wrong in ({"low": 1.0}, interval, {"peer_value": 1.0}, {"value": float("nan")}):
            with pytest.raises(ValidationError):
                Figure(**{"topic": "engine", "name": "x", "value": 2.0, "unit": "s", **wrong})

    @pytest.mark.parametrize(
        ("facts", "met"),
        [
            ({}, None),
            ({"goal": 2}, True),
            ({"goal": 2.5}, False),
            ({"goal": 2.5, "better": "lower"}, True),
            ({"goal": 2.5, "better": "lower", "low": 1, "high": 3, "interval": "95%"}, False),
            ({"goal": 2.5, "better": "lower", "low": 1, "high": 3, "interval": "rounds"}, True),
            ({"goal": 1.5, "peer": "p", "ratio": 1.4}, False),
        ],
    )
    def test_a_goal_is_for_the_ratio_or_the_worse_end_of_the_interval(
        self, facts: dict[str, Any], met: bool | None
    ) -> None:
        assert Figure(**{"topic": "engine", "name": "x", "value": 2.0, "unit": "s", **facts}).met is met
