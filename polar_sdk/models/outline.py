"""The network of a GGUF file as an outline: the names and sizes of its weights, without transformers' class.

Importing a model's class takes longer than packing 1 GB of weights, and 0.14 GB of memory; a decoder needs only names,
sizes and angles from it. These are known here for the most common architectures, and equal those of the class; other
networks are built by `network.py`. Knows no values of weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import nn

from polar_sdk.models.gguf import GgufFile, WeightSource, damaged
from polar_sdk.models.network import read_generation_config
from polar_sdk.reading import parse_object, read_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

_BIASED: Final = {"llama": (), "qwen2": ("attn_q", "attn_k", "attn_v"), "qwen3": ()}
"""Model types with an outline, and which of their matrices have a bias whatever the configuration says."""
_ENDS: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names in a file, without those of layer and part, and in transformers."""


class _Angles(nn.Module):
    """Cosine and sine of positions, as the rotary module of these models computes them."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rope: Any = config.rope_parameters
        if (kind := rope.get("rope_type", "default")) == "default":
            size = _head_size(config)
            steps = torch.arange(0, size, 2, dtype=torch.float32) / size
            self.frequencies, self.scale = 1.0 / rope["rope_theta"] ** steps, 1.0
        else:
            self.frequencies, self.scale = ROPE_INIT_FUNCTIONS[kind](config)

    def forward(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Both for positions (B, T), (B, T, d) each, in the dtype and on the device of a tensor."""
        half = positions[..., None].float() * self.frequencies.to(like.device)
        angles = torch.cat((half, half), dim=-1)
        return (angles.cos() * self.scale).to(like.dtype), (angles.sin() * self.scale).to(like.dtype)


class _Outline(nn.Module):
    """The part of a `PreTrainedModel` that a decoder takes."""

    def __init__(self, config: PreTrainedConfig, settings: GenerationConfig) -> None:
        super().__init__()
        self.config, self.generation_config = config, settings

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.get_submodule("model.embed_tokens")

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.get_submodule("lm_head")

    def put(self, name: str, weight: nn.Parameter) -> None:
        """Add a weight of that name, with the modules that it is in."""
        inside, _, last = name.rpartition(".")
        module: nn.Module = self
        for part in inside.split("."):
            if part not in dict(module.named_children()):
                module.add_module(part, nn.ModuleList() if part == "layers" else nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, weight)
        if not hasattr(module, "bias"):
            module.register_parameter("bias", None)


def read_outline(folder: Path, path: Path) -> PreTrainedModel | None:
    """The network of a file whose configuration and generation settings are in a folder; None = it has no outline.

    Raises:
        ModelDamagedError: A weight is missing, or has another size.
    """
    from transformers import PreTrainedConfig

    config = PreTrainedConfig.from_dict(parse_object(read_bytes(folder / "config.json")))
    if config.model_type not in _BIASED:
        return None
    file = GgufFile(path)
    outline = _Outline(config, read_generation_config(folder))
    for stored, name, shape in weights_of(config):
        if (entry := file.tensors.get(stored)) is None:
            raise damaged(path, f"it has no {name} ({stored})")
        if entry.shape != shape:
            raise damaged(path, f"tensor {stored!r} has shape {entry.shape}, and {name} has {shape}")
        weight: Any = nn.Parameter(torch.zeros((), dtype=torch.bfloat16).expand(shape), requires_grad=False)
        weight.source = WeightSource(file, entry, _turned(config, stored), shape)
        outline.put(name, weight)
    if config.tie_word_embeddings:
        outline.put("lm_head.weight", cast("nn.Parameter", outline.get_input_embeddings().weight))
    outline.get_submodule("model").add_module("rotary_emb", _Angles(config))
    return cast("PreTrainedModel", outline.eval())


def weights_of(config: Any) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name in the file, name in transformers and shape of each weight of a network."""
    width, inner, size = config.hidden_size, config.intermediate_size, _head_size(config)
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (width,),
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        **({"attn_q_norm": (size,), "attn_k_norm": (size,)} if config.model_type == "qwen3" else {}),
        "attn_output": (width, queries),
        "ffn_norm": (width,),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    biased = {*_BIASED[config.model_type]}
    biased |= {"attn_q", "attn_k", "attn_v", "attn_output"} if getattr(config, "attention_bias", False) else set()
    biased |= {"ffn_gate", "ffn_up", "ffn_down"} if getattr(config, "mlp_bias", False) else set()
    for layer in range(config.num_hidden_layers):
        for stored, shape in shapes.items():
            named = f"blk.{layer}.{stored}", f"model.layers.{layer}.{_LAYER[stored]}"
            yield f"{named[0]}.weight", f"{named[1]}.weight", shape
            if stored in biased:
                yield f"{named[0]}.bias", f"{named[1]}.bias", shape[:1]
    table = config.vocab_size, width
    ends = {"token_embd": table, "output_norm": (width,), **({} if config.tie_word_embeddings else {"output": table})}
    for stored, shape in ends.items():
        yield f"{stored}.weight", f"{_ENDS[stored]}.weight", shape


def _head_size(config: Any) -> int:
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def _turned(config: Any, stored: str) -> Callable[[NDArray[Any]], NDArray[Any]] | None:
    """How a file has a weight otherwise than transformers; None = it has not.

    Llama's files have queries and keys of a head in pairs that turn together, transformers has the halves of a head.
    """
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(stored.split(".")[-2])
    if config.model_type != "llama" or heads is None:
        return None
    return lambda whole: whole.reshape(heads, -1, 2, *whole.shape[1:]).swapaxes(1, 2).reshape(whole.shape)
