"""Settings and fixtures of the engine's tests: the tiny model with a list as its sink, and a tiny model per family."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from polar_sdk.testing import tiny_model
from polar_sdk.usage import ListSink

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from polar_sdk.model import PolarModel

_GATED: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # spread logits, so that a wrong layer shows
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
}
_WIDE = _GATED | {"head_dim": 20}  # heads × size of a head is not the hidden size
_CAPPED = _WIDE | {"query_pre_attn_scalar": 30, "sliding_window": 6, "final_logit_softcapping": 7.0}
_MIXED = _GATED | {"initializer_range": 0.1}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_PLAIN = {name: value for name, value in _GATED.items() if name != "num_key_value_heads"}
_LEARNED = {name: value for name, value in _PLAIN.items() if name not in {"intermediate_size", "bos_token_id"}}
_TWO_TABLES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
_HALF_TURN = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}

# Windows are shorter than the tests' prompts, and caps near the size of what they cap, so that both act.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _GATED),
    "mistral": ("Mistral", _WIDE | {"sliding_window": 7, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", _GATED | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    "qwen3": ("Qwen3", _WIDE | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}),
    "gemma2": ("Gemma2", _CAPPED | {"attn_logit_softcapping": 3.0}),
    "gemma3_text": ("Gemma3Text", _CAPPED | {"sliding_window_pattern": 3, "rope_parameters": _TWO_TABLES}),
    "phi3": ("Phi3", _GATED | {"sliding_window": 11, "rope_parameters": _HALF_TURN}),
    "gpt2": ("GPT2", _LEARNED | {"n_inner": 88, "bos_token_id": 256}),
    "gpt_neox": ("GPTNeoX", _PLAIN | {"rotary_pct": 0.5}),
    "opt": ("OPT", _LEARNED | {"ffn_dim": 88, "init_std": 0.2}),
    "mixtral": ("Mixtral", _MIXED | {"sliding_window": 7, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2Moe",
        _MIXED
        | {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True, "mlp_only_layers": [1]}
        | {"moe_intermediate_size": 28, "shared_expert_intermediate_size": 36},
    ),
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, one key head": ("llama", {"num_key_value_heads": 1}),
    "llama, a key head per query head": ("llama", {"num_key_value_heads": 4}),
    "llama, wide heads": ("llama", {"head_dim": 24}),
    "llama, wide sides": ("llama", {"hidden_size": 128, "head_dim": 32}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied embeddings": ("llama", {"tie_word_embeddings": True}),
    "llama, scaled rotary": ("llama", {"rope_parameters": _LLAMA3}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2, no window": ("qwen2", {"use_sliding_window": False}),
    "qwen3, biases": ("qwen3", {"attention_bias": True}),
    "gemma2, no caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3_text, global layers only": ("gemma3_text", {"layer_types": ["full_attention"] * 6}),
    "gpt2, scores scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2, scores not scaled": ("gpt2", {"scale_attn_weights": False}),
    "gpt_neox, one after the other": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox, no biases": ("gpt_neox", {"attention_bias": False}),
    "opt, no biases, fixed norms": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "qwen2_moe, every other layer": ("qwen2_moe", {"decoder_sparse_step": 2, "norm_topk_prob": False}),
    "qwen2_moe, windows": ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8}),
}
"""Options that change the arithmetic, each over the family that it belongs to."""


@lru_cache(maxsize=64)
def build_family(name: str, seed: int = 0) -> PreTrainedModel:
    """A random Hugging Face model of six layers in float32: a family or a variant of one. Shared: do not change it."""
    family, options = VARIANTS.get(name, (name, {}))
    stem, given = FAMILIES[family]
    config = getattr(transformers, f"{stem}Config")(**given | options)
    config._attn_implementation = config._experts_implementation = "eager"  # one plain way to compute, which is counted
    head = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}.get(stem, f"{stem}ForCausalLM")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, head)(config)
        for key, value in model.named_parameters():
            if value.dim() == 1:  # biases begin at zero and norms at one, where a forgotten one would not show
                value.add_(0.3 * torch.randn_like(value))
            if key.endswith("mlp.gate.weight"):  # no two experts so close that rounding chooses between them
                value.mul_(4)
    model.train(False)
    return model


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `family` runs for every family; one that takes `variant`, for every variant too."""
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", FAMILIES)
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", [*FAMILIES, *VARIANTS])


@pytest.fixture
def tiny_family() -> Callable[..., PreTrainedModel]:
    """Builds the tiny Hugging Face model of a family or variant by name."""
    return build_family


@pytest.fixture
def records() -> ListSink:
    return ListSink()


@pytest.fixture
def tiny(records: ListSink) -> PolarModel:
    """Six layers, all tiers, window of 512 tokens; its records land in `records`."""
    return tiny_model(sink=records, tenant="acme", tags={"team": "search", "stage": "test"})
