"""The Qwen 3 family: Qwen 2 with a norm on every query and key head before its rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from polar_sdk.engine.families.qwen2 import Qwen2Family
from polar_sdk.engine.parts import fuse_head_norms

if TYPE_CHECKING:
    from torch import Tensor

    from polar_sdk.engine.types import Weights


class Qwen3Family(Qwen2Family):
    """`Qwen3ForCausalLM`: layers of type `sliding_attention` see the last `sliding_window` keys, own included."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3",)

    def take_layer(self, index: int, layer: Any) -> Weights:
        """Llama's, and the norms of the heads."""
        attention = layer.self_attn
        norms = fuse_head_norms(attention.q_norm, attention.k_norm, self.heads, self.kv_heads)
        return {**super().take_layer(index, layer), "head_norms": norms}

    def before_rotation(self, heads: Tensor, w: Weights, first: int = 0) -> Tensor:
        """Norm over each head."""
        return self.rms(heads, w["head_norms"][first:])
