"""The Llama family: RMS norm, rotary positions, grouped-query attention, gated feed-forward, no biases needed.

The weights are those of the Hugging Face model; query, key and value projections are fused into one matrix, gate and
up projections into another, so that a decode step makes four matrix products per layer instead of seven.
Reference for the arithmetic, order of casts included: `transformers.models.llama.modeling_llama`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from polar_sdk.cost import CostModel, LayerCost
from polar_sdk.engine.decoder import Attend, Decoder, Rotary
from polar_sdk.errors import UnsupportedArchitectureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary variants whose frequencies do not depend on the length of the request."""


@dataclass(frozen=True, slots=True)
class _LayerWeights:
    attn_norm: Tensor  # (E,)
    qkv: Tensor  # ((H + 2G) × d, E)
    qkv_bias: Tensor | None
    out: Tensor  # (E, H × d)
    out_bias: Tensor | None
    mlp_norm: Tensor  # (E,)
    gate_up: Tensor  # (2I, E)
    gate_up_bias: Tensor | None
    down: Tensor  # (E, I)
    down_bias: Tensor | None


class LlamaDecoder(Decoder):
    """Frozen weights of a `LlamaForCausalLM`."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        _check_options(config)
        inner: Any = model.get_submodule("model")
        self.heads: int = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.context_window = config.max_position_embeddings
        self.vocab = config.vocab_size
        self.eps: float = config.rms_norm_eps
        self._embedding: Tensor = inner.embed_tokens.weight.detach()
        self._norm: Tensor = inner.norm.weight.detach()
        self._head: Tensor = model.get_output_embeddings().weight.detach()  # type: ignore[no-untyped-call]
        self._rotary_module = inner.rotary_emb
        self._rotary_table: Rotary | None = None
        self._layers = [_take_layer(layer) for layer in inner.layers]
        self.device = self._embedding.device
        self.dtype = self._embedding.dtype
        self.cost = self._cost(config)

    def _cost(self, config: Any) -> CostModel:
        width, inner = config.hidden_size, config.intermediate_size
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        weights = width * qkv + self.heads * self.head_dim * width + 3 * width * inner
        layer = LayerCost(
            linear=2 * weights,
            attention=4 * self.heads * self.head_dim,
        )
        return CostModel(layers=(layer,) * len(self._layers), head=2 * width * self.vocab)

    def embed(self, tokens: Tensor) -> Tensor:
        """Look tokens (N,) up; returns (N, E)."""
        return F.embedding(tokens, self._embedding)

    def rotary(self, positions: Tensor) -> Rotary:
        """Cosine and sine at positions (N,), (N, 1, d) each, from a table that grows with need."""
        cos, sin = self._table(int(positions.max()) + 1)
        return cos[positions], sin[positions]

    def _table(self, length: int) -> Rotary:
        table = self._rotary_table
        if table is None or table[0].shape[0] < length:
            size = min(max(2 * length, 1024), max(self.context_window, length))
            every = torch.arange(size, device=self.device).unsqueeze(0)
            cos, sin = self._rotary_module(torch.empty(0, dtype=self.dtype, device=self.device), every)
            # One assignment: a thread that reads meanwhile sees the old table or the new one, both right.
            self._rotary_table = table = (cos[0].unsqueeze(1).contiguous(), sin[0].unsqueeze(1).contiguous())
        return table

    def layer(self, index: int, hidden: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """Run one layer on (N, E)."""
        w = self._layers[index]
        qkv = F.linear(_rms_norm(hidden, w.attn_norm, self.eps), w.qkv, w.qkv_bias)
        qkv = qkv.view(hidden.shape[0], self.heads + 2 * self.kv_heads, self.head_dim)
        turned = _rotate(qkv[:, : self.heads + self.kv_heads], rotary)  # queries and keys in one go
        mixed = attend(turned[:, : self.heads], turned[:, self.heads :], qkv[:, self.heads + self.kv_heads :])
        hidden = hidden + F.linear(mixed, w.out, w.out_bias)
        gate, up = F.linear(_rms_norm(hidden, w.mlp_norm, self.eps), w.gate_up, w.gate_up_bias).chunk(2, dim=-1)
        return hidden + F.linear(F.silu(gate) * up, w.down, w.down_bias)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (M, V) in float32 of hidden states (M, E)."""
        return F.linear(_rms_norm(hidden, self._norm, self.eps), self._head).float()


def _check_options(config: Any) -> None:
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _ROPE_TYPES:
        raise UnsupportedArchitectureError(
            f"rotary variant {rope!r} of a llama model is not supported; supported are: {', '.join(_ROPE_TYPES)}."
        )
    if config.hidden_act not in {"silu", "swish"}:
        raise UnsupportedArchitectureError(
            f"activation {config.hidden_act!r} of a llama model is not supported; supported is silu."
        )


def _take_layer(layer: Any) -> _LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    gate_up = [mlp.gate_proj, mlp.up_proj]
    return _LayerWeights(
        attn_norm=layer.input_layernorm.weight.detach(),
        qkv=_fuse([m.weight for m in qkv]),
        qkv_bias=_fuse([m.bias for m in qkv]) if attention.q_proj.bias is not None else None,
        out=attention.o_proj.weight.detach(),
        out_bias=attention.o_proj.bias,
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_fuse([m.weight for m in gate_up]),
        gate_up_bias=_fuse([m.bias for m in gate_up]) if mlp.gate_proj.bias is not None else None,
        down=mlp.down_proj.weight.detach(),
        down_bias=mlp.down_proj.bias,
    )


def _fuse(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.detach() for part in parts]).contiguous()


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, in float32, cast back before the weight as the reference does."""
    wide = hidden.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(hidden.dtype)


def _rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """Turn (N, heads, d) by the rotary angles: x cos + (−x₂, x₁) sin, x₁ and x₂ the halves of x."""
    cos, sin = rotary
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
