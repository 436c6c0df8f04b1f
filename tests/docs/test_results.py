"""The figures of the documents are those of the files in `benchmarks/results`, which are as benchmarks write them."""

from __future__ import annotations

import datetime
import importlib.util
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from benchmarks.results import RESULTS, Figure, Machine, Recorder, Run, newest, read_runs, write_run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
MACHINE = Machine(processor="p", cores=2, memory_gib=4, isa="avx2")
DAY = datetime.date(2026, 11, 25)

numbers = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(min_size=1, max_size=20)
topics = st.sampled_from(["engine", "billing", "engine-tiny-2"])


def a_run(day: datetime.date = DAY, **values: float) -> Run:
    return Run(
        topic="engine",
        date=day,
        command="c",
        commit=None,
        machine=MACHINE,
        versions={},
        quiet=True,
        figures=tuple(Figure(topic="engine", name=name, value=value, unit="s") for name, value in values.items()),
    )


@st.composite
def figures(draw: st.DrawFn) -> Figure:
    low, value, high = sorted(draw(st.lists(numbers, min_size=3, max_size=3)))
    interval = draw(st.sampled_from([None, "95%", "rounds", "seeds"]))
    peer = draw(st.none() | words)
    return Figure(
        topic=draw(topics),
        name=draw(words),
        value=value,
        unit=draw(st.text(max_size=5)),
        low=low if interval else None,
        high=high if interval else None,
        interval=interval,
        goal=draw(st.none() | numbers),
        better=draw(st.sampled_from(["higher", "lower"])),
        peer=peer,
        peer_value=draw(numbers) if peer else None,
        ratio=draw(st.none() | numbers),
        note=draw(st.none() | words),
    )


runs = st.builds(
    Run,
    topic=topics,
    date=st.dates(),
    command=words,
    commit=st.none() | words,
    machine=st.builds(Machine, processor=words, cores=st.integers(1, 99), memory_gib=st.integers(0, 99), isa=words),
    versions=st.dictionaries(words, words, max_size=2),
    quiet=st.booleans(),
    transcribed=st.booleans(),
    note=st.none() | words,
    figures=st.lists(figures(), max_size=4, unique_by=lambda one: (one.topic, one.name)).map(tuple),
)


class TestFiles:
    @given(run=runs)
    def test_a_run_is_read_back_as_it_was(self, run: Run) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = write_run(run, Path(folder))
            assert path.name == f"{run.date}-{run.topic}.json"
            assert read_runs(Path(folder)) == [run]
            assert path.read_text(encoding="utf-8") == run.text

    @given(st.lists(st.tuples(st.dates(), st.sets(st.sampled_from("abc"), min_size=1)), min_size=1, max_size=12))
    def test_the_newest_run_that_has_a_figure_gives_it(self, made: list[tuple[datetime.date, set[str]]]) -> None:
        """By date; on the same day, the one written last."""
        with tempfile.TemporaryDirectory() as folder:
            for number, (day, names) in enumerate(made):
                write_run(a_run(day, **{name: float(number) for name in names}), Path(folder))
            found = newest("engine", Path(folder))
            for name in {name for _, names in made for name in names}:
                day, last = max((day, number) for number, (day, names) in enumerate(made) if name in names)
                assert (found[name].run.date, found[name].figure.value) == (day, last)
            assert not newest("billing", Path(folder))

    def test_a_second_run_of_a_day_replaces_nothing(self, tmp_path: Path) -> None:
        paths = [write_run(a_run(x=value), tmp_path) for value in (1.0, 2.0)]
        assert [path.name for path in paths] == ["2026-11-25-engine.json", "2026-11-25-engine.2.json"]
        assert [run.figures[0].value for run in read_runs(tmp_path)] == [1.0, 2.0]

    def test_a_recorder_keeps_one_file_and_knows_where_it_ran(self, tmp_path: Path) -> None:
        recorder = Recorder("engine", tmp_path)
        recorder.add("speed", 123.456, "tokens/s", low=123.111, high=124.0, interval="rounds", goal=100)
        recorder.add("size", 1234.5, "MiB", topic="memory")
        (run,) = read_runs(tmp_path)
        assert run == recorder.run
        assert [(one.topic, one.value, one.low) for one in run.figures] == [
            ("engine", 123.5, 123.1),
            ("memory", 1234.0, None),
        ]
        assert run.machine.processor
        assert run.machine.cores >= 1
        assert run.versions["python"]
        assert not run.transcribed

    def test_another_model_has_topics_of_its_own(self, tmp_path: Path) -> None:
        recorder = Recorder("engine", tmp_path, model="org/Tiny_Model-0.5B")
        recorder.add("size", 1.0, "MiB", topic="memory")
        assert recorder.run.topic == "engine-tiny-model-0-5b"
        assert list(newest("memory-tiny-model-0-5b", tmp_path)) == ["size"]

    def test_other_kernels_have_topics_of_their_own(self, tmp_path: Path) -> None:
        assert Recorder("engine", tmp_path, kernels="amx").run.topic == "engine-amx"
        here = Machine.here()
        assert here.model_copy(update={"isa": "avx2 avx512_bf16 amx_bf16"}).kernels == "amx"
        assert here.model_copy(update={"isa": "avx2 avx512_bf16"}).kernels == ""

    @pytest.mark.parametrize(
        "wrong",
        [{"low": 1.0}, {"low": 3.0, "high": 4.0, "interval": "95%"}, {"peer_value": 1.0}, {"value": float("nan")}],
        ids=str,
    )
    def test_half_a_figure_is_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            Figure(**{"topic": "engine", "name": "x", "value": 2.0, "unit": "s", **wrong})

    def test_a_name_stands_once_in_a_run(self) -> None:
        with pytest.raises(ValidationError, match="named twice"):
            Run(**{**dict(a_run(x=1.0)), "figures": a_run(x=1.0).figures * 2})

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


class TestDocuments:
    @staticmethod
    def generator() -> Any:
        spec = importlib.util.spec_from_file_location("generate_results", ROOT / "docs" / "generate_results.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def test_every_file_is_a_run_as_it_would_be_written_today(self) -> None:
        paths = [path for path in RESULTS.glob("*.json") if path.name[0].isdigit()]
        assert len(paths) == len(read_runs()) > 0
        for path in paths:
            run = Run.model_validate_json(path.read_text(encoding="utf-8"))
            assert path.name.startswith(f"{run.date}-{run.topic}.")
            assert path.read_text(encoding="utf-8") == run.text, path.name
            assert run.commit or run.transcribed, f"{path.name}: only a transcribed run may have no commit"

    def test_the_results_page_is_generated(self) -> None:
        module = self.generator()
        assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run: python docs/generate_results.py"

    def test_the_figures_of_the_readme_are_generated(self) -> None:
        module = self.generator()
        text = module.README.read_text(encoding="utf-8")
        assert text == module.with_figures(text), "run: python docs/generate_results.py"

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_every_interval_that_is_quoted_is_in_a_file(self, page: Path) -> None:
        """A pair in brackets, `−2.85 [−5.01, −0.69]`, with the value before it, rounded as it may be."""
        number = r"([−+-]?\d[\d,]*(?:\.\d+)?)"
        quoted = re.compile(rf"(?:{number}[*%]*(?: points| percentage points)?[*]* \|? ?)?\[{number}, {number}\]")
        known = [
            (one.value, one.low, one.high)
            for run in read_runs()
            for one in run.figures
            if one.low is not None and one.high is not None
        ]
        for match in quoted.finditer(page.read_text(encoding="utf-8")):
            parts = [part for part in match.groups() if part is not None]
            assert any(
                all(_rounds_to(exact, part) for exact, part in zip(one[-len(parts) :], parts, strict=True))
                for one in known
            ), match[0]


def _rounds_to(exact: float, quoted: str) -> bool:
    """Whether a number is another one, rounded to fewer digits; a half may go either way."""
    text = quoted.replace("−", "-").replace(",", "")
    digits = len(text.partition(".")[2])
    return abs(exact - float(text)) <= 0.5 / 10.0**digits + 1e-9
