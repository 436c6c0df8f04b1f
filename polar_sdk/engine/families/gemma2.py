"""The Gemma 2 family: scaled embeddings, norms before and after each half of a layer, soft caps, windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from polar_sdk.engine.families.llama import LlamaFamily
from polar_sdk.engine.parts import attention_kinds, offset_rms_norm, refuse, soft_cap
from polar_sdk.engine.products import multiply
from polar_sdk.engine.types import LayerPlan

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from polar_sdk.engine.types import Weights


class Gemma2Family(LlamaFamily):
    """`Gemma2ForCausalLM`.

    Layers of type `sliding_attention` (every other one) see the last `sliding_window` keys, their own included. Scores
    are scaled by `query_pre_attn_scalar` and capped before the mask; logits are capped too.
    """

    model_types: ClassVar[tuple[str, ...]] = ("gemma2",)
    act_option: ClassVar[str] = "hidden_activation"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.use_bidirectional_attention:
            refuse(config, "use_bidirectional_attention", "False")
        self.kinds = attention_kinds(config, config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping)
        self.logit_cap: float | None = config.final_logit_softcapping

    @property
    def plan(self) -> LayerPlan:
        """Gated, with norms whose weights are offsets from 1."""
        return LayerPlan("offset_rms", self.eps, self.act_name)

    def take_layer(self, index: int, layer: Any) -> Weights:
        """Llama's, with four norms instead of two."""
        return {
            **super().take_layer(index, layer),
            "attn_after": layer.post_attention_layernorm.weight.detach(),
            "mlp_norm": layer.pre_feedforward_layernorm.weight.detach(),
            "mlp_after": layer.post_feedforward_layernorm.weight.detach(),
        }

    def take_ends(self, model: PreTrainedModel) -> Weights:
        """Llama's, and the scale of the embedding, rounded to the model's dtype as the reference rounds it."""
        ends = super().take_ends(model)
        norm: Tensor = ends["norm"]
        scale = torch.tensor(self.hidden**0.5, dtype=norm.dtype, device=norm.device)
        return {**ends, "embedding_scale": scale}

    def embed(self, tokens: Tensor, positions: Tensor, ends: Weights) -> Tensor:
        """Look tokens (N,) up and scale them by √E; returns (N, E)."""
        scale: Tensor = ends["embedding_scale"]
        return super().embed(tokens, positions, ends) * scale

    def rms(self, x: Tensor, weight: Tensor) -> Tensor:
        """The norm whose weight is an offset from 1."""
        return offset_rms_norm(x, weight, self.eps)

    def finish(self, x: Tensor, mixed: Tensor, w: Weights) -> Tensor:
        """Output projection and feed-forward, each normed before it is added to the residual stream."""
        x = x + self.rms(multiply(mixed, w["out"]), w["attn_after"])
        return x + self.rms(self.mlp(self.rms(x, w["mlp_norm"]), w), w["mlp_after"])

    def logits(self, x: Tensor, ends: Weights) -> Tensor:
        """Final norm, output projection and soft cap of (M, E); returns float32 logits (M, V)."""
        logits = super().logits(x, ends)
        return logits if self.logit_cap is None else soft_cap(logits, self.logit_cap)
