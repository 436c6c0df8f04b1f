"""The common part of GPT-2, GPT-NeoX and OPT: layer norms with biases, a key head per query head, plain feed-forward.

Not a family by itself: positions and the names of the weights differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polar_sdk.engine.family import Family
from polar_sdk.engine.parts import layer_norm, no_rotary, plain_mlp
from polar_sdk.engine.products import multiply, multiply_from
from polar_sdk.engine.types import LayerPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from polar_sdk.engine.types import Projected, Rotary, Weights


class PlainFamily(Family):
    """Weights of a layer are `attn_norm`, `qkv`, `out`, `mlp_norm`, `up` and `down`; of the ends, `norm` and `head`."""

    eps: float
    """Added to the variance in norms."""
    intermediate: int
    """Width of the feed-forward."""
    act_name: str
    """Activation of the feed-forward, by name."""
    act: Callable[[Tensor], Tensor]
    """The activation as a function."""

    @property
    def plan(self) -> LayerPlan:
        """One matrix up and one down, with layer norms."""
        return LayerPlan("layer", self.eps, self.act_name, gated=False)

    def rotary_tables(self, rotary: Any, length: int, dtype: torch.dtype, device: torch.device) -> list[Rotary]:
        """None: positions enter with the embedding."""
        return [no_rotary(dtype, device)]

    def project(self, x: Tensor, rotary: Rotary, w: Weights) -> Projected:
        """Norm and fused projections."""
        qkv = multiply(layer_norm(x, w, "attn_norm", self.eps), w["qkv"])
        query, key, value = qkv.view(x.shape[0], 3, self.heads, self.head_dim).unbind(1)
        return query, key, value

    def keys_values(self, x: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
        """Norm, and the part of the fused projections that is not the queries'."""
        kv = multiply_from(layer_norm(x, w, "attn_norm", self.eps), w["qkv"], self.heads * self.head_dim)
        key, value = kv.view(x.shape[0], 2, self.heads, self.head_dim).unbind(1)
        return key, value

    def turn(self, heads: Tensor, rotary: Rotary) -> Tensor:
        """Nothing: positions enter with the embedding."""
        return heads

    def finish(self, x: Tensor, mixed: Tensor, w: Weights) -> Tensor:
        """Output projection and feed-forward, each added to the residual stream."""
        x = x + multiply(mixed, w["out"])
        return x + self.mlp(x, w)

    def mlp(self, x: Tensor, w: Weights) -> Tensor:
        """Norm and feed-forward of (N, E)."""
        return plain_mlp(layer_norm(x, w, "mlp_norm", self.eps), w["up"], w["down"], self.act)

    def norm(self, x: Tensor, ends: Weights) -> Tensor:
        """Layer norm."""
        return layer_norm(x, ends, "norm", self.eps)

    def layer_linear(self, index: int) -> int:
        """The four matrices."""
        return 4 * self.hidden * self.hidden + 2 * self.hidden * self.intermediate
