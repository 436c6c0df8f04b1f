"""The GPT-NeoX family (Pythia): attention and feed-forward in parallel, and a rotation of part of each head."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from polar_sdk.engine.families.llama import check_rope
from polar_sdk.engine.families.plain import PlainFamily
from polar_sdk.engine.parts import activation, rotary_table, rotate, take, take_norm
from polar_sdk.engine.products import Plain, look_up, multiply

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from polar_sdk.engine.types import LayerPlan, Projected, Rotary, Weights


class GPTNeoXFamily(PlainFamily):
    """`GPTNeoXForCausalLM`: a query sees all keys up to its own."""

    model_types: ClassVar[tuple[str, ...]] = ("gpt_neox",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        check_rope(config.rope_parameters)
        self.eps = config.layer_norm_eps
        self.intermediate = config.intermediate_size
        self.act_name = config.hidden_act
        self.act = activation(self.act_name)
        self.parallel: bool = config.use_parallel_residual

    @property
    def plan(self) -> LayerPlan:
        """As the others, in parallel where the configuration says so."""
        return replace(super().plan, parallel=self.parallel)

    def layer_modules(self, model: PreTrainedModel) -> list[nn.Module]:
        """The layers, in order."""
        inner: Any = model.get_submodule("gpt_neox")
        return list(inner.layers)

    def take_layer(self, index: int, layer: Any) -> Weights:
        """Two norms and four matrices."""
        return {
            **take_norm("attn_norm", layer.input_layernorm),
            "qkv": self._take_qkv(layer.attention.query_key_value),
            "out": take(layer.attention.dense),
            **take_norm("mlp_norm", layer.post_attention_layernorm),
            "up": take(layer.mlp.dense_h_to_4h),
            "down": take(layer.mlp.dense_4h_to_h),
        }

    def _take_qkv(self, linear: Any) -> Plain:
        """Outputs ordered by head (query, key, value of each), reordered to all queries, all keys, all values."""
        by_head = (self.heads, 3, self.head_dim)
        weight = linear.weight.detach().view(*by_head, self.hidden).transpose(0, 1).reshape(-1, self.hidden)
        if linear.bias is None:
            return Plain(weight)
        return Plain(weight, linear.bias.detach().view(by_head).transpose(0, 1).reshape(-1))

    def take_ends(self, model: PreTrainedModel) -> Weights:
        """Embedding (V, E), final norm and head."""
        inner: Any = model.get_submodule("gpt_neox")
        return {
            "embedding": inner.embed_in.weight.detach(),
            **take_norm("norm", inner.final_layer_norm),
            "head": take(model.get_output_embeddings()),  # type: ignore[no-untyped-call]
        }

    def embed(self, tokens: Tensor, positions: Tensor, ends: Weights) -> Tensor:
        """Look tokens (N,) up; returns (N, E)."""
        return look_up(tokens, ends["embedding"])

    def take_rotary(self, model: PreTrainedModel) -> Any:
        """The model's rotary module."""
        return model.get_submodule("gpt_neox.rotary_emb")

    def rotary_tables(self, rotary: Any, length: int, dtype: torch.dtype, device: torch.device) -> list[Rotary]:
        """One table for all layers, narrower than a head."""
        return [rotary_table(rotary, length, dtype, device)]

    def project(self, x: Tensor, rotary: Rotary, w: Weights) -> Projected:
        """Norm, fused projections, rotation of the first entries of queries and keys."""
        query, key, value = super().project(x, rotary, w)
        return rotate(query, rotary), rotate(key, rotary), value

    def turn(self, heads: Tensor, rotary: Rotary) -> Tensor:
        """The rotation of the first entries."""
        return rotate(heads, rotary)

    def finish(self, x: Tensor, mixed: Tensor, w: Weights) -> Tensor:
        """Output projection and feed-forward, which reads the layer's input where they are parallel."""
        if not self.parallel:
            return super().finish(x, mixed, w)
        return self.mlp(x, w) + multiply(mixed, w["out"]) + x
