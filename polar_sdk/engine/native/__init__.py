"""The library built from the C++ files here: when it is used, how it is compiled and kept, how layers call it.

Operations on bfloat16 tensors of a CPU: the product of rows with a packed matrix of bfloat16 or of integers, attention
of one token per row over pages, attention of the tokens of a prompt, and the guesses of a draft head; and on float32,
how likely tokens are. They are used on processors with AVX2; AVX512 with VNNI, AVX512-BF16 and AMX make them faster.
Elsewhere, and where there is no library, torch or numpy does it. Knows tensors, no families.

There are two libraries. The kernels (`kernels.h`) need neither Python nor torch: they come with the package, where it
was built beside a compiler, or are compiled in four seconds. Layers that are not compiled call them from here. Compiled
layers call them by way of `operations.cpp`, which belongs to one version of torch and is compiled with the layers.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import tempfile
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from polar_sdk.engine.native.build import INSTRUCTIONS, BuildError, build_library, is_possible, library_name
from polar_sdk.errors import CompileError, DeviceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from polar_sdk.engine.eager import Visits
    from polar_sdk.engine.panels import Packed, PackedInt8
    from polar_sdk.engine.types import AttentionKind, Rotary


_FOLDER: Final = Path(__file__).parent
ISA_VARIABLE: Final = "POLAR_ISA"
"""Environment variable that names the newest of `INSTRUCTIONS` to use: a machine with more can run with less."""
_HEAD_STEP: Final = 32
"""The size of a head must be a multiple of this: bfloat16 numbers in a register."""
_TEAM_ROWS: Final = 8
"""Maximum number of rows whose products outside compiled code are shared by the library's own threads: with more, torch
shares what is between them, and its threads would spin beside those."""
BLOCK: Final = 512
"""Tokens whose weights are summed up together, so that a draw looks into one block and not at the whole vocabulary."""
_LANES: Final = 16
"""Numbers in a register of the kernels."""
_DONE, _NO_MEMORY = 0, 1
"""What functions of the library return, see `kernels.h`."""
_log = logging.getLogger(__name__)
_loaded: dict[str, ctypes.CDLL] = {}
"""The library loaded in this process, if any, by the name of its file."""
_operations: set[str] = set()
"""The operations loaded in this process, if any."""
_failures: list[str] = []
"""Why the library could not be compiled or loaded in this process, if so."""
_team = ContextVar("team", default=True)
"""Whether the library's own threads share the work of operations called from here, rather than torch's."""
_in_use = ContextVar("in_use", default=False)
"""Whether uncompiled layers that run here use the library."""


@cache
def _kinds_of_library() -> tuple[str, ...]:
    """Which of `INSTRUCTIONS` this processor has, the fastest first."""
    if not is_possible():
        return ()
    has = set(processor().replace("_", "").split())
    kinds = tuple(INSTRUCTIONS)[: tuple(INSTRUCTIONS).index(_restriction()) + 1]
    return tuple(kind for kind in reversed(kinds) if has >= {name.replace("-", "") for name in INSTRUCTIONS[kind]})


def _restriction() -> str:
    """The last of `INSTRUCTIONS` that may be used, as the environment restricts it.

    Raises:
        DeviceError: The environment names none of them.
    """
    kinds = tuple(INSTRUCTIONS)
    limit = os.environ.get(ISA_VARIABLE) or kinds[-1]
    if limit not in kinds:
        raise DeviceError(
            f"{ISA_VARIABLE} is {limit!r}, which is not an instruction set that kernels are built for.",
            hint=f"Set it to one of {', '.join(kinds)}, or unset it to use all that the processor has.",
        )
    return limit


@cache
def _key() -> str:
    """What operations and compiled layers depend on: all sources, torch, and the processor."""
    source = "".join(file.read_text() for file in sorted([*_FOLDER.glob("*.h"), *_FOLDER.glob("*.cpp")]))
    return hashlib.sha256(f"{source}|{torch.__version__}|{processor()}|{_kinds_of_library()}".encode()).hexdigest()[:32]


@cache
def processor() -> str:
    """Vendor and instruction sets of the processor: what is compiled for it may use any of them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = ("vendor_id", "flags", "CPU implementer", "CPU part", "Features")  # the last three are Arm's
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))


@cache
def _pairs() -> bool:
    """Whether to multiply with the instruction for pairs of bfloat16 numbers.

    On AMD cores it does twice the work of a float32 product in the same time; on Intel cores it takes 4 times as long.
    Where there is AMX, products with matrices go by its tiles anyway.
    """
    return "AuthenticAMD" in processor() and "avx512bf16" in _kinds_of_library()


def has_tiles() -> bool:
    """Whether this processor multiplies tiles of bfloat16 (AMX), in a fraction of the time of float32."""
    return "amx" in _kinds_of_library()


def comes_along() -> bool:
    """Whether a library for this processor came with the package."""
    return any((_FOLDER / library_name(kind)).exists() for kind in _kinds_of_library())


def load_library(folder: Path, dtype: torch.dtype, device: torch.device, *, build: bool) -> bool:
    """Make the kernels available in this process, where they can be used.

    Args:
        folder: Where the library is kept that did not come with the package.
        dtype: Of activations, keys and values.
        device: Of the same.
        build: Whether to compile the library if it is not there yet, which takes four seconds.

    Returns:
        Whether layers may call them. A compiler that is missing or fails is only logged: layers run without.
    """
    kinds = _kinds_of_library() if _fits(dtype, device) else ()
    for known in (place / library_name(kind) for kind in kinds for place in (_FOLDER, folder)):
        if not _loaded and known.exists():
            _load(known)
    if kinds and not _loaded and build and (built := _build(kinds, folder)):
        _load(built)
    return bool(kinds and _loaded)


def load_operations(folder: Path, *, build: bool) -> bool:
    """Make the operations that compiled layers call available in this process, which has the library.

    Args:
        folder: Where they are kept.
        build: Whether to compile them if they are not there yet, which takes about ten seconds.

    Returns:
        Whether they are.

    Raises:
        CompileError: The compiler is missing or failed.
    """
    if _operations:
        return True
    file = folder / f"operations-{_key()}.so"
    if file.exists() and _load_operations(file):
        return True
    if not build:
        return False
    _build_operations(file)
    return _load_operations(file)


def _fits(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype == torch.bfloat16 and device.type == "cpu"


def _build(kinds: Sequence[str], folder: Path) -> Path | None:
    """Compile the library of the first kind for which the compiler knows all instructions."""
    errors: list[Exception] = []
    for kind in kinds:
        file = folder / library_name(kind)
        try:
            build_library(kind, file)
        except (BuildError, OSError) as error:
            errors.append(error)
        else:
            return file
    _fail("compiled", errors[0])
    return None


def _load(file: Path) -> None:
    try:
        library = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)  # operations find its functions by name
        for name, arguments in _FUNCTIONS.items():
            getattr(library, name).argtypes = arguments
        _loaded[file.name] = library
    except (OSError, AttributeError) as error:
        _fail("loaded", error)


def _build_operations(file: Path) -> None:
    """Compile the operations; their file appears whole or not at all."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            options = CppTorchOptions(include_pytorch=True, warning_all=False)
            builder = CppBuilder("operations", str(_FOLDER / "operations.cpp"), options, output_dir=scratch)
            builder.build()
            Path(builder.get_target_file_path()).replace(file)
    except Exception as error:  # the compiler raises what it likes
        raise CompileError(
            f"what compiled layers call cannot be compiled here ({_reason(str(error))}).",
            hint="Install a C++ compiler such as g++, or load the model with compile=False.",
        ) from error


def _load_operations(file: Path) -> bool:
    try:
        torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)  # compiled layers find its functions by name
    except OSError as error:
        _log.warning("%s is damaged, and is not used: %s", file, _reason(str(error)))
        return False
    _operations.add(file.name)
    return True


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


_INTEGERS = "Tensor x, Tensor panels, Tensor scale, Tensor bias, bool team"
_HISTORY = "Tensor query, Tensor store, Tensor table, Tensor positions"
for _name, _arguments, _shape in (
    ("product", "Tensor x, Tensor panels, Tensor bias, bool pairs, bool team", _product_shape),
    ("product_int8", _INTEGERS, _product_int8_shape),
    ("product_int4", _INTEGERS.replace("Tensor scale, ", ""), _product_int4_shape),
    ("attend_pages", f"{_HISTORY}, float scale, int? window, float? softcap, bool team", _attend_pages_shape),
):  # what torch's compiler knows of the operations
    torch.library.define(f"polar::{_name}", f"({_arguments}) -> Tensor")
    torch.library.register_fake(f"polar::{_name}", _shape)


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
    """Version of the library that layers of such activations depend on; empty where they use none of it."""
    return _key() if _loaded and _fits(dtype, device) else ""


@contextmanager
def used() -> Iterator[None]:
    """Uncompiled layers that run within this block use the library; others compute as they did before it was there."""
    before = _in_use.set(True)
    try:
        yield
    finally:
        _in_use.reset(before)


def in_use() -> bool:
    """Whether products with matrices in panels are the library's here."""
    return _in_use.get() or (torch.compiler.is_compiling() and bool(_loaded))


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


class _Sharing(ctypes.Structure):
    _fields_ = (("threads", ctypes.c_int32), ("team", ctypes.c_int32))


class _Kind(ctypes.Structure):
    _fields_ = (("scale", ctypes.c_double), ("softcap", ctypes.c_double), ("window", ctypes.c_int64))


class _Steps(ctypes.Structure):
    _fields_ = (("token", ctypes.c_int64), ("head", ctypes.c_int64))


class _Bytes(ctypes.Structure):
    _fields_ = (("panels", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class _DraftHead(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("width", "units", "tokens")),
        *((name, ctypes.c_void_p) for name in ("numbers", "scale")),
        *((name, _Bytes) for name in ("enter", "gated", "down", "rows")),
        *(("embeddings", ctypes.c_void_p), ("in_panels", ctypes.c_int32)),
    )


_ADDRESS, _SIZE, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_FUNCTIONS: Final[dict[str, tuple[Any, ...]]] = {
    "polar_product": (*[_ADDRESS] * 4, *[_SIZE] * 3, _NUMBER, _Sharing),
    "polar_product_integers": (*[_ADDRESS] * 5, *[_SIZE] * 3, _Sharing),
    "polar_attend_pages": (_ADDRESS, _SIZE, *[_ADDRESS] * 4, *[_SIZE] * 6, _Kind, _Sharing),
    "polar_write_pages": (_ADDRESS, *[_SIZE] * 4, *[_ADDRESS] * 2, _SIZE, *(_ADDRESS, _Steps) * 2),
    "polar_attend_prompt": (
        *(_ADDRESS, _SIZE), *(_ADDRESS, _Steps) * 2, *[_ADDRESS] * 2, *[_SIZE] * 5, _Kind, *[_NUMBER] * 2,
    ),
    "polar_weigh": (_ADDRESS, _SIZE, ctypes.c_float, _SIZE, *[_ADDRESS] * 2),
    "polar_pick": (_ADDRESS, _SIZE, ctypes.c_float, _SIZE, ctypes.c_float, *[_ADDRESS] * 4),
    "polar_look_up": (_ADDRESS, *[_SIZE] * 2, _ADDRESS, _SIZE, _ADDRESS),
    "polar_guess": (*[_ADDRESS] * 3, *[_SIZE] * 2, ctypes.c_float, *[_ADDRESS] * 3, _Sharing),
}  # fmt: skip
"""Arguments of its functions, as `kernels.h` declares them."""


def _call(name: str, *arguments: Any) -> None:
    """Run a function of the library.

    Raises:
        MemoryError: There is no memory for what it keeps.
        IndexError: A page is not in the store, or an output not in the matrix.
    """
    result = getattr(next(iter(_loaded.values())), name)(*arguments)
    if result == _NO_MEMORY:
        raise MemoryError(f"there is no memory left for {name}")
    if result != _DONE:
        raise IndexError(f"{name} was given a page, an offset or an output that is out of range")


@lru_cache(maxsize=16)
def _sharing(threads: int, team: bool) -> _Sharing:
    return _Sharing(threads, team)


def _shared_by(rows: int) -> _Sharing:
    """Who shares the work of an operation on so many rows outside compiled code."""
    return _sharing(torch.get_num_threads(), rows <= _TEAM_ROWS)


@lru_cache(maxsize=16)
def _kind(kind: AttentionKind) -> _Kind:
    return _Kind(kind.scale, kind.softcap or 0.0, kind.window or 0)


def _steps(heads: Tensor, token: int, head: int) -> _Steps:
    """Steps of a tensor of tokens and heads, whose axes these are; numbers of a head lie together."""
    assert heads.stride(2) == 1
    return _Steps(heads.stride(token), heads.stride(head))


def product(x: Tensor, panels: Tensor, bias: Tensor) -> Tensor:
    """Multiply rows (M, K) by a `panels.Packed` matrix, add its bias (N,), and round once; returns (M, N)."""
    if torch.compiler.is_compiling():
        total: Tensor = torch.ops.polar.product(x, panels, bias, _pairs(), _team.get())
        return total
    return _product(x, panels, bias, _pairs(), _shared_by(x.shape[0]))


def _product(x: Tensor, panels: Tensor, bias: Tensor, pairs: bool, sharing: _Sharing) -> Tensor:
    rows, y = x.contiguous(), x.new_empty((x.shape[0], bias.shape[0]))
    matrix = panels.data_ptr(), bias.data_ptr()
    _call("polar_product", rows.data_ptr(), *matrix, y.data_ptr(), *x.shape, y.shape[1], pairs, sharing)
    return y


def product_int8(x: Tensor, panels: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """As `product`, by a `panels.PackedInt8` matrix."""
    if torch.compiler.is_compiling():
        total: Tensor = torch.ops.polar.product_int8(x, panels, scale, bias, _team.get())
        return total
    return _product_integers(x, panels, scale, bias, _shared_by(x.shape[0]))


def product_int4(x: Tensor, panels: Tensor, bias: Tensor) -> Tensor:
    """As `product`, by a `panels.PackedInt4` matrix."""
    if torch.compiler.is_compiling():
        total: Tensor = torch.ops.polar.product_int4(x, panels, bias, _team.get())
        return total
    return _product_integers(x, panels, None, bias, _shared_by(x.shape[0]))


def _product_integers(x: Tensor, panels: Tensor, scale: Tensor | None, bias: Tensor, sharing: _Sharing) -> Tensor:
    rows, y = x.contiguous(), x.new_empty((x.shape[0], bias.shape[0]))
    matrix = panels.data_ptr(), None if scale is None else scale.data_ptr(), bias.data_ptr()
    _call("polar_product_integers", rows.data_ptr(), *matrix, y.data_ptr(), *x.shape, y.shape[1], sharing)
    return y


def look_up(panels: Tensor, outputs: Tensor, like: Tensor) -> Tensor:
    """The rows (M, K) of some outputs (M,) of a `panels.Packed` matrix of as many outputs as `like` (N,) has numbers.

    Raises:
        IndexError: An output is not in the matrix.
    """
    wanted, rows = outputs.contiguous(), like.new_empty((outputs.shape[0], 2 * panels.shape[1]))
    matrix = panels.data_ptr(), like.shape[0], rows.shape[1]
    _call("polar_look_up", *matrix, wanted.data_ptr(), rows.shape[0], rows.data_ptr())
    return rows


def is_loaded() -> bool:
    """Whether this process has the library."""
    return bool(_loaded)


def weigh(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """How likely tokens are beside the likeliest, from float32 logits (V,) on a CPU, divided by a temperature.

    Returns:
        Weights (V,), from 0 to 1 for the likeliest, and the sums of every `BLOCK` of them, float64.
    """
    scores, weights = logits.contiguous(), logits.new_empty(logits.shape)
    sums = torch.empty(-(-len(scores) // BLOCK), dtype=torch.float64)
    _call("polar_weigh", scores.data_ptr(), len(scores), temperature, BLOCK, weights.data_ptr(), sums.data_ptr())
    return weights, sums


def pick(logits: Tensor, temperature: float, least: float) -> tuple[Tensor, Tensor, float]:
    """Of the tokens that are at least so likely beside the likeliest: weights (N,) as of `weigh`, and ids (N,), int32.

    The last result is the sum of all V weights.
    """
    scores, count, total = logits.contiguous(), ctypes.c_int64(), ctypes.c_double()
    weights = logits.new_empty(len(scores) + _LANES)
    tokens = torch.empty(len(weights), dtype=torch.int32)
    results = weights.data_ptr(), tokens.data_ptr(), ctypes.addressof(count), ctypes.addressof(total)
    _call("polar_pick", scores.data_ptr(), len(scores), temperature, BLOCK, least, *results)
    return weights[: count.value], tokens[: count.value], total.value


def can_attend(query: Tensor) -> bool:
    """Whether `attend_pages` and `attend_prompt` can be used for queries (…, d)."""
    return bool(version(query.dtype, query.device)) and takes_heads(query.shape[-1])


def takes_heads(size: int) -> bool:
    """Whether the kernels for attention take heads of that size."""
    return size % _HEAD_STEP == 0


def attend_pages(query: Tensor, store: Tensor, table: Tensor, positions: Tensor, kind: AttentionKind) -> Tensor:
    """`attention.paged_decode`, with its arguments and result."""
    if torch.compiler.is_compiling():
        how = (kind.scale, kind.window, kind.softcap, _team.get())
        total: Tensor = torch.ops.polar.attend_pages(query, store, table, positions, *how)
        return total
    rows, heads, size = query.shape
    assert store.is_contiguous() and query.stride()[1:] == (size, 1)
    pages, at, mixed = table.contiguous(), positions.contiguous(), query.new_empty((rows, heads * size))
    history = store.data_ptr(), pages.data_ptr(), at.data_ptr()
    sizes = rows, heads, store.shape[2], size, store.shape[3], table.shape[1]
    own = (_kind(kind), _shared_by(rows))
    _call("polar_attend_pages", query.data_ptr(), query.stride(0), *history, mixed.data_ptr(), *sizes, *own)
    return mixed


def write_pages(store: Tensor, pages: Tensor, offsets: Tensor, key: Tensor, value: Tensor) -> None:
    """`attention.write_pages`, with its arguments.

    Raises:
        IndexError: A page or an offset is not in the store.
    """
    assert store.is_contiguous()
    places, at = pages.contiguous(), offsets.contiguous()
    sizes = store.shape[0], *store.shape[2:]
    parts = (key.data_ptr(), _steps(key, 0, 1), value.data_ptr(), _steps(value, 0, 1))
    _call("polar_write_pages", store.data_ptr(), *sizes, places.data_ptr(), at.data_ptr(), key.shape[0], *parts)


class Guesses:
    """A draft head of `draft_head.DraftHead` in the library.

    Args:
        tokens: Those that it can guess, (C,), int64.
        scale: What states are multiplied by before they meet the rows of the tokens, (E,).
        matrices: `enter`, `gated`, `down` and `rows`.
        embedding: The model's, (V, E).
    """

    def __init__(
        self, tokens: Tensor, scale: Tensor, matrices: Sequence[PackedInt8], embedding: Tensor | Packed
    ) -> None:
        numbers = embedding if isinstance(embedding, Tensor) else embedding.panels
        assert numbers.is_contiguous() and tokens.dtype == torch.int64
        self._tensors = (tokens, scale, matrices, numbers)  # whose addresses the library is given
        self._head = _DraftHead(
            *(scale.shape[0], matrices[1].bias.shape[0] // 2, tokens.shape[0], tokens.data_ptr(), scale.data_ptr()),
            *(_Bytes(*(tensor.data_ptr() for tensor in matrix)) for matrix in matrices),
            *(numbers.data_ptr(), numbers is not embedding),
        )

    def guess(
        self, states: Tensor, tokens: Sequence[int], most: int, least: float
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Guesses for each of some tokens, given the states (B, E) before them, and how likely each is.

        They end where in no row all are right with a chance of at least `least`, or after `most`.
        """
        before, after = states.contiguous(), torch.tensor(tokens)
        guesses, chances = after.new_empty((len(tokens), most)), torch.empty((len(tokens), most))
        made = ctypes.c_int64()
        results = guesses.data_ptr(), chances.data_ptr(), ctypes.addressof(made)
        sizes = len(tokens), most, least
        inputs = ctypes.addressof(self._head), before.data_ptr(), after.data_ptr()
        _call("polar_guess", *inputs, *sizes, *results, _shared_by(len(tokens)))
        return guesses[:, : made.value].tolist(), chances[:, : made.value].tolist()


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
    tokens, heads, size = query.shape
    assert query.stride(2) == 1 and (heads == 1 or query.stride(1) == size)
    groups, total, _ = keys.shape
    at, mixed = None if positions is None else positions.contiguous(), query.new_empty((tokens, heads * size))
    history = (keys.data_ptr(), _steps(keys, 1, 0), values.data_ptr(), _steps(values, 1, 0))
    places = (None if at is None else at.data_ptr(), mixed.data_ptr())
    own = (_kind(kind), _pairs(), torch.get_num_threads())
    sizes = tokens, heads, groups, size, total
    _call("polar_attend_prompt", query.data_ptr(), query.stride(0), *history, *places, *sizes, *own)
    return mixed
