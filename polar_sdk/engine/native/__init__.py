"""The library built from the C++ files here: when it is used, and its functions on tensors.

Operations on bfloat16 tensors of a CPU: the product of rows with a packed matrix of bfloat16 or of integers, attention
of one token per row over pages, attention of the tokens of a prompt, whole layers (`layers.py`), and the guesses of a
draft head; and on float32, how likely tokens are. They are used on x86 processors with AVX2, faster with AVX512
and VNNI, AVX512-BF16 and AMX, and on 64-bit Arm with dot products, faster with i8mm. Elsewhere, and where there is no
library, torch or numpy does it. Knows tensors, no families.

The kernels (`kernels.h`) need neither Python nor torch: they are built when the package is, by `build.py`.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from polar_sdk.engine.native.build import INSTRUCTIONS, is_possible, kinds_that_run, library_name, processor
from polar_sdk.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.engine.types import AttentionKind


_FOLDER: Final = Path(__file__).parent
ISA_VARIABLE: Final = "POLAR_ISA"
"""Environment variable that names the newest of `INSTRUCTIONS` to use, or `none`: a machine can run with less."""
_HEAD_STEP: Final = 32
"""The size of a head must be a multiple of this: bfloat16 numbers in a register."""
_TEAM_ROWS: Final = 8
"""Maximum number of rows of one operation whose work the library's own threads share: with more, torch shares what is
between operations, and its threads would spin beside those."""
BLOCK: Final = 512
"""Tokens whose weights are summed up together, so that a draw looks into one block and not at the whole vocabulary."""
_LANES: Final = 16
"""Numbers in a register of the kernels."""
FORMS: Final = (
    *("numbers", "bytes", "nibbles", "rows"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"),
)
"""How matrices can be stored, in the order of `PolarForm`: those of GGUF files have their names there."""
_DONE, _NO_MEMORY, _CUT_SHORT, _NOT_FINITE = 0, 1, 3, 4
"""Results of the library's functions, see `kernels.h`."""
_log = logging.getLogger(__name__)
_loaded: dict[str, ctypes.CDLL] = {}
"""The library loaded in this process, if any, by the name of its file."""


@cache
def _kinds_of_library() -> tuple[str, ...]:
    """Which of `INSTRUCTIONS` this processor has and the environment allows, the fastest first.

    Raises:
        DeviceError: The environment names none of them.
    """
    if not is_possible():
        return ()
    kinds, limit = tuple(INSTRUCTIONS), os.environ.get(ISA_VARIABLE) or tuple(INSTRUCTIONS)[-1]
    if limit == "none":
        return ()
    if limit not in kinds:
        raise DeviceError(
            f"{ISA_VARIABLE} is {limit!r}, which is not an instruction set that kernels are built for.",
            hint=f"Set it to none or one of {', '.join(kinds)}, or unset it to use all that the processor has.",
        )
    allowed = kinds[: kinds.index(limit) + 1]
    return tuple(kind for kind in kinds_that_run(INSTRUCTIONS) if kind in allowed)


@cache
def pairs() -> bool:
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


def load_library(dtype: torch.dtype, device: torch.device) -> bool:
    """Make the kernels available in this process, where they can be used.

    Args:
        dtype: Of activations, keys and values.
        device: Of the same.

    Returns:
        Whether layers may call them. Where this processor has kernels and the package has no library, a warning says
        once that layers run without.
    """
    if not _fits(dtype, device):
        return False
    for kind in _kinds_of_library():
        if not _loaded and (file := _FOLDER / library_name(kind)).exists():
            _load(file)
    if reason := missing():
        _warn_once(reason)
    return bool(_loaded)


def missing() -> str:
    """Why this process runs without the library although the processor could use it, as a sentence; else empty."""
    if _loaded or not _kinds_of_library() or comes_along():
        return ""
    return (
        "native kernels are not built, so layers run by torch, several times slower; "
        "install a C++ compiler and run `polar models kernels`."
    )


@cache
def _warn_once(text: str) -> None:
    _log.warning("%s", text)


def _fits(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype == torch.bfloat16 and device.type == "cpu"


def _load(file: Path) -> None:
    try:
        library = ctypes.CDLL(str(file))
        for name, arguments in _FUNCTIONS.items():
            getattr(library, name).argtypes = arguments
        library.polar_packed_size.restype = _SIZE
        _loaded[file.name] = library
    except (OSError, AttributeError) as error:
        _warn_once(f"native kernels cannot be loaded, layers run without: {str(error)[:200]}.")


def is_used(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether operations on such tensors can be the library's in this process."""
    return bool(_loaded) and _fits(dtype, device)


def multiplies(x: Tensor) -> bool:
    """Whether the library multiplies these rows: gradients do not pass its products."""
    return is_used(x.dtype, x.device) and not torch.is_grad_enabled()


class Sharing(ctypes.Structure):
    """Number of threads that share work, and whether they are the library's own rather than torch's."""

    _fields_ = (("threads", ctypes.c_int32), ("team", ctypes.c_int32))


class Kind(ctypes.Structure):
    """How a layer attends; a window or soft cap of 0 is none."""

    _fields_ = (("scale", ctypes.c_double), ("softcap", ctypes.c_double), ("window", ctypes.c_int64))


class Matrix(ctypes.Structure):
    """A matrix in one of `FORMS`, whose last outputs may be those of a next one; it keeps alive what it points to.

    Args:
        form: One of `FORMS`.
        panels: As that form has them.
        bias: Of each output, (N,).
        inputs: K.
        scale: Of each output, for bytes.
        following: The matrix of the outputs that come last, which N counts too.
        fine: Whether results near a row's greatest meet the row in 16 bits instead of 8, in a format of GGUF files.
    """

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("panels", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
        ("next", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("form", "fine")),
    )

    def __init__(
        self,
        form: str,
        panels: Tensor,
        bias: Tensor,
        inputs: int,
        *,
        scale: Tensor | None = None,
        following: Matrix | None = None,
        fine: bool = False,
    ) -> None:
        self.kept = panels, bias, scale, following
        assert all(each.is_contiguous() for each in (panels, bias))
        outputs = bias.shape[0] + (following.outputs if following else 0)
        pointers = panels.data_ptr(), None if scale is None else scale.data_ptr(), bias.data_ptr()
        after = None if following is None else ctypes.addressof(following)
        super().__init__(*pointers, inputs, outputs, after, FORMS.index(form), fine)


class _Steps(ctypes.Structure):
    _fields_ = (("token", ctypes.c_int64), ("head", ctypes.c_int64))


class _DraftHead(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("width", "units", "tokens")),
        *((name, ctypes.c_void_p) for name in ("numbers", "scale")),
        *((name, Matrix) for name in ("enter", "gated", "down", "rows", "embeddings")),
    )


class Angles(ctypes.Structure):
    """Cosine and sine of tokens, (N, width)."""

    _fields_ = (("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p), ("width", ctypes.c_int64))


class Pages(ctypes.Structure):
    """A store of keys and values, and how many pages each row of a table has."""

    _fields_ = (
        ("store", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("places", "page", "blocks")),
    )


_ADDRESS, _SIZE, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_FUNCTIONS: Final[dict[str, tuple[Any, ...]]] = {
    "polar_product": (*[_ADDRESS] * 4, _SIZE, _NUMBER, Sharing),
    "polar_attend_pages": (_ADDRESS, _SIZE, *[_ADDRESS] * 4, *[_SIZE] * 6, Kind, Sharing),
    "polar_write_pages": (_ADDRESS, *[_SIZE] * 4, *[_ADDRESS] * 2, _SIZE, *(_ADDRESS, _Steps) * 2),
    "polar_attend_prompt": (
        *(_ADDRESS, _SIZE), *(_ADDRESS, _Steps) * 2, *[_ADDRESS] * 2, *[_SIZE] * 5, Kind, *[_NUMBER] * 2,
    ),
    "polar_weigh": (_ADDRESS, _SIZE, ctypes.c_float, _SIZE, *[_ADDRESS] * 2),
    "polar_pick": (_ADDRESS, _SIZE, ctypes.c_float, _SIZE, ctypes.c_float, *[_ADDRESS] * 4),
    "polar_look_up": (_ADDRESS, _ADDRESS, _SIZE, _ADDRESS, Sharing),
    "polar_pack": (*[_NUMBER] * 2, _SIZE, _ADDRESS, *[_SIZE] * 2, _ADDRESS, Sharing),
    "polar_packed_size": (_NUMBER, *[_SIZE] * 2),
    "polar_project": (_ADDRESS, _ADDRESS, _SIZE, Angles, _ADDRESS, Sharing),
    "polar_keys_values": (_ADDRESS, _ADDRESS, _SIZE, Angles, _ADDRESS, Sharing),
    "polar_finish": (*[_ADDRESS] * 4, _SIZE, Sharing),
    "polar_decode_layers": (
        _ADDRESS, _SIZE, *[_ADDRESS] * 2, _SIZE, *[_ADDRESS] * 4, ctypes.POINTER(Angles), Pages, _ADDRESS, Sharing,
    ),
    "polar_guess": (*[_ADDRESS] * 3, *[_SIZE] * 2, ctypes.c_float, *[_ADDRESS] * 3, Sharing),
}  # fmt: skip
"""Arguments of its functions, as `kernels.h` declares them."""


def _library() -> ctypes.CDLL:
    return next(iter(_loaded.values()))


def call(name: str, *arguments: Any) -> None:
    """Run a function of the library.

    Raises:
        MemoryError: There is no memory for what it keeps.
        IndexError: A page is not in the store, or an output not in the matrix.
        EOFError: A file ends before what it should hold.
        ArithmeticError: A scale in a file is not finite.
    """
    result = getattr(_library(), name)(*arguments)
    if result == _NO_MEMORY:
        raise MemoryError(f"there is no memory left for {name}")
    if result in (_CUT_SHORT, _NOT_FINITE):
        raise EOFError("the file ends early") if result == _CUT_SHORT else ArithmeticError("a scale is not finite")
    if result != _DONE:
        raise IndexError(f"{name} was given a page, an offset or an output that is out of range")


@lru_cache(maxsize=16)
def _sharing(threads: int, team: bool) -> Sharing:
    return Sharing(threads, team)


def shared_by(rows: int) -> Sharing:
    """The threads that share the work of one operation on N rows."""
    return _sharing(torch.get_num_threads(), rows <= _TEAM_ROWS)


def shared_by_team() -> Sharing:
    """The library's own threads share the work: of many operations one after another."""
    return _sharing(torch.get_num_threads(), True)


@lru_cache(maxsize=16)
def kind_of(kind: AttentionKind) -> Kind:
    """How a layer attends, as the library reads it."""
    return Kind(kind.scale, kind.softcap or 0.0, kind.window or 0)


def _steps(heads: Tensor, token: int, head: int) -> _Steps:
    """Steps of a tensor of tokens and heads, whose axes these are; numbers of a head lie together."""
    assert heads.stride(2) == 1
    return _Steps(heads.stride(token), heads.stride(head))


def product(x: Tensor, matrix: Matrix) -> Tensor:
    """Multiply rows (M, K) by a matrix, add its bias, and round once; returns (M, N)."""
    rows, y = x.contiguous(), x.new_empty((x.shape[0], matrix.outputs))
    pointers = ctypes.addressof(matrix), rows.data_ptr(), y.data_ptr(), None
    call("polar_product", *pointers, x.shape[0], pairs(), shared_by(x.shape[0]))
    return y


def product_wide(x: Tensor, matrix: Matrix) -> Tensor:
    """As `product`, without rounding; returns float32 (M, N)."""
    rows, y = x.contiguous(), x.new_empty((x.shape[0], matrix.outputs), dtype=torch.float32)
    pointers = ctypes.addressof(matrix), rows.data_ptr(), None, y.data_ptr()
    call("polar_product", *pointers, x.shape[0], pairs(), shared_by(x.shape[0]))
    return y


def look_up(outputs: Tensor, matrix: Matrix) -> Tensor:
    """The weights (M, K), bfloat16, of some outputs (M,) of a matrix that is not of bytes or nibbles.

    Raises:
        IndexError: An output is not in the matrix.
    """
    wanted, rows = outputs.contiguous(), torch.empty((outputs.shape[0], matrix.inputs), dtype=torch.bfloat16)
    count = rows.shape[0]
    call("polar_look_up", ctypes.addressof(matrix), wanted.data_ptr(), count, rows.data_ptr(), shared_by(count))
    return rows


def packed_size(form: str, inputs: int, outputs: int) -> int:
    """Bytes of the panels of N outputs in a form of GGUF files; 0 if it cannot have that number of inputs."""
    return int(_library().polar_packed_size(FORMS.index(form), inputs, outputs))


def pack(form: str, file: int, start: int, order: Tensor | None, inputs: int, outputs: int, panels: Tensor) -> None:
    """Bring a matrix of a GGUF file into panels.

    Args:
        form: One of `FORMS`.
        file: The number of the open file.
        start: Of the matrix, in bytes.
        order: Which of its rows are outputs, (N,), int64; None = all, one after another.
        inputs: K.
        outputs: N.
        panels: Of the size of `packed_size`.

    Raises:
        EOFError: The file ends before the matrix does.
        ArithmeticError: A scale is not finite.
    """
    places = None if order is None else order.data_ptr()
    call("polar_pack", FORMS.index(form), file, start, places, inputs, outputs, panels.data_ptr(), shared_by_team())


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
    call("polar_weigh", scores.data_ptr(), len(scores), temperature, BLOCK, weights.data_ptr(), sums.data_ptr())
    return weights, sums


def pick(logits: Tensor, temperature: float, least: float) -> tuple[Tensor, Tensor, float]:
    """Pick the tokens that are at least so likely beside the likeliest: weights (N,) as of `weigh`, ids (N,), int32.

    The last result is the sum of all V weights.
    """
    scores, count, total = logits.contiguous(), ctypes.c_int64(), ctypes.c_double()
    weights = logits.new_empty(len(scores) + _LANES)
    tokens = torch.empty(len(weights), dtype=torch.int32)
    results = weights.data_ptr(), tokens.data_ptr(), ctypes.addressof(count), ctypes.addressof(total)
    call("polar_pick", scores.data_ptr(), len(scores), temperature, BLOCK, least, *results)
    return weights[: count.value], tokens[: count.value], total.value


def can_attend(query: Tensor) -> bool:
    """Whether `attend_pages` and `attend_prompt` can be used for queries (…, d)."""
    return is_used(query.dtype, query.device) and takes_heads(query.shape[-1])


def takes_heads(size: int) -> bool:
    """Whether the kernels for attention take heads of that size."""
    return size % _HEAD_STEP == 0


def attend_pages(query: Tensor, store: Tensor, table: Tensor, positions: Tensor, kind: AttentionKind) -> Tensor:
    """Attention of one token per row over the row's pages, its own key and value already written.

    Args:
        query: (B, H, d).
        store: (P, 2, G, page, d).
        table: Pages of each row in order, (B, n); entries after the row's end may name any page.
        positions: Position of each row's token, (B,); it sees the keys up to its own, as far as the window reaches.
        kind: Scale, window and soft cap.

    Returns:
        (B, H × d).
    """
    rows, heads, size = query.shape
    assert store.is_contiguous() and query.stride()[1:] == (size, 1)
    pages, at, mixed = table.contiguous(), positions.contiguous(), query.new_empty((rows, heads * size))
    history = store.data_ptr(), pages.data_ptr(), at.data_ptr()
    sizes = rows, heads, store.shape[2], size, store.shape[3], table.shape[1]
    own = (kind_of(kind), shared_by(rows))
    call("polar_attend_pages", query.data_ptr(), query.stride(0), *history, mixed.data_ptr(), *sizes, *own)
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
    call("polar_write_pages", store.data_ptr(), *sizes, places.data_ptr(), at.data_ptr(), key.shape[0], *parts)


class Guesses:
    """A draft head of `draft_head.DraftHead` in the library.

    Args:
        tokens: Those that it can guess, (C,), int64.
        scale: What states are multiplied by before they meet the rows of the tokens, (E,).
        matrices: `enter`, `gated`, `down` and `rows`, of bytes, and the model's embedding (V, E).
    """

    def __init__(self, tokens: Tensor, scale: Tensor, matrices: Sequence[Matrix]) -> None:
        assert tokens.dtype == torch.int64
        self._kept = tokens, scale, matrices  # whose addresses the library is given
        sizes = scale.shape[0], matrices[1].outputs // 2, tokens.shape[0]
        self._head = _DraftHead(*sizes, tokens.data_ptr(), scale.data_ptr(), *matrices)

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
        call("polar_guess", *inputs, *sizes, *results, shared_by(len(tokens)))
        return guesses[:, : made.value].tolist(), chances[:, : made.value].tolist()


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
    own = (kind_of(kind), pairs(), torch.get_num_threads())
    sizes = tokens, heads, groups, size, total
    call("polar_attend_prompt", query.data_ptr(), query.stride(0), *history, *places, *sizes, *own)
    return mixed
