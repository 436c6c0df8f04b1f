"""One pass of packed rows through their programs: prefill and decode are the same code.

Each step runs once for all rows that want it next (`schedule.py`): gather their tokens, run, scatter back. Rows
never touch each other's keys, values or counts. Where every row has one token and the kernels can, a layer runs as
one compiled call over the pages. Knows rows and programs, not requests or text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polar_sdk.engine.attention import write_pages
from polar_sdk.engine.layout import Layout, Members
from polar_sdk.engine.row import Row, extra_visits
from polar_sdk.engine.types import pick
from polar_sdk.programs.guard import damp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.types import Rotary


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
    layout = Layout(rows, tokens, decoder.placement.first)
    hidden = decoder.embed(layout.tokens, layout.positions)
    _take_over(decoder, layout, hidden)
    rotary = decoder.rotary(layout.positions, layout.longest)
    here, ran = layout, list[Members]()
    try:
        for members in layout.members(decoder.placement.layers):
            if members.layout is not here:
                here = members.layout
                hidden, rotary = hidden.to(here.device), decoder.rotary(here.positions, here.longest)
            hidden = _run(decoder, here, members, hidden, rotary)
            ran.append(members)
    finally:
        _count(layout, ran)
    for row, new in zip(rows, tokens, strict=True):
        row.pages.length += len(new)
        row.work.finish_pass()
        if row.lead is not None and row.length >= row.lead.tokens:
            row.end_lead()
    return hidden


def _take_over(decoder: Decoder, layout: Layout, hidden: Tensor) -> None:
    """Rows with a lead begin behind it: their states in the place of the embeddings, keys and values in their pages."""
    for row, start, count in zip(layout.rows, layout.starts, layout.counts, strict=True):
        if row.lead is not None:
            end = row.length + count
            hidden[start : start + count] = row.lead.states[row.length : end].to(hidden.device)
            row.lead.fill(row.pages, [decoder.store(layer) for layer in range(row.lead.layers)], row.length, end)


def _count(layout: Layout, ran: Sequence[Members]) -> None:
    """Count the steps that have run, for every row: at once where they are all of its program."""
    places = [0] * len(layout.rows)
    for members in ran:
        for number, _ in members.going:
            places[number] += 1
    whole = [count == len(row.program) for row, count in zip(layout.rows, places, strict=True)]
    for row, new, all_ran in zip(layout.rows, layout.counts, whole, strict=True):
        if all_ran:
            row.work.whole_pass(new, row.length + new)
    if all(whole):
        return
    for members in ran:
        for number, _ in members.going:
            if not whole[number]:
                row, new = layout.rows[number], layout.counts[number]
                row.work.step(members.step, new, row.length + new)


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


def _run(decoder: Decoder, layout: Layout, members: Members, hidden: Tensor, rotary: list[Rotary]) -> Tensor:
    """One step for its members; returns the hidden states of all rows."""
    index, step = members.index, members.step
    if _pages(decoder, members) and not (step.bridge or step.parts > 1 or layout.guarded):
        return _visit_pages(decoder, step.first, members, hidden, index, rotary)
    before = hidden if index is None else hidden.index_select(0, index)
    if step.bridge:
        after = decoder.bridge(step)(before, members.positions)
    else:
        turned = rotary if index is None else [pick(pair, index) for pair in rotary]
        after = damp(before, _visit(decoder, step.first, members, before, turned), step.parts)
    if layout.guarded:
        after = _guarded(members, before, after)
    if index is None:
        return after
    return hidden.index_copy_(0, index, after)


def _pages(decoder: Decoder, members: Members) -> bool:
    """Whether a layer runs as one call over the pages."""
    return members.single and decoder.kernels.pages


def _visit_pages(
    decoder: Decoder, layer: int, members: Members, x: Tensor, index: Tensor | None, rotary: list[Rotary]
) -> Tensor:
    """One layer for one token of each member, which stand at `index` of the states x (B, E); returns all states."""
    kind, weights = decoder.family.kinds[layer], decoder.layers[layer]
    return decoder.kernels.decode(
        weights, x, index, rotary[kind.rope], kind, decoder.store(layer), members.table, members.positions
    )


def _visit(decoder: Decoder, layer: int, members: Members, x: Tensor, rotary: list[Rotary]) -> Tensor:
    """One layer for the members' tokens (N, E)."""
    if _pages(decoder, members):
        return _visit_pages(decoder, layer, members, x, None, rotary)
    kind, store = decoder.family.kinds[layer], decoder.store(layer)
    query, key, value = decoder.project(layer, x, rotary)
    write_pages(store, members.pages, members.offsets, key, value)
    parts = []
    for row, visit, span in members.spans:
        total = row.length + span.stop - span.start
        if row.length == 0:
            keys, values = key[span].transpose(0, 1), value[span].transpose(0, 1)
        else:
            keys, values = row.pages.history(visit, total)
        parts.append(decoder.kernels.attend(query[span], keys, values, kind))
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
