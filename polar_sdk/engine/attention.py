"""Attention of one segment of tokens over its own history, through torch's fused kernel.

Also teaches `FlopCounterMode` the CPU form of that kernel. torch registers formulas for the CUDA forms only, so on
a CPU it counts attention as nothing; with this registration it counts the same on both, which is what the meter counts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils import flop_counter

__all__ = ["causal_attention"]


def causal_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the last T positions of a row.

    Args:
        query: (T, H, d).
        keys: (G, S, d), S ≥ T; the last T are the queries' own.
        values: (G, S, d).

    Returns:
        (T, H × d).
    """
    tokens, total = query.shape[0], keys.shape[1]
    mask = None
    if 1 < tokens < total:  # torch's own causal flag aligns the mask to the upper left, which is wrong here
        mask = torch.ones(tokens, total, dtype=torch.bool, device=query.device).tril(total - tokens)
    mixed = F.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None and tokens > 1,
        enable_gqa=query.shape[1] != keys.shape[0],
    )
    return mixed[0].transpose(0, 1).reshape(tokens, -1)


def _cpu_attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(flop_counter.sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


_CPU_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
if _CPU_KERNEL not in flop_counter.flop_registry:
    flop_counter.register_flop_formula(_CPU_KERNEL)(_cpu_attention_flops)
