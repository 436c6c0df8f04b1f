"""The families one by one: what their options do, what they refuse, and that their functions look at shapes alone.

That they equal the reference is `test_parity.py`, that their FLOPs do, `test_metering.py`; both run over all of them.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from polar_sdk import Program
from polar_sdk.engine.decoder import build_decoder
from polar_sdk.engine.families import SUPPORTED, find_family
from polar_sdk.engine.forward import advance
from polar_sdk.engine.parts import choose_experts, gated_mlp, run_experts
from polar_sdk.engine.products import Plain
from polar_sdk.engine.row import Row
from polar_sdk.errors import UnsupportedArchitectureError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from polar_sdk.engine.decoder import Decoder

    TinyFamily = Callable[..., PreTrainedModel]

DEPTH = 6
SMALL: dict[str, Any] = {"vocab_size": 260, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = [random.Random(5).randrange(256) for _ in range(40)]


def identity_logits(decoder: Decoder) -> Tensor:
    with torch.inference_mode():
        return decoder.head(advance(decoder, [Row(decoder, Program.identity(DEPTH))], [TOKENS]))


def test_every_supported_architecture_finds_a_family_that_says_so() -> None:
    for model_type in SUPPORTED:
        config = transformers.AutoConfig.for_model(model_type)
        assert model_type in find_family(config).model_types


def test_an_unsupported_architecture_says_what_is_supported() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"'bloom'.*gemma2, "):
        find_family(transformers.AutoConfig.for_model("bloom"))


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_parameters": DYNAMIC}, "'dynamic'.*default"),
    ("llama", {"hidden_act": "mish"}, "'mish'.*silu"),
    ("mistral", {"sliding_window": None, "layer_types": ["sliding_attention"] * 2}, "layer_types.*full_attention in"),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.*sliding_attention in all"),
    ("mixtral", {"hidden_act": "mish"}, "'mish'.*silu"),
    ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention.*full_attention or slid"),
    ("qwen2_moe", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention.*full_attention or slid"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window=None.*at least 1"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True.*False"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0.*None"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True.*False"),
    ("phi3", {"rope_parameters": LONG}, "'longrope'.*default"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True.*False"),
    ("gpt_neox", {"rope_parameters": DYNAMIC}, "'dynamic'.*default"),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False.*True"),
    ("opt", {"word_embed_proj_dim": 24}, "word_embed_proj_dim=24.*48"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True.*False"),
]


@pytest.mark.parametrize(("model_type", "options", "message"), REFUSED)
def test_an_unsupported_option_is_refused_with_its_value(
    model_type: str, options: dict[str, Any], message: str
) -> None:
    config = transformers.AutoConfig.for_model(model_type, **SMALL, **options)
    with pytest.raises(UnsupportedArchitectureError, match=message):
        find_family(config)


def test_windows_caps_and_tables_are_where_the_reference_has_them(tiny_family: TinyFamily) -> None:
    def kinds(name: str, what: str) -> list[Any]:
        return [getattr(kind, what) for kind in find_family(tiny_family(name).config).kinds]

    assert kinds("mistral", "window") == kinds("mixtral", "window") == [7] * 6
    assert kinds("qwen2", "window") == [None, None, 9, 9, 9, 9]
    assert kinds("gemma2", "window") == [6, None, 6, None, 6, None]
    assert kinds("gemma3_text", "window") == [6, 6, None, 6, 6, None]
    assert kinds("gemma3_text", "rope") == [1, 1, 0, 1, 1, 0]
    assert kinds("gemma2", "softcap") == [3.0] * 6
    assert kinds("gpt2, scores scaled by layer", "scale") == pytest.approx([12**-0.5 / layer for layer in range(1, 7)])


def test_the_text_part_of_a_gemma_3_that_sees_images_is_that_of_the_reference() -> None:
    text = SMALL | {"num_hidden_layers": DEPTH, "head_dim": 20, "sliding_window": 6, "sliding_window_pattern": 3}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config={**text, "intermediate_size": 88, "initializer_range": 0.2, "pad_token_id": None},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.Gemma3ForConditionalGeneration(config).train(False)
    with torch.inference_mode():
        reference = model(torch.tensor([TOKENS]), use_cache=False).logits[0]
    ours = identity_logits(build_decoder(model))
    assert (ours - reference).abs().max() <= 1e-5 * max(1.0, float(reference.abs().max()))


def test_a_mixture_runs_each_token_through_the_experts_it_chose_and_no_others() -> None:
    rng = torch.Generator().manual_seed(3)
    x, router = torch.randn(9, 8, generator=rng), torch.randn(5, 8, generator=rng)
    weights: dict[str, Any] = {"router": router}
    for expert in range(5):
        weights[f"gate_up.{expert}"] = Plain(torch.randn(12, 8, generator=rng))
        weights[f"down.{expert}"] = Plain(torch.randn(8, 6, generator=rng))
    scores, chosen = choose_experts(x, router, 2, normalise=True)
    with FlopCounterMode(display=False) as counter:
        mixed = run_experts(x, scores, chosen, weights, torch.relu)
    assert counter.get_total_flops() == 9 * 2 * (2 * 12 * 8 + 2 * 8 * 6)
    for token in range(9):
        state = x[token : token + 1]
        expected = sum(
            score * gated_mlp(state, weights[f"gate_up.{expert}"], weights[f"down.{expert}"], torch.relu)
            for score, expert in zip(scores[token].tolist(), chosen[token].tolist(), strict=True)
        )
        torch.testing.assert_close(mixed[token : token + 1], expected)
    torch.testing.assert_close(scores.sum(-1), torch.ones(9))
