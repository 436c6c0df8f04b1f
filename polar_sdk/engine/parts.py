"""Pieces that families are made of: kinds of attention, norms, rotations, feed-forwards and mixtures of experts.

Pure functions of tensors and configurations. The experts of a token depend on values, and the other experts are not
executed for it. Knows no family.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F  # noqa: N812

from polar_sdk.engine.panels import Blocks, StoredMatrix
from polar_sdk.engine.products import Plain, multiply
from polar_sdk.engine.types import AttentionKind
from polar_sdk.errors import UnsupportedArchitectureError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from polar_sdk.engine.products import Embedding, Product
    from polar_sdk.engine.types import Rotary, Weights


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function that a configuration names.

    Raises:
        UnsupportedArchitectureError: The activation is not supported.
    """
    if name not in _ACTIVATIONS:
        raise UnsupportedArchitectureError(
            f"activation {name!r} is not supported; choose from: {', '.join(sorted(_ACTIVATIONS))}."
        )
    return _ACTIVATIONS[name]


def refuse(config: Any, option: str, supported: str) -> NoReturn:
    """Refuse an option of a configuration.

    Args:
        config: The configuration.
        option: Name of the option.
        supported: The values that are supported, for the message.

    Raises:
        UnsupportedArchitectureError: Always.
    """
    raise UnsupportedArchitectureError(
        f"{option}={getattr(config, option)!r} of architecture {config.model_type!r} is not supported; "
        f"it must be {supported}."
    )


def attention_kinds(config: Any, scale: float, softcap: float | None = None) -> tuple[AttentionKind, ...]:
    """The kind of each layer, by the configuration's `layer_types`: all keys, or the last `sliding_window` keys.

    Hugging Face masks the keys with key ≤ query − sliding_window, so a query sees `sliding_window` keys, its own
    included: exactly `AttentionKind.window`.

    Raises:
        UnsupportedArchitectureError: A layer has another type, or is sliding without a window.
    """
    supported = ("full_attention", "sliding_attention")
    types: list[str] = config.layer_types
    if not set(types) <= set(supported):
        refuse(config, "layer_types", " or ".join(supported))
    if "sliding_attention" in types and not config.sliding_window:
        refuse(config, "sliding_window", "at least 1 where a layer is of type sliding_attention")
    window = {"full_attention": None, "sliding_attention": config.sliding_window}
    return tuple(AttentionKind(scale=scale, window=window[kind], softcap=softcap) for kind in types)


def refuse_other_windows(config: Any) -> None:
    """Refuse `layer_types` in a family whose layers all attend alike: Hugging Face ignores them there.

    Raises:
        UnsupportedArchitectureError: Layers have several types, or one that contradicts `sliding_window`.
    """
    expected = "sliding_attention" if config.sliding_window else "full_attention"
    if set(getattr(config, "layer_types", None) or [expected]) != {expected}:
        refuse(config, "layer_types", f"{expected} in all layers, since sliding_window is {config.sliding_window}")


def take(linear: Any) -> Plain | Blocks:
    """Weight (N, K) and bias of an `nn.Linear`."""
    return fuse([linear])


def fuse(linears: Sequence[Any]) -> Plain | Blocks:
    """Several projections of the same input as one matrix, their outputs one after another.

    Weights that a GGUF file holds (`stored`, see `Family.reads_blocks`) are packed as they are there.
    """
    biases = [linear.bias for linear in linears if linear.bias is not None]
    bias = torch.cat([each.detach() for each in biases]) if biases else None
    weights = [getattr(linear.weight, "stored", linear.weight.detach()) for linear in linears]
    if any(isinstance(weight, StoredMatrix) for weight in weights):
        return weights[0].alone if len(weights) == 1 and bias is None else Blocks.of(weights, bias)
    return Plain(weights[0] if len(weights) == 1 else torch.cat(weights).contiguous(), bias)


def take_table(embedding: Any) -> Embedding:
    """Rows (V, E) of an `nn.Embedding`."""
    weight = embedding.weight
    rows: Embedding = weight.stored.alone if hasattr(weight, "stored") else weight.detach()
    return rows


def fuse_head_norms(query: Any, key: Any, heads: int, kv_heads: int) -> Tensor:
    """Weights (d,) of the norms over query and key heads, repeated to (H + G, d), so that one norm does both."""
    norms = query.weight.detach().expand(heads, -1), key.weight.detach().expand(kv_heads, -1)
    return torch.cat(norms).contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, in float32, cast back before the weight as Llama does."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def offset_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm whose weight is stored as its difference from 1, cast back at the end, as Gemma does."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * (1.0 + weight.float())).to(x.dtype)


def take_norm(name: str, norm: Any) -> Weights:
    """Weight and bias (E,) of an `nn.LayerNorm`, as `name` and `name_bias`; None if it has none."""
    weight, bias = norm.weight, norm.bias
    return {
        name: None if weight is None else weight.detach(),
        f"{name}_bias": None if bias is None else bias.detach(),
    }


def layer_norm(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    """Norm by mean and variance over the last axis, with the weights from `take_norm`."""
    return F.layer_norm(x, x.shape[-1:], w[name], w[f"{name}_bias"], eps)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Bend values smoothly into (−cap, cap)."""
    return torch.tanh(x / cap) * cap


def no_rotary(dtype: torch.dtype, device: torch.device) -> Rotary:
    """The table of a family whose positions enter with the embedding: of size 0, for any length."""
    empty = torch.empty((1, 1, 0), dtype=dtype, device=device)
    return empty, empty


def rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """Rotate (N, heads, d) by the rotary angles: x cos + (−x₂, x₁) sin, x₁ and x₂ the halves of x.

    Where the table is narrower than d, only the first entries of each head are rotated.
    """
    cos, sin = rotary
    width = cos.shape[-1]
    rotated = heads if width == heads.shape[-1] else heads[..., :width]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return rotated if width == heads.shape[-1] else torch.cat((rotated, heads[..., width:]), dim=-1)


def rotary_table(module: Any, length: int, dtype: torch.dtype, device: torch.device, *extra: Any) -> Rotary:
    """Cosine and sine (length, 1, r) from a Hugging Face rotary module; `extra` goes to its call."""
    positions = torch.arange(length, device=device).unsqueeze(0)
    cos, sin = module(torch.empty(0, dtype=dtype, device=device), positions, *extra)
    return cos[0].unsqueeze(1).contiguous(), sin[0].unsqueeze(1).contiguous()


def gated_mlp(x: Tensor, gate_up: Product, down: Product, act: Callable[[Tensor], Tensor]) -> Tensor:
    """down(act(gate) × up), gate and up fused in one matrix."""
    gate, up = multiply(x, gate_up).chunk(2, dim=-1)
    return multiply(act(gate) * up, down)


def plain_mlp(x: Tensor, up: Product, down: Product, act: Callable[[Tensor], Tensor]) -> Tensor:
    """down(act(up))."""
    return multiply(act(multiply(x, up)), down)


def take_experts(block: Any) -> Weights:
    """Weights of a Hugging Face block: `router` (X, E), and two matrices per expert, named by its index.

    The router stays a tensor: it is small, and in few bits it would send tokens to other experts.
    """
    weights: Weights = {"router": block.gate.weight.detach()}
    for expert, (gate_up, down) in enumerate(zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True)):
        weights |= {f"gate_up.{expert}": Plain(gate_up.detach()), f"down.{expert}": Plain(down.detach())}
    return weights


def choose_experts(x: Tensor, router: Tensor, count: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
    """Send each token (N, E) to the `count` experts with the largest router probability.

    Returns:
        Scores in float32, which sum to 1 per token if `normalise`, and indices of the experts, (N, count) each.
    """
    scores, chosen = F.linear(x, router.to(x.dtype)).float().softmax(-1).topk(count, dim=-1)
    return (scores / scores.sum(-1, keepdim=True) if normalise else scores), chosen


def run_experts(x: Tensor, scores: Tensor, chosen: Tensor, w: Weights, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Run each expert once over the tokens (N, E) that it gets, and sum by their scores (N, k); returns (N, E)."""
    count = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)
    sizes = chosen.flatten().bincount(minlength=w["router"].shape[0]).tolist()
    total = torch.zeros_like(x)
    for expert, places in enumerate(torch.split(order, sizes)):
        if places.numel():
            tokens = places // count
            out = gated_mlp(x[tokens], w[f"gate_up.{expert}"], w[f"down.{expert}"], act)
            total.index_add_(0, tokens, (out * scores.flatten()[places, None]).to(x.dtype))
    return total
