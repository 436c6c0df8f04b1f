"""The Phi-3 family: Llama with fused matrices, a sliding window, and a rotation of part of each head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from polar_sdk.engine.families.mistral import MistralFamily
from polar_sdk.engine.parts import take

if TYPE_CHECKING:
    from polar_sdk.engine.types import Weights


class Phi3Family(MistralFamily):
    """`Phi3ForCausalLM`: a query sees the last `sliding_window` keys, its own included; None = all.

    The rotary variant `longrope` is refused: it changes the angles of all positions when a request gets long.
    """

    model_types: ClassVar[tuple[str, ...]] = ("phi3",)

    def take_layer(self, index: int, layer: Any) -> Weights:
        """Two norms and four matrices, as the reference fuses them."""
        return {
            "attn_norm": layer.input_layernorm.weight.detach(),
            "qkv": take(layer.self_attn.qkv_proj),
            "out": take(layer.self_attn.o_proj),
            "mlp_norm": layer.post_attention_layernorm.weight.detach(),
            "gate_up": take(layer.mlp.gate_up_proj),
            "down": take(layer.mlp.down_proj),
        }
