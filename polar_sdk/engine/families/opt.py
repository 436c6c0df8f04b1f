"""The OPT family: learned positions that begin at 2, and ReLU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F  # noqa: N812

from polar_sdk.engine.families.plain import PlainFamily
from polar_sdk.engine.parts import activation, fuse, refuse, take, take_norm
from polar_sdk.engine.products import look_up

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from polar_sdk.engine.types import Weights


_OFFSET = 2
"""Row of the position embedding that belongs to position 0."""


class OPTFamily(PlainFamily):
    """`OPTForCausalLM` with norms before each half of a layer, as all sizes but 350m: a query sees all keys."""

    model_types: ClassVar[tuple[str, ...]] = ("opt",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if not config.do_layer_norm_before:
            refuse(config, "do_layer_norm_before", "True")
        if config.word_embed_proj_dim != config.hidden_size:
            refuse(config, "word_embed_proj_dim", f"hidden_size, which is {config.hidden_size}")
        if config._remove_final_layer_norm:
            refuse(config, "_remove_final_layer_norm", "False")
        self.eps = 1e-5  # the reference leaves `nn.LayerNorm` at its default
        self.intermediate = config.ffn_dim
        self.act_name = config.activation_function
        self.act = activation(self.act_name)

    def layer_modules(self, model: PreTrainedModel) -> list[nn.Module]:
        """The layers, in order."""
        inner: Any = model.get_submodule("model.decoder")
        return list(inner.layers)

    def take_layer(self, index: int, layer: Any) -> Weights:
        """Two norms and four matrices."""
        attention = layer.self_attn
        return {
            **take_norm("attn_norm", layer.self_attn_layer_norm),
            "qkv": fuse([attention.q_proj, attention.k_proj, attention.v_proj]),
            "out": take(attention.out_proj),
            **take_norm("mlp_norm", layer.final_layer_norm),
            "up": take(layer.fc1),
            "down": take(layer.fc2),
        }

    def take_ends(self, model: PreTrainedModel) -> Weights:
        """Embeddings of tokens (V, E) and of positions, final norm and head."""
        inner: Any = model.get_submodule("model.decoder")
        return {
            "embedding": inner.embed_tokens.weight.detach(),
            "positions": inner.embed_positions.weight.detach(),
            **take_norm("norm", inner.final_layer_norm),
            "head": take(model.get_output_embeddings()),  # type: ignore[no-untyped-call]
        }

    def embed(self, tokens: Tensor, positions: Tensor, ends: Weights) -> Tensor:
        """Sum of the token's and the position's embedding, (N, E)."""
        return look_up(tokens, ends["embedding"]) + F.embedding(positions + _OFFSET, ends["positions"])
