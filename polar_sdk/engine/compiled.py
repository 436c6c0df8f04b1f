"""Compiled kernels: a layer's parts through torch's ahead-of-time compiler, kept on disk.

One compiled layer serves all layers of its kind and so every program: weights are arguments, and the program only
chooses which layer runs next. What is compiled: the whole layer for one token of one row, the same for one token of
several rows, the two halves of a layer around attention for many tokens, and the head. A package on disk is named by
all that its code depends on; the next process loads it in a few hundredths of a second. Knows no rows and no programs.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

import polar_sdk.engine.attention
import polar_sdk.engine.family
import polar_sdk.engine.native
import polar_sdk.engine.parts
import polar_sdk.engine.products
import polar_sdk.engine.types
from polar_sdk.engine import native
from polar_sdk.engine.attention import paged_decode, write_pages
from polar_sdk.engine.eager import EagerKernels
from polar_sdk.engine.pages import PAGE
from polar_sdk.engine.products import Int4, Int8, Plain, one_by_one, wide_from
from polar_sdk.engine.types import pick
from polar_sdk.errors import CompileError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.family import Family
    from polar_sdk.engine.types import AttentionKind, Projected, Rotary, Weights


_MOST: Final = 1 << 20
_EXAMPLE_ROWS: Final = 4
_EXAMPLE_TOKENS: Final = 16
_MATRICES: Final = (Plain, Int8, Int4)
_SOURCES: Final = (
    polar_sdk.engine.attention,
    polar_sdk.engine.family,
    polar_sdk.engine.native,
    polar_sdk.engine.parts,
    polar_sdk.engine.products,
    polar_sdk.engine.types,
)
_log = logging.getLogger(__name__)


def _flat(weights: Weights) -> list[Tensor]:
    """The tensors of a layer's weights in a fixed order."""
    found: list[Tensor] = []
    for name in sorted(weights):
        value = weights[name]
        found += [value] if isinstance(value, Tensor) else [part for part in value or () if part is not None]
    return found


def _rebuild(template: Weights, tensors: Iterator[Tensor]) -> Weights:
    """Weights like `template` with these tensors in them."""
    built: Weights = {}
    for name in sorted(template):
        value = template[name]
        if value is None or isinstance(value, Tensor):
            built[name] = None if value is None else next(tensors)
        else:
            built[name] = type(value)(*(None if part is None else next(tensors) for part in value))
    return built


def _signature(weights: Weights) -> str:
    """What compiled code assumes of the weights: names, kinds, shapes and dtypes."""
    told = []
    for name in sorted(weights):
        value = weights[name]
        shown = [value] if value is None or isinstance(value, Tensor) else list(value)
        kinds = ",".join("-" if part is None else f"{tuple(part.shape)}{part.dtype}" for part in shown)
        told.append(f"{name}:{type(value).__name__}({kinds})")
    return ";".join(told)


class _Part(nn.Module):
    """A function of activations and weights as a module, which is what can be exported."""

    def __init__(self, run: Callable[..., Any], template: Weights, inputs: int) -> None:
        super().__init__()
        self._run, self._template, self._inputs = run, template, inputs

    def forward(self, *arguments: Tensor) -> Any:
        weights = _rebuild(self._template, iter(arguments[self._inputs :]))
        return self._run(*arguments[: self._inputs], weights)


@dataclass(frozen=True)
class Part:
    """One piece of code to compile: what it is called, what it runs, and an example of its arguments."""

    name: str
    run: Callable[..., Any]
    template: Weights
    inputs: tuple[Tensor, ...]
    dynamic: tuple[dict[int, str], ...]
    """For each input, which of its sizes may change, by a name that tells which of them are equal."""
    assumptions: str
    """All that the code depends on besides this package's source and the machine."""
    least_tokens: int = 2
    """Tokens from which on the code may be used, where their number may change."""

    @property
    def key(self) -> str:
        """Names the compiled code on disk."""
        return hashlib.sha256(f"{self.name}|{self.assumptions}|{_environment()}".encode()).hexdigest()[:32]

    def compile(self, path: Path) -> None:
        """Compile to a package file; it appears whole or not at all.

        Raises:
            CompileError: The compiler is missing or failed.
        """
        module = _Part(self.run, self.template, len(self.inputs))
        arguments = (*self.inputs, *_flat(self.template))
        least = {"batch": 2, "rows": 2, "tokens": self.least_tokens, "blocks": 1, "pages": 1}
        sizes = {name: torch.export.Dim(name, min=least[name], max=_MOST) for name in least}
        shapes = [{axis: sizes[name] for axis, name in given.items()} for given in self.dynamic]
        shapes += [{} for _ in _flat(self.template)]
        beside = path.with_suffix(f".{os.getpid()}.pt2")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exported = torch.export.export(module, arguments, dynamic_shapes={"arguments": tuple(shapes)})
                torch._inductor.aoti_compile_and_package(exported, package_path=str(beside))
            beside.replace(path)
        except Exception as error:  # the compiler raises what it likes
            raise CompileError(
                f"layers cannot be compiled here ({type(error).__name__}: {' '.join(str(error).split())[:200]}).",
                hint="Install a C++ compiler such as g++, or load the model with compile=False.",
            ) from error
        finally:
            beside.unlink(missing_ok=True)


def _environment() -> str:
    """What else compiled code depends on: our own source, torch, and the machine."""
    digest = hashlib.sha256()
    for module in _SOURCES:
        digest.update(inspect.getsource(module).encode())
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    cpu = torch.backends.cpu.get_cpu_capability()
    return f"{digest.hexdigest()}|{torch.__version__}|{cpu}|{torch.get_num_threads()}|{cuda}"


def parts(decoder: Decoder) -> dict[tuple[str, str], Part]:
    """Everything to compile for a decoder, by (name of the part, what it assumes of its weights)."""
    family = decoder.family
    found: dict[tuple[str, str], Part] = {}
    for weights, kind in zip(decoder.layers, family.kinds, strict=True):
        shape = _signature(weights)
        for part in _layer_parts(decoder, weights, kind):
            found.setdefault((part.name, shape), part)
    for part in _head_parts(decoder):
        found.setdefault((part.name, _signature(decoder.ends)), part)
    return found


def _layer_parts(decoder: Decoder, weights: Weights, kind: AttentionKind) -> Iterator[Part]:
    family = decoder.family
    told = _assumptions(decoder, weights)
    least = _least_tokens(weights)
    tokens = least + _EXAMPLE_TOKENS
    x, mixed = _zeros(decoder, tokens, family.hidden), _zeros(decoder, tokens, _mixed(family))
    rotary, moves = _rotary(decoder, kind, tokens, "tokens")
    many = {0: "tokens"}

    def project(x: Tensor, cos: Tensor, sin: Tensor, w: Weights) -> Projected:
        return family.project(x, (cos, sin), w)

    yield Part("project", project, weights, (x, *rotary), (many, *moves), told, least)
    yield Part("finish", family.finish, weights, (x, mixed), (many, many), told, least)
    for single in (True, False):
        yield _decode_part(decoder, weights, kind, single=single)


def _decode_part(decoder: Decoder, weights: Weights, kind: AttentionKind, *, single: bool) -> Part:
    """A layer for one token of the only row, or of some of several: these it gathers, and puts back, by itself."""
    family = decoder.family
    rows, batch = (1, 1) if single else (_EXAMPLE_ROWS, _EXAMPLE_ROWS + 1)

    def decode(x: Tensor, cos: Tensor, sin: Tensor, store: Tensor, table: Tensor, at: Tensor, w: Weights) -> Tensor:
        query, key, value = family.project(x, (cos, sin), w)
        write_pages(store, table.gather(1, (at // PAGE)[:, None])[:, 0], at % PAGE, key, value)
        return family.finish(x, paged_decode(query, store, table, at, kind), w)

    def decode_some(x: Tensor, index: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Tensor:
        return x.index_copy(0, index, decode(x.index_select(0, index), *pick((cos, sin), index), *rest))

    axis = {} if single else {0: "rows"}
    rotary, moves = _rotary(decoder, kind, batch, None if single else "batch")
    store = decoder.pool.stores[0][: min(rows * 3, decoder.pool.size)]
    table = torch.zeros((rows, 3), dtype=torch.long, device=decoder.device)
    at = torch.full((rows,), 2 * PAGE, device=decoder.device)
    x = _zeros(decoder, batch, family.hidden)
    index = torch.arange(rows, device=decoder.device)
    first, moving = ((x,), ({},)) if single else ((x, index), ({0: "batch"}, axis))
    return Part(
        _decode_name(kind, single=single), decode if single else decode_some, weights,
        (*first, *rotary, store, table, at), (*moving, *moves, {0: "pages"}, {**axis, 1: "blocks"}, axis),
        f"{_assumptions(decoder, weights)}|{kind}",
    )  # fmt: skip


def _head_parts(decoder: Decoder) -> Iterator[Part]:
    family = decoder.family
    told = _assumptions(decoder, decoder.ends)
    for name, rows, moves in (("head 1", 1, {}), ("head", _EXAMPLE_ROWS, {0: "rows"})):
        yield Part(name, family.logits, decoder.ends, (_zeros(decoder, rows, family.hidden),), (moves,), told)


def _decode_name(kind: AttentionKind, *, single: bool) -> str:
    return f"decode{' 1' if single else ''} {kind}"


def _assumptions(decoder: Decoder, weights: Weights) -> str:
    family = decoder.family
    source = "".join(inspect.getsource(inspect.getmodule(one) or one) for one in type(family).__mro__[:-2])
    sizes = sorted((name, str(value)) for name, value in vars(family).items() if name not in {"kinds", "act"})
    kernels = native.version(decoder.dtype, decoder.device)
    told = f"{source}|{sizes}|{decoder.dtype}|{decoder.device.type}|{kernels}|{_signature(weights)}"
    return hashlib.sha256(told.encode()).hexdigest()


def _rotary(
    decoder: Decoder, kind: AttentionKind, count: int, axis: str | None
) -> tuple[Rotary, tuple[dict[int, str], ...]]:
    cos, sin = decoder.rotary(torch.arange(count, device=decoder.device), count)[kind.rope]
    moves = {0: axis} if axis and cos.numel() else {}
    return (cos, sin), (moves, dict(moves))


def _one_by_one(weights: Weights) -> int:
    """Rows up to which one row after another is fastest."""
    return min(one_by_one(value) for value in weights.values() if isinstance(value, _MATRICES))


def _least_tokens(weights: Weights) -> int:
    """Tokens from which on the two halves of a layer are compiled for many; fewer run as they stand."""
    return max((wide_from(value) for value in weights.values() if isinstance(value, _MATRICES)), default=2)


def _mixed(family: Family) -> int:
    return family.heads * family.head_dim


def _zeros(decoder: Decoder, rows: int, width: int) -> Tensor:
    return torch.zeros((rows, width), dtype=decoder.dtype, device=decoder.device)


def load_kernels(
    decoder: Decoder, folder: Path, *, build: bool, progress: Callable[[str, int, int], None] = lambda *_: None
) -> CompiledKernels | None:
    """The compiled kernels of a decoder.

    Args:
        decoder: What to run.
        folder: Where packages are kept.
        build: Whether to compile what is not there yet; it takes some ten seconds a part.
        progress: Called with (name of the part, its number from 1, how many there are) before each is compiled.

    Returns:
        Kernels; None where a package is missing and `build` is off.

    Raises:
        CompileError: The compiler is missing or failed.
    """
    if not decoder.family.compiled:
        return None
    native.load_library(folder, decoder.dtype, decoder.device, build=build)
    wanted = parts(decoder)
    loaders = {}
    for number, (which, part) in enumerate(wanted.items(), start=1):
        file = folder / f"{part.key}.pt2"
        loader = _open(file)
        if loader is None and not build:
            return None
        if loader is None:
            progress(part.name, number, len(wanted))
            part.compile(file)
            loader = torch._inductor.aoti_load_package(str(file)).loader
        loaders[which] = loader
    return CompiledKernels(decoder, loaders)


def _open(file: Path) -> Any | None:
    """The code in a package; None where there is no package, or a damaged one."""
    if not file.exists():
        return None
    try:
        return torch._inductor.aoti_load_package(str(file)).loader
    except Exception as error:  # torch raises what it likes
        _log.warning(
            "compiled package %s cannot be read and is made again: %s", file, " ".join(str(error).split())[:200]
        )
        return None


class CompiledKernels:
    """Runs layers through compiled code; what nothing was compiled for, as half a layer for one token, runs eagerly."""

    pages = True

    def __init__(self, decoder: Decoder, loaders: dict[tuple[str, str], Any]) -> None:
        self._eager = EagerKernels(decoder.family)
        self._tensors = {id(weights): _flat(weights) for weights in [*decoder.layers, decoder.ends]}
        self._shapes = {id(weights): _signature(weights) for weights in [*decoder.layers, decoder.ends]}
        self._loaders = loaders
        self._least = {id(weights): _least_tokens(weights) for weights in decoder.layers}
        self._alone = {id(weights): _one_by_one(weights) for weights in [*decoder.layers, decoder.ends]}
        self._decoders = {
            (id(weights), single): loaders[_decode_name(kind, single=single), self._shapes[id(weights)]]
            for weights, kind in zip(decoder.layers, decoder.family.kinds, strict=True)
            for single in (True, False)
        }

    def project(self, w: Weights, x: Tensor, rotary: Rotary) -> Projected:
        """The part before attention."""
        if x.shape[0] < self._least[id(w)]:
            return self._eager.project(w, x, rotary)
        query, key, value = self._run("project", w, [x, *rotary])
        return query, key, value

    def finish(self, w: Weights, x: Tensor, mixed: Tensor) -> Tensor:
        """The part after attention."""
        if x.shape[0] < self._least[id(w)]:
            return self._eager.finish(w, x, mixed)
        return self._run("finish", w, [x, mixed])[0]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind) -> Tensor:
        """Attention in the middle."""
        if native.attends(query):
            return native.attend_prompt(query, keys, values, kind)
        return self._eager.attend(query, keys, values, kind)

    def decode(
        self,
        w: Weights,
        x: Tensor,
        index: Tensor | None,
        rotary: Rotary,
        kind: AttentionKind,
        store: Tensor,
        table: Tensor,
        at: Tensor,
    ) -> Tensor:
        """A whole layer for one token of some rows."""
        tensors, count = self._tensors[id(w)], table.shape[0]
        if count > self._alone[id(w)]:
            places = _all_rows(count, x.device) if index is None else index
            every: Tensor = self._decoders[id(w), False].run([x, places, *rotary, store, table, at, *tensors])[0]
            return every
        some, turned = (x, rotary) if index is None else (x.index_select(0, index), pick(rotary, index))
        apart = zip(*(_apart(one, count) for one in (some, *turned, table, at)), strict=True)
        loader = self._decoders[id(w), True]
        rows = [loader.run([x1, cos, sin, store, pages, at1, *tensors])[0] for x1, cos, sin, pages, at1 in apart]
        after = rows[0] if count == 1 else torch.cat(rows)
        return after if index is None else x.index_copy(0, index, after)

    def head(self, ends: Weights, x: Tensor) -> Tensor:
        """Logits."""
        if 1 < x.shape[0] <= self._alone[id(ends)]:
            return torch.cat([self.head(ends, row) for row in _apart(x, x.shape[0])])
        return self._run("head 1" if x.shape[0] == 1 else "head", ends, [x])[0]

    def _run(self, name: str, w: Weights, inputs: list[Tensor]) -> list[Tensor]:
        found: list[Tensor] = self._loaders[name, self._shapes[id(w)]].run([*inputs, *self._tensors[id(w)]])
        return found


@lru_cache(maxsize=64)
def _all_rows(count: int, device: torch.device) -> Tensor:
    """Places of all rows; made once, not for every layer."""
    return torch.arange(count, device=device)


def _apart(rows: Tensor, count: int) -> Sequence[Tensor]:
    """The rows one by one; what is empty goes with each of them."""
    return rows.unsqueeze(1).unbind() if rows.numel() else [rows] * count
