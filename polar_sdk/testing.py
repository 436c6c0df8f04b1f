"""Tiny but real models for tests, ours and yours: the real engine over random weights, without download.

`tiny_model()` is a Llama of a few small layers with a byte-level tokenizer and a chat template. Its answers are
repeatable noise; programs, streaming, cancellation, usage records and sinks behave as with any other model.
`scripted_model(reply)` is the same with answers that you choose, as far as schema and grammar of a request allow them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from polar_sdk.model import PolarModel
from polar_sdk.programs.policy import Policy
from polar_sdk.request.maker import RequestMaker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.maps import Fill
    from polar_sdk.request.options import Prompt, RequestOptions
    from polar_sdk.serving.request import Request


_SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
_CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_model(
    *,
    layers: int = 6,
    seed: int = 0,
    context_window: int = 512,
    chat_template: str | None = None,
    special: Sequence[str] = (),
    ledger: str | None = None,
    **settings: Any,
) -> PolarModel:
    """The real engine over a tiny random Llama in float32.

    Args:
        layers: Depth, D.
        seed: For the random weights.
        context_window: Maximum number of tokens of prompt and answer together.
        chat_template: Template of the tokenizer; None = a plain one. Turns end with `<|end|>`.
        special: Texts of further special tokens of the tokenizer.
        ledger: See `PolarModel`, but metering is off by default.
        **settings: Further settings of `PolarModel`; the policy is `tiny_policy` by default.
    """
    policy = settings.pop("policy", None) or tiny_policy(layers)
    tokenizer = tiny_tokenizer(chat_template or _CHAT, tuple(special))
    model = tiny_llama(
        layers=layers, seed=seed, max_position_embeddings=context_window, vocab_size=256 + len(_SPECIAL) + len(special)
    )
    return PolarModel.from_hf(model, tokenizer, policy=policy, ledger=ledger, **settings)


def scripted_model(reply: Callable[[Prompt], str], **settings: Any) -> PolarModel:
    """A tiny model that answers `reply(prompt)`: the engine runs, and a logits hook forces the answer.

    If a schema or grammar forbids the next token of the reply, the answer continues as the random weights choose.

    Args:
        reply: Maps a prompt (a text, or messages with `role` and `content`) to the answer.
        **settings: See `tiny_model`.
    """
    model = tiny_model(**settings)
    fields = {name: getattr(model._maker, name) for name in RequestMaker.__dataclass_fields__}
    model._maker = _ScriptedMaker(**fields, reply=reply)
    return model


@dataclass(frozen=True)
class _ScriptedMaker(RequestMaker):
    reply: Callable[[Prompt], str]

    def make(self, prompt: Prompt, options: RequestOptions) -> Request:
        script = [*self.encoder.plain(self.reply(prompt)), tiny_tokenizer().eos_token_id]

        def say(tokens: Sequence[int], logits: Tensor) -> Tensor:
            if len(tokens) < len(script) and list(tokens) == script[: len(tokens)]:
                logits[script[len(tokens)]] += 1e3
            return logits

        return super().make(prompt, {**options, "logits_hook": say})


def random_fill(
    decoder: Decoder,
    segment: tuple[int, int],
    *,
    seed: int = 0,
    rank: int | None = None,
    units: int = 0,
    token: int = 0,
) -> Fill:
    """A random map that fills a segment, for `decoder.set_fills`; it writes what no layer would.

    It carries states over the segment, unless the segment ends with the model's last layer.

    Args:
        decoder: Of the model that it is for.
        segment: First and last layer.
        seed: For the random weights, together with the first layer.
        rank: Of a map of two factors; None = full rank.
        units: Hidden units of the map.
        token: Rank of what it reads of the token's embedding; 0 = nothing.
    """
    import torch

    from polar_sdk.engine.maps import Fill

    family = decoder.family
    generator = torch.Generator().manual_seed(1000 * seed + segment[0])
    bias = torch.randn(segment[1] - segment[0] + 1, 2, family.kv_heads, family.head_dim, generator=generator)
    sides = [family.hidden + units, *([rank] if rank else []), bias.numel()]
    weight = tuple(torch.randn(a, b, generator=generator) / a**0.5 for a, b in pairwise(sides))
    hidden = (torch.randn(family.hidden, units, generator=generator), torch.randn(units, generator=generator))
    carry = (
        torch.randn(family.hidden + units, family.hidden, generator=generator) / family.hidden,
        torch.randn(family.hidden, generator=generator) / 10,
    )
    chosen = (hidden if units else (), carry if segment[1] < decoder.depth - 1 else ())
    ends = pairwise([family.hidden, token, bias.numel()]) if token else ()
    read = tuple(torch.randn(a, b, generator=generator) / a**0.5 for a, b in ends)
    return Fill(weight, bias, *chosen, read).to(decoder.dtype, decoder.device)


def random_draft_head(width: int, tokens: Sequence[int], *, units: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a random draft head, for `decoder.set_draft_head`.

    Args:
        width: Of the model's states, E.
        tokens: Those that it can guess.
        units: Hidden units.
        seed: For the random weights.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    shapes = {"enter": (width, 2 * width), "gated": (2 * units, width), "down": (width, units), "other": (1, width)}
    random = {name: torch.randn(a, b, generator=generator) / b**0.5 for name, (a, b) in shapes.items()}
    return {**random, "other": random["other"][0], "tokens": torch.tensor(tokens), "scale": torch.ones(width)}


def tiny_policy(layers: int) -> Policy:
    """A policy with all four tiers; economy skips two layers, standard one."""
    last = layers - 1
    return Policy.model_validate(
        {
            "protected": [0, -1],
            "default_tier": "standard",
            "tiers": {
                "economy": {"program": f"0 3-{last}"},
                "standard": {"program": f"0 2-{last}"},
                "premium": {"program": f"0-{last}"},
                "exact": {"program": f"0-{last}"},
            },
        }
    )


def tiny_llama(*, layers: int = 6, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """A random Llama, 48 wide, with 4 query heads and 2 key and value heads; `options` go to its configuration."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": 256 + len(_SPECIAL),
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,  # spreads the logits, so that a wrong token shows
            "eos_token_id": 256,
            "bos_token_id": None,
            "pad_token_id": None,
            **options,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.train(False)
    return model


@lru_cache(maxsize=16)
def tiny_tokenizer(chat_template: str = _CHAT, special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token per byte, and four special tokens, or more."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*_SPECIAL, *special])
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")  # type: ignore[no-untyped-call]
    fast.chat_template = chat_template
    return fast
