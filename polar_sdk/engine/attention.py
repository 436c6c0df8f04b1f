"""Attention by torch: of some tokens of one row over its history, and of one new token of each of several rows.

The first goes row by row, the second takes rows whose histories were copied side by side. Both go through torch's fused
kernel, or through plain products where a soft cap forbids it. Several tokens in bfloat16 on a CPU without tiles go in
float32: without AVX512, torch's products of bfloat16 take up to 150 times as long.

Importing this also registers the CPU form of torch's kernel with `FlopCounterMode`. torch has formulas for the CUDA
forms only, so on a CPU it would count attention as zero; now it counts the same on both, like the meter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils import flop_counter

from polar_sdk.engine import native

if TYPE_CHECKING:
    from polar_sdk.engine.types import AttentionKind


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
    if kind.softcap is not None or windowed or tokens < total:
        return attend_seen(query, keys, values, kind, _mask(tokens, total, kind.window, query.device))
    return _fused(query, keys, values, kind, None)


def _fused(query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind, seen: Tensor | None) -> Tensor:
    """Attention by torch's kernel of queries (T, H, d) over what `seen` (T, S) marks; None = up to their own."""
    wide = _wide(query)
    mixed = F.scaled_dot_product_attention(
        query.to(wide).transpose(0, 1)[None],
        keys.to(wide)[None],
        values.to(wide)[None],
        attn_mask=seen,
        # torch's causal flag aligns the mask to the upper left, which is wrong for a row with history.
        is_causal=seen is None,
        scale=kind.scale,
        enable_gqa=query.shape[1] != keys.shape[0],
    )
    return mixed[0].transpose(0, 1).reshape(query.shape[0], -1).to(query.dtype)


def _wide(query: Tensor) -> torch.dtype:
    """The type to compute several tokens in."""
    halves = query.dtype == torch.bfloat16 and query.device.type == "cpu"
    return torch.float32 if halves and not native.has_tiles() else query.dtype


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


def attend_some(query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind, positions: Tensor) -> Tensor:
    """As `attend_row`, of the tokens at these positions, (T,)."""
    distance = positions[:, None] - torch.arange(keys.shape[1], device=positions.device)
    seen = distance >= 0 if kind.window is None else (distance >= 0) & (distance < kind.window)
    return attend_seen(query, keys, values, kind, seen)


def attend_seen(query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind, seen: Tensor) -> Tensor:
    """Attention of queries (T, H, d) over the keys and values (G, S, d) that `seen` (T, S) marks; (T, H × d)."""
    if kind.softcap is None:
        return _fused(query, keys, values, kind, seen)
    tokens, heads, size = query.shape
    groups = keys.shape[0]
    wide = _wide(query)
    grouped = query.to(wide).view(tokens, groups, heads // groups, size).permute(1, 2, 0, 3)  # (G, H / G, T, d)
    scores = torch.bmm(grouped.flatten(1, 2), keys.to(wide).transpose(1, 2)) * kind.scale
    scores = kind.softcap * torch.tanh(scores / kind.softcap)
    scores = scores.view(groups, heads // groups, tokens, -1).masked_fill(~seen, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(wide).flatten(1, 2)  # (G, H / G × T, S)
    mixed = torch.bmm(weights, values.to(wide)).view(groups, heads // groups, tokens, size)
    return mixed.permute(2, 0, 1, 3).reshape(tokens, -1).to(query.dtype)


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
