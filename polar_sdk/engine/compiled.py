"""Compiled kernels: a layer's parts through torch's ahead-of-time compiler, kept on disk.

One compiled layer serves all layers of its kind, and so every program: weights are arguments, and the program only
decides which layer runs next. What is compiled: the whole layer for one token of one row, the same for one token of
each of several rows, the two halves of a layer around attention for many tokens, its keys and values alone, and the
head. Knows no rows and no programs.

Compiling takes a minute of a core, so that it goes by stages (`eager.Compiled`), and each is used as soon as it is
there: answers first, since most of a request's time is theirs. What is missing runs uncompiled meanwhile. With the
native library, the code for any number of rows is as fast for one, and there is no other: so what a row decodes does
not depend on the rows that decode beside it.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from polar_sdk.engine import native
from polar_sdk.engine.attention import paged_decode, write_pages
from polar_sdk.engine.eager import Compiled, EagerKernels, NativeKernels
from polar_sdk.engine.large_pages import give_back_freed_memory
from polar_sdk.engine.package import Part, compiler_options, flat, signature
from polar_sdk.engine.pages import PAGE
from polar_sdk.engine.products import InPanels, NotInPanels, Product, max_rows_one_by_one, min_wide_rows, pack
from polar_sdk.engine.types import pick

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.eager import Kernels, PagedTokens, Visits
    from polar_sdk.engine.types import AttentionKind, Projected, Rotary, Weights


_EXAMPLE_ROWS: Final = 4
_EXAMPLE_TOKENS: Final = 64
_FEW_ROWS: Final = 4
"""Number of rows that run one by one while only the code for one row is there; it takes a quarter of the time of
uncompiled code."""
_log = logging.getLogger(__name__)


def parts(decoder: Decoder) -> dict[tuple[str, str], Part]:
    """Everything to compile for a decoder, in order, by (name of the part, what it assumes of its weights)."""
    family = decoder.family
    needed: dict[tuple[str, str], Part] = {}
    for taken, kind in zip(decoder.layers, family.kinds, strict=True):
        weights = _as_used(decoder, taken)
        assumed = signature(weights)
        for part in _layer_parts(decoder, weights, kind):
            needed.setdefault((part.name, assumed), part)
    ends = _as_used(decoder, decoder.ends)
    for part in _head_parts(decoder, ends):
        needed.setdefault((part.name, signature(ends)), part)
    return dict(sorted(needed.items(), key=lambda item: item[1].stage))  # stable


def _as_used(decoder: Decoder, weights: Weights) -> Weights:
    """Weights as compiled layers get them; of what `Decoder.pack` has not packed yet, the shapes."""
    if not native.version(decoder.dtype, decoder.device):
        return weights
    matrices = {name: value for name, value in weights.items() if isinstance(value, NotInPanels)}
    return {**weights, **{name: pack(type(value)(*map(_shape, value))) for name, value in matrices.items()}}


def _shape(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.to("meta")


def _layer_parts(decoder: Decoder, weights: Weights, kind: AttentionKind) -> Iterator[Part]:
    family = decoder.family
    assumptions = _assumptions(decoder, weights)
    minimum = _min_tokens(weights)
    tokens = minimum + _EXAMPLE_TOKENS
    x, mixed = _zeros(decoder, tokens, family.hidden), _zeros(decoder, tokens, family.heads * family.head_dim)
    rotary, rotary_sizes = _rotary(decoder, kind, tokens, "tokens")
    many = {0: "tokens"}

    def project(x: Tensor, cos: Tensor, sin: Tensor, w: Weights) -> Projected:
        return family.project(x, (cos, sin), w)

    def keys_values(x: Tensor, cos: Tensor, sin: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
        key, value = family.keys_values(x, w)
        return family.turn(key, (cos, sin)), value

    stage = Compiled.ALL
    yield Part("project", project, weights, (x, *rotary), (many, *rotary_sizes), assumptions, stage, minimum)
    yield Part(
        "keys and values", keys_values, weights, (x, *rotary), (many, *rotary_sizes), assumptions, stage, minimum,
        shared=_shares(decoder, weights),
    )  # fmt: skip
    yield Part("finish", family.finish, weights, (x, mixed), (many, many), assumptions, stage, minimum)
    for single in (True, False) if _max_rows_one_by_one(weights) else (False,):
        yield _decode_part(decoder, weights, kind, single=single)


def _decode_part(decoder: Decoder, weights: Weights, kind: AttentionKind, *, single: bool) -> Part:
    """A layer for one token of the only row, or of some of several rows, which it gathers and puts back itself."""
    family = decoder.family
    rows, batch = (1, 1) if single else (_EXAMPLE_ROWS, _EXAMPLE_ROWS + 1)

    def decode(
        x: Tensor, cos: Tensor, sin: Tensor, store: Tensor, table: Tensor, positions: Tensor, w: Weights
    ) -> Tensor:
        query, key, value = family.project(x, (cos, sin), w)
        write_pages(store, table.gather(1, (positions // PAGE)[:, None])[:, 0], positions % PAGE, key, value)
        return family.finish(x, paged_decode(query, store, table, positions, kind), w)

    def decode_some(x: Tensor, index: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Tensor:
        return x.index_copy(0, index, decode(x.index_select(0, index), *pick((cos, sin), index), *rest))

    axis = {} if single else {0: "rows"}
    rotary, rotary_sizes = _rotary(decoder, kind, batch, None if single else "batch")
    store = decoder.pool.stores[0][: min(rows * 3, decoder.pool.size)]
    table = torch.zeros((rows, 3), dtype=torch.long, device=decoder.device)
    positions = torch.full((rows,), 2 * PAGE, device=decoder.device)
    x = _zeros(decoder, batch, family.hidden)
    index = torch.arange(rows, device=decoder.device)
    states, states_sizes = ((x,), ({},)) if single else ((x, index), ({0: "batch"}, axis))
    shared = _shares(decoder, weights) or not native.takes_heads(family.head_dim)
    return Part(
        _decode_name(kind, single=single), decode if single else decode_some, weights,
        (*states, *rotary, store, table, positions),
        (*states_sizes, *rotary_sizes, {0: "pages"}, {**axis, 1: "blocks"}, axis),
        f"{_assumptions(decoder, weights)}|{kind}",
        Compiled.ROWS if _max_rows_one_by_one(weights) and not single else Compiled.ONE_ROW,
        shared=shared, whole=not shared,
    )  # fmt: skip


def _shares(decoder: Decoder, weights: Weights) -> bool:
    """Whether the code has work for several threads that the native library does not do."""
    matrices = [value for value in weights.values() if isinstance(value, Product)]
    packed = all(isinstance(value, InPanels) for value in matrices)
    return not packed or not native.version(decoder.dtype, decoder.device)


def _head_parts(decoder: Decoder, ends: Weights) -> Iterator[Part]:
    logits, assumptions = decoder.family.logits, _assumptions(decoder, ends)
    one, several = (_zeros(decoder, rows, decoder.family.hidden) for rows in (1, _EXAMPLE_ROWS))
    stage, shared = Compiled.ONE_ROW, _shares(decoder, ends)
    if _max_rows_one_by_one(ends):
        yield Part("head 1", logits, ends, (one,), ({},), assumptions, stage, shared=shared)
        stage = Compiled.ROWS
    yield Part("head", logits, ends, (several,), ({0: "rows"},), assumptions, stage, shared=shared)


def _decode_name(kind: AttentionKind, *, single: bool) -> str:
    return f"decode{' 1' if single else ''} {kind}"


def _assumptions(decoder: Decoder, weights: Weights) -> str:
    family = decoder.family
    source = "".join(inspect.getsource(inspect.getmodule(base) or base) for base in type(family).__mro__[:-2])
    sizes = sorted((name, str(value)) for name, value in vars(family).items() if name not in {"kinds", "act"})
    kernels = native.version(decoder.dtype, decoder.device)
    text = f"{source}|{sizes}|{decoder.dtype}|{decoder.device.type}|{kernels}|{signature(weights)}"
    return hashlib.sha256(text.encode()).hexdigest()


def _rotary(
    decoder: Decoder, kind: AttentionKind, count: int, axis: str | None
) -> tuple[Rotary, tuple[dict[int, str], ...]]:
    """Example angles of that many tokens, and which of their sizes may change."""
    cos, sin = decoder.rotary(torch.arange(count, device=decoder.device), count)[kind.rope]
    sizes = {0: axis} if axis and cos.numel() else {}
    return (cos, sin), (sizes, dict(sizes))


def _max_rows_one_by_one(weights: Weights) -> int:
    """Number of rows up to which one row after another is fastest."""
    return min(max_rows_one_by_one(value) for value in weights.values() if isinstance(value, Product))


def _min_tokens(weights: Weights) -> int:
    """Minimum number of tokens for the compiled halves of a layer; fewer run uncompiled."""
    return max((min_wide_rows(value) for value in weights.values() if isinstance(value, Product)), default=2)


def _zeros(decoder: Decoder, rows: int, width: int) -> Tensor:
    return torch.zeros((rows, width), dtype=decoder.dtype, device=decoder.device)


def load_kernels(
    decoder: Decoder,
    folder: Path,
    *,
    build: bool,
    partly: bool = False,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Kernels | None:
    """The kernels of a decoder, compiled or the native library's.

    Args:
        decoder: What to run.
        folder: Where packages are kept.
        build: Whether to compile what is not there yet, which takes five to ten seconds per part.
        partly: Whether the stages that are there will do, where not all are; the library alone is the first of them.
        progress: Called with (name of the part, its number from 1, number of parts) before each is compiled.

    Returns:
        Kernels; None where packages are missing and `build` is off. Of a family that cannot be compiled, the library's,
        or None where there is no library.

    Raises:
        CompileError: The compiler is missing or failed.
    """
    packs = native.load_library(folder, decoder.dtype, decoder.device, build=build)
    if packs and build:
        decoder.pack()
    loaders: dict[tuple[str, str], Any] = {}
    stage, needed = Compiled.PRODUCTS, dict[tuple[str, str], Part]()
    if decoder.family.compiled and (not packs or _load_operations(folder, build=build)):
        stage, needed = Compiled.ALL, parts(decoder)
    for number, (key, part) in enumerate(needed.items(), start=1):
        file = folder / f"{part.key}.pt2"
        loader = _open(part, file)
        if loader is None and not build:
            stage = Compiled(part.stage - 1)
            break
        if loader is None:
            progress(part.name, number, len(needed))
            part.compile(file)
            loader = part.open(file)
        loaders[key] = loader
    if not partly and stage != Compiled.ALL and decoder.family.compiled:
        return None
    if packs:
        decoder.pack()
    give_back_freed_memory()
    if stage == Compiled.PRODUCTS:
        return NativeKernels(decoder.family) if packs else None
    return CompiledKernels(decoder, {key: each for key, each in loaders.items() if needed[key].stage <= stage}, stage)


def _load_operations(folder: Path, *, build: bool) -> bool:
    with compiler_options():
        return native.load_operations(folder, build=build)


def _open(part: Part, file: Path) -> Any | None:
    """The code in a package; None where there is no package, or a damaged one."""
    if not file.exists():
        return None
    try:
        return part.open(file)
    except Exception as error:  # torch raises errors of any class
        _log.warning("compiled package %s is damaged, and is not used: %s", file, " ".join(str(error).split())[:200])
        return None


class CompiledKernels:
    """Runs layers through compiled code; what is not compiled, such as half a layer for one token, runs eagerly.

    Args:
        decoder: Whose layers.
        loaders: The code of all parts up to a stage, named as `parts` names them.
        compiled: That stage.
    """

    def __init__(self, decoder: Decoder, loaders: dict[tuple[str, str], Any], compiled: Compiled) -> None:
        self.compiled = compiled
        packed = bool(native.version(decoder.dtype, decoder.device))
        self._eager: Kernels = NativeKernels(decoder.family) if packed else EagerKernels(decoder.family)
        self._tensors = {id(weights): flat(weights) for weights in [*decoder.layers, decoder.ends]}
        self._signatures = {id(weights): signature(weights) for weights in [*decoder.layers, decoder.ends]}
        self._loaders = loaders
        self._min_tokens = {id(weights): _min_tokens(weights) for weights in decoder.layers}
        self._max_one_by_one = {
            id(weights): _max_rows_one_by_one(weights) for weights in [*decoder.layers, decoder.ends]
        }
        self.independent = not any(self._max_one_by_one.values()) and native.takes_heads(decoder.family.head_dim)
        self.at_once = self.independent and packed
        self._decoders: dict[tuple[int, bool], Any] = {
            (id(weights), single): loaders.get((_decode_name(kind, single=single), self._signatures[id(weights)]))
            for weights, kind in zip(decoder.layers, decoder.family.kinds, strict=True)
            for single in (True, False)
        }
        self._layers = self._all_layers(decoder) if self.at_once else None

    def _all_layers(self, decoder: Decoder) -> native.Layers:
        layers = zip(decoder.layers, decoder.family.kinds, strict=True)
        return native.Layers((self._decoders[id(w), False], self._tensors[id(w)], kind.rope) for w, kind in layers)

    def decodes(self, tokens: int) -> bool:
        """Whether the code for that many is there, or that for one is faster than what is not compiled."""
        return self.compiled >= Compiled.ROWS or tokens <= _FEW_ROWS

    def project(self, w: Weights, x: Tensor, rotary: Rotary) -> Projected:
        """The part before attention."""
        if not self._fits(w, x):
            return self._eager.project(w, x, rotary)
        query, key, value = self._run("project", w, [x, *rotary])
        return query, key, value

    def keys_values(self, w: Weights, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        if not self._fits(w, x):
            return self._eager.keys_values(w, x, rotary)
        key, value = self._run("keys and values", w, [x, *rotary])
        return key, value

    def finish(self, w: Weights, x: Tensor, mixed: Tensor) -> Tensor:
        """The part after attention."""
        if not self._fits(w, x):
            return self._eager.finish(w, x, mixed)
        return self._run("finish", w, [x, mixed])[0]

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind, positions: Tensor | None = None
    ) -> Tensor:
        """Attention, native where that is possible."""
        return self._eager.attend(query, keys, values, kind, positions)

    def decode(
        self, w: Weights, x: Tensor, rotary: Rotary, kind: AttentionKind, store: Tensor, tokens: PagedTokens
    ) -> Tensor:
        """A whole layer for one token of some rows."""
        weights, (index, table, positions), count = self._tensors[id(w)], tokens, tokens.table.shape[0]
        if count > self._max_one_by_one[id(w)] and self.compiled >= Compiled.ROWS:
            rows = _all_rows(count, x.device) if index is None else index
            inputs = [x, rows, *rotary, store, table, positions, *weights]
            states: Tensor = self._decoders[id(w), False].run(inputs)[0]
            return states
        before, angles = (x, rotary) if index is None else (x.index_select(0, index), pick(rotary, index))
        run, by_token = self._decoders[id(w), True].run, (before, *angles, table, positions)
        by_row = [by_token] if count == 1 else zip(*(_split(each, count) for each in by_token), strict=True)
        outputs = [run([state, cos, sin, store, pages, at, *weights])[0] for state, cos, sin, pages, at in by_row]
        after = outputs[0] if count == 1 else torch.cat(outputs)
        return after if index is None else x.index_copy(0, index, after)

    def decode_layers(self, x: Tensor, visits: Visits, rotary: Sequence[Rotary], store: Tensor, done: Tensor) -> Tensor:
        """Several layers for one token of some rows each."""
        assert self._layers is not None, "asked although `at_once` is off"
        return self._layers.decode(x, visits, rotary, store, done)

    def head(self, ends: Weights, x: Tensor) -> Tensor:
        """Logits."""
        rows = x.shape[0]
        most = self._max_one_by_one[id(ends)] if self.compiled >= Compiled.ROWS else _FEW_ROWS
        if 1 < rows <= most:
            return torch.cat([self.head(ends, row) for row in _split(x, rows)])
        if rows != 1 and self.compiled < Compiled.ROWS:
            return self._eager.head(ends, x)
        return self._run("head 1" if rows == 1 <= self._max_one_by_one[id(ends)] else "head", ends, [x])[0]

    def _fits(self, w: Weights, x: Tensor) -> bool:
        """Whether there is compiled code for the halves of a layer with that many tokens."""
        return self.compiled == Compiled.ALL and x.shape[0] >= self._min_tokens[id(w)]

    def _run(self, name: str, w: Weights, inputs: list[Tensor]) -> list[Tensor]:
        outputs: list[Tensor] = self._loaders[name, self._signatures[id(w)]].run([*inputs, *self._tensors[id(w)]])
        return outputs


@lru_cache(maxsize=64)
def _all_rows(count: int, device: torch.device) -> Tensor:
    """Indices of all rows, made once and not for every layer."""
    return torch.arange(count, device=device)


def _split(rows: Tensor, count: int) -> Sequence[Tensor]:
    """The rows one by one; an empty tensor goes with each of them."""
    return rows.unsqueeze(1).unbind() if rows.numel() else [rows] * count
