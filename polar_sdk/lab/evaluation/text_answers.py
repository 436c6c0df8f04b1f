"""Effect of a router on answers in text, by tier: tokens kept, teacher-forced, and answers written freely.

*Kept* are tokens of identity's answer that the tier's program would also choose, given the tokens before them. The
noise floor is the same for identity itself: its answer was written token by token, and scored again in one pass. A
sample of the prompts may also be answered freely: one different token changes all that follows, so these figures show
what a reader sees.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from pydantic import BaseModel

from polar_sdk.lab.healing.packs import make_packs
from polar_sdk.lab.items import AnswerItem, ChoiceItem, normalised
from polar_sdk.lab.training.outcomes import by_class, grouped
from polar_sdk.programs.program import Program
from polar_sdk.promises.losses import ANSWER_TOKENS, is_lost
from polar_sdk.router.base import IdentityRouter
from polar_sdk.router.exact_tests import Interval, mean_difference
from polar_sdk.serving.prefixes import common_start
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_sdk.lab.healing.packs import Pack
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.lab.training.outcomes import PromptOutcome
    from polar_sdk.model import PolarModel
    from polar_sdk.router.base import Router
    from polar_sdk.router.certificate import Setting
    from polar_sdk.router.learned import LearnedRouter


LENGTHS: Final = {"under_100": (0, 100), "100_to_500": (100, 501), "over_500": (501, 1 << 40)}
"""Lengths of prompts that are looked at apart, by name: from, and below. Unit: tokens."""
_CHRF: Final = 6
"""Longest runs of characters that chrF compares."""
_PACK_TOKENS: Final = 2048
"""Maximum tokens that are compared together: their logits are held twice."""


def length_name(tokens: int) -> str:
    """The name of the length, in `LENGTHS`, of a prompt of that many tokens."""
    return next(name for name, (low, high) in LENGTHS.items() if low <= tokens < high)


class TextFigures(BaseModel, frozen=True):
    """Some prompts answered in text, by one tier. Shares are fractions of 1."""

    prompts: int
    flops_saved: float
    tokens_kept: float
    """Mean share of the tokens of identity's answer that the tier would choose too."""
    tokens_kept_interval: tuple[float, float]
    """Its 95 % confidence interval, from prompt to prompt; from 0 to 1 for a single prompt."""
    strict_kept: float
    """Share of the answers that keep at least 95 % of their tokens."""
    three_quarters_kept: float
    """Share of the answers that keep at least three quarters of their tokens."""
    noise_floor: float
    """`tokens_kept` of identity against itself."""


class FreeFigures(BaseModel, frozen=True):
    """A sample of the prompts, answered freely by one tier, against identity's answers."""

    prompts: int
    same_text: float
    """Share of the answers that are the same to the last token."""
    first_divergence: float
    """Mean number of tokens before the first one that differs; the whole answer's where none does."""
    chrf: float
    """Mean chrF to identity's answer, from 0 to 1 (Popović, 2015; up to six characters, recall counts twice)."""
    repeated_4grams: float
    """Mean share of an answer's runs of four tokens that were there before."""
    gold_f1: float | None
    """Mean overlap of words with the right text, as in SQuAD; None if no right text is known."""
    gold_f1_drop: Interval | None
    """Identity's less the tier's, paired, with its 95 % interval."""
    kl_per_token: float
    """Mean divergence of the tier's token distribution from identity's, along identity's answer. Unit: nats."""


class TierTexts(TextFigures, frozen=True):
    """All prompts answered in text, by one tier."""

    by_length: dict[str, TextFigures]
    """Prompts of under 100, of 100 to 500, and of over 500 tokens."""
    by_kind: dict[str, TextFigures]
    """By the class that items name, where they name one."""
    worst_kind: str | None
    """The class that keeps the smallest share of its tokens."""
    free: FreeFigures | None = None


class TextRun(NamedTuple):
    """One tier on some prompts: what it does, and identity twice."""

    outcomes: Sequence[PromptOutcome]
    spent: Sequence[float]
    """FLOPs, those of the router included."""
    full: Sequence[float]
    """FLOPs of identity."""
    floor: Sequence[PromptOutcome]
    """Identity against itself."""
    lengths: Sequence[int]
    """Lengths of the prompts. Unit: tokens."""
    classes: Sequence[str]

    def figures(self, rows: Sequence[int]) -> TextFigures:
        """Figures over some of the prompts, at least one."""
        shares = [self.outcomes[row].share for row in rows]
        lost = mean_difference([1.0] * len(rows), shares)
        return TextFigures(
            prompts=len(rows),
            flops_saved=1 - sum(self.spent[row] for row in rows) / sum(self.full[row] for row in rows),
            tokens_kept=fmean(shares),
            tokens_kept_interval=(max(0.0, 1 - lost.high), min(1.0, 1 - lost.low)),
            strict_kept=fmean(not is_lost(share, "strict") for share in shares),
            three_quarters_kept=fmean(self.outcomes[row].agree for row in rows),
            noise_floor=fmean(self.floor[row].share for row in rows),
        )

    def whole(self, free: FreeFigures | None = None) -> TierTexts:
        """Figures over all prompts, by length and by class."""
        rows = range(len(self.outcomes))
        by_length = grouped(rows, lambda row: length_name(self.lengths[row]))
        kinds = {name: self.figures(of_kind) for name, of_kind in by_class(rows, self.classes).items()}
        return TierTexts(
            **self.figures(rows).model_dump(),
            by_length={name: self.figures(by_length[name]) for name in LENGTHS if name in by_length},
            by_kind=kinds,
            worst_kind=min(kinds, key=lambda name: (kinds[name].tokens_kept, name), default=None),
            free=free,
        )


class Answer(NamedTuple):
    """A text that a program wrote."""

    tokens: tuple[int, ...]
    text: str


def free_figures(ours: Sequence[Answer], identity: Sequence[Answer], gold: Mapping[int, str], kl: float) -> FreeFigures:
    """Compare answers that were written freely with identity's.

    Args:
        ours: One per prompt, at least one.
        identity: The same prompts.
        gold: The right text by the prompt's place, where it is known.
        kl: Mean divergence per token along identity's answers.
    """
    pairs = list(zip(ours, identity, strict=True))
    theirs = [f1(identity[place].text, text) for place, text in gold.items()]
    scores = [f1(ours[place].text, text) for place, text in gold.items()]
    return FreeFigures(
        prompts=len(pairs),
        same_text=fmean(one.tokens == other.tokens for one, other in pairs),
        first_divergence=fmean(common_start(one.tokens, other.tokens) for one, other in pairs),
        chrf=fmean(chrf(one.text, other.text) for one, other in pairs),
        repeated_4grams=fmean(repeated(answer.tokens) for answer in ours),
        gold_f1=fmean(scores) if scores else None,
        gold_f1_drop=mean_difference(theirs, scores) if scores else None,
        kl_per_token=kl,
    )


@dataclass(frozen=True)
class FreeRunner:
    """Answers a sample of prompts freely by every tier of a router that is bound, beside identity."""

    model: PolarModel
    router: LearnedRouter
    on_progress: Progress = silent

    def figures(self, tasks: Sequence[Task], points: Mapping[str, Setting]) -> dict[str, FreeFigures]:
        """Figures of each tier, given its setting of the dial, on prompts that are answered in text, at least one."""
        identity = self._written(tasks, IdentityRouter(self.model.depth))
        gold = {place: task.item.answer for place, task in enumerate(tasks) if isinstance(task.item, AnswerItem)}
        features = self.router.reader.stack([task.question.prompt for task in tasks])
        outputs = self.router.allowed(self.router.outputs(features), "text")
        found = {}
        for done, (tier, setting) in enumerate(points.items()):
            self.on_progress("writing freely", done, len(points))
            ours = self._written(tasks, self.router.at(setting)) if setting.text else identity
            lengths = [len(task.question.prompt) for task in tasks]
            programs = self.router.choose_all(outputs, setting.text, lengths)
            found[tier] = free_figures(ours, identity, gold, self._divergence(tasks, programs))
        return found

    def _written(self, tasks: Sequence[Task], router: Router) -> list[Answer]:
        prompts = [task.item.prompt for task in tasks if not isinstance(task.item, ChoiceItem)]
        answers = self.model.greedy_answers(prompts, max_tokens=ANSWER_TOKENS, router=router)
        return [Answer(tokens, self.model.decode(tokens)) for tokens in answers]

    @torch.inference_mode()
    def _divergence(self, tasks: Sequence[Task], programs: Sequence[Program]) -> float:
        """Mean over all tokens of identity's answers of KL(identity ‖ program), in nats."""
        decoder = self.model.decoder
        identity = Program.identity(decoder.depth)
        total, count = 0.0, 0
        for program in dict.fromkeys(programs):
            chosen = [task for task, other in zip(tasks, programs, strict=True) if other == program]
            for pack in make_packs(decoder, chosen, _PACK_TOKENS):
                count += len(pack.targets)
                total += 0.0 if program == identity else self._pack_divergence(pack, program, identity)
        return total / count

    def _pack_divergence(self, pack: Pack, program: Program, identity: Program) -> float:
        decoder = self.model.decoder
        full, ours = (
            decoder.head(pack.run(decoder, pack.packed.embedded, steps)[pack.sources]).log_softmax(-1)
            for steps in (identity.steps, program.steps)
        )
        return float((full.exp() * (full - ours)).sum())


def repeated(tokens: Sequence[int], size: int = 4) -> float:
    """Share of the runs of that many tokens that stood in the text before."""
    runs = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def f1(written: str, right: str) -> float:
    """Overlap of words with the right text: the harmonic mean of precision and recall, of words as a multiset."""
    return _f_score(normalised(written).split(), normalised(right).split(), 1)


def chrf(written: str, reference: str) -> float:
    """Character n-gram F-score, recall counted twice (β = 2), from 0 to 1; white space is left out."""
    one, other = "".join(written.split()), "".join(reference.split())
    scores = [_f_score(_runs(one, size), _runs(other, size), 2) for size in range(1, _CHRF + 1) if len(other) >= size]
    return fmean(scores) if scores else float(one == other)


def _runs(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(len(text) - size + 1)]


def _f_score(ours: Sequence[str], reference: Sequence[str], beta: int) -> float:
    common = sum((Counter(ours) & Counter(reference)).values())
    if not common:
        return float(not ours and not reference)
    precision, recall = common / len(ours), common / len(reference)
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)
