"""One pass of packed rows through their programs: prefill and decode are the same code.

Each step runs once for all rows that need it next (`layout.schedule`): gather their tokens, run, scatter back. Rows
never touch each other's keys, values or counts. Where every row has one token and the kernels can do it, a layer runs
as one compiled call over the pages. Knows rows and programs, not requests or text.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from polar_sdk.engine.attention import write_pages
from polar_sdk.engine.decoder import damp
from polar_sdk.engine.eager import PagedTokens
from polar_sdk.engine.layout import Layout, Members
from polar_sdk.engine.row import Row, extra_visits
from polar_sdk.engine.types import pick

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.types import Rotary


def next_logits(
    decoder: Decoder, rows: Sequence[Row], tokens: Sequence[Sequence[int]], ends: Sequence[bool] | None = None
) -> Tensor:
    """Advance the rows and compute logits for the token after each row's last one.

    Args:
        decoder: The weights.
        rows: B rows.
        tokens: New token ids of each row, as in `advance`.
        ends: For each row, whether its logits are needed: not between the chunks of a prompt. None = of all rows.

    Returns:
        Float32 logits of the rows that need them, in order, (M, V).
    """
    hidden = advance(decoder, rows, tokens)
    ending = list(rows) if ends is None else [row for row, end in zip(rows, ends, strict=True) if end]
    if not ending:
        return hidden.new_empty((0, decoder.vocab), dtype=torch.float32)
    if hidden.shape[0] != len(ending):
        last = torch.tensor([len(new) for new in tokens], device=hidden.device).cumsum(0) - 1
        hidden = hidden[last if ends is None else last[torch.tensor(ends, device=hidden.device)]]
    logits = decoder.head(hidden)
    for row in ending:
        row.work.head()
        row.work.end_prefill()
    return logits


def advance(decoder: Decoder, rows: Sequence[Row], tokens: Sequence[Sequence[int]]) -> Tensor:
    """Run new tokens of every row through the row's program.

    Args:
        decoder: The weights.
        rows: B rows. A row without history is in prefill; one with history is decoding.
        tokens: New token ids of each row, at least one each; lengths may differ.

    Returns:
        Hidden states of all new tokens before the final norm, packed, (N, E).

    Raises:
        CacheMemoryError: No pages are left for the new tokens; nothing has run then.
    """
    for row, new in zip(rows, tokens, strict=True):
        row.page_table.reserve(row.length + len(new))
    layout = Layout(rows, tokens, decoder.placement.first)
    hidden = decoder.embed(layout.tokens, layout.positions)
    _take_over_leads(decoder, layout, hidden)
    rotary = decoder.rotary(layout.positions, layout.longest)
    here, finished = layout, list[Members]()
    try:
        for members in layout.members(decoder.placement.layers):
            if members.layout is not here:
                here = members.layout
                hidden, rotary = hidden.to(here.device), decoder.rotary(here.positions, here.longest)
            hidden = _run(decoder, members, hidden, rotary)
            finished.append(members)
    finally:
        _count(layout, finished)
    for row, new in zip(rows, tokens, strict=True):
        row.page_table.length += len(new)
        row.work.finish_pass()
        if row.lead is not None and row.length >= row.lead.tokens:
            row.end_lead()
    return hidden


def _take_over_leads(decoder: Decoder, layout: Layout, hidden: Tensor) -> None:
    """Rows with a lead go on after it: its states replace their embeddings, its keys and values fill their pages."""
    for row, start, count in zip(layout.rows, layout.starts, layout.counts, strict=True):
        if row.lead is not None:
            end = row.length + count
            hidden[start : start + count] = row.lead.states[row.length : end].to(hidden.device)
            stores = [decoder.store(layer) for layer in range(row.lead.layers)]
            row.lead.fill(row.page_table, stores, row.length, end)


def _count(layout: Layout, finished: Sequence[Members]) -> None:
    """Count the finished steps of every row: at once where they are all of its program."""
    steps = [0] * len(layout.rows)
    for members in finished:
        for index, _ in members.going:
            steps[index] += 1
    whole = [count == len(row.program) for row, count in zip(layout.rows, steps, strict=True)]
    for row, new, all_ran in zip(layout.rows, layout.counts, whole, strict=True):
        if all_ran:
            row.work.whole_pass(new, row.length + new)
    if all(whole):
        return
    for members in finished:
        for index, _ in members.going:
            if not whole[index]:
                row, new = layout.rows[index], layout.counts[index]
                row.work.step(members.step, new, row.length + new)


def _run(decoder: Decoder, members: Members, hidden: Tensor, rotary: list[Rotary]) -> Tensor:
    """One step for its members; returns the hidden states of all rows."""
    index, step, guarded = members.index, members.step, members.layout.guarded
    paged = members.single and decoder.kernels.has_paged_decode and not step.bridge
    if paged and step.parts == 1 and not guarded:
        return _decode_paged(decoder, members, hidden, index, rotary)
    before = hidden if index is None else hidden.index_select(0, index)
    if index is not None and not step.bridge:
        rotary = [pick(pair, index) for pair in rotary]
    if paged:
        after = damp(before, _decode_paged(decoder, members, before, None, rotary), step.parts)
    else:
        attend = partial(_attend, decoder, members)
        after = decoder.run_step(step, before, members.positions, rotary, attend)
    if guarded:
        after = _undo_breaches(members, before, after)
    return after if index is None else hidden.index_copy_(0, index, after)


def _decode_paged(decoder: Decoder, members: Members, x: Tensor, index: Tensor | None, rotary: list[Rotary]) -> Tensor:
    """A plain visit for one token of each member, which are at `index` of the states x (B, E); returns all states."""
    layer = members.step.first
    kind, weights = decoder.family.kinds[layer], decoder.layers[layer]
    tokens = PagedTokens(index, members.table, members.positions)
    return decoder.kernels.decode(weights, x, rotary[kind.rope], kind, decoder.store(layer), tokens)


def _attend(decoder: Decoder, members: Members, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Store the members' keys and values, and attend row by row; (N, H × d)."""
    layer = members.step.first
    kind = decoder.family.kinds[layer]
    write_pages(decoder.store(layer), members.token_pages, members.token_offsets, key, value)
    mixed = []
    for row, visit, span in members.spans:
        if row.length == 0:
            keys, values = key[span].transpose(0, 1), value[span].transpose(0, 1)
        else:
            keys, values = row.page_table.history(visit, row.length + span.stop - span.start)
        mixed.append(decoder.kernels.attend(query[span], keys, values, kind))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _undo_breaches(members: Members, before: Tensor, after: Tensor) -> Tensor:
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
