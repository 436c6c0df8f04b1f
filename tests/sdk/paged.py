"""Attention over pages by plain operations: what the native library's is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from polar_sdk.engine.types import AttentionKind


def paged_decode(query: Tensor, store: Tensor, table: Tensor, positions: Tensor, kind: AttentionKind) -> Tensor:
    """Attention of one token per row over the row's pages, its own key and value already written.

    Args:
        query: (B, H, d).
        store: (P, 2, G, page, d).
        table: Pages of each row in order, (B, n); entries after the row's end may name any page.
        positions: Position of each row's token, (B,); it sees the keys up to its own, as far as the window reaches.
        kind: Scale, window and soft cap.

    Returns:
        (B, H × d).
    """
    rows, count = table.shape
    _, _, groups, page, size = store.shape
    heads = query.shape[1]
    history = store[table]  # (B, n, 2, G, page, d)
    grouped = query.view(rows, 1, groups, heads // groups, 1, size).float()
    scores = (grouped * history[:, :, 0, :, None].float()).sum(-1) * kind.scale  # (B, n, G, H / G, page)
    if kind.softcap is not None:
        scores = kind.softcap * torch.tanh(scores / kind.softcap)
    key_positions = torch.arange(count * page, device=query.device).view(1, count, 1, 1, page)
    own = positions.view(rows, 1, 1, 1, 1)
    hidden = key_positions > own
    if kind.window is not None:
        hidden = hidden | (key_positions <= own - kind.window)
    scores = scores.masked_fill(hidden, float("-inf"))
    weights = (scores - scores.amax((1, 4), keepdim=True)).exp()
    mixed = (weights.unsqueeze(-1) * history[:, :, 1, :, None].float()).sum(4).sum(1)  # (B, G, H / G, d)
    total = weights.sum((1, 4)).unsqueeze(-1)
    return (mixed / total).view(rows, heads * size).to(query.dtype)
