"""One pass of packed rows through their programs: prefill and decode are the same code.

Each step runs once for all rows that want it next (`schedule.turns`): gather their tokens, run, scatter back. Rows
never touch each other's keys, values or counts. Where every row has one token and the kernels can, a layer runs as
one compiled call over the pages. Knows rows and programs, not requests or text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polar_sdk.engine.attention import attend_row, write_pages
from polar_sdk.engine.layout import Layout
from polar_sdk.engine.rows import Row, extra_visits
from polar_sdk.engine.schedule import turns
from polar_sdk.loops import damp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.layout import Members
    from polar_sdk.engine.schedule import Turn

__all__ = ["Row", "advance", "next_logits"]


def advance(decoder: Decoder, rows: Sequence[Row], tokens: Sequence[Sequence[int]]) -> Tensor:
    """Run new tokens of every row through the row's program.

    Args:
        decoder: The weights.
        rows: B rows. A row without history is in prefill; one with history is decoding.
        tokens: New token ids of each row, at least one each; lengths may differ.

    Returns:
        Hidden states of all new tokens before the final norm, packed, (N, E).

    Raises:
        CacheMemoryError: No pages left for the new tokens; then nothing ran.
    """
    for row, new in zip(rows, tokens, strict=True):
        row.pages.reserve(row.length + len(new))
    here = decoder.placement.first
    layout = Layout(rows, tokens, here)
    layouts = {here: layout}
    hidden = decoder.embed(layout.tokens, layout.positions)
    rotary = decoder.rotary(layout.positions, layout.longest)
    for turn in turns([row.program for row in rows]):
        if (there := decoder.placement.layers[turn.step.first]) != here:
            layout = layouts[there] = layouts.get(there) or Layout(rows, tokens, there)
            hidden, rotary = hidden.to(there), decoder.rotary(layout.positions, layout.longest)
            here = there
        members = layout.members(turn)
        if members is not None:
            hidden = _run(decoder, turn, layout, members, hidden, rotary)
    for row, new in zip(rows, tokens, strict=True):
        row.pages.length += len(new)
        row.work.finish_pass()
    return hidden


def next_logits(decoder: Decoder, rows: Sequence[Row], tokens: Sequence[Sequence[int]]) -> Tensor:
    """Advance the rows and return float32 logits for the token after each row's last one, (B, V)."""
    hidden = advance(decoder, rows, tokens)
    if hidden.shape[0] != len(rows):
        ends = torch.tensor([len(new) for new in tokens], device=hidden.device).cumsum(0) - 1
        hidden = hidden[ends]
    logits = decoder.head(hidden)
    for row in rows:
        row.work.head()
        row.work.end_prefill()  # logits are asked for at the end of a prompt, not between its chunks
    return logits


def _run(
    decoder: Decoder,
    turn: Turn,
    layout: Layout,
    members: Members,
    hidden: Tensor,
    rotary: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """One step for its members; returns the hidden states of all rows."""
    index = members.index
    before = hidden if index is None else hidden[index]
    if turn.step.bridge:
        after = decoder.bridge(turn.step)(before, members.positions)
    else:
        turned = rotary if index is None else [_pick(pair, index) for pair in rotary]
        after = damp(before, _visit(decoder, turn.step.first, members, before, turned), turn.step.parts)
    members.count(turn.step)
    if layout.guarded:
        after = _guarded(members, before, after)
    if index is None:
        return after
    hidden[index] = after
    return hidden


def _pick(rotary: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = rotary
    return (cos[index], sin[index]) if cos.numel() else rotary


def _visit(decoder: Decoder, layer: int, members: Members, x: Tensor, rotary: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One layer for the members' tokens (N, E)."""
    kind, store = decoder.family.kinds[layer], decoder.store(layer)
    if members.single and decoder.kernels.pages:
        weights = decoder.layers[layer]
        return decoder.kernels.decode(weights, x, rotary[kind.rope], kind, store, members.table, members.positions)
    query, key, value = decoder.project(layer, x, rotary)
    write_pages(store, members.pages, members.offsets, key, value)
    parts = []
    for row, visit, span in members.spans:
        total = row.length + span.stop - span.start
        if row.length == 0:
            keys, values = key[span].transpose(0, 1), value[span].transpose(0, 1)
        else:
            keys, values = row.pages.history(visit, total)
        parts.append(attend_row(query[span], keys, values, kind))
    return decoder.finish(layer, x, parts[0] if len(parts) == 1 else torch.cat(parts))


def _guarded(members: Members, before: Tensor, after: Tensor) -> Tensor:
    """Undo an extra visit for the rows whose guard it breaches, and stop their loops."""
    for row, place, span in members.places:
        if row.guard is None or place not in extra_visits(row.program):
            continue
        last = slice(span.stop - 1, span.stop)
        if bool(row.guard.breached(before[last], after[last]).any()):
            after = after.clone()
            after[span] = before[span]
            row.stop_loop(place)
    return after
