"""The GPT-2 family: learned positions, and matrices that the reference stores transposed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F  # noqa: N812

from polar_sdk.engine.families.plain import PlainFamily
from polar_sdk.engine.parts import activation, refuse, take, take_norm
from polar_sdk.engine.products import Plain, look_up

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from polar_sdk.engine.types import Weights


class GPT2Family(PlainFamily):
    """`GPT2LMHeadModel`: a query sees all keys up to its own; scores may be scaled by layer."""

    model_types: ClassVar[tuple[str, ...]] = ("gpt2",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.add_cross_attention:
            refuse(config, "add_cross_attention", "False")
        self.eps = config.layer_norm_epsilon
        self.intermediate = config.n_inner or 4 * self.hidden
        self.act_name = config.activation_function
        self.act = activation(self.act_name)
        scale = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        by_layer = config.scale_attn_by_inverse_layer_idx
        self.kinds = tuple(
            replace(kind, scale=scale / (index + 1) if by_layer else scale) for index, kind in enumerate(self.kinds)
        )

    def layer_modules(self, model: PreTrainedModel) -> list[nn.Module]:
        """The blocks, in order."""
        inner: Any = model.get_submodule("transformer")
        return list(inner.h)

    def take_layer(self, index: int, layer: Any) -> Weights:
        """Two norms and four matrices."""
        return {
            **take_norm("attn_norm", layer.ln_1),
            "qkv": _take_transposed(layer.attn.c_attn),
            "out": _take_transposed(layer.attn.c_proj),
            **take_norm("mlp_norm", layer.ln_2),
            "up": _take_transposed(layer.mlp.c_fc),
            "down": _take_transposed(layer.mlp.c_proj),
        }

    def take_ends(self, model: PreTrainedModel) -> Weights:
        """Embeddings of tokens (V, E) and of positions, final norm and head."""
        inner: Any = model.get_submodule("transformer")
        return {
            "embedding": inner.wte.weight.detach(),
            "positions": inner.wpe.weight.detach(),
            **take_norm("norm", inner.ln_f),
            "head": take(model.get_output_embeddings()),  # type: ignore[no-untyped-call]
        }

    def embed(self, tokens: Tensor, positions: Tensor, ends: Weights) -> Tensor:
        """Sum of the token's and the position's embedding, (N, E)."""
        return look_up(tokens, ends["embedding"]) + F.embedding(positions, ends["positions"])


def _take_transposed(conv: Any) -> Plain:
    """Weight (N, K) and bias (N,) of a `Conv1D`, which stores (K, N)."""
    return Plain(conv.weight.detach().t().contiguous(), conv.bias.detach())
