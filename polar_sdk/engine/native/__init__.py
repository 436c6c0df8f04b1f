"""The library built from the C++ files here: when it is used, how it is compiled and kept, how compiled layers call it.

Operations on bfloat16 tensors of a CPU: the product of rows with a packed matrix of bfloat16 or of integers, attention
of one token per row over pages, and attention of the tokens of a prompt. Only compiled kernels
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
    from collections.abc import Iterable, Iterator, Sequence

    from polar_sdk.engine.eager import Visits
    from polar_sdk.engine.types import AttentionKind, Rotary


_FOLDER: Final = Path(__file__).parent
_HEAD_STEP: Final = 32
"""The size of a head must be a multiple of this: bfloat16 numbers in a register."""
_log = logging.getLogger(__name__)
_loaded: set[str] = set()
"""Version of the library loaded in this process, if any."""
_failures: list[str] = []
"""Why the library could not be compiled or loaded in this process, if so."""
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
        _fail("compiled", error)


def _load(file: Path) -> None:
    try:
        torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)  # compiled layers find functions of the library by name
    except OSError as error:
        _fail("loaded", error)
        return
    torch.library.register_fake("polar::product", _product_shape)
    torch.library.register_fake("polar::product_int8", _product_int8_shape)
    torch.library.register_fake("polar::product_int4", _product_int4_shape)
    torch.library.register_fake("polar::attend_pages", _attend_pages_shape)
    _loaded.add(_key())


def _fail(what: str, error: Exception) -> None:
    _failures.append(f"native kernels cannot be {what}, layers run without: {_reason(str(error))}.")
    _log.warning("%s", _failures[-1])


def _reason(text: str) -> str:
    """The line of a compiler's output that says what is wrong, or the beginning of another text."""
    lines = [line for line in text.splitlines() if " error: " in line]
    return " ".join((lines[0] if lines else text).split())[:200]


def failure() -> str:
    """Why this process tried to have the library and does not, as a sentence; empty otherwise."""
    return "" if _loaded or not _failures else _failures[-1]


def _product_shape(x: Tensor, panels: Tensor, bias: Tensor, *_: object) -> Tensor:
    return x.new_empty((x.shape[0], bias.shape[0]))


def _product_int8_shape(x: Tensor, panels: Tensor, scale: Tensor, bias: Tensor, team: bool) -> Tensor:
    return x.new_empty((x.shape[0], bias.shape[0]))


def _product_int4_shape(x: Tensor, panels: Tensor, bias: Tensor, team: bool) -> Tensor:
    return x.new_empty((x.shape[0], bias.shape[0]))


def _attend_pages_shape(query: Tensor, *_: object) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[1] * query.shape[2]))


def direct_calls() -> dict[Any, list[str]]:
    """Operations that compiled layers call by the name of a function in the library, with its declaration."""
    if not _loaded:
        return {}
    tensor, result = "AtenTensorHandle", "AtenTensorHandle* result);"
    attend = f"{tensor} query, {tensor} store, {tensor} table, {tensor} positions, double scale"
    attend += ", const int64_t* window, const double* softcap, int32_t team"
    integers = f"{tensor} x, {tensor} panels"
    product = f"{integers}, {tensor} bias, int32_t pairs, int32_t team"
    declared = {
        torch.ops.polar.product: f"product({product}, {result}",
        torch.ops.polar.product_int8: f"product_int8({integers}, {tensor} scale, {tensor} bias, int32_t team, {result}",
        torch.ops.polar.product_int4: f"product_int4({integers}, {tensor} bias, int32_t team, {result}",
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
    """Multiply rows (M, K) by a `panels.Packed` matrix, add its bias (N,), and round once; returns (M, N)."""
    total: Tensor = torch.ops.polar.product(x, panels, bias, _pairs(), _team.get())
    return total


def product_int8(x: Tensor, panels: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """As `product`, by a `panels.PackedInt8` matrix."""
    total: Tensor = torch.ops.polar.product_int8(x, panels, scale, bias, _team.get())
    return total


def product_int4(x: Tensor, panels: Tensor, bias: Tensor) -> Tensor:
    """As `product`, by a `panels.PackedInt4` matrix."""
    total: Tensor = torch.ops.polar.product_int4(x, panels, bias, _team.get())
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


class Layers:
    """Compiled layers that run one after another in one call: from one call to the next takes as long as a product.

    Args:
        layers: For each its code from `open_layer`, its weights, and its `AttentionKind.rope`.
    """

    def __init__(self, layers: Iterable[tuple[Any, list[Tensor], int]]) -> None:
        self._layers: Any = torch.classes.polar.Layers()
        for layer in layers:
            self._layers.add(*layer)

    def decode(self, x: Tensor, visits: Visits, rotary: Sequence[Rotary], store: Tensor, done: Tensor) -> Tensor:
        """`Kernels.decode_layers`, with its arguments and result."""
        angles = [each for pair in rotary for each in pair]
        after: Tensor = torch.ops.polar.decode_layers.default(self._layers, x, *visits, angles, store, done)
        return after


def open_layer(path: Path) -> Any:
    """The code for a whole layer in a package file, which runs tensors, for `Layers`; errors as `open_package`."""
    return torch.classes.polar.Package(str(path))


def attend_prompt(
    query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind, positions: Tensor | None = None
) -> Tensor:
    """`Kernels.attend`, with its arguments and result."""
    own = (kind.scale, kind.window, kind.softcap)
    mixed: Tensor = torch.ops.polar.attend_prompt(query, keys, values, positions, *own, _pairs())
    return mixed
