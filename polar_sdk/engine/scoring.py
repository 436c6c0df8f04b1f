"""Log-likelihoods of continuations after a shared prompt, many questions in one pass. For scans; not metered.

All tokens of all questions are packed without padding. A prompt runs once per program however many continuations it
has: each continuation attends to the prompt's keys and values and to its own. Knows programs, no text and no policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING

import torch

from polar_sdk.engine.attention import attend_seen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.types import AttentionKind
    from polar_sdk.programs.program import Program, Step


MAX_PACK_TOKENS = 4096
"""Questions run together up to this many tokens."""
QUERY_BATCH = 128
"""Number of tokens that attend together: their scores stay in the processor's cache, and the masks are small."""
HEAD_BATCH = 1024
"""Number of positions whose logits are held together: V floats each."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and its possible continuations, as token ids; each continuation needs at least one token."""

    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Number of tokens that one pass runs."""
        return len(self.prompt) + sum(map(len, self.continuations))

    @property
    def longest(self) -> int:
        """Number of tokens of the prompt and its longest continuation together."""
        return len(self.prompt) + max(map(len, self.continuations), default=0)


@dataclass(frozen=True, slots=True)
class Score:
    """What a program says about one question.

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


class _QuestionSpan:
    """The packed tokens of one question: its prompt, then its continuations.

    Args:
        own: Its T places in the pack.
        prompt: Number of tokens of the prompt.
        positions: Position of each token of the pack; continuations restart where the prompt ends, (N,).
        branches: 0 for tokens of a prompt, else the number of the continuation, from 1, (N,).
        windows: The windows that layers have.
    """

    def __init__(
        self, own: slice, prompt: int, positions: Tensor, branches: Tensor, windows: Iterable[int | None]
    ) -> None:
        self._own, self._prompt, self._positions, self._branches = own, prompt, positions[own], branches[own]
        rows = slice(0, min(QUERY_BATCH, own.stop - own.start))
        self._first_masks = {window: self._seen(rows, rows, window) for window in windows}
        """The masks of the first block, by window: all that a short question needs, in every layer."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kind: AttentionKind) -> Iterator[Tensor]:
        """Attention within the question, (T, H × d), in blocks of queries, so that no (T, T) mask is ever held."""
        query, keys, values = query[self._own], key[self._own].transpose(0, 1), value[self._own].transpose(0, 1)
        for start in range(0, len(query), QUERY_BATCH):
            rows = slice(start, min(start + QUERY_BATCH, len(query)))
            columns = slice(self._first_key(start, kind.window), rows.stop)
            seen = self._seen(rows, columns, kind.window) if start else self._first_masks[kind.window]
            yield attend_seen(query[rows], keys[:, columns], values[:, columns], kind, seen)

    def _first_key(self, row: int, window: int | None) -> int:
        """The first token that this one, or one after it, attends to."""
        return 0 if window is None else max(0, min(row, self._prompt) - window + 1)

    def _seen(self, rows: slice, columns: slice, window: int | None) -> Tensor:
        """Which tokens (columns) each token (rows) attends to: those before it in the prompt and in its own part."""
        key_branches = self._branches[columns]
        distance = self._positions[rows, None] - self._positions[None, columns]
        seen = (distance >= 0) & ((key_branches == 0) | (key_branches == self._branches[rows, None]))
        return seen if window is None else seen & (distance < window)


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
        for program, hidden in _final_states(decoder, pack, ordered):
            scores[program].extend(_read(decoder, pack, hidden))
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


def packs(questions: Sequence[Question], limit: int | None = None) -> Iterator[list[Question]]:
    """Split questions into packs of at most `limit` tokens (None = 4096); a longer question stands alone."""
    size = 0
    pack: list[Question] = []
    for question in questions:
        if pack and size + question.tokens > (limit or MAX_PACK_TOKENS):
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

    In lexicographic order neighbours share the longest starts, so a stack of the states after each step of the current
    program walks through the trie of all programs: each edge runs once, and no more states are held than a program has
    steps.
    """
    packed = PackedQuestions(decoder, pack)
    stack = [packed.embedded]
    before: tuple[Step, ...] = ()
    for program in ordered:
        shared = _shared_start(before, program.steps)
        del stack[shared + 1 :]
        with torch.inference_mode():
            for step in program.steps[shared:]:
                stack.append(packed.step(decoder, step, stack[-1]))
        before = program.steps
        yield program, stack[-1]


class PackedQuestions:
    """A pack of questions laid out for the steps of any program, on every device that has layers."""

    def __init__(self, decoder: Decoder, pack: Sequence[Question]) -> None:
        tokens, positions, branches = _lay_out(pack)
        windows = {kind.window for kind in decoder.family.kinds}
        self._by_device = {
            device: _DevicePack(
                decoder, pack, torch.tensor(positions, device=device), torch.tensor(branches, device=device), windows
            )
            for device in decoder.placement.devices
        }
        first = decoder.placement.first
        self.positions = self._by_device[first].positions
        """Position of each token, (N,), on the device where tokens enter."""
        self.embedded = decoder.embed(torch.tensor(tokens, device=first), self.positions)
        """Hidden states before the first step, (N, E)."""

    def step(self, decoder: Decoder, step: Step, x: Tensor) -> Tensor:
        """One step of a program for all packed tokens, (N, E), on the device of its layer."""
        device = decoder.placement.layers[step.first]
        packed, kind = self._by_device[device], decoder.family.kinds[step.first]
        return decoder.run_step(step, x.to(device), packed.positions, packed.rotary, partial(packed.attend, kind))


class _DevicePack:
    """What the layers of one device need of a pack: positions (N,), rotary angles, and who attends to whom."""

    def __init__(
        self, decoder: Decoder, pack: Sequence[Question], positions: Tensor, branches: Tensor, windows: set[int | None]
    ) -> None:
        self.positions = positions
        self.rotary = decoder.rotary(positions, max(question.longest for question in pack))
        sizes = [question.tokens for question in pack]
        ends = list(accumulate(sizes))
        self._spans = [
            _QuestionSpan(slice(end - size, end), len(question.prompt), positions, branches, windows)
            for question, size, end in zip(pack, sizes, ends, strict=True)
        ]

    def attend(self, kind: AttentionKind, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of every question within itself, (N, H × d)."""
        return torch.cat([block for span in self._spans for block in span.attend(query, key, value, kind)])


def _lay_out(pack: Sequence[Question]) -> tuple[list[int], list[int], list[int]]:
    """Tokens of a pack, with their positions and branches; continuations restart at the position after their prompt."""
    tokens: list[int] = []
    positions: list[int] = []
    branches: list[int] = []
    for question in pack:
        for branch, piece in enumerate((question.prompt, *question.continuations)):
            start = len(question.prompt) if branch else 0
            tokens.extend(piece)
            positions.extend(range(start, start + len(piece)))
            branches.extend([branch] * len(piece))
    return tokens, positions, branches


def _shared_start(first: Sequence[Step], second: Sequence[Step]) -> int:
    """Number of steps that two programs have in common before they differ."""
    same = (a == b for a, b in zip(first, second, strict=False))
    return sum(1 for _ in takewhile(bool, same))


def predictors(pack: Sequence[Question]) -> tuple[list[int], list[int]]:
    """Places in the pack that predict the continuations' tokens, and those tokens.

    The end of the prompt predicts the first token of each continuation; every other one is predicted by the token
    before it.
    """
    sources: list[int] = []
    targets: list[int] = []
    start = 0
    for question in pack:
        prompt_end = start + len(question.prompt)
        start = prompt_end
        for tail in question.continuations:
            sources.extend([prompt_end - 1, *range(start, start + len(tail) - 1)])
            targets.extend(tail)
            start += len(tail)
    return sources, targets


@torch.inference_mode()
def _read(decoder: Decoder, pack: Sequence[Question], hidden: Tensor) -> list[Score]:
    sources, targets = predictors(pack)
    likelihoods, choices = _predict(decoder, hidden[sources], targets)
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
