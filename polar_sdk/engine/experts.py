"""A mixture of experts: which experts each token goes to, and each expert run once over the tokens that it gets.

It looks at values, so it cannot be compiled; what a token does not go to is not executed. Knows no family.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812

from polar_sdk.engine.parts import gated_mlp
from polar_sdk.engine.products import Plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from polar_sdk.engine.types import Weights


def take_experts(block: Any) -> Weights:
    """Weights of a Hugging Face block: `router` (X, E), and two matrices per expert, named by its number.

    The router stays a tensor: it is small, and stored in few bits it would send tokens to other experts.
    """
    weights: Weights = {"router": block.gate.weight.detach()}
    for expert, (gate_up, down) in enumerate(zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True)):
        weights |= {f"gate_up.{expert}": Plain(gate_up.detach()), f"down.{expert}": Plain(down.detach())}
    return weights


def choose_experts(x: Tensor, router: Tensor, count: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
    """Send each token (N, E) to the `count` experts with the largest router probability.

    Returns:
        Scores in float32, of sum 1 per token if `normalise`, and numbers of the experts, (N, count) each.
    """
    scores, chosen = F.linear(x, router).float().softmax(-1).topk(count, dim=-1)
    return (scores / scores.sum(-1, keepdim=True) if normalise else scores), chosen


def run_experts(x: Tensor, scores: Tensor, chosen: Tensor, w: Weights, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum over the experts of each token (N, E), weighted by their scores (N, k); returns (N, E)."""
    count = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)
    sizes = chosen.flatten().bincount(minlength=w["router"].shape[0]).tolist()
    total = torch.zeros_like(x)
    for expert, places in enumerate(torch.split(order, sizes)):
        if places.numel():
            tokens = places // count
            out = gated_mlp(x[tokens], w[f"gate_up.{expert}"], w[f"down.{expert}"], act)
            total.index_add_(0, tokens, (out * scores.flatten()[places, None]).to(x.dtype))
    return total
