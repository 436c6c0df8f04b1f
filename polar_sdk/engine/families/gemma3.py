"""The Gemma 3 family: Gemma 2 with normed heads, and one rotary table for local layers and one for global ones."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from polar_sdk.engine.families.gemma2 import Gemma2Family
from polar_sdk.engine.families.llama import check_rope
from polar_sdk.engine.parts import fuse_head_norms, refuse, rotary_table

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from polar_sdk.engine.types import Rotary, Weights


class Gemma3Family(Gemma2Family):
    """`Gemma3ForCausalLM`, and the text part of `Gemma3ForConditionalGeneration`; images are not supported.

    Local layers (type `sliding_attention`) see the last `sliding_window` keys, their own included. `AttentionKind.rope`
    is the index of the layer's type in alphabetical order.
    """

    model_types: ClassVar[tuple[str, ...]] = ("gemma3_text", "gemma3")

    def __init__(self, config: Any) -> None:
        text = config.get_text_config()
        super().__init__(text)
        if text.attn_logit_softcapping is not None:
            # The reference reads this option but ignores it, so there is nothing to compare with.
            refuse(text, "attn_logit_softcapping", "None")
        self.layer_types: list[str] = sorted(set(text.layer_types))
        for kind in self.layer_types:
            check_rope(text.rope_parameters[kind])
        tables = [self.layer_types.index(kind) for kind in text.layer_types]
        self.kinds = tuple(replace(kind, rope=table) for kind, table in zip(self.kinds, tables, strict=True))

    def inner(self, model: PreTrainedModel) -> Any:
        """The text model without its head."""
        inner: Any = super().inner(model)
        return getattr(inner, "language_model", inner)

    def take_layer(self, index: int, layer: Any) -> Weights:
        """Gemma 2's, and the norms of the heads."""
        attention = layer.self_attn
        norms = fuse_head_norms(attention.q_norm, attention.k_norm, self.heads, self.kv_heads)
        return {**super().take_layer(index, layer), "head_norms": norms}

    def rotary_tables(self, rotary: Any, length: int, dtype: torch.dtype, device: torch.device) -> list[Rotary]:
        """One table per type of layer."""
        return [rotary_table(rotary, length, dtype, device, kind) for kind in self.layer_types]

    def before_rotation(self, heads: Tensor, w: Weights, first: int = 0) -> Tensor:
        """Norm over each head."""
        return self.rms(heads, w["head_norms"][first:])
