"""A pack of questions: prompts with several continuations each, laid out to run together without padding.

A prompt's tokens run once for all its continuations: each continuation attends to the prompt's keys and values and to
its own. Nothing is kept in pages, and gradients flow. Knows steps, no programs and no policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from polar_sdk.engine.attention import attend_seen
from polar_sdk.engine.decoder import damp
from polar_sdk.engine.types import pick

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.kernels import Kernels
    from polar_sdk.engine.maps import Fill
    from polar_sdk.engine.types import AttentionKind
    from polar_sdk.programs.program import Step


MAX_PACK_TOKENS = 2048
"""Questions run together up to this many tokens."""
QUERY_BATCH = 128
"""Number of tokens that attend together: their scores stay in the processor's cache, and the masks are small."""


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


class _QuestionSpan:
    """The packed tokens of one question: its prompt, then its continuations.

    Args:
        own: Its T places in the pack.
        question: The question.
        positions: Position of each token of the pack; continuations restart where the prompt ends, (N,).
        branches: 0 for tokens of a prompt, else the number of the continuation, from 1, (N,).
        windows: The windows that layers have.
    """

    def __init__(
        self, own: slice, question: Question, positions: Tensor, branches: Tensor, windows: Iterable[int | None]
    ) -> None:
        self._own, self._prompt = own, len(question.prompt)
        self._positions, self._branches = positions[own], branches[own]
        self._branched = len(question.continuations) > 1
        """Whether tokens attend to something else than all before them."""
        rows = slice(0, min(QUERY_BATCH, own.stop - own.start))
        self._first_masks = {window: self._seen(rows, rows, window) for window in windows if self._branched}
        """The masks of the first block, by window: all that a short question needs, in every layer."""

    def attend(
        self, kernels: Kernels, query: Tensor, key: Tensor, value: Tensor, kind: AttentionKind
    ) -> Iterator[Tensor]:
        """Attention within the question, (T, H × d), in blocks of queries, so that no (T, T) mask is ever held."""
        query, keys, values = query[self._own], key[self._own].transpose(0, 1), value[self._own].transpose(0, 1)
        for start in range(0, len(query), QUERY_BATCH):
            rows = slice(start, min(start + QUERY_BATCH, len(query)))
            columns = slice(self._first_key(start, kind.window), rows.stop)
            if self._branched:
                seen = self._seen(rows, columns, kind.window) if start else self._first_masks[kind.window]
                yield attend_seen(query[rows], keys[:, columns], values[:, columns], kind, seen)
            else:
                yield kernels.attend(query[rows], keys[:, columns], values[:, columns], kind)

    def attend_some(
        self, kernels: Kernels, query: Tensor, key: Tensor, value: Tensor, kind: AttentionKind, index: Tensor
    ) -> Iterator[Tensor]:
        """As `attend`, for the queries (M, H, d) of some tokens of the pack; those at `index` (M,) that are its own."""
        low, high = torch.searchsorted(index, torch.tensor([self._own.start, self._own.stop], device=index.device))
        query, index = query[low:high], index[low:high] - self._own.start
        keys, values = key[self._own].transpose(0, 1), value[self._own].transpose(0, 1)
        for rows, part in zip(torch.split(index, QUERY_BATCH), torch.split(query, QUERY_BATCH), strict=True):
            if not len(rows):
                continue
            columns = slice(self._first_key(int(rows[0]), kind.window), int(rows[-1]) + 1)
            if self._branched:
                seen = self._seen(rows, columns, kind.window)
                yield attend_seen(part, keys[:, columns], values[:, columns], kind, seen)
            else:
                yield kernels.attend(part, keys[:, columns], values[:, columns], kind, rows - columns.start)

    def _first_key(self, row: int, window: int | None) -> int:
        """The first token that this one, or one after it, attends to."""
        return 0 if window is None else max(0, min(row, self._prompt) - window + 1)

    def _seen(self, rows: slice | Tensor, columns: slice, window: int | None) -> Tensor:
        """Which tokens (columns) each token (rows) attends to: those before it in the prompt and in its own part."""
        key_branches = self._branches[columns]
        distance = self._positions[rows].unsqueeze(1) - self._positions[None, columns]
        seen = (distance >= 0) & ((key_branches == 0) | (key_branches == self._branches[rows].unsqueeze(1)))
        return seen if window is None else seen & (distance < window)


def packs(questions: Sequence[Question], limit: int | None = None) -> Iterator[list[Question]]:
    """Split questions into packs of at most `limit` tokens (None = 2048); a longer question stands alone."""
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
        """One step of a program for all packed tokens, (N, E), on the device of its layer.

        Tokens that are filled there pass, and are carried over their segment at its end.
        """
        device = decoder.placement.layers[step.first]
        packed, kind = self._by_device[device], decoder.family.kinds[step.first]
        x = x.to(device)
        filled = packed.filled(step.fill)
        if not len(filled):
            attend = partial(packed.attend, decoder.kernels, kind)
            return decoder.run_step(step, x, packed.positions, packed.rotary, attend)
        running = _without(filled, len(x))
        after = packed.visit(decoder, step, x, running, [(filled, self._written(decoder, step, x, filled))])
        if step.ends_segment:
            x = x.index_copy(0, filled, _map(decoder, step, device).carried(x[filled]))
        return x.index_copy(0, running, after)

    def finish(self, decoder: Decoder, steps: Sequence[Step], x: Tensor, wanted: Sequence[int]) -> Tensor:
        """The last visit of a program and the bridges after it, for the tokens at the places `wanted`, ascending.

        Args:
            decoder: The weights.
            steps: The last visit, and what follows it.
            x: States of all packed tokens before it, (N, E).
            wanted: Places of tokens that run it, M ≥ 1 of them.

        Returns:
            Their states (M, E), on the device of the last step.
        """
        step, *bridges = steps
        device = decoder.placement.layers[step.first]
        packed, x = self._by_device[device], x.to(device)
        running = torch.tensor(wanted, device=device)
        filled = packed.filled(step.fill)
        leaving = _without(torch.cat((running, filled)), len(x))
        others = [(leaving, _left(decoder, step, x[leaving]))]
        if len(filled):
            others.append((filled, self._written(decoder, step, x, filled)))
        x = packed.visit(decoder, step, x, running, others)
        for bridge in bridges:
            device = decoder.placement.layers[bridge.first]
            positions = self._by_device[device].positions[running.to(device)]
            x = decoder.bridge(bridge)(x.to(device), positions)
        return x

    def _written(self, decoder: Decoder, step: Step, x: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
        """Keys before their turn, and values, that the map of a step's segment writes for its layer, from states x."""
        fill = _map(decoder, step, x.device).layer(step.first - step.segment[0])
        embedded = self.embedded.to(x.device)[filled] if fill.token else None
        keys_values = fill(x[filled], embedded)[:, 0]
        return keys_values[:, 0], keys_values[:, 1]


def _without(index: Tensor, count: int) -> Tensor:
    """The numbers 0 … count − 1 but those in `index`, ascending."""
    others = torch.ones(count, dtype=torch.bool, device=index.device).index_fill(0, index, False)
    return others.nonzero().squeeze(1)


def _map(decoder: Decoder, step: Step, device: torch.device) -> Fill:
    """The map of a step's segment, on a device."""
    first, last = step.segment
    return decoder.fill((first, last)).at(device)


def _left(decoder: Decoder, step: Step, x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys before their turn, and values, of the layer itself, from states (M, E)."""
    return decoder.keys_values(step.first, x)


class _DevicePack:
    """The part of a pack that the layers of one device need: positions (N,), rotary angles, and who attends to whom."""

    def __init__(
        self, decoder: Decoder, pack: Sequence[Question], positions: Tensor, branches: Tensor, windows: set[int | None]
    ) -> None:
        self.positions = positions
        self.rotary = decoder.rotary(positions, max(question.longest for question in pack))
        sizes = [question.tokens for question in pack]
        ends = list(accumulate(sizes))
        self._prompts = [
            (end - size, len(question.prompt)) for question, size, end in zip(pack, sizes, ends, strict=True)
        ]
        """Place of the first token of each prompt, and the prompt's length."""
        self._filled: dict[int, Tensor] = {}
        self._spans = [
            _QuestionSpan(slice(end - size, end), question, positions, branches, windows)
            for question, size, end in zip(pack, sizes, ends, strict=True)
        ]

    def attend(self, kernels: Kernels, kind: AttentionKind, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of every question within itself, (N, H × d)."""
        return torch.cat([block for span in self._spans for block in span.attend(kernels, query, key, value, kind)])

    def filled(self, tail: int) -> Tensor:
        """Places of the prompts' tokens that are filled where the last `tail` run; none where that is 0."""
        if tail not in self._filled:
            places = [place for start, prompt in self._prompts for place in range(start + 1, start + prompt - tail)]
            self._filled[tail] = torch.tensor(places if tail else [], dtype=torch.long, device=self.positions.device)
        return self._filled[tail]

    def visit(
        self,
        decoder: Decoder,
        step: Step,
        x: Tensor,
        running: Tensor,
        others: Sequence[tuple[Tensor, tuple[Tensor, Tensor]]],
    ) -> Tensor:
        """A visit that only some tokens run.

        Args:
            decoder: The weights.
            step: The visit.
            x: States of all tokens before it, (N, E).
            running: Places of those that run it, ascending, (M,).
            others: Places of others, and the keys before their turn and values that they leave.

        Returns:
            States after it of those that run it, (M, E).
        """
        kind, before = decoder.family.kinds[step.first], x[running]
        query, key, value = decoder.project(step.first, before, [pick(pair, running) for pair in self.rotary])
        shape = (len(x), *key.shape[1:])
        keys = key.new_zeros(shape).index_copy(0, running, key)
        values = value.new_zeros(shape).index_copy(0, running, value)
        for places, (unturned, left) in others:
            turned = decoder.family.turn(unturned, pick(self.rotary[kind.rope], places))
            keys, values = keys.index_copy(0, places, turned), values.index_copy(0, places, left)
        blocks = [
            block
            for span in self._spans
            for block in span.attend_some(decoder.kernels, query, keys, values, kind, running)
        ]
        return damp(before, decoder.finish(step.first, before, torch.cat(blocks)), step.parts)


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
