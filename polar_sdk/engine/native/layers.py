"""Layers that the native library runs whole: the contents of a `PolarLayer` of `kernels.h`, and calls with tensors."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Final

import torch

from polar_sdk.engine import native
from polar_sdk.engine.native import Angles, Kind, Matrix, Pages
from polar_sdk.engine.products import outputs_from

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from polar_sdk.engine.family import Family
    from polar_sdk.engine.products import InPanels
    from polar_sdk.engine.types import AttentionKind, LayerPlan, Rotary, Visits, Weights


_NORMS: Final = {"rms": 0, "offset_rms": 1, "layer": 2}
_ACTIVATIONS: Final = {
    **{"silu": 0, "swish": 0, "relu": 1, "gelu": 2},
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), 3),
}


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, Matrix) for name in ("qkv", "keys_values", "out", "up", "down")),
        *((name, _Norm) for name in ("attn_norm", "attn_after", "mlp_norm", "mlp_after")),
        ("head_norms", ctypes.c_void_p),
        ("kind", Kind),
        *((name, ctypes.c_int64) for name in ("width", "heads", "groups", "size", "rope")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("norm", "activation", "gated", "parallel", "pairs")),
    )


def _address(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def _norm(weights: Weights, name: str) -> _Norm:
    return _Norm(_address(weights.get(name)), _address(weights.get(f"{name}_bias")))


def _layer(weights: Weights, keys_values: InPanels, family: Family, plan: LayerPlan, kind: AttentionKind) -> _Layer:
    up = weights["gate_up" if plan.gated else "up"]
    units = up.bias.shape[0] // (2 if plan.gated else 1)
    return _Layer(
        weights["qkv"].matrix(family.hidden),
        keys_values.matrix(family.hidden),
        weights["out"].matrix(family.heads * family.head_dim),
        up.matrix(family.hidden),
        weights["down"].matrix(units),
        *(_norm(weights, name) for name in ("attn_norm", "attn_after", "mlp_norm", "mlp_after")),
        _address(weights.get("head_norms")),
        native.kind_of(kind),
        *(family.hidden, family.heads, family.kv_heads, family.head_dim, kind.rope),
        plan.eps,
        *(_NORMS[plan.norm], _ACTIVATIONS[plan.activation], plan.gated, plan.parallel, native.pairs()),
    )


class Layers:
    """The layers of a model, whose matrices are all in panels.

    Args:
        layers: Weights of each.
        family: What they compute.
        plan: The same as data.
    """

    def __init__(self, layers: Sequence[Weights], family: Family, plan: LayerPlan) -> None:
        self._family = family
        queries = family.heads * family.head_dim
        # Kept, since the library is given the addresses of their tensors.
        self._weights = list(layers)
        self._keys_values: list[Any] = [outputs_from(each["qkv"], queries) or each["qkv"] for each in layers]
        structs = (
            _layer(weights, keys_values, family, plan, kind)
            for weights, keys_values, kind in zip(layers, self._keys_values, family.kinds, strict=True)
        )
        self._layers = (_Layer * len(layers))(*structs)
        self._places = {id(weights): index for index, weights in enumerate(layers)}

    def place(self, weights: Weights) -> int:
        """Which layer these weights are of."""
        return self._places[id(weights)]

    def project(self, index: int, x: Tensor, rotary: Rotary) -> Tensor:
        """Queries and keys in their positions, and values, (N, H + 2 G, d), of tokens (N, E)."""
        return self._heads("polar_project", index, x, rotary, self._family.heads + 2 * self._family.kv_heads)

    def keys_values(self, index: int, x: Tensor, rotary: Rotary) -> Tensor:
        """The same without the queries, (N, 2 G, d)."""
        return self._heads("polar_keys_values", index, x, rotary, 2 * self._family.kv_heads)

    def _heads(self, name: str, index: int, x: Tensor, rotary: Rotary, count: int) -> Tensor:
        states, heads = x.contiguous(), x.new_empty((x.shape[0], count, self._family.head_dim))
        layer, sharing = ctypes.addressof(self._layers[index]), native.shared_by(x.shape[0])
        native.call(name, layer, states.data_ptr(), x.shape[0], _angles(rotary), heads.data_ptr(), sharing)
        return heads

    def finish(self, index: int, x: Tensor, mixed: Tensor) -> Tensor:
        """States after the layer, (N, E), from those before it and the result of attention (N, H × d)."""
        states, own, after = x.contiguous(), mixed.contiguous(), x.new_empty(x.shape)
        pointers = states.data_ptr(), own.data_ptr(), after.data_ptr()
        sharing = native.shared_by(x.shape[0])
        native.call("polar_finish", ctypes.addressof(self._layers[index]), *pointers, x.shape[0], sharing)
        return after

    def decode(self, x: Tensor, visits: Visits, rotary: Iterable[Rotary], store: Tensor, done: Tensor) -> Tensor:
        """`Kernels.decode_layers`, with its arguments and result."""
        after, pairs = x.clone(memory_format=torch.contiguous_format), list(rotary)
        tensors = [each.contiguous() for each in visits]
        layers, bounds, rows, table, positions = (tensor.data_ptr() for tensor in tensors)
        pages = Pages(_address(store), store.shape[0], store.shape[3], visits.table.shape[1])
        native.call(
            "polar_decode_layers", ctypes.addressof(self._layers), len(self._layers), after.data_ptr(), layers,
            len(visits.layers), bounds, rows, table, positions, (Angles * len(pairs))(*map(_angles, pairs)), pages,
            done.data_ptr(), native.shared_by_team(),
        )  # fmt: skip
        return after


def _angles(rotary: Rotary) -> Any:
    cos, sin = rotary
    return Angles(_address(cos), _address(sin), cos.shape[-1])
