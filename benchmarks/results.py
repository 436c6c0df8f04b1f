"""What benchmarks measured, as data: one JSON file per run in `benchmarks/results`, named `<date>-<topic>.json`.

`docs/generate_results.py` makes `docs/results.md` and the figures of the README from the newest ones. A second run of a
topic on the same day is `<date>-<topic>.2.json`, so nothing is overwritten. Knows nothing of what is measured;
imports no package under test.
"""

from __future__ import annotations

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
from typing import Annotated, Any, Literal, NamedTuple, Self

import psutil
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

__all__ = ["RESULTS", "Figure", "Found", "Machine", "Recorder", "Run", "newest", "read_runs", "write_run"]

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("torch", "transformers", "llama-cpp-python", "sqlalchemy")
EXTENSIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
QUIET_LOAD = 0.3
"""Load average per core below which nothing else counts as running."""
Topic = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$")]
_FILE = re.compile(r"(\d{4}-\d{2}-\d{2})-([a-z0-9-]+)(?:\.(\d+))?\.json")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(_Frozen):
    """One measured number."""

    topic: Topic
    """The table it belongs to; one run may fill several."""
    name: Annotated[str, Field(min_length=1)]
    """What was measured, unique within the topic. `row: column` where the table has columns."""
    value: FiniteFloat
    unit: str
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    interval: Literal["95%", "rounds", "seeds"] | None = None
    """What `low` and `high` are: a 95% confidence interval, or the range over rounds or training seeds."""
    goal: FiniteFloat | None = None
    """For the ratio where there is one, else for the value."""
    better: Literal["higher", "lower"] = "higher"
    peer: str | None = None
    """What the value is compared with."""
    peer_value: FiniteFloat | None = None
    """In the same unit."""
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
    def met(self) -> bool | None:
        """Whether the goal was met; None without a goal. A 95% interval must lie on the right side as a whole."""
        if self.goal is None:
            return None
        worst = self.low if self.better == "higher" else self.high
        value = worst if self.interval == "95%" and worst is not None else self.value
        value = value if self.ratio is None else self.ratio
        return value >= self.goal if self.better == "higher" else value <= self.goal


class Machine(_Frozen):
    """What a run was made on."""

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

    topic: Topic
    """Names the file."""
    date: date
    command: str
    commit: str | None
    """With `-dirty` where the working tree had changes; None = not recorded."""
    machine: Machine
    versions: dict[str, str]
    quiet: bool
    """Whether the machine had nothing else to do; speeds of other runs are good for ratios at most."""
    transcribed: bool = False
    """Copied by hand from a record in prose, from before benchmarks wrote files."""
    note: str | None = None
    figures: tuple[Figure, ...]

    @model_validator(mode="after")
    def _unique(self) -> Self:
        names = [(figure.topic, figure.name) for figure in self.figures]
        if len(set(names)) < len(names):
            raise ValueError(f"figures named twice: {sorted({name for name in names if names.count(name) > 1})}")
        return self

    @property
    def text(self) -> str:
        """As JSON with a line per figure, so that a diff shows which figures changed."""
        head = json.dumps(self.model_dump(mode="json", exclude={"figures"}), indent=1, ensure_ascii=False)
        figures = [one.model_dump(mode="json", exclude_defaults=True) for one in self.figures]
        lines = ",\n".join(f"  {json.dumps(one, ensure_ascii=False)}" for one in figures)
        return head.removesuffix("\n}") + f',\n "figures": [\n{lines}\n ]\n}}\n'


class Found(NamedTuple):
    """A figure and the run it is from."""

    figure: Figure
    run: Run


class Recorder:
    """Collects the figures of a run that begins now, and keeps its file up to date, so that Ctrl-C loses nothing.

    Args:
        topic: Of the run, and of its figures unless they name another.
        folder: Where the file goes.
        model: Another model than the default one.
        device: What the model runs on.
        kernels: Which of the engine's kernels for CPUs are measured, where others than those of most figures.

    Another model, device or kernel has topics of its own: its figures replace none of the default model's on a CPU.
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
        self.folder = folder
        self.path: Path | None = None
        variant = f"{Path(model).name if model else ''} {device.removeprefix('cpu')} {kernels}".lower()
        self._suffix = "".join(f"-{part}" for part in re.findall("[a-z0-9]+", variant))
        self.run = Run(
            topic=topic + self._suffix,
            date=datetime.now(UTC).date(),
            command=shlex.join(["python", *sys.orig_argv[1:]]),
            commit=_commit(),
            machine=Machine.here(None if device == "cpu" else _accelerator(device)),
            versions=_versions(),
            quiet=psutil.getloadavg()[0] / (os.cpu_count() or 1) < QUIET_LOAD,
            figures=(),
        )

    def add(self, name: str, value: float, unit: str, *, topic: str | None = None, **facts: Any) -> Figure:
        """Record a figure, rounded to four digits; `facts` are further fields of `Figure`."""
        numbers = {key: _rounded(fact) if isinstance(fact, float) else fact for key, fact in facts.items()}
        topic = self.run.topic if topic is None else topic + self._suffix
        figure = Figure(topic=topic, name=name, value=_rounded(value), unit=unit, **numbers)
        self.run = Run(**{**dict(self.run), "figures": (*self.run.figures, figure)})
        self.path = write_run(self.run, self.folder, self.path)
        return figure


def write_run(run: Run, folder: Path = RESULTS, path: Path | None = None) -> Path:
    """Write a run to its file, or over the one it has already."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while path is None:
        name = folder / f"{run.date}-{run.topic}{f'.{number}' if number > 1 else ''}.json"
        number, path = number + 1, None if name.exists() else name
    path.write_text(run.text, encoding="utf-8", newline="\n")
    return path


def read_runs(folder: Path = RESULTS) -> list[Run]:
    """All runs, oldest first."""
    found = [(match, path) for path in folder.glob("*.json") if (match := _FILE.fullmatch(path.name))]
    found.sort(key=lambda one: (one[0][1], one[0][2], int(one[0][3] or 1)))
    return [Run.model_validate_json(path.read_text(encoding="utf-8")) for _, path in found]


def newest(topic: str, folder: Path = RESULTS) -> dict[str, Found]:
    """The figures of a topic by name, each from the newest run that has it."""
    return {one.name: Found(one, run) for run in read_runs(folder) for one in run.figures if one.topic == topic}


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
