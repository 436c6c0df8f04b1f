"""Weight matrices and their product with activations, in every precision the engine has.

A matrix is a named tuple of tensors: `Plain` (the model's own dtype), `Int8` (a scale per output), or one in panels,
the order of the native library. 4-bit integers are always in panels: torch's order of them differs by processor.
`multiply` is pure and can be compiled. One row is bound by reading the weights, many rows by arithmetic, so without the
library 8-bit integers have a narrow and a wide form; `benchmarks/LOG.md` has the measurements. Knows nothing of layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch.fx.experimental.symbolic_shapes import statically_known_true

from polar_sdk.engine import native
from polar_sdk.engine.panels import GROUP, INTEGER_OUTPUTS, Packed, PackedInt4, PackedInt8
from polar_sdk.errors import DeviceError

if TYPE_CHECKING:
    from torch import Tensor


PRECISIONS: Final = ("bf16", "fp32", "fp16", "int8", "int4")
INT4_GROUP: Final = GROUP
"""Number of inputs that share a scale and a zero point in int4: as in Q4_1 files, which so lose next to nothing."""
MIN_WIDE_INT8: Final = 32
"""Minimum number of rows for which compiled code unpacks weights once; torch's kernel unpacks them for every row."""
QUANTIZE_BATCH: Final = 4096
"""Number of outputs that are rounded to int8 together, so that no float32 copy of a whole head is made."""
_FEW_ROWS: Final = 64
"""Up to so many rows are multiplied as they are; more are padded to a multiple of it at least, see `times`."""


class Plain(NamedTuple):
    """A matrix (N, K) as it is, with an optional bias (N,)."""

    weight: Tensor
    bias: Tensor | None = None


class Int8(NamedTuple):
    """A matrix in 8-bit integers (N, K): weight ≈ integer × scale, one scale (N,) per output."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None = None


InPanels = Packed | PackedInt8 | PackedInt4
NotInPanels = Plain | Int8
Product = NotInPanels | InPanels


def multiply(x: Tensor, product: Product) -> Tensor:
    """Multiply activations (M, K) by a matrix and add its bias; returns (M, N) in the dtype of `x`."""
    match product:
        case Plain():
            return _plain(x, product)
        case Int8():
            return _add(_int8(x, product), product.bias)
        case _:
            return _in_panels(x, product)


def times(x: Tensor, factor: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply states (M, K) by a map's factor (K, N), and add its bias (N,); returns (M, N).

    For numbers of 16 bits on a CPU oneDNN compiles a product for each M that it meets, which takes several times as
    long as the product itself. So there rows are padded to one of few numbers, by less than 64 or a quarter.
    """
    rows = x.shape[0]
    by_number = x.device.type == "cpu" and x.dtype.itemsize == 2 and rows > _FEW_ROWS
    padding = -rows % max(_FEW_ROWS, (1 << (rows - 1).bit_length()) // 8) if by_number else 0
    padded = F.pad(x, (0, 0, 0, padding)) if padding else x
    product = padded @ factor if bias is None else torch.addmm(bias, padded, factor)
    return product[:rows] if padding else product


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


def _plain(x: Tensor, product: Plain) -> Tensor:
    if _is_fused(x):
        total = _one_row(x, product.weight)
        return (total if product.bias is None else total + product.bias.float()).to(x.dtype)
    return F.linear(x, product.weight, product.bias)


def _in_panels(x: Tensor, product: InPanels) -> Tensor:
    """By the library, where that is in use; else as a plain matrix, which gradients can pass."""
    if native.in_use():
        return product.multiply(x)
    return F.linear(x, product.unpack(x.shape[-1]), product.bias)


def _is_fused(x: Tensor) -> bool:
    """Whether the compiler should write the product itself: one row on a CPU.

    Written as multiply and sum, the product is fused with the operations around it and reads weights at full speed; a
    library call takes twice as long. For 2 to 4 rows the compiler's code is no faster than the library.
    """
    return x.shape[0] == 1 and x.device.type == "cpu" and torch.compiler.is_compiling()


def _one_row(x: Tensor, weight: Tensor) -> Tensor:
    """Float32 (1, N), in halves that the compiler sums in parallel; one sum after another takes 1.4 times as long."""
    wide = x.float()
    return torch.cat([(half.float() * wide).sum(-1) for half in weight.chunk(2)]).unsqueeze(0)


def _int8(x: Tensor, product: Int8) -> Tensor:
    if _is_fused(x):
        return (_one_row(x, product.weight) * product.scale.float()).to(x.dtype)
    if x.device.type != "cpu" or _has_rows(x, MIN_WIDE_INT8):
        return F.linear(x, product.weight.to(x.dtype)) * product.scale
    total: Tensor = torch.ops.aten._weight_int8pack_mm(x, product.weight, product.scale)
    return total


def _has_rows(x: Tensor, minimum: int) -> bool:
    """Whether there are at least `minimum` rows; in code that is being compiled, whether there always are."""
    return statically_known_true(x.shape[0] >= minimum)


def min_wide_rows(product: Product) -> int:
    """Minimum number of rows that code must be compiled for to use the form for many rows."""
    return {Plain: 2, Int8: MIN_WIDE_INT8}.get(type(product), 1)


def max_rows_one_by_one(product: Product) -> int:
    """Maximum number of rows for which compiled code for one row, run row by row, beats the code for any number.

    0 = there is no such code, and none is needed.
    """
    return {Plain: 2, Int8: 1}.get(type(product), 0)


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
        case _:
            return product.unpack(inputs)[outputs]


def look_up(tokens: Tensor, embedding: Tensor | Packed) -> Tensor:
    """Rows (N, E) of an embedding for tokens (N,). Where it is the matrix of the head, it is as that is."""
    return embedding.look_up(tokens) if isinstance(embedding, Packed) else F.embedding(tokens, embedding)


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
