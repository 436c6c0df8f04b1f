"""Weight matrices and their product with activations, in every precision the engine has.

A matrix is a named tuple of tensors: `Plain` (the model's own dtype), `Int8` (a scale per output), or one in panels,
the order of the native library. 4-bit integers are always in panels: torch's order of them differs by processor.
One row is bound by reading the weights, many rows by arithmetic, so without the library 8-bit integers have a narrow
and a wide form. Knows nothing of layers.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from polar_sdk.engine import native
from polar_sdk.engine.panels import GROUP, INTEGER_OUTPUTS, Blocks, Packed, PackedInt4, PackedInt8
from polar_sdk.errors import DeviceError

if TYPE_CHECKING:
    from torch import Tensor


PRECISIONS: Final = ("bf16", "fp32", "fp16", "int8", "int4")
INT4_GROUP: Final = GROUP
"""Number of inputs that share a scale and a zero point in int4: as in Q4_1 files, which so lose next to nothing."""
_WIDE_INT8: Final = 32
"""Number of rows from which weights are unpacked once; torch's kernel unpacks them for every row."""
QUANTIZE_BATCH: Final = 4096
"""Number of outputs that are rounded to int8 together, so that no float32 copy of a whole head is made."""
_FEW_ROWS: Final = 64
"""Up to this number of rows are not padded; more are padded at least to a multiple of it, see `times`."""


class Plain(NamedTuple):
    """A matrix (N, K) as it is, with an optional bias (N,)."""

    weight: Tensor
    bias: Tensor | None = None


class Int8(NamedTuple):
    """A matrix in 8-bit integers (N, K): weight ≈ integer × scale, one scale (N,) per output."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None = None


InPanels = Packed | PackedInt8 | PackedInt4 | Blocks
NotInPanels = Plain | Int8
Product = NotInPanels | InPanels


def multiply(x: Tensor, product: Product) -> Tensor:
    """Multiply activations (M, K) by a matrix and add its bias; returns (M, N) in the dtype of `x`."""
    match product:
        case Plain():
            return _linear(x, product.weight, product.bias)
        case Int8():
            return _add(_int8(x, product), product.bias)
        case _:
            return _in_panels(x, product)


def multiply_wide(x: Tensor, product: Product) -> Tensor:
    """As `multiply`, in float32; by the library without rounding, so that logits which are close stay apart."""
    if isinstance(product, InPanels) and native.multiplies(x):
        return native.product_wide(x, product.matrix(x.shape[1]))
    return multiply(x, product).float()


def times(x: Tensor, factor: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply states (M, K) by a map's factor (K, N), and add its bias (N,); returns (M, N).

    By the native library, where it multiplies: a product of bfloat16 by torch takes up to 70 times as long on
    processors without instructions for it. Else, for numbers of 16 bits on a CPU, oneDNN compiles a product for each M
    that it meets, which takes several times as long as the product itself: so rows are padded to one of few numbers, by
    less than 64 or a quarter.
    """
    if native.multiplies(x) and not factor.requires_grad:
        product = native.product(x, _panels_of(factor).matrix(x.shape[1]))
        return product if bias is None else product + bias
    rows = x.shape[0]
    by_number = x.device.type == "cpu" and x.dtype.itemsize == 2 and rows > _FEW_ROWS
    padding = -rows % max(_FEW_ROWS, (1 << (rows - 1).bit_length()) // 8) if by_number else 0
    padded = F.pad(x, (0, 0, 0, padding)) if padding else x
    product = padded @ factor if bias is None else torch.addmm(bias, padded, factor)
    return product[:rows] if padding else product


_panels: dict[int, tuple[weakref.ref[Tensor], Packed]] = {}
"""Factors of maps in panels, by the identity of the tensor, for as long as that is there. Whether it is the same tensor
is asked nevertheless: a signal may cut off what forgets it."""


def _panels_of(factor: Tensor) -> Packed:
    """The panels of a map's factor (K, N), which nobody changes: one that is trained has gradients."""
    found = _panels.get(id(factor))
    if found is None or found[0]() is not factor:
        found = _panels[id(factor)] = weakref.ref(factor), Packed.of(factor.T, None)
        weakref.finalize(factor, _panels.pop, id(factor), None)
    return found[1]


def outputs_from(product: Product, first: int) -> Product | None:
    """The matrix of all outputs from the one with that index on, over the same memory.

    None where outputs before and after it are packed together, so that they cannot be computed apart.
    """
    bias = None if product.bias is None else product.bias[first:]
    match product:
        case Plain():
            return Plain(product.weight[first:], bias)
        case Int8():
            return Int8(product.weight[first:], product.scale[first:], bias)
        case _:
            return product.outputs_from(first)


def multiply_from(x: Tensor, product: Product, first: int) -> Tensor:
    """As `multiply`, of all outputs from the one with index `first` on: (M, N − first)."""
    part = outputs_from(product, first)
    return multiply(x, product)[:, first:] if part is None else multiply(x, part)


def _in_panels(x: Tensor, product: InPanels) -> Tensor:
    """By the library, where there is one; else as a plain matrix, which gradients can pass."""
    if native.multiplies(x):
        return native.product(x, product.matrix(x.shape[1]))
    return _linear(x, product.unpack(x.shape[-1]), product.bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the dtype of `x`, which is wider than the model's where maps are trained."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _int8(x: Tensor, product: Int8) -> Tensor:
    if x.device.type != "cpu" or x.shape[0] >= _WIDE_INT8 or torch.is_grad_enabled():
        return F.linear(x, product.weight.to(x.dtype)) * product.scale
    total: Tensor = torch.ops.aten._weight_int8pack_mm(x, product.weight, product.scale)
    return total


def _add(total: Tensor, bias: Tensor | None) -> Tensor:
    return total if bias is None else total + bias


def pack(product: Product) -> Product:
    """Bring a matrix into panels; one that is in panels stays as it is."""
    match product:
        case Plain():
            return Packed.of(*product)
        case Int8():
            return PackedInt8.of(*product)
        case _:
            return product


def rows_of(product: Product, outputs: Tensor, inputs: int) -> Tensor:
    """The rows (M, K) of some outputs (M,) of a matrix, as numbers; K is `inputs`."""
    match product:
        case Plain():
            return product.weight[outputs]
        case Int8():
            return product.weight[outputs] * product.scale[outputs, None]
        case Packed() if inputs % 2 == 0:
            return product.look_up(outputs)
        case Blocks():
            return product.look_up(outputs)
        case _:
            return product.unpack(inputs)[outputs]


Embedding = torch.Tensor | Packed | Blocks
"""Rows of tokens (V, E); where it is the matrix of the head, it is as that is."""


def look_up(tokens: Tensor, embedding: Embedding) -> Tensor:
    """Rows (N, E) of an embedding for tokens (N,)."""
    return F.embedding(tokens, embedding) if isinstance(embedding, torch.Tensor) else embedding.look_up(tokens)


def quantize(product: Plain, precision: str) -> Product:
    """Store a matrix in int8 or int4, by rounding to nearest; other precisions leave it as it is.

    A matrix with sides that int4 cannot group is stored in int8 instead.

    Raises:
        DeviceError: The device has no kernel for this precision.
    """
    device = product.weight.device.type
    if precision == "int4" and device != "cpu":
        raise DeviceError(f"precision 'int4' is not available on {device!r}; use int8 or bf16 there.")
    outputs, inputs = product.weight.shape
    if precision == "int4" and inputs % INT4_GROUP == 0 and outputs % INTEGER_OUTPUTS == 0:
        return _to_int4(product)
    return _to_int8(product) if precision in {"int8", "int4"} else product


def _to_int8(product: Plain) -> Int8:
    codes, scales = zip(*map(_int8_rows, torch.split(product.weight, QUANTIZE_BATCH)), strict=True)
    return Int8(torch.cat(codes), torch.cat(scales).to(product.weight.dtype), product.bias)


def _int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    wide = weight.float()
    scale = wide.abs().amax(1).clamp(min=1e-12) / 127
    return (wide / scale[:, None]).round().to(torch.int8), scale


def _to_int4(product: Plain) -> PackedInt4:
    outputs, inputs = product.weight.shape
    groups = product.weight.float().view(outputs, inputs // INT4_GROUP, INT4_GROUP)
    low, high = groups.aminmax(dim=-1)
    scale = ((high - low) / 15).clamp(min=1e-12)
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.uint8).view(outputs, inputs)
    # weight = (code − 8) × scale + zero
    scales_zeros = torch.stack((scale, low + 8 * scale), dim=-1).transpose(0, 1)
    return PackedInt4.of(codes, scales_zeros.to(product.weight.dtype), product.bias)
