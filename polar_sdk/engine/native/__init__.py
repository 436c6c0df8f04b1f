"""The library built from the C++ files here: when it is used, how it is compiled and kept, how compiled layers call it.

Operations on bfloat16 tensors of a CPU: the product of rows with a packed matrix, of one row with a matrix of
integers, attention of one token per row over pages, and attention of the tokens of a prompt. Only compiled kernels
use them, on processors with AVX512-BF16 and without AMX (where torch's own products are faster). Elsewhere, and where
the library cannot be compiled, layers use torch's operations. Knows tensors, no families.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import sys
import tempfile
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polar_sdk.engine.types import AttentionKind


_FOLDER: Final = Path(__file__).parent
_HEAD_STEP: Final = 32
"""The size of a head must be a multiple of this: bfloat16 numbers in a register."""
_log = logging.getLogger(__name__)
_loaded: set[str] = set()
"""Version of the library loaded in this process, if any."""
_team = ContextVar("team", default=True)
"""Whether the library's own threads share the work of operations called from here, rather than torch's."""


@cache
def _supported() -> bool:
    """Whether this processor can run the kernels and is faster with them."""
    if not sys.platform.startswith("linux"):
        return False
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


@cache
def _key() -> str:
    """Name of the library on disk, from its source, torch, and the processor that it is compiled for."""
    source = "".join(file.read_text() for file in sorted([*_FOLDER.glob("*.h"), *_FOLDER.glob("*.cpp")]))
    return hashlib.sha256(f"{source}|{torch.__version__}|{processor()}".encode()).hexdigest()[:32]


@cache
def processor() -> str:
    """Vendor and instruction sets of the processor: what is compiled for it may use any of them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = ("vendor_id", "flags", "CPU implementer", "CPU part", "Features")  # the last three are Arm's
    return "".join(sorted({line for line in lines if line.startswith(names)}))


@cache
def _pairs() -> bool:
    """Whether to multiply with the instruction for pairs of bfloat16 numbers.

    On AMD cores it does twice the work of a float32 product in the same time; on Intel cores it takes 4 times as long.
    """
    return "AuthenticAMD" in processor()


def load_library(folder: Path, dtype: torch.dtype, device: torch.device, *, build: bool) -> bool:
    """Make the kernels available in this process, where they can be used.

    Args:
        folder: Where the library is kept.
        dtype: Of activations, keys and values.
        device: Of the same.
        build: Whether to compile the library if it is not there yet, which takes about ten seconds.

    Returns:
        Whether compiled layers may call them. A compiler that is missing or fails is only logged: layers run without.
    """
    if not _fits(dtype, device) or not _supported():
        return False
    if _loaded:
        return True
    file = folder / f"native-{_key()}.so"
    if build and not file.exists():
        _build(file)
    if file.exists():
        _load(file)
    return bool(_loaded)


def _fits(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype == torch.bfloat16 and device.type == "cpu"


def _build(file: Path) -> None:
    """Compile the library; it appears whole or not at all."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions

    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            options = CppTorchOptions(include_pytorch=True, warning_all=False)
            builder = CppBuilder("native", str(_FOLDER / "kernels.cpp"), options, output_dir=scratch)
            builder.build()
            Path(builder.get_target_file_path()).replace(file)
    except Exception as error:  # the compiler raises what it likes
        _log.warning("native kernels cannot be compiled, layers run without: %s", " ".join(str(error).split())[:200])


def _load(file: Path) -> None:
    try:
        torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)  # compiled layers find functions of the library by name
    except OSError as error:
        _log.warning("native kernels in %s cannot be loaded: %s", file, " ".join(str(error).split())[:200])
        return
    torch.library.register_fake("polar::product", _product_shape)
    torch.library.register_fake("polar::product_int8", _product_int8_shape)
    torch.library.register_fake("polar::product_int4", _product_int4_shape)
    torch.library.register_fake("polar::attend_pages", _attend_pages_shape)
    _loaded.add(_key())


def _product_shape(x: Tensor, panels: Tensor, bias: Tensor, *_: object) -> Tensor:
    return x.new_empty((x.shape[0], bias.shape[0]))


def _product_int8_shape(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _product_int4_shape(x: Tensor, packed: Tensor, scales_zeros: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], scales_zeros.shape[1]))


def _attend_pages_shape(query: Tensor, *_: object) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[1] * query.shape[2]))


def direct_calls() -> dict[Any, list[str]]:
    """Operations that compiled layers call by the name of a function in the library, with its declaration."""
    if not _loaded:
        return {}
    tensor, result = "AtenTensorHandle", "AtenTensorHandle* result);"
    attend = f"{tensor} query, {tensor} store, {tensor} table, {tensor} positions, double scale"
    attend += ", const int64_t* window, const double* softcap, int32_t team"
    product = f"{tensor} x, {tensor} panels, {tensor} bias, int32_t pairs, int32_t team"
    declared = {
        torch.ops.polar.product: f"product({product}, {result}",
        torch.ops.polar.product_int8: f"product_int8({tensor} x, {tensor} weight, {tensor} scale, {result}",
        torch.ops.polar.product_int4: f"product_int4({tensor} x, {tensor} packed, {tensor} scales_zeros, {result}",
        torch.ops.polar.attend_pages: f"attend_pages({attend}, {result}",
    }
    return {each.default: [f"AOTITorchError aoti_torch_cpu_{text}"] for each, text in declared.items()}


def version(dtype: torch.dtype, device: torch.device) -> str:
    """Version of the library that compiled layers of such activations depend on; empty where they use none of it."""
    return next(iter(_loaded), "") if _fits(dtype, device) else ""


@contextmanager
def shared_by(*, team: bool) -> Iterator[None]:
    """In code that is compiled within this block, the library's own threads share its work, or torch's.

    The library's are faster where pieces are short, but not beside torch's, which spin for the next of theirs.
    """
    before = _team.set(team)
    try:
        yield
    finally:
        _team.reset(before)


def product(x: Tensor, panels: Tensor, bias: Tensor) -> Tensor:
    """Multiply rows (M, K) by a `products.Packed` matrix, add its bias (N,), and round once; returns (M, N)."""
    total: Tensor = torch.ops.polar.product(x, panels, bias, _pairs(), _team.get())
    return total


def can_multiply_integers(x: Tensor) -> bool:
    """Whether to use `product_int8` and `product_int4` for activations (M, K): in a compiled layer, where M is 1."""
    return bool(version(x.dtype, x.device)) and x.shape[0] == 1 and torch.compiler.is_compiling()


def product_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply a row (1, K) by a matrix of 8-bit integers (N, K) with a scale (N,) per output; returns (1, N)."""
    total: Tensor = torch.ops.polar.product_int8(x, weight, scale)
    return total


def product_int4(x: Tensor, packed: Tensor, scales_zeros: Tensor) -> Tensor:
    """Multiply a row (1, K) by a matrix of 4-bit integers, packed as torch's kernel expects it; returns (1, N).

    N is a multiple of 64. Scales and zeros are (K / 32, N, 2).
    """
    total: Tensor = torch.ops.polar.product_int4(x, packed, scales_zeros)
    return total


def can_attend(query: Tensor) -> bool:
    """Whether `attend_pages` and `attend_prompt` can be used for queries (…, d)."""
    return bool(version(query.dtype, query.device)) and takes_heads(query.shape[-1])


def takes_heads(size: int) -> bool:
    """Whether the kernels for attention take heads of that size."""
    return size % _HEAD_STEP == 0


def attend_pages(query: Tensor, store: Tensor, table: Tensor, positions: Tensor, kind: AttentionKind) -> Tensor:
    """`attention.paged_decode`, with its arguments and result."""
    own = (kind.scale, kind.window, kind.softcap)
    mixed: Tensor = torch.ops.polar.attend_pages(query, store, table, positions, *own, _team.get())
    return mixed


def write_pages(store: Tensor, pages: Tensor, offsets: Tensor, key: Tensor, value: Tensor) -> None:
    """`attention.write_pages`, with its arguments."""
    torch.ops.polar.write_pages(store, pages, offsets, key, value)


def attend_prompt(
    query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind, positions: Tensor | None = None
) -> Tensor:
    """`Kernels.attend`, with its arguments and result."""
    own = (kind.scale, kind.window, kind.softcap)
    mixed: Tensor = torch.ops.polar.attend_prompt(query, keys, values, positions, *own, _pairs())
    return mixed
