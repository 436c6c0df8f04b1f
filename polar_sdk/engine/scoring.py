"""Log-likelihoods of continuations behind a shared prompt, many questions in one pass. For scans; not metered.

All tokens of all questions lie packed without padding. A prompt runs once per program however many continuations it
has: each continuation attends to the prompt's keys and values and to its own. Knows programs, no text and no policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING

import torch

from polar_sdk.engine.attention import attend_seen
from polar_sdk.programs.guard import damp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.types import AttentionKind
    from polar_sdk.programs.program import Program, Step


_PACK_TOKENS = 4096
"""Questions run together up to this many tokens."""
_BLOCK = 128
"""Tokens that attend at once: their scores stay in the processor's cache, and the masks are small."""
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

    @property
    def longest(self) -> int:
        """Tokens of the prompt and its longest continuation together."""
        return len(self.prompt) + max(map(len, self.continuations), default=0)


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


class _Span:
    """The packed tokens of one question: its prompt, then its continuations.

    Args:
        own: Its places in the pack, T of them.
        prompt: Tokens of the prompt.
        positions: Position of each token of the pack; continuations restart where the prompt ends, (N,).
        parts: 0 for tokens of a prompt, else the number of the continuation, from 1, (N,).
        windows: The windows that layers have.
    """

    def __init__(
        self, own: slice, prompt: int, positions: Tensor, parts: Tensor, windows: Iterable[int | None]
    ) -> None:
        self._own, self._prompt, self._positions, self._parts = own, prompt, positions[own], parts[own]
        rows = slice(0, min(_BLOCK, own.stop - own.start))
        self._first = {window: self._seen(rows, rows, window) for window in windows}
        """The masks of the first block, which are all that a short question needs, in every layer."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kind: AttentionKind) -> Iterator[Tensor]:
        """Attention within the question, (T, H × d), some queries at a time, so that no (T, T) mask is ever held."""
        query, keys, values = query[self._own], key[self._own].transpose(0, 1), value[self._own].transpose(0, 1)
        for first in range(0, len(query), _BLOCK):
            rows = slice(first, min(first + _BLOCK, len(query)))
            columns = slice(self._first_key(first, kind.window), rows.stop)
            seen = self._seen(rows, columns, kind.window) if first else self._first[kind.window]
            yield attend_seen(query[rows], keys[:, columns], values[:, columns], kind, seen)

    def _first_key(self, row: int, window: int | None) -> int:
        """The first token that this one or one behind it looks at."""
        return 0 if window is None else max(0, min(row, self._prompt) - window + 1)

    def _seen(self, rows: slice, columns: slice, window: int | None) -> Tensor:
        """Which tokens (columns) each token (rows) looks at: those before it in the prompt and in its own part."""
        theirs = self._parts[columns]
        before = self._positions[rows, None] - self._positions[None, columns]
        seen = (before >= 0) & ((theirs == 0) | (theirs == self._parts[rows, None]))
        return seen if window is None else seen & (before < window)


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


def states_after(decoder: Decoder, prompts: Sequence[tuple[int, ...]], steps: Sequence[Step]) -> list[Tensor]:
    """Hidden states (T, E) of each prompt's tokens after these steps, before the final norm; no steps: embeddings."""
    states: list[Tensor] = []
    for pack in packs([Question(prompt, ()) for prompt in prompts]):
        with torch.no_grad():  # not inference mode: what comes out may enter somebody's training
            walk = Walk(decoder, pack)
            x = walk.embedded
            for step in steps:
                x = walk.step(decoder, step, x)
        states.extend(torch.split(x, [len(question.prompt) for question in pack]))
    return states


def packs(questions: Sequence[Question], limit: int | None = None) -> Iterator[list[Question]]:
    """Split questions into packs of at most `limit` tokens (None = 4096); a longer question stands alone."""
    size = 0
    pack: list[Question] = []
    for question in questions:
        if pack and size + question.tokens > (limit or _PACK_TOKENS):
            yield pack
            pack, size = [], 0
        size += question.tokens
        pack.append(question)
    if pack:
        yield pack


def _final_states(
    decoder: Decoder, pack: Sequence[Question], ordered: Sequence[Program]
) -> Iterator[tuple[Program, Tensor]]:
    """Hidden states (N, E) of a pack after each program.

    In lexicographic order neighbours share the longest starts, so a stack of the states after each visit of the current
    program is a walk through the trie of all programs: at most one visit per edge, at most D states held.
    """
    walk = Walk(decoder, pack)
    stack = [walk.embedded]
    before: tuple[Step, ...] = ()
    for program in ordered:
        shared = _shared_start(before, program.steps)
        del stack[shared + 1 :]
        with torch.inference_mode():
            for step in program.steps[shared:]:
                stack.append(walk.step(decoder, step, stack[-1]))
        before = program.steps
        yield program, stack[-1]


class Walk:
    """A pack laid out, and what every step of a program needs of it, on every device that has layers."""

    def __init__(self, decoder: Decoder, pack: Sequence[Question]) -> None:
        tokens, places, parts = _lay_out(pack)
        windows = {kind.window for kind in decoder.family.kinds}
        self._grounds = {
            device: _Ground(
                decoder, pack, torch.tensor(places, device=device), torch.tensor(parts, device=device), windows
            )
            for device in decoder.placement.devices
        }
        first = decoder.placement.first
        self.positions = self._grounds[first].positions
        """Position of each token, where tokens enter, (N,)."""
        self.embedded = decoder.embed(torch.tensor(tokens, device=first), self.positions)
        """Hidden states before the first step, (N, E)."""

    def step(self, decoder: Decoder, step: Step, x: Tensor) -> Tensor:
        """One step of a program for all packed tokens, (N, E), on the device of its layer."""
        device = decoder.placement.layers[step.first]
        ground, x = self._grounds[device], x.to(device)
        if step.bridge:
            return decoder.bridge(step)(x, ground.positions)
        kind = decoder.family.kinds[step.first]
        query, key, value = decoder.project(step.first, x, ground.rotary)
        mixed = torch.cat([part for span in ground.spans for part in span.attend(query, key, value, kind)])
        return damp(x, decoder.finish(step.first, x, mixed), step.parts)


class _Ground:
    """What the layers of one device need of a pack: positions (N,), rotary angles, and who looks at whom."""

    def __init__(
        self, decoder: Decoder, pack: Sequence[Question], positions: Tensor, parts: Tensor, windows: set[int | None]
    ) -> None:
        self.positions = positions
        self.rotary = decoder.rotary(positions, max(question.longest for question in pack))
        sizes = [question.tokens for question in pack]
        ends = list(accumulate(sizes))
        self.spans = [
            _Span(slice(end - size, end), len(question.prompt), positions, parts, windows)
            for question, size, end in zip(pack, sizes, ends, strict=True)
        ]


def _lay_out(pack: Sequence[Question]) -> tuple[list[int], list[int], list[int]]:
    """Tokens of a pack, with their positions and parts; continuations restart at the position after their prompt."""
    tokens: list[int] = []
    positions: list[int] = []
    parts: list[int] = []
    for question in pack:
        for part, piece in enumerate((question.prompt, *question.continuations)):
            start = len(question.prompt) if part else 0
            tokens.extend(piece)
            positions.extend(range(start, start + len(piece)))
            parts.extend([part] * len(piece))
    return tokens, positions, parts


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
