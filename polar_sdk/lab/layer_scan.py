"""The scan: which layers a model can do without; a heat map of skipped blocks and loops, and a greedy removal path.

The reference is the model itself at full depth: its own greedy answers to bare prompts (teacher-forced, so that one
pass judges all tokens), and the choice it prefers. A scan measures and decides nothing; what it found saves as JSON,
and `policy_of` turns picked programs into a policy whose tiers say what was measured. Renders nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, Field

from polar_sdk.errors import DataError
from polar_sdk.lab.items import ChoiceItem, builtin_items
from polar_sdk.lab.rewards.cache import RewardCache
from polar_sdk.lab.rewards.measure import Measurer, preferred_choice
from polar_sdk.lab.rewards.tasks import make_tasks
from polar_sdk.programs.policy import Policy, Tier
from polar_sdk.programs.program import Program
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from polar_sdk.engine.scoring import Score
    from polar_sdk.lab.items import Item
    from polar_sdk.model import PolarModel

Share = Annotated[float, Field(ge=0, le=1)]


class ProgramScore(BaseModel, frozen=True):
    """One program, measured against identity on the calibration items."""

    program: Program
    flops_ratio: float
    """FLOPs over identity's, at 128 prompt and 64 output tokens."""
    agreement: Share | None = None
    """Bare prompts: share of the tokens of identity's own answers that the program would choose too, given the tokens
    before. None where the set holds no bare prompts."""
    excess_nats: float | None = None
    """Bare prompts: mean loss in log-likelihood per token of identity's answers. Unit: nats."""
    same_choice: Share | None = None
    """Choice questions: share where the program prefers the same choice as identity. None where there are none."""
    accuracy: Share | None = None
    """Choice questions: share where the program prefers the right choice."""

    @property
    def fidelity(self) -> float:
        """How much stays as at full depth: the lower of `agreement` and `same_choice`."""
        return min(value for value in (self.agreement, self.same_choice) if value is not None)


class ScanReport(BaseModel, frozen=True):
    """A whole scan."""

    model: str
    fingerprint: str
    dtype: str
    prompts: int
    """Bare prompts used."""
    questions: int
    """Choice questions used."""
    answer_tokens: int
    """Tokens of identity's own answers that agreement is measured on."""
    identity: ProgramScore
    skips: tuple[ProgramScore, ...]
    """One per block of skipped layers."""
    loops: tuple[ProgramScore, ...]
    """One per layer visited twice."""
    path: tuple[ProgramScore, ...]
    """Greedy removal of one layer after another, each time the one that costs least."""

    def cheapest(self, floor: float) -> ProgramScore:
        """The cheapest program of the path with at least that fidelity; identity where none has it."""
        good = [score for score in (self.identity, *self.path) if score.fidelity >= floor]
        return min(good, key=lambda score: score.flops_ratio)


def scan(
    model: PolarModel,
    items: Sequence[Item] | None = None,
    *,
    lengths: Sequence[int] = (1, 2, 3),
    loops: bool = True,
    removals: int = 8,
    answer_tokens: int = 24,
    on_progress: Progress = silent,
) -> ScanReport:
    """Measure which layers a model can do without: blocks of skipped layers, loops, and a greedy path of removals.

    Args:
        model: The model; its policy's protected layers are never skipped.
        items: Calibration items; None = the prompts that come with the package.
        lengths: Lengths of the skipped blocks; each starts at every layer where no protected layer is in the way.
        loops: Whether to measure each layer visited twice.
        removals: Layers removed one after another; 0 leaves the path out.
        answer_tokens: Length of identity's answers to bare prompts. Unit: tokens.
        on_progress: Called with (stage, steps done, steps in all).

    Raises:
        DataError: There is no item.
    """
    scanner = Scanner(model, builtin_items() if items is None else items, answer_tokens, on_progress)
    return scanner.scan(lengths, loops=loops, removals=removals)


@dataclass
class Scanner:
    """Scans one model on one calibration set; see `scan`."""

    model: PolarModel
    items: Sequence[Item]
    answer_tokens: int = 24
    on_progress: Progress = silent

    def __post_init__(self) -> None:
        cache = RewardCache()
        self._measurer = Measurer(self.model, cache, self.on_progress)
        self._tasks = make_tasks(
            self.model, self.items, cache, answer_tokens=self.answer_tokens, on_progress=self.on_progress
        )
        if not self._tasks:
            raise DataError("the calibration set has no prompt that fits the model; give at least one.")
        self._identity = Program.identity(self.model.depth)
        self._free = self.model.policy.free(self.model.depth)

    def scan(self, lengths: Sequence[int] = (1, 2, 3), *, loops: bool = True, removals: int = 8) -> ScanReport:
        """Measure blocks of skipped layers, loops, and a greedy path of removals."""
        depth = self.model.depth
        skips = [program for length in lengths for program in self._blocks(length)]
        doubled = [Program.looping(depth, {layer: 2}) for layer in self._free] if loops else []
        scores = self.measure([self._identity, *skips, *doubled], "heat map")
        written = [task for task in self._tasks if task.kind != "choice"]
        return ScanReport(
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            dtype=self.model.dtype,
            prompts=len(written),
            questions=len(self._tasks) - len(written),
            answer_tokens=sum(len(task.question.continuations[0]) for task in written),
            identity=scores[self._identity],
            skips=tuple(scores[program] for program in skips),
            loops=tuple(scores[program] for program in doubled),
            path=tuple(self._remove(removals)),
        )

    def measure(self, programs: Iterable[Program], stage: str = "programs") -> dict[Program, ProgramScore]:
        """Score programs against identity on the calibration set."""
        distinct = list(dict.fromkeys(programs))
        scores = self._measurer.scores(self._tasks, [self._identity, *distinct], stage)
        return {program: self._score(program, scores[program], scores[self._identity]) for program in distinct}

    def _blocks(self, length: int) -> list[Program]:
        free = set(self._free)
        starts = [start for start in self._free if all(start + offset in free for offset in range(length))]
        return [Program.skipping(self.model.depth, range(start, start + length)) for start in starts]

    def _remove(self, removals: int) -> Iterable[ProgramScore]:
        """Greedy path: remove the layer whose absence costs least, measured on top of those already gone."""
        gone: list[int] = []
        for count in range(1, min(removals, len(self._free)) + 1):
            candidates = {
                Program.skipping(self.model.depth, [*gone, layer]): layer for layer in self._free if layer not in gone
            }
            scores = self.measure(candidates, f"removal {count} of {removals}")
            best = max(scores.values(), key=lambda score: (-(score.excess_nats or 0.0), score.fidelity))
            gone.append(candidates[best.program])
            yield best

    def _score(self, program: Program, ours: Sequence[Score], full: Sequence[Score]) -> ProgramScore:
        kept, chosen, right, lost = list[bool](), list[bool](), list[bool](), 0.0
        for task, own, reference in zip(self._tasks, ours, full, strict=True):
            if isinstance(task.item, ChoiceItem):
                choice = preferred_choice(own, task.characters)
                chosen.append(choice == preferred_choice(reference, task.characters))
                right.append(choice == task.item.answer)
            else:
                written = task.question.continuations[0]
                kept += [token == other for token, other in zip(own.greedy[0], written, strict=True)]
                lost += reference.loglikelihoods[0] - own.loglikelihoods[0]
        return ProgramScore(
            program=program,
            flops_ratio=self.model.decoder.cost.ratio(program),
            agreement=fmean(kept) if kept else None,
            excess_nats=lost / len(kept) if kept else None,
            same_choice=fmean(chosen) if chosen else None,
            accuracy=fmean(right) if right else None,
        )


def policy_of(report: ScanReport, picks: Mapping[str, ProgramScore]) -> Policy:
    """A policy for the scanned model: the picks, full depth for the other tiers, standard by default."""
    full = Tier(program=report.identity.program, note="Full depth.")
    tiers = {name: Tier(program=score.program, note=_note(report, score)) for name, score in picks.items()}
    return Policy(
        model=report.model,
        fingerprint=report.fingerprint,
        default_tier="standard",
        tiers={**tiers, "premium": full, "exact": full},
    )


def _note(report: ScanReport, score: ProgramScore) -> str:
    parts = [f"{score.flops_ratio:.1%} of full depth's FLOPs"]
    if score.agreement is not None:
        parts.append(f"{score.agreement:.1%} of {report.answer_tokens} answer tokens as at full depth")
    if score.same_choice is not None:
        parts.append(f"{score.same_choice:.1%} of {report.questions} choices as at full depth")
    return "Scanned: " + "; ".join(parts) + "."
