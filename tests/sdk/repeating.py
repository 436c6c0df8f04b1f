"""A tiny network that says again what it has said, so that drafts of it are often right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from polar_sdk.testing import tiny_llama

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def repeating_llama(mixing: float, **options: Any) -> LlamaForCausalLM:
    """A random Llama whose layers change states by this part of what they would; `options` as of `tiny_llama`."""
    network = tiny_llama(**options)
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.mul_(mixing)
            layer.mlp.down_proj.weight.mul_(mixing)
    return network
