"""One pass of packed rows through their programs: prefill and decode are the same code.

Each layer runs once for all rows that want it next (`schedule.turns`): gather their tokens, run, scatter back. Rows
never touch each other's keys, values or counts. Knows rows and programs, not requests or text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from polar_sdk.engine.attention import causal_attention
from polar_sdk.engine.kv import VisitCache
from polar_sdk.engine.schedule import turns
from polar_sdk.engine.work import Work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Attend, Decoder
    from polar_sdk.program import Program

__all__ = ["Row", "advance", "next_logits"]


@dataclass
class Row:
    """One sequence with its program, its history and its counts."""

    decoder: Decoder
    program: Program
    capacity: int
    """Tokens that the history is first made for; it grows when more come."""
    work: Work = field(init=False)
    cache: VisitCache = field(init=False)

    def __post_init__(self) -> None:
        self.work = Work(self.decoder.cost)
        self.cache = VisitCache(self.decoder, len(self.program), self.capacity)


def advance(decoder: Decoder, rows: Sequence[Row], tokens: Sequence[Sequence[int]]) -> Tensor:
    """Run new tokens of every row through the row's program.

    Args:
        decoder: The weights.
        rows: B rows. A row without history is in prefill; one with history is decoding.
        tokens: New token ids of each row, at least one each; lengths may differ.

    Returns:
        Hidden states of all new tokens before the final norm, packed, (N, E).
    """
    counts = [len(new) for new in tokens]
    starts = [sum(counts[:row]) for row in range(len(rows))]
    for row, count in zip(rows, counts, strict=True):
        row.cache.reserve(row.cache.length + count)
    ids = torch.tensor([token for new in tokens for token in new], device=decoder.device)
    spans = [range(row.cache.length, row.cache.length + count) for row, count in zip(rows, counts, strict=True)]
    positions = torch.tensor([position for span in spans for position in span], device=decoder.device)
    hidden, rotary = decoder.embed(ids), decoder.rotary(positions)
    for layer, members in turns([row.program for row in rows]):
        taking = [(rows[row], visit, counts[row]) for row, visit in members]
        if len(members) == len(rows):
            hidden = decoder.layer(layer, hidden, rotary, _attend(taking))
        else:
            index = _index(members, starts, counts, decoder.device)
            some = (rotary[0][index], rotary[1][index])
            hidden[index] = decoder.layer(layer, hidden[index], some, _attend(taking))
        for row, _, count in taking:
            row.work.visit(layer, count, row.cache.length + count, decoding=row.work.prefilled)
    for row, count in zip(rows, counts, strict=True):
        row.cache.length += count
        row.work.finish_pass(decoding=row.work.prefilled)
    return hidden


def next_logits(decoder: Decoder, rows: Sequence[Row], tokens: Sequence[Sequence[int]]) -> Tensor:
    """Advance the rows and return float32 logits for the token after each row's last one, (B, V)."""
    hidden = advance(decoder, rows, tokens)
    last, at = [], -1
    for new in tokens:
        at += len(new)
        last.append(at)
    logits = decoder.head(hidden if len(last) == hidden.shape[0] else hidden[last])
    for row in rows:
        row.work.head()
    return logits


def _attend(taking: Sequence[tuple[Row, int, int]]) -> Attend:
    """Attention of each member over the history of its own visit."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if len(taking) == 1:
            row, visit, _ = taking[0]
            return causal_attention(query, *row.cache.append(visit, key, value))
        parts, start = [], 0
        for row, visit, count in taking:
            span = slice(start, start + count)
            parts.append(causal_attention(query[span], *row.cache.append(visit, key[span], value[span])))
            start += count
        return torch.cat(parts)

    return attend


def _index(
    members: Sequence[tuple[int, int]], starts: Sequence[int], counts: Sequence[int], device: torch.device
) -> Tensor:
    """Positions of the members' tokens among the packed ones."""
    return torch.tensor(
        [at for row, _ in members for at in range(starts[row], starts[row] + counts[row])], device=device
    )
