"""The scan: which layers a model can do without; a heat map of skipped blocks and loops, and a greedy removal path.

The reference is the model itself at full depth: its own greedy answers to bare prompts (teacher-forced, so that one
pass judges all tokens), and the choice it prefers. A scan measures and decides nothing; what it found saves as JSON,
and `policy_of` turns picked programs into a policy whose tiers say what was measured. Renders nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import BaseModel, Field

from polar_sdk.engine.pack import Question, packs
from polar_sdk.engine.scoring import Score, score_programs
from polar_sdk.errors import DataError
from polar_sdk.lab.items import ChoiceItem, builtin_items
from polar_sdk.lab.rewards.measure import preferred_choice
from polar_sdk.lab.rewards.tasks import choice_question
from polar_sdk.programs.cost import NOMINAL_OUTPUT, NOMINAL_PROMPT
from polar_sdk.programs.policy import Policy, Tier
from polar_sdk.programs.program import Program
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from polar_sdk.lab.items import AnswerItem, Item, PromptItem
    from polar_sdk.model import PolarModel

Share = Annotated[float, Field(ge=0, le=1)]
_BATCH: Final = 16
"""Prompts answered together for the reference."""


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
    """Scans one model on one calibration set.

    Attributes:
        model: The model; its policy's protected layers are never skipped.
        items: Calibration items, at least one.
        answer_tokens: Length of identity's answers to bare prompts. Unit: tokens.
        on_progress: Called with (stage, steps done, steps in all).
    """

    model: PolarModel
    items: Sequence[Item]
    answer_tokens: int = 24
    on_progress: Progress = silent

    def __post_init__(self) -> None:
        if not self.items:
            raise DataError("the calibration set is empty; give at least one prompt.")

    def scan(self, lengths: Sequence[int] = (1, 2, 3), *, loops: bool = True, removals: int = 8) -> ScanReport:
        """Measure blocks of skipped layers, loops, and a greedy path of removals; see the function `scan`."""
        skips = [program for length in lengths for program in self._blocks(length)]
        doubled = [Program.looping(self._depth, {layer: 2}) for layer in self._free] if loops else []
        scores = self.measure([*skips, *doubled], "heat map")
        return ScanReport(
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            dtype=self.model.dtype,
            prompts=len(self._prompts),
            questions=len(self._choices),
            answer_tokens=sum(question.tokens - len(question.prompt) for question in self._answers),
            identity=self._score(self._identity, self._reference[0], self._reference[1]),
            skips=tuple(scores[program] for program in skips),
            loops=tuple(scores[program] for program in doubled),
            path=tuple(self._remove(removals)),
        )

    def measure(self, programs: Iterable[Program], stage: str = "programs") -> dict[Program, ProgramScore]:
        """Score programs against identity on the calibration set."""
        distinct = list(dict.fromkeys(programs))
        passes = len(list(packs(self._answers))) + len(list(packs(self._choice_questions)))
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            self.on_progress(stage, done, passes * len(distinct))

        answers = score_programs(self.model.loaded.decoder, self._answers, distinct, step)
        choices = score_programs(self.model.loaded.decoder, self._choice_questions, distinct, step)
        return {program: self._score(program, answers[program], choices[program]) for program in distinct}

    @property
    def _depth(self) -> int:
        return self.model.depth

    @cached_property
    def _identity(self) -> Program:
        return Program.identity(self._depth)

    @cached_property
    def _free(self) -> list[int]:
        protected = {layer % self._depth for layer in self.model.policy.protected}
        return [layer for layer in range(self._depth) if layer not in protected]

    def _blocks(self, length: int) -> list[Program]:
        free = set(self._free)
        starts = [start for start in self._free if all(start + offset in free for offset in range(length))]
        return [Program.skipping(self._depth, range(start, start + length)) for start in starts]

    def _remove(self, removals: int) -> Iterable[ProgramScore]:
        """Greedy path: remove the layer whose absence costs least, measured on top of those already gone."""
        gone: list[int] = []
        for count in range(1, min(removals, len(self._free)) + 1):
            candidates = {
                Program.skipping(self._depth, [*gone, layer]): layer for layer in self._free if layer not in gone
            }
            scores = self.measure(candidates, f"removal {count} of {removals}")
            best = max(scores.values(), key=lambda score: (-(score.excess_nats or 0.0), score.fidelity))
            gone.append(candidates[best.program])
            yield best

    @cached_property
    def _prompts(self) -> list[PromptItem | AnswerItem]:
        return [item for item in self.items if not isinstance(item, ChoiceItem)]

    @cached_property
    def _choices(self) -> list[ChoiceItem]:
        return [item for item in self.items if isinstance(item, ChoiceItem)]

    @cached_property
    def _answers(self) -> list[Question]:
        """Bare prompts, each continued by what identity answers."""
        texts = [item.prompt for item in self._prompts]
        questions: list[Question] = []
        for start in range(0, len(texts), _BATCH):
            self.on_progress("reference answers", start, len(texts))
            batch = texts[start : start + _BATCH]
            prompts = [tuple(self.model.prompt_tokens(text)) for text in batch]
            answers = self.model.greedy_answers(batch, max_tokens=self.answer_tokens)
            questions += [Question(prompt, (answer,)) for prompt, answer in zip(prompts, answers, strict=True)]
        return questions

    @cached_property
    def _choice_questions(self) -> list[Question]:
        return [choice_question(self.model, item) for item in self._choices]

    @cached_property
    def _reference(self) -> tuple[list[Score], list[Score]]:
        decoder = self.model.loaded.decoder
        answers = score_programs(decoder, self._answers, [self._identity])[self._identity]
        choices = score_programs(decoder, self._choice_questions, [self._identity])[self._identity]
        return answers, choices

    def _score(self, program: Program, answers: Sequence[Score], choices: Sequence[Score]) -> ProgramScore:
        full = self.model.cost(prompt=NOMINAL_PROMPT, output=NOMINAL_OUTPUT).total
        ratio = self.model.cost(program, prompt=NOMINAL_PROMPT, output=NOMINAL_OUTPUT).total / full
        score = ProgramScore(program=program, flops_ratio=ratio)
        if answers:
            score = score.model_copy(update=self._on_answers(answers))
        if choices:
            score = score.model_copy(update=self._on_choices(choices))
        return score

    def _on_answers(self, answers: Sequence[Score]) -> dict[str, float]:
        tokens = [token for question in self._answers for token in question.continuations[0]]
        chosen = [token for score in answers for token in score.greedy[0]]
        lost = sum(
            full.loglikelihoods[0] - score.loglikelihoods[0]
            for full, score in zip(self._reference[0], answers, strict=True)
        )
        same = sum(a == b for a, b in zip(tokens, chosen, strict=True))
        return {"agreement": same / len(tokens), "excess_nats": lost / len(tokens)}

    def _on_choices(self, choices: Sequence[Score]) -> dict[str, float]:
        lengths = [[len(choice) for choice in item.choices] for item in self._choices]
        ours = [preferred_choice(score, size) for score, size in zip(choices, lengths, strict=True)]
        full = [preferred_choice(score, size) for score, size in zip(self._reference[1], lengths, strict=True)]
        right = [item.answer for item in self._choices]
        return {
            "same_choice": sum(a == b for a, b in zip(ours, full, strict=True)) / len(ours),
            "accuracy": sum(a == b for a, b in zip(ours, right, strict=True)) / len(ours),
        }


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
