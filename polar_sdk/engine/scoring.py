"""Log-likelihoods of continuations after a shared prompt, many questions in one pass. For scans; not metered.

As in a request, a prompt's tokens that are filled do not run a segment, and only tokens that predict something run the
last visit to its end. Knows programs, no text and no policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import torch

from polar_sdk.engine.pack import PackedQuestions, Question, packs, predictors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.programs.program import Program, Step


HEAD_BATCH = 128
"""Number of positions whose logits are held together, V floats each: 1,024 leave the cache, and take twice as long."""


@dataclass(frozen=True, slots=True)
class Score:
    """The answer of a program to one question.

    Attributes:
        loglikelihoods: Per continuation, in nats, summed over its tokens.
        greedy: Per continuation, for each of its tokens, the id that the program itself would have chosen.
    """

    loglikelihoods: tuple[float, ...]
    greedy: tuple[tuple[int, ...], ...]

    @property
    def best(self) -> int:
        """Index of the likeliest continuation."""
        return max(range(len(self.loglikelihoods)), key=self.loglikelihoods.__getitem__)


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
        programs: In any order; duplicates count once.
        on_program: Called after each program of each pack, for progress.
    """
    ordered = sorted(set(programs), key=lambda program: program.steps)
    scores: dict[Program, list[Score]] = {program: [] for program in ordered}
    for pack in packs(questions):
        sources, targets = predictors(pack)
        wanted = sorted(set(sources))
        place_of = {source: place for place, source in enumerate(wanted)}
        rows = [place_of[source] for source in sources]
        if not wanted:  # no continuation has a token: there is nothing to compute
            for program in ordered:
                scores[program].extend(_regroup(pack, [], []))
                on_program()
            continue
        for program, hidden in _final_states(decoder, pack, ordered, wanted):
            scores[program].extend(_read(decoder, pack, hidden[rows], targets))
            on_program()
    return scores


def states_after(decoder: Decoder, prompts: Sequence[tuple[int, ...]], steps: Sequence[Step]) -> list[Tensor]:
    """Hidden states (T, E) of each prompt's tokens after these steps, before the final norm; no steps: embeddings."""
    states: list[Tensor] = []
    for pack in packs([Question(prompt, ()) for prompt in prompts]):
        with torch.no_grad():  # not inference mode: the states may be used in training
            packed = PackedQuestions(decoder, pack)
            x = packed.embedded
            for step in steps:
                x = packed.step(decoder, step, x)
        states.extend(torch.split(x, [len(question.prompt) for question in pack]))
    return states


def _final_states(
    decoder: Decoder, pack: Sequence[Question], ordered: Sequence[Program], wanted: Sequence[int]
) -> Iterator[tuple[Program, Tensor]]:
    """Hidden states (M, E) of the tokens of a pack at the places `wanted`, ascending, after each program.

    In lexicographic order neighbours share the longest starts, so a stack of the states before each visit of the
    current program walks through the trie of all programs: each edge runs once, and no more states are held than a
    program has steps. The last visit, which only the wanted tokens run to its end, is each program's own.
    """
    packed = PackedQuestions(decoder, pack)
    stack = [packed.embedded]
    before: tuple[Step, ...] = ()
    for program in ordered:
        shared_by_all, own = program.steps[: program.last_visit], program.steps[program.last_visit :]
        shared = _shared_start(before, shared_by_all)
        del stack[shared + 1 :]
        with torch.inference_mode():
            for step in shared_by_all[shared:]:
                stack.append(packed.step(decoder, step, stack[-1]))
            states = packed.finish(decoder, own, stack[-1], wanted)
        before = shared_by_all
        yield program, states


def _shared_start(first: Sequence[Step], second: Sequence[Step]) -> int:
    """Number of steps that two programs have in common before they differ."""
    same = (a == b for a, b in zip(first, second, strict=False))
    return sum(1 for _ in takewhile(bool, same))


@torch.inference_mode()
def _read(decoder: Decoder, pack: Sequence[Question], states: Tensor, targets: list[int]) -> list[Score]:
    likelihoods, choices = _predict(decoder, states, targets)
    return _regroup(pack, likelihoods, choices)


def _predict(decoder: Decoder, states: Tensor, targets: list[int]) -> tuple[list[float], list[int]]:
    likelihoods: list[float] = []
    choices: list[int] = []
    for start in range(0, len(targets), HEAD_BATCH):
        logits = decoder.head(states[start : start + HEAD_BATCH])
        batch = torch.tensor(targets[start : start + HEAD_BATCH], device=logits.device)
        likelihoods += (-torch.nn.functional.cross_entropy(logits, batch, reduction="none")).tolist()
        choices += logits.argmax(-1).tolist()
    return likelihoods, choices


def _regroup(pack: Sequence[Question], likelihoods: list[float], choices: list[int]) -> list[Score]:
    scores, start = [], 0
    for question in pack:
        sums, greedy = [], []
        for tail in question.continuations:
            sums.append(sum(likelihoods[start : start + len(tail)]))
            greedy.append(tuple(choices[start : start + len(tail)]))
            start += len(tail)
        scores.append(Score(tuple(sums), tuple(greedy)))
    return scores
