"""Attention by torch: of some tokens of one row over its history, and of one new token of each of several rows.

The first goes row by row, the second takes rows whose histories were copied side by side. Both go through torch's fused
kernel, or through plain products where a soft cap forbids it or, for many tokens in bfloat16 on a CPU without tiles,
where they are faster.

Importing this also registers the CPU form of torch's kernel with `FlopCounterMode`. torch has formulas for the CUDA
forms only, so on a CPU it would count attention as zero; now it counts the same on both, like the meter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils import flop_counter

from polar_sdk.engine import native

if TYPE_CHECKING:
    from polar_sdk.engine.types import AttentionKind


QUERY_BATCH: Final = 128
"""Number of queries that `_by_blocks` runs together: their scores stay in the processor's cache."""


def attend_row(query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind) -> Tensor:
    """Causal attention of the last T positions of one row.

    Args:
        query: (T, H, d).
        keys: (G, S, d), S ≥ T; the last T are the queries' own.
        values: (G, S, d).
        kind: Scale, window and soft cap.

    Returns:
        (T, H × d).
    """
    tokens, total = query.shape[0], keys.shape[1]
    windowed = kind.window is not None and kind.window < total
    if tokens == 1:
        mask = added_mask(_mask(1, total, kind.window, query.device), query.dtype) if windowed else None
        return attend_rows(query, keys[None], values[None], kind, mask)
    if query.dtype == torch.bfloat16 and query.device.type == "cpu" and not _fused_is_faster(kind):
        return _by_blocks(query, keys, values, kind)
    if kind.softcap is not None:
        return _capped(query, keys, values, kind)
    # torch's causal flag aligns the mask to the upper left, which is wrong for a row with history.
    masked = windowed or tokens < total
    mixed = F.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=_mask(tokens, total, kind.window, query.device) if masked else None,
        is_causal=not masked,
        scale=kind.scale,
        enable_gqa=query.shape[1] != keys.shape[0],
    )
    return mixed[0].transpose(0, 1).reshape(tokens, -1)


def _fused_is_faster(kind: AttentionKind) -> bool:
    """Whether torch's kernel for CPUs beats `_by_blocks` in bfloat16: by the tiles of AMX, in half of its time."""
    return kind.softcap is None and native.has_tiles()


def attend_rows(query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind, mask: Tensor | None) -> Tensor:
    """Attention of one token of each of several rows over the row's keys.

    Query heads that share keys go in the place of tokens, so that keys are read once for all of them: in bfloat16 on a
    CPU, torch's kernel for shared keys takes four times as long.

    Args:
        query: (B, H, d).
        keys: (B, G, S, d).
        values: (B, G, S, d).
        kind: Scale and soft cap; what the window hides, `mask` hides.
        mask: Of `added_mask`, by which keys each row sees; None = all.

    Returns:
        (B, H × d).
    """
    rows, heads, size = query.shape
    groups = keys.shape[1]
    grouped = query.reshape(rows, groups, heads // groups, size)
    if kind.softcap is None:
        mixed = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=kind.scale)
        return mixed.reshape(rows, heads * size)
    scores = torch.matmul(grouped, keys.transpose(2, 3)) * kind.scale  # (B, G, H / G, S)
    scores = kind.softcap * torch.tanh(scores / kind.softcap)
    if mask is not None:
        scores = scores + mask
    weights = scores.float().softmax(-1).to(values.dtype)
    return torch.matmul(weights, values).reshape(rows, heads * size)


def added_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers to add to scores so that each row attends to visible keys only, (B, 1, 1, S), from `seen` (B, S)."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
    return mask[:, None, None]


def _mask(tokens: int, total: int, window: int | None, device: torch.device) -> Tensor:
    """True (T, S) where a query sees a key."""
    seen = torch.ones(tokens, total, dtype=torch.bool, device=device).tril(total - tokens)
    return seen if window is None else seen.triu(total - tokens - window + 1)


def _by_blocks(query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind) -> Tensor:
    """Attention in blocks of queries, each over the keys up to its end.

    Without AMX this takes 60 % of the time of torch's kernel for 512 tokens, and a sixth for 32: nothing after a
    block is computed, and heads that share keys are one product. Scores are rounded to bfloat16, as in the eager
    attention of transformers; the kernel keeps them in float32.
    """
    tokens, heads, size = query.shape
    groups, total, _ = keys.shape
    grouped = query.view(tokens, groups, heads // groups, size).permute(1, 2, 0, 3)  # (G, H / G, T, d)
    mixed = query.new_empty(tokens, heads, size)  # (T, H, d)
    for start in range(0, tokens, QUERY_BATCH):  # t queries, which see s keys
        end = min(start + QUERY_BATCH, tokens)
        seen = slice(_first_key(total - tokens + start, kind), total - tokens + end)
        scores = _scores(grouped[:, :, start:end], keys[:, seen], kind)  # (G, H / G, t, s)
        if kind.window is None:  # all queries of the block see all that came before it
            diagonal = scores[..., scores.shape[-1] - (end - start) :]  # (G, H / G, t, t)
            diagonal.masked_fill_(~_mask(end - start, end - start, None, query.device), float("-inf"))
        else:
            scores.masked_fill_(~_mask(end - start, scores.shape[-1], kind.window, query.device), float("-inf"))
        weights = scores.softmax(-1)  # (G, H / G, t, s)
        part = torch.bmm(weights.flatten(1, 2), values[:, seen])  # (G, H / G × t, d)
        part = part.view(groups, heads // groups, end - start, size)  # (G, H / G, t, d)
        mixed[start:end] = part.permute(2, 0, 1, 3).flatten(1, 2)  # (t, H, d)
    return mixed.view(tokens, -1)  # (T, H × d)


def _first_key(position: int, kind: AttentionKind) -> int:
    """The first key that a query at this position sees."""
    return 0 if kind.window is None else max(0, position - kind.window + 1)


def _scores(query: Tensor, keys: Tensor, kind: AttentionKind) -> Tensor:
    """Scores (G, H / G, T, S) of queries (G, H / G, T, d) and keys (G, S, d), scaled and capped."""
    groups, sharing, tokens, size = query.shape
    flat = query.reshape(groups, sharing * tokens, size)
    scores = torch.baddbmm(flat.new_empty(()), flat, keys.transpose(1, 2), beta=0, alpha=kind.scale)
    if kind.softcap is not None:
        scores = kind.softcap * torch.tanh(scores / kind.softcap)
    return scores.view(groups, sharing, tokens, -1)


def attend_some(query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind, positions: Tensor) -> Tensor:
    """As `attend_row`, of the tokens at these positions, (T,)."""
    distance = positions[:, None] - torch.arange(keys.shape[1], device=positions.device)
    seen = distance >= 0 if kind.window is None else (distance >= 0) & (distance < kind.window)
    return attend_seen(query, keys, values, kind, seen)


def attend_seen(query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind, seen: Tensor) -> Tensor:
    """Attention of queries (T, H, d) over the keys and values (G, S, d) that `seen` (T, S) marks; (T, H × d)."""
    tokens, heads, size = query.shape
    groups = keys.shape[0]
    if kind.softcap is None and query.dtype != torch.bfloat16:
        mixed = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None], keys[None], values[None],
            attn_mask=seen, scale=kind.scale, enable_gqa=heads != groups,
        )  # fmt: skip
        return mixed[0].transpose(0, 1).reshape(tokens, -1)
    grouped = query.view(tokens, groups, heads // groups, size).permute(1, 2, 0, 3)
    weights = _scores(grouped, keys, kind).masked_fill_(~seen, float("-inf")).softmax(-1)
    mixed = torch.bmm(weights.flatten(1, 2), values).view(groups, heads // groups, tokens, size)
    return mixed.permute(2, 0, 1, 3).reshape(tokens, -1)


def _capped(query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind) -> Tensor:
    """`attend_row` with a soft cap, which torch's kernel does not have."""
    assert kind.softcap is not None
    tokens, heads, size = query.shape
    groups, total, _ = keys.shape
    grouped = query.transpose(0, 1).reshape(groups, heads // groups * tokens, size)
    scores = torch.bmm(grouped, keys.transpose(1, 2)) * kind.scale
    scores = kind.softcap * torch.tanh(scores / kind.softcap)
    scores = scores.view(heads, tokens, total).masked_fill(
        ~_mask(tokens, total, kind.window, query.device), float("-inf")
    )
    weights = scores.float().softmax(-1).to(values.dtype).view(groups, heads // groups * tokens, total)
    mixed = torch.bmm(weights, values).view(heads, tokens, size)
    return mixed.transpose(0, 1).reshape(tokens, -1)


def write_pages(store: Tensor, pages: Tensor, offsets: Tensor, key: Tensor, value: Tensor) -> None:
    """Write keys and values (N, G, d) to their places, pages (N,) and offsets (N,), of a store (P, 2, G, page, d)."""
    if native.can_attend(key) and store.dtype == key.dtype:
        native.write_pages(store, pages, offsets, key, value)
        return
    store[pages, :, :, offsets] = torch.stack((key, value), dim=1).to(store.dtype)


def _cpu_attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(flop_counter.sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


_CPU_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
if _CPU_KERNEL not in flop_counter.flop_registry:
    flop_counter.register_flop_formula(_CPU_KERNEL)(_cpu_attention_flops)
