"""Log-likelihoods of continuations behind a shared prompt, many questions in one pass. For scans; not metered.

All tokens of all questions lie packed without padding. A prompt runs once per program however many continuations it
has: each continuation attends to the prompt's keys and values and to its own. Knows programs, no text and no policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import torch

from polar_sdk.engine.attention import attend_row
from polar_sdk.loops import damp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.family import AttentionKind, Rotary
    from polar_sdk.program import Program, Step

__all__ = [
    "Question",
    "Score",
    "Segment",
    "lay_out",
    "packs",
    "predictors",
    "run_step",
    "score_programs",
    "score_questions",
]

_PACK_TOKENS = 4096
"""Questions run together up to this many tokens."""
_HEAD_ROWS = 1024
"""Positions whose logits are held at once: V floats each."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and its possible continuations, as token ids; each continuation needs at least one token."""

    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Tokens that one pass runs."""
        return len(self.prompt) + sum(map(len, self.continuations))


@dataclass(frozen=True, slots=True)
class Score:
    """What a program says about one question.

    Attributes:
        loglikelihoods: Per continuation, in nats, summed over its tokens.
        greedy: Per continuation, for each of its tokens, the id that the program itself would have chosen there.
    """

    loglikelihoods: tuple[float, ...]
    greedy: tuple[tuple[int, ...], ...]

    @property
    def best(self) -> int:
        """Index of the likeliest continuation."""
        return max(range(len(self.loglikelihoods)), key=self.loglikelihoods.__getitem__)


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of packed tokens; `parent` is the span of the prompt it continues, itself excluded."""

    start: int
    end: int
    parent: tuple[int, int] | None


def score_questions(decoder: Decoder, questions: Sequence[Question], program: Program) -> list[Score]:
    """Score every continuation of every question under one program."""
    return score_programs(decoder, questions, [program])[program]


def score_programs(
    decoder: Decoder,
    questions: Sequence[Question],
    programs: Iterable[Program],
    on_program: Callable[[], None] = lambda: None,
) -> dict[Program, list[Score]]:
    """Score the questions under many programs; visits that programs share at their start run once.

    Args:
        decoder: The weights.
        questions: What to score.
        programs: Any order; duplicates count once.
        on_program: Called after each program of each pack, for progress.
    """
    ordered = sorted(set(programs), key=lambda program: program.steps)
    scores: dict[Program, list[Score]] = {program: [] for program in ordered}
    for pack in packs(questions):
        for program, hidden in _final_states(decoder, pack, ordered):
            scores[program].extend(_read(decoder, pack, hidden))
            on_program()
    return scores


def packs(questions: Sequence[Question], limit: int | None = None) -> Iterator[list[Question]]:
    """Split questions into packs of at most `limit` tokens (None = 4096); a longer question stands alone."""
    pack: list[Question] = []
    size = 0
    for question in questions:
        if pack and size + question.tokens > (limit or _PACK_TOKENS):
            yield pack
            pack, size = [], 0
        pack.append(question)
        size += question.tokens
    if pack:
        yield pack


def _final_states(
    decoder: Decoder, pack: Sequence[Question], ordered: Sequence[Program]
) -> Iterator[tuple[Program, Tensor]]:
    """Hidden states (N, E) of a pack after each program.

    In lexicographic order neighbours share the longest starts, so a stack of the states after each visit of the current
    program is a walk through the trie of all programs: at most one visit per edge, at most D states held.
    """
    tokens, places, segments = lay_out(pack)
    positions = torch.tensor(places, device=decoder.device)
    stack = [decoder.embed(torch.tensor(tokens, device=decoder.device), positions)]
    rotary = decoder.rotary(positions, max(places) + 1)
    before: tuple[Step, ...] = ()
    for program in ordered:
        shared = _shared_start(before, program.steps)
        del stack[shared + 1 :]
        with torch.inference_mode():
            for step in program.steps[shared:]:
                stack.append(run_step(decoder, step, stack[-1], positions, rotary, segments))
        before = program.steps
        yield program, stack[-1]


def run_step(
    decoder: Decoder,
    step: Step,
    x: Tensor,
    positions: Tensor,
    rotary: list[Rotary],
    segments: Sequence[Segment],
) -> Tensor:
    """One step of a program for all packed tokens, (N, E)."""
    if step.bridge:
        return decoder.bridge(step)(x, positions)
    kind = decoder.family.kinds[step.first]
    query, key, value = decoder.project(step.first, x, rotary)
    mixed = torch.cat([_attend_segment(query, key, value, segment, kind) for segment in segments])
    return damp(x, decoder.finish(step.first, x, mixed), step.parts)


def lay_out(pack: Sequence[Question]) -> tuple[list[int], list[int], list[Segment]]:
    """Tokens, positions and segments of a pack; continuations restart at the position after their prompt."""
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    for question in pack:
        span = (len(tokens), len(tokens) + len(question.prompt))
        segments.append(Segment(*span, parent=None))
        tokens.extend(question.prompt)
        positions.extend(range(len(question.prompt)))
        for tail in question.continuations:
            segments.append(Segment(len(tokens), len(tokens) + len(tail), parent=span))
            tokens.extend(tail)
            positions.extend(range(len(question.prompt), len(question.prompt) + len(tail)))
    return tokens, positions, segments


def _attend_segment(query: Tensor, key: Tensor, value: Tensor, segment: Segment, kind: AttentionKind) -> Tensor:
    own = slice(segment.start, segment.end)
    keys, values = key[own], value[own]
    if segment.parent is not None:
        before = slice(*segment.parent)
        keys, values = torch.cat((key[before], keys)), torch.cat((value[before], values))
    return attend_row(query[own], keys.transpose(0, 1), values.transpose(0, 1), kind)


def _shared_start(one: Sequence[Step], other: Sequence[Step]) -> int:
    """Number of steps that two programs have in common before they differ."""
    same = (a == b for a, b in zip(one, other, strict=False))
    return sum(1 for _ in takewhile(bool, same))


def predictors(pack: Sequence[Question]) -> tuple[list[int], list[int]]:
    """Packed places that predict the continuations' tokens, and those tokens.

    The prompt's end predicts the first token of each continuation, the token before it each other one.
    """
    sources: list[int] = []
    targets: list[int] = []
    at = 0
    for question in pack:
        prompt_end = at + len(question.prompt)
        at = prompt_end
        for tail in question.continuations:
            sources.extend([prompt_end - 1, *range(at, at + len(tail) - 1)])
            targets.extend(tail)
            at += len(tail)
    return sources, targets


@torch.inference_mode()
def _read(decoder: Decoder, pack: Sequence[Question], hidden: Tensor) -> list[Score]:
    sources, targets = predictors(pack)
    likelihoods, choices = _predict(decoder, hidden[sources], targets)
    return _regroup(pack, likelihoods, choices)


def _predict(decoder: Decoder, states: Tensor, targets: list[int]) -> tuple[list[float], list[int]]:
    likelihoods: list[float] = []
    choices: list[int] = []
    for start in range(0, len(targets), _HEAD_ROWS):
        logits = decoder.head(states[start : start + _HEAD_ROWS])
        wanted = torch.tensor(targets[start : start + _HEAD_ROWS], device=logits.device)
        likelihoods += (-torch.nn.functional.cross_entropy(logits, wanted, reduction="none")).tolist()
        choices += logits.argmax(-1).tolist()
    return likelihoods, choices


def _regroup(pack: Sequence[Question], likelihoods: list[float], choices: list[int]) -> list[Score]:
    scores, at = [], 0
    for question in pack:
        sums, greedy = [], []
        for tail in question.continuations:
            sums.append(sum(likelihoods[at : at + len(tail)]))
            greedy.append(tuple(choices[at : at + len(tail)]))
            at += len(tail)
        scores.append(Score(tuple(sums), tuple(greedy)))
    return scores
