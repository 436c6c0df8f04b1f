"""Results: the current figures of benchmarks, one JSON file per topic and kind of processor in `benchmarks/results`.

A run replaces the figures that it measures again and leaves the others, each with the run that it comes from; git keeps
what was replaced. Knows nothing of what is measured; imports no package under test.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import sqlite3
import subprocess
import sys
from datetime import UTC, date, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import psutil
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["RESULTS", "Figure", "Machine", "Recorder", "Results", "Run", "arguments"]

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("torch", "transformers", "llama-cpp-python", "sqlalchemy")
EXTENSIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
QUIET_LOAD = 0.3
"""Load average per core below which nothing else counts as running."""
Topic = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(_Frozen):
    """One measured number."""

    run: int = 0
    """Index of its run in the file."""
    topic: Topic
    """Table it belongs to; a file may hold several."""
    name: Annotated[str, Field(min_length=1)]
    """Name, unique within the topic: `row: column` where the table has columns."""
    value: FiniteFloat
    unit: str
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    interval: Literal["95%", "rounds", "seeds"] | None = None
    """Kind of `low` and `high`: a 95% confidence interval, or the range over rounds or training seeds."""
    goal: FiniteFloat | None = None
    """Goal for the ratio where there is one, else for the value."""
    better: Literal["higher", "lower"] = "higher"
    peer: str | None = None
    """Name of what the value is compared with."""
    peer_value: FiniteFloat | None = None
    """Value of the peer, in the same unit."""
    ratio: FiniteFloat | None = None
    """Ours over the peer's; the median over rounds, so it may differ from the ratio of the two medians."""
    note: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if len({self.low is None, self.high is None, self.interval is None}) > 1:
            raise ValueError(f"{self.name}: low, high and interval belong together")
        if self.low is not None and self.high is not None and not self.low <= self.value <= self.high:
            raise ValueError(f"{self.name}: {self.value} is not between {self.low} and {self.high}")
        if self.peer is None and self.peer_value is not None:
            raise ValueError(f"{self.name}: peer_value needs the name of the peer")
        return self

    @property
    def numbers(self) -> list[float]:
        """All of its numbers, as a page may quote them."""
        facts = (self.value, self.low, self.high, self.goal, self.peer_value, self.ratio)
        return [number for number in facts if number is not None]

    @property
    def met(self) -> bool | None:
        """Whether the goal was met; None without a goal. A 95% interval must lie on the right side as a whole."""
        if self.goal is None:
            return None
        worst = self.low if self.better == "higher" else self.high
        value = worst if self.interval == "95%" and worst is not None else self.value
        value = value if self.ratio is None else self.ratio
        return value >= self.goal if self.better == "higher" else value <= self.goal


class Machine(_Frozen):
    """The machine of a run."""

    processor: str
    cores: int
    memory_gib: int
    isa: str
    """Instruction set extensions that matter here."""
    accelerator: str | None = None

    @classmethod
    def here(cls, accelerator: str | None = None) -> Machine:
        """This machine."""
        cpu = _cpu_info()
        flags = re.split(r"\s+", cpu.get("flags", cpu.get("Features", "")))
        return cls(
            processor=cpu.get("model name") or platform.processor() or platform.machine(),
            cores=os.cpu_count() or 1,
            memory_gib=round(psutil.virtual_memory().total / 2**30),
            isa=" ".join(name for name in EXTENSIONS if name in flags) or platform.machine(),
            accelerator=accelerator,
        )

    @property
    def kernels(self) -> str:
        """`amx` where the engine's products go by AMX's tiles on the CPU; most figures are of processors without."""
        return "amx" if "amx_bf16" in self.isa.split() and self.accelerator is None else ""


class Run(_Frozen):
    """One run of a benchmark."""

    date: date
    command: str
    commit: str | None
    """Commit measured, with `-dirty` where the working tree had changes; None = not recorded."""
    machine: Machine
    versions: dict[str, str]
    quiet: bool
    """Whether the machine had nothing else to do; speeds of other runs are good for ratios at most."""
    note: str | None = None


class Results(_Frozen):
    """The file of a topic: current figures, and the runs they come from."""

    topic: Topic
    runs: tuple[Run, ...]
    figures: tuple[Figure, ...]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        names = [(figure.topic, figure.name) for figure in self.figures]
        if len(set(names)) < len(names):
            raise ValueError(f"figures named twice: {sorted({name for name in names if names.count(name) > 1})}")
        if {figure.run for figure in self.figures} != set(range(len(self.runs))):
            raise ValueError("each figure needs a run of the file, and each run a figure")
        return self

    def updated(self, run: Run, figures: list[Figure]) -> Results:
        """These results with figures of a new run, in the place of those of the same name."""
        current = {(one.topic, one.name): (one, self.runs[one.run]) for one in self.figures}
        current |= {(one.topic, one.name): (one, run) for one in figures}
        runs: list[Run] = []
        for _, origin in current.values():
            if origin not in runs:
                runs.append(origin)
        placed = [one.model_copy(update={"run": runs.index(origin)}) for one, origin in current.values()]
        return Results(topic=self.topic, runs=tuple(runs), figures=tuple(placed))

    @property
    def text(self) -> str:
        """JSON with a line per run and per figure, so that a diff shows which figures changed."""

        def lines(models: tuple[_Frozen, ...]) -> str:
            plain = (one.model_dump(mode="json", exclude_defaults=True) for one in models)
            return ",\n".join(f"  {json.dumps(one, ensure_ascii=False)}" for one in plain)

        runs, figures = lines(self.runs), lines(self.figures)
        return f'{{\n "topic": "{self.topic}",\n "runs": [\n{runs}\n ],\n "figures": [\n{figures}\n ]\n}}\n'

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a file."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the option that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the file of figures")
    return parser


class Recorder:
    """Records and prints the figures of a run; its file is up to date after each, so that Ctrl-C loses nothing.

    Args:
        topic: Topic of the file, and of its figures unless they name another.
        folder: Folder of the file.
        model: Another model than the default one.
        device: Device that the model runs on.
        kernels: The engine's kernels for CPUs, where others than those of most figures.

    Another model, device or kernel has a file of its own: its figures replace none of the default model's on a CPU.
    """

    def __init__(
        self,
        topic: str,
        folder: Path = RESULTS,
        *,
        model: str | Path | None = None,
        device: str = "cpu",
        kernels: str = "",
    ) -> None:
        variant = f"{Path(model).name if model else ''} {device.removeprefix('cpu')} {kernels}".lower()
        self._suffix = "".join(f"-{part}" for part in re.findall("[a-z0-9]+", variant))
        self.topic = topic + self._suffix
        self.path = folder / f"{self.topic}.json"
        self.figures: list[Figure] = []
        self._before = Results.read(self.path) if self.path.exists() else Results(topic=self.topic, runs=(), figures=())
        self.run = Run(
            date=datetime.now(UTC).date(),
            command=shlex.join(["python", *sys.orig_argv[1:]]),
            commit=_commit(),
            machine=Machine.here(None if device == "cpu" else _accelerator(device)),
            versions=_versions(),
            quiet=psutil.getloadavg()[0] / (os.cpu_count() or 1) < QUIET_LOAD,
        )

    def add(self, name: str, value: float, unit: str, *, topic: str | None = None, **facts: Any) -> Figure:
        """Record a figure, rounded to four digits; `facts` are further fields of `Figure`. Prints a row of a table."""
        numbers = {key: _rounded(fact) if isinstance(fact, float) else fact for key, fact in facts.items()}
        topic = self.topic if topic is None else topic + self._suffix
        figure = Figure(topic=topic, name=name, value=_rounded(value), unit=unit, **numbers)
        if not self.figures:
            print("| what | ours | peer | ratio | note |\n|---|---|---|---|---|")
        self.figures.append(figure)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self._before.updated(self.run, self.figures).text
        self.path.write_text(text, encoding="utf-8", newline="\n")
        print(_row(figure), flush=True)
        return figure

    def add_rounds(self, name: str, values: Sequence[float], unit: str, **facts: Any) -> Figure:
        """Record the median over rounds, with their range where there are several."""
        if len(values) > 1:
            facts |= {"low": min(values), "high": max(values), "interval": "rounds"}
        return self.add(name, median(values), unit, **facts)

    def compare(
        self, name: str, ours: Sequence[float], theirs: Sequence[float], unit: str, *, peer: str, **facts: Any
    ) -> float:
        """Record the median beside a peer's, round by round; returns the median ratio."""
        ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
        spread = f"ratios of the rounds: {min(ratios):.2f} to {max(ratios):.2f}"
        facts["note"] = "; ".join(filter(None, [facts.get("note"), spread]))
        self.add_rounds(name, ours, unit, peer=peer, peer_value=median(theirs), ratio=median(ratios), **facts)
        return median(ratios)


def _row(figure: Figure) -> str:
    spread = "" if figure.low is None else f" ({figure.low:,g} to {figure.high:,g})"
    goal = f", goal {figure.goal:g}" if figure.goal is not None else ""
    peer = "" if figure.peer_value is None else f"{figure.peer}: {figure.peer_value:,g}"
    ratio = "" if figure.ratio is None else f"**{figure.ratio:.2f}**"
    return f"| {figure.name} | {figure.value:,g} {figure.unit}{spread}{goal} | {peer} | {ratio} | {figure.note or ''} |"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}") if abs(value) < 1_000 else float(round(value))


def _cpu_info() -> dict[str, str]:
    """Facts of the first core, by the names that Linux gives them; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines() if path.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _accelerator(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        ended = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return ended.stdout.strip()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
