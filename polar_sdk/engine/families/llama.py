"""The Llama family: RMS norm, rotary positions, grouped-query attention, gated feed-forward, optional biases.

Query, key and value projections are fused into one matrix, gate and up projections into another, so that a decode
step makes four matrix products per layer instead of seven. Other families with a gated feed-forward build on this one
and override what differs: `rms`, `before_rotation`, `mlp`, and the weights they read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from polar_sdk.engine.family import Family
from polar_sdk.engine.parts import activation, fuse, gated_mlp, rms_norm, rotary_table, rotate, take, take_table
from polar_sdk.engine.products import look_up, multiply, multiply_from
from polar_sdk.engine.types import LayerPlan
from polar_sdk.errors import UnsupportedArchitectureError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from polar_sdk.engine.types import Projected, Rotary, Weights


_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary variants whose frequencies do not depend on the length of the request."""


class LlamaFamily(Family):
    """`LlamaForCausalLM`, and models that differ from it only in options."""

    model_types: ClassVar[tuple[str, ...]] = ("llama",)
    act_option: ClassVar[str] = "hidden_act"
    """Option of the configuration that names the activation."""
    reads_blocks: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        check_rope(config.rope_parameters)
        self.eps: float = config.rms_norm_eps
        self.intermediate: int = config.intermediate_size
        self.act_name: str = getattr(config, self.act_option)
        self.act = activation(self.act_name)

    @property
    def plan(self) -> LayerPlan | None:
        """Gated, with norms by mean square."""
        return LayerPlan("rms", self.eps, self.act_name)

    def inner(self, model: PreTrainedModel) -> Any:
        """The model without its head."""
        return model.get_submodule("model")

    def layer_modules(self, model: PreTrainedModel) -> list[nn.Module]:
        """The layers, in order."""
        return list(self.inner(model).layers)

    def take_layer(self, index: int, layer: Any) -> Weights:
        """Two norms and four matrices."""
        attention = layer.self_attn
        return {
            "attn_norm": layer.input_layernorm.weight.detach(),
            "qkv": fuse([attention.q_proj, attention.k_proj, attention.v_proj]),
            "out": take(attention.o_proj),
            "mlp_norm": layer.post_attention_layernorm.weight.detach(),
            **self.take_mlp(layer.mlp),
        }

    def take_mlp(self, block: Any) -> Weights:
        """Weights of the feed-forward."""
        return {"gate_up": fuse([block.gate_proj, block.up_proj]), "down": take(block.down_proj)}

    def take_ends(self, model: PreTrainedModel) -> Weights:
        """Embedding (V, E), final norm (E,) and head."""
        inner = self.inner(model)
        return {
            "embedding": take_table(inner.embed_tokens),
            "norm": inner.norm.weight.detach(),
            "head": take(model.get_output_embeddings()),  # type: ignore[no-untyped-call]
        }

    def embed(self, tokens: Tensor, positions: Tensor, ends: Weights) -> Tensor:
        """Look tokens (N,) up; returns (N, E)."""
        return look_up(tokens, ends["embedding"])

    def take_rotary(self, model: PreTrainedModel) -> Any:
        """The model's rotary module."""
        return self.inner(model).rotary_emb

    def rotary_tables(self, rotary: Any, length: int, dtype: torch.dtype, device: torch.device) -> list[Rotary]:
        """One table for all layers."""
        return [rotary_table(rotary, length, dtype, device)]

    def project(self, x: Tensor, rotary: Rotary, w: Weights) -> Projected:
        """Norm, fused projections, one rotation of queries and keys together."""
        qkv = multiply(self.rms(x, w["attn_norm"]), w["qkv"])
        qkv = qkv.view(x.shape[0], self.heads + 2 * self.kv_heads, self.head_dim)
        rotating = self.heads + self.kv_heads
        rotated = rotate(self.before_rotation(qkv[:, :rotating], w), rotary)
        return rotated[:, : self.heads], rotated[:, self.heads :], qkv[:, rotating:]

    def keys_values(self, x: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
        """Norm, and the part of the fused projections that is not the queries'."""
        kv = multiply_from(self.rms(x, w["attn_norm"]), w["qkv"], self.heads * self.head_dim)
        kv = kv.view(x.shape[0], 2 * self.kv_heads, self.head_dim)
        return self.before_rotation(kv[:, : self.kv_heads], w, self.heads), kv[:, self.kv_heads :]

    def turn(self, heads: Tensor, rotary: Rotary) -> Tensor:
        """The rotation."""
        return rotate(heads, rotary)

    def finish(self, x: Tensor, mixed: Tensor, w: Weights) -> Tensor:
        """Output projection and feed-forward, each added to the residual stream."""
        x = x + multiply(mixed, w["out"])
        return x + self.mlp(self.rms(x, w["mlp_norm"]), w)

    def norm(self, x: Tensor, ends: Weights) -> Tensor:
        """RMS norm."""
        return self.rms(x, ends["norm"])

    def rms(self, x: Tensor, weight: Tensor) -> Tensor:
        """The norm of this family, over the last axis."""
        return rms_norm(x, weight, self.eps)

    def before_rotation(self, heads: Tensor, w: Weights, first: int = 0) -> Tensor:
        """Change queries and keys before their rotation, those of all H + G from `first` on: Llama does not."""
        return heads

    def mlp(self, x: Tensor, w: Weights) -> Tensor:
        """The feed-forward of normed states (N, E)."""
        return gated_mlp(x, w["gate_up"], w["down"], self.act)

    def layer_linear(self, index: int) -> int:
        """Fused projections, output projection, feed-forward."""
        attention = self.hidden * (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return attention + self.mlp_linear(index)

    def mlp_linear(self, index: int) -> int:
        """Multiply-accumulates per token in the feed-forward of one layer."""
        return 3 * self.hidden * self.intermediate


def check_rope(parameters: Mapping[str, Any]) -> None:
    """Refuse rotary variants whose angles change with the length of the request.

    Raises:
        UnsupportedArchitectureError: It is such a variant.
    """
    rope = parameters.get("rope_type", "default")
    if rope not in _ROPE_TYPES:
        raise UnsupportedArchitectureError(
            f"rotary variant {rope!r} is not supported; choose from: {', '.join(_ROPE_TYPES)}."
        )
