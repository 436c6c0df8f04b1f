"""One pass of packed rows through their programs: prefill and decode are the same code.

Each step runs once for all rows that need it next (`layout.schedule`): gather their tokens, run, scatter back. Rows
never touch each other's keys, values or counts. Prompt tokens whose states are no longer needed write their keys and
values and stop, and a filled segment's map writes those of the tokens that do not run it, for all its layers at once.
If only a few tokens of a row run, and the kernels support it, a layer runs as one call over the pages, and so does a
pass that consists of such visits only. Knows rows and programs, not requests or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from polar_sdk.engine.attention import attend_rows, write_pages
from polar_sdk.engine.decoder import damp
from polar_sdk.engine.kernels import PagedTokens
from polar_sdk.engine.layout import Layout, Members, Tokens
from polar_sdk.engine.pages import histories
from polar_sdk.engine.row import Row, extra_visits
from polar_sdk.engine.types import Visits

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.types import AttentionKind, Rotary
    from polar_sdk.programs.cost import Segment


_Going = Sequence[tuple[int, int]]
"""The members of a turn that ran: row, and place in its program."""


def next_logits(
    decoder: Decoder,
    rows: Sequence[Row],
    tokens: Sequence[Sequence[int]],
    ends: Sequence[bool] | None = None,
    scored: Mapping[int, Callable[[Tensor], None]] | None = None,
) -> Tensor:
    """Advance the rows and compute logits for the token after each row's last one.

    Args:
        decoder: The weights.
        rows: B rows.
        tokens: New token ids of each row, as in `advance`.
        ends: For each row, whether its logits are needed: not between the chunks of a prompt. None = of all rows.
        scored: By row, what to do with the states (T, E) of all its new tokens, which then all run the last visit.

    Returns:
        Float32 logits of the rows that need them, in order, (M, V).
    """
    wanted = [1] * len(rows) if ends is None else list(map(int, ends))
    reading = scored or {}
    counts = [len(new) if index in reading else wanted[index] for index, new in enumerate(tokens)]
    hidden = advance(decoder, rows, tokens, counts)
    for index, states in enumerate(torch.split(hidden, [len(new) for new in tokens]) if reading else ()):
        if index in reading:
            reading[index](states)
    ending = [row for row, count in zip(rows, wanted, strict=True) if count]
    if not ending:
        return hidden.new_empty((0, decoder.vocab), dtype=torch.float32)
    if hidden.shape[0] != len(ending):
        last = torch.tensor([len(new) for new in tokens], device=hidden.device).cumsum(0) - 1
        hidden = hidden[last if ends is None else last[torch.tensor(ends, device=hidden.device)]]
    logits = decoder.head(hidden)
    _keep_states(decoder, ending, hidden, [1] * len(ending))
    for row in ending:
        row.work.head()
        row.work.end_prefill()
    return logits


def drafted_logits(decoder: Decoder, rows: Sequence[Row], tokens: Sequence[Sequence[int]]) -> Tensor:
    """Advance rows that decode by one token each, and by what is drafted after it.

    What is not kept of it is up to the caller to forget, see `Work.keep_draft` and `PageTable.shorten`.

    Args:
        decoder: The weights.
        rows: B rows whose prompts have run.
        tokens: For each row the token sampled last, and then drafted ones, if any.

    Returns:
        Float32 logits after every token, packed, (N, V).
    """
    try:
        for row, new in zip(rows, tokens, strict=True):
            row.drafted, row.breached = len(new) - 1, False
        hidden = advance(decoder, rows, tokens)
        logits = decoder.head(hidden)
        _keep_states(decoder, rows, hidden, [len(new) for new in tokens])
        for row in rows:
            row.work.head(drafted=row.drafted)
    finally:
        for row in rows:
            row.drafted = 0
    return logits


def _keep_states(decoder: Decoder, rows: Sequence[Row], hidden: Tensor, counts: Sequence[int]) -> None:
    """Leave with each row its part of the states (N, E) whose logits were computed, for the draft head."""
    if decoder.draft_head is not None:
        start = 0
        for row, count in zip(rows, counts, strict=True):
            row.keep_states(hidden, start, start + count)
            start += count


def advance(
    decoder: Decoder, rows: Sequence[Row], tokens: Sequence[Sequence[int]], wanted: Sequence[int] | None = None
) -> Tensor:
    """Run new tokens of every row through the row's program.

    Args:
        decoder: The weights.
        rows: B rows. A row without history is in prefill; one with history is decoding.
        tokens: New token ids of each row, at least one each; lengths may differ.
        wanted: For each row, of how many of its last new tokens the states are wanted; the others do not run the last
            visit to its end. None = of all.

    Returns:
        Hidden states of all new tokens before the final norm, packed, (N, E); of those that are not wanted, the states
        before the last visit.

    Raises:
        CacheMemoryError: No pages are left for the new tokens; nothing has run then.
        MissingMapError: A program fills a segment for which the model has no map; likewise.
    """
    for row, new in zip(rows, tokens, strict=True):
        row.page_table.reserve(row.length + len(new))
    counts = [None] * len(rows) if wanted is None else wanted
    pieces = [row.piece(len(new), count) for row, new, count in zip(rows, tokens, counts, strict=True)]
    layout = Layout(rows, pieces, tokens, decoder.placement.first)
    hidden = decoder.embed(layout.tokens, layout.positions)
    finished = list[_Going]()
    try:
        if _runs_at_once(decoder, layout):
            hidden = _run_at_once(decoder, layout, hidden, finished)
        else:
            for members in layout.members(decoder.placement.layers):
                hidden = _run(decoder, members, hidden.to(members.layout.device))
                finished.append(members.going)
    finally:
        _count(layout, finished)
    for row, new in zip(rows, tokens, strict=True):
        row.page_table.length += len(new)
        row.work.finish_pass()
    return hidden


def _count(layout: Layout, finished: Sequence[_Going]) -> None:
    """Count the finished steps of every row."""
    places: list[Collection[int]]
    if len(finished) == len(layout.plan.turns) and not any(row.left_out for row in layout.rows):
        places = [range(len(row.program)) for row in layout.rows]
    else:
        ran = [(index, place) for going in finished for index, place in going]
        places = [{place for index, place in ran if index == row} for row in range(len(layout.rows))]
    for row, piece, done in zip(layout.rows, layout.pieces, places, strict=True):
        row.work.steps(piece, done, row.drafted)


def _runs_at_once(decoder: Decoder, layout: Layout) -> bool:
    """Whether every turn is a layer of which nothing is kept or left out, and the kernels run several at once."""
    return (
        decoder.kernels.at_once
        and layout.few
        and layout.plan.layers is not None
        and not layout.guarded
        and not any(row.left_out for row in layout.rows)
    )


def _run_at_once(decoder: Decoder, layout: Layout, hidden: Tensor, finished: list[_Going]) -> Tensor:
    """All turns in one call; returns the hidden states of all rows, and says which turns have run."""
    layers, done = layout.plan.layers, torch.zeros(1, dtype=torch.long)
    assert layers is not None, "see `_runs_at_once`"
    tokens = layout.member_tokens, layout.member_tables, layout.member_positions
    visits, rotary = Visits(layers, layout.turn_bounds, *tokens), layout.all.rotary(decoder.rotary)
    try:
        return decoder.kernels.decode_layers(hidden, visits, rotary, decoder.store(0), done)
    finally:
        finished += [turn.members for turn in layout.plan.turns[: int(done)]]


def _run(decoder: Decoder, members: Members, hidden: Tensor) -> Tensor:
    """One step for its members; returns the hidden states of all rows."""
    if members.few and _is_plain(decoder, members):
        rotary = members.layout.all.rotary(decoder.rotary)
        tokens = PagedTokens(members.index, members.table, members.positions)
        return _decode_paged(decoder, members, hidden, rotary, tokens)
    if not members.single:  # else every token runs
        for segment, filled in members.filled.items():
            hidden = _fill(decoder, members, segment, filled, hidden)
        if members.leaving.count:
            _leave(decoder, members, hidden)
    running = members.running
    if not running.count:
        return hidden
    before = running.of(hidden)
    after = _visit(decoder, members, before)
    if members.layout.guarded:
        after = _undo_breaches(members, before, after)
    return after if running.index is None else hidden.index_copy_(0, running.index, after)


def _is_plain(decoder: Decoder, members: Members) -> bool:
    """Whether a step is a layer, run whole by one call, of which nothing has to be kept."""
    return members.step.plain and not members.layout.guarded and decoder.kernels.decodes


def _visit(decoder: Decoder, members: Members, x: Tensor) -> Tensor:
    """One step for the tokens that run it, whose states are x (M, E); returns their states after it."""
    step, tokens = members.step, members.running
    if step.bridge:
        return decoder.bridge(step)(x, tokens.positions)
    rotary = tokens.rotary(decoder.rotary)
    if decoder.kernels.decodes and members.apart:
        paged = PagedTokens(None, tokens.tables(members.visits), tokens.positions)
        return damp(x, _decode_paged(decoder, members, x, rotary, paged), step.parts)
    return decoder.run_step(step, x, tokens.positions, rotary, partial(_attend, decoder, members))


def _decode_paged(decoder: Decoder, members: Members, x: Tensor, rotary: list[Rotary], tokens: PagedTokens) -> Tensor:
    """A visit of one call for tokens that are at `tokens.rows` of the states x; returns all states."""
    layer = members.step.first
    kind, weights = decoder.family.kinds[layer], decoder.layers[layer]
    return decoder.kernels.decode(weights, x, rotary[kind.rope], kind, decoder.store(layer), tokens)


def _leave(decoder: Decoder, members: Members, hidden: Tensor) -> None:
    """Store keys and values of tokens whose states nobody reads after this visit."""
    layer, tokens = members.step.first, members.leaving
    rotary = tokens.rotary(decoder.rotary)[decoder.family.kinds[layer].rope]
    key, value = decoder.kernels.keys_values(decoder.layers[layer], tokens.of(hidden), rotary)
    write_pages(decoder.store(layer), tokens.pages(members.visits), tokens.offsets, key, value)


def _fill(decoder: Decoder, members: Members, segment: Segment, tokens: Tokens, hidden: Tensor) -> Tensor:
    """Store what a segment's map gives for tokens that do not run it: keys and values of all its layers.

    Returns the hidden states of all rows, those of the tokens carried over the segment.
    """
    fill = decoder.fill(segment)
    embedded = decoder.embedded(tokens.of(members.layout.tokens), tokens.positions) if fill.token else None
    written, carried = fill.crossed(tokens.of(hidden), embedded)  # (M, L, 2, G, d) and (M, E)
    for index, layer in enumerate(range(segment[0], segment[1] + 1)):
        device = decoder.placement.layers[layer]
        there = members.layout.on(device).some(tokens.ranges)
        keys_values = written[:, index].to(device)
        rotary = there.rotary(decoder.rotary)[decoder.family.kinds[layer].rope]
        key = decoder.family.turn(keys_values[:, 0], rotary)
        visits = [visit + index for visit in members.visits]  # the segment's visits follow each other
        write_pages(decoder.store(layer), there.pages(visits), there.offsets, key, keys_values[:, 1])
    if not fill.carry:
        return hidden
    return carried if tokens.index is None else hidden.index_copy_(0, tokens.index, carried)


def _attend(decoder: Decoder, members: Members, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Store the keys and values of the tokens that run, and attend; (M, H × d).

    Rows with one token each attend together, others one by one.
    """
    layer, tokens = members.step.first, members.running
    kind = decoder.family.kinds[layer]
    if members.single and not decoder.kernels.decodes:
        write_pages(decoder.store(layer), members.pages, members.offsets, key, value)
        return _attend_together(members, query, decoder.store(layer), kind)
    write_pages(decoder.store(layer), tokens.pages(members.visits), tokens.offsets, key, value)
    mixed = []
    for spot in members.spots:
        own = spot.span
        if spot.ranges == ((0, spot.end),):
            keys, values = key[own].transpose(0, 1), value[own].transpose(0, 1)
        else:
            keys, values = spot.row.page_table.history(spot.visit, spot.end)
        positions = None if spot.is_suffix else tokens.positions[own]
        mixed.append(decoder.kernels.attend(query[own], keys, values, kind, positions))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _attend_together(members: Members, query: Tensor, store: Tensor, kind: AttentionKind) -> Tensor:
    """Attention of the members' tokens (M, H, d), one each, whose keys and values are stored; (M, H × d)."""
    table, bands = members.table, members.bands
    mixed = []
    for band in bands:
        keys, values = histories(store, band.of(table)[:, : band.blocks], band.longest)
        mixed.append(attend_rows(band.of(query), keys, values, kind, band.mask(kind.window, query.dtype)))
    if len(bands) == 1:
        return mixed[0]
    places = torch.cat([band.places for band in bands if band.places is not None])
    together = torch.cat(mixed)
    return torch.empty_like(together).index_copy_(0, places, together)


def _undo_breaches(members: Members, before: Tensor, after: Tensor) -> Tensor:
    """Undo an extra visit for the rows whose guard it breaches, and stop their loops.

    A row is judged by its last token. Where that stops before the end of the last visit, there is nothing to judge. Of
    a pass with drafts every token is judged, and a breach is only noted: the pass is to be dropped, since no token
    after the one that breaches runs the loop.
    """
    for spot in members.spots:
        row, own = spot.row, spot.span
        if row.guard is None or spot.place not in extra_visits(row.program) or spot.ranges[-1][1] != spot.end:
            continue
        if row.drafted:
            row.breached |= bool(row.guard.breached(before[own], after[own]).any())
            continue
        last = slice(own.stop - 1, own.stop)
        if bool(row.guard.breached(before[last], after[last]).any()):
            after = after.clone()
            after[own] = before[own]
            row.stop_loop(spot.place)
    return after
