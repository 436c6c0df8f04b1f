"""The frozen weights of one model, ready to run layer by layer: embed, project, finish, head.

Takes the weights from a Hugging Face model, layer by layer, in the requested precision. Knows tokens, layers and single
steps, but not in which order and over whose history they run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from polar_sdk.engine import native
from polar_sdk.engine.allocator import give_back_freed_memory
from polar_sdk.engine.draft_head import DraftHead, NativeDraftHead, head_flops
from polar_sdk.engine.families import find_family
from polar_sdk.engine.kernels import NativeKernels, NativeLayers, TorchKernels
from polar_sdk.engine.large_pages import LargePages
from polar_sdk.engine.pages import PAGE, PagePool
from polar_sdk.engine.panels import Blocks
from polar_sdk.engine.placement import Placement
from polar_sdk.engine.products import InPanels, NotInPanels, Plain, look_up, pack, quantize, rows_of
from polar_sdk.errors import CacheMemoryError
from polar_sdk.locks import renewed_in_child

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn
    from transformers import PreTrainedModel

    from polar_sdk.engine.draft_head import Guess
    from polar_sdk.engine.family import Family
    from polar_sdk.engine.kernels import Kernels
    from polar_sdk.engine.maps import Bridge, Fill
    from polar_sdk.engine.types import Projected, Rotary, Weights
    from polar_sdk.programs.cost import CostModel, Segment
    from polar_sdk.programs.program import Program, Step


Attend = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""Attention of queries (N, H, d) with their new keys and values (N, G, d); returns (N, H × d)."""
Bring = Callable[[Sequence["nn.Parameter"], torch.device], None]
"""Loads weights that are not in memory yet onto a device, in the dtype that they run in."""

MAX_POOL_SHARE: Final = 0.5
"""Share of the memory free when the pool is made that it may take."""
POOL_ROWS: Final = 64
"""Rows of the longest context that the pool is sized for where memory allows."""
_SHORT_NAMES: Final = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Decoder:
    """One model's weights and the kernels that run them.

    Attributes:
        family: The arithmetic.
        cost: FLOPs of each part, bridges and fills included.
        placement: Where each part of the weights is.
        dtype: Of activations, keys and values.
        precision: How matrices are stored: `bf16`, `fp16`, `fp32`, `int8`, `int4`, or the format of a GGUF file.
        layers: Weights of each layer.
        start: Weights of the embedding.
        ends: Weights of final norm and head.
        kernels: What runs its layers: torch's operations, until `use_library`.
        bridges: Maps by which programs may cross layers.
        fills: Maps by which programs may fill segments of layers.
        draft_head: Guesses the tokens after the next one; None = nothing does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        *,
        precision: str | None = None,
        kv_memory: int | None = None,
        placement: Placement | None = None,
        bring: Bring | None = None,
    ) -> None:
        self.family = family
        self.placement = placement or Placement.whole(model.device, family.depth)
        modules = family.layer_modules(model)
        in_layers = {id(weight) for module in modules for weight in module.parameters()}
        outside_layers = [weight for weight in model.parameters() if id(weight) not in in_layers]
        with _brought(outside_layers, self.placement.last, bring):
            ends = family.take_ends(model)
        self.start = _moved({name: value for name, value in ends.items() if name != "head"}, self.placement.first)
        self.ends = _moved({name: value for name, value in ends.items() if name != "embedding"}, self.placement.last)
        self.dtype: torch.dtype = self.start["embedding"].dtype
        self.precision = precision or _SHORT_NAMES[self.dtype]
        # The head decides between near-equal tokens: in int4 it costs a tenth of them (`benchmarks/LOG.md`).
        head = self.ends["head"]
        in_bytes = "int8" if self.precision == "int4" else self.precision
        self.ends["head"] = replace(head, fine=True) if isinstance(head, Blocks) else quantize(head, in_bytes)
        self._place_ends()
        self.layers = list(self._take_layers(modules, bring))
        self.cost: CostModel = family.cost()
        self.kernels: Kernels = TorchKernels(family)
        self.prepared: dict[object, object] = {}
        """Of others, once for all objects over these weights: the routers bound to them."""
        self.bridges: dict[Segment, Bridge] = {}
        self.fills: dict[Segment, Fill] = {}
        self.draft_head: DraftHead | NativeDraftHead | None = None
        self._rotary_source: Any = family.take_rotary(model)
        self._rotary: dict[torch.device, list[Rotary]] = {}
        self._kv_memory = kv_memory
        self._pool: PagePool | None = None
        self._making_pool = renewed_in_child(threading.Lock())

    def _take_layers(self, modules: Sequence[nn.Module], bring: Bring | None) -> Iterator[Weights]:
        memory = LargePages()
        for index, module in enumerate(modules):
            with _brought(list(module.parameters()), self.placement.layers[index], bring):
                yield memory.place(self._take_layer(index, module))

    def _take_layer(self, index: int, module: nn.Module) -> Weights:
        weights = self.family.take_layer(index, module)
        return {
            name: quantize(value, self.precision) if isinstance(value, Plain) else value
            for name, value in weights.items()
        }

    def use_library(self) -> None:
        """Run layers by the native library from now on, where this process has it and layers are on one CPU.

        It reads matrices in panels: they are brought into that order, one after another. An embedding that is the
        head's matrix stays it.
        """
        if len(self.placement.devices) > 1 or not native.load_library(self.dtype, self.device):
            return
        memory = LargePages()
        embedding, head = self.start["embedding"], self.ends["head"]
        for weights in [*self.layers, self.ends]:
            matrices = {name: value for name, value in weights.items() if isinstance(value, NotInPanels)}
            weights.update(memory.place({name: pack(value) for name, value in matrices.items()}))
        if isinstance(head, Plain) and embedding is head.weight and embedding.shape[1] % 2 == 0:
            self.start["embedding"] = self.ends["head"]
        if isinstance(self.draft_head, DraftHead):
            self.draft_head = NativeDraftHead(self.draft_head, self.start["embedding"])
        plan = self.family.plan
        self.kernels = NativeKernels(self.family) if plan is None else NativeLayers(self.layers, self.family, plan)
        give_back_freed_memory()

    def _place_ends(self) -> None:
        """Bring the head to large pages; an embedding that is the head's matrix stays it."""
        embedding, head = self.start["embedding"], self.ends["head"]
        tied = (
            isinstance(head, Plain) and isinstance(embedding, Tensor) and embedding.data_ptr() == head.weight.data_ptr()
        )
        self.ends = LargePages().place(self.ends)
        if tied:
            self.start["embedding"] = self.ends["head"].weight

    @property
    def device(self) -> torch.device:
        """The device of the embedding."""
        return self.placement.first

    @property
    def dtype_name(self) -> str:
        """How the weights are held, for usage records: `bfloat16`, …, `int8`, `int4`, or the format of a GGUF file."""
        plain = self.precision in _SHORT_NAMES.values()
        return str(self.dtype).removeprefix("torch.") if plain else self.precision

    @property
    def depth(self) -> int:
        """Number of layers, D."""
        return self.family.depth

    @property
    def context_window(self) -> int:
        """Maximum number of tokens of prompt and answer together."""
        return self.family.context_window

    @property
    def vocab(self) -> int:
        """Size of the vocabulary, V."""
        return self.family.vocab

    @property
    def pool(self) -> PagePool:
        """Pages for keys and values, made at first use."""
        if self._pool is None:
            with self._making_pool:
                if self._pool is None:  # another thread may have made it meanwhile
                    self._pool = self._make_pool()
        return self._pool

    def restart_after_fork(self) -> None:
        """In a forked child: the parent's threads are not here, and their rows are the parent's."""
        if self._pool is not None:
            self._pool.restart_after_fork()

    def _make_pool(self) -> PagePool:
        family = self.family
        sizes = [(device, self._pool_size(device)) for device in self.placement.stores]
        return PagePool(sizes, family.kv_heads, family.head_dim, self.dtype)

    def _pool_size(self, device: torch.device) -> int:
        """Number of pages on a device: its share of `kv_memory` by its number of layers, or half of what is free there.

        Raises:
            CacheMemoryError: There is not even one for each of its layers.
        """
        page = 2 * self.family.kv_heads * PAGE * self.family.head_dim * self.dtype.itemsize
        layers = self.placement.layers.count(device)
        useful = POOL_ROWS * layers * -(-self.context_window // PAGE)
        share = self._kv_memory and self._kv_memory * layers // self.depth
        limit = share or int(MAX_POOL_SHARE * free_memory(device))
        pages = min(useful, limit // page)
        if pages < layers:
            raise CacheMemoryError(
                f"kv_memory={limit} bytes holds {pages} pages of keys and values; one request needs {layers}.",
                hint=f"Give it at least {self.depth * page} bytes.",
            )
        return pages

    def stores(self, program: Program) -> tuple[int, ...]:
        """For each visit of a program, which store of the pool its pages are in."""
        return tuple(self.placement.store_of[layer] for layer in program.layers)

    def store(self, layer: int) -> Tensor:
        """The store that holds the pages of a layer."""
        return self.pool.stores[self.placement.store_of[layer]]

    def set_bridges(self, bridges: Mapping[Segment, Bridge]) -> None:
        """Replace the decoder's bridges by these, each on the device of the first layer that it crosses."""
        self.bridges = {segment: bridge.at(self.placement.layers[segment[0]]) for segment, bridge in bridges.items()}
        self.cost = self.cost.with_bridges({segment: bridge.flops for segment, bridge in bridges.items()})

    def bridge(self, step: Step) -> Bridge:
        """The map of a step that crosses layers.

        Raises:
            MissingMapError: The model has no such bridge.
        """
        self.cost.step(step)
        return self.bridges[step.first, step.last]

    def set_fills(self, fills: Mapping[Segment, Fill]) -> None:
        """Replace the decoder's fills by these, each on the device of the first layer that it writes."""
        self.fills = {segment: fill.at(self.placement.layers[segment[0]]) for segment, fill in fills.items()}
        self.cost = self.cost.with_fills({segment: fill.flops for segment, fill in fills.items()})

    def fill(self, segment: Segment) -> Fill:
        """The map of a filled segment.

        Raises:
            MissingMapError: The model has no such map.
        """
        self.cost.fill(segment)
        return self.fills[segment]

    def set_draft_head(self, tensors: Mapping[str, Tensor]) -> None:
        """Guess tokens with a draft head of these tensors, see `DraftHead.of`."""
        device, tokens = self.placement.last, tensors["tokens"].long()
        numbers = {name: value.to(device, self.dtype) for name, value in tensors.items() if name != "tokens"}
        head = DraftHead.of({**numbers, "tokens": tokens.to(device)}, self.head_rows(tokens).to(self.dtype))
        in_panels = isinstance(self.ends["head"], InPanels)
        self.draft_head = NativeDraftHead(head, self.start["embedding"]) if in_panels else head
        width, units = numbers["down"].shape
        self.cost = replace(self.cost, guess=head_flops(width, units, len(tokens)))

    def guess(self, states: Tensor, tokens: Sequence[int], most: int) -> list[list[Guess]]:
        """Guess what follows each of some tokens by the draft head, one token after another.

        Args:
            states: Of the token before each of them, which ran last, (B, E).
            tokens: That were sampled after these states, B.
            most: How many guesses for each, at most; they end where no row's are likely to be all right.

        Returns:
            For each token equally many guesses.
        """
        assert self.draft_head is not None, "see `set_draft_head`"
        if isinstance(self.draft_head, NativeDraftHead):
            return self.draft_head.guess(states, tokens, most)
        return self.draft_head.guess(states.to(self.placement.last), tokens, most, self.embeddings)

    def head_rows(self, tokens: Tensor) -> Tensor:
        """The rows (C, E) of the head for tokens (C,), where a draft head runs."""
        return rows_of(self.ends["head"], tokens.to(self.placement.last), self.family.hidden)

    def embeddings(self, tokens: Tensor) -> Tensor:
        """The embeddings (B, E) of tokens (B,), without positions or scale, where a draft head runs."""
        return look_up(tokens.to(self.placement.first), self.start["embedding"]).to(self.placement.last)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embed token ids (N,) at positions (N,) as hidden states (N, E)."""
        return self.family.embed(tokens, positions, self.start)

    def embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """As `embed`, for tokens on any device, where the states stay."""
        first = self.placement.first
        return self.embed(tokens.to(first), positions.to(first)).to(tokens.device)

    def rotary(self, positions: Tensor, longest: int) -> list[Rotary]:
        """Cosine and sine at positions (N,), all below `longest`: (N, 1, r) each, one pair per kind of layer."""
        device = positions.device
        tables = self._rotary.get(device)
        if tables is None or (tables[0][0].shape[0] < longest and tables[0][0].numel()):
            length = min(max(2 * longest, 1024), max(self.context_window, longest))
            # One assignment: a thread that reads meanwhile sees the old tables or the new ones, both correct.
            tables = self._rotary[device] = self._tables(length, device)
        return [(cos[positions], sin[positions]) if cos.numel() else (cos, sin) for cos, sin in tables]

    def _tables(self, length: int, device: torch.device) -> list[Rotary]:
        """Tables of that length, computed where tokens enter, so that they are the same on every device."""
        tables = self.family.rotary_tables(self._rotary_source, length, self.dtype, self.placement.first)
        return [(cos.to(device), sin.to(device)) for cos, sin in tables]

    def run_step(self, step: Step, x: Tensor, positions: Tensor, rotary: list[Rotary], attend: Attend) -> Tensor:
        """One step of a program: a bridge, or a visit of a layer, which goes 1 / parts of the way.

        Args:
            step: What runs.
            x: States before it, (N, E), on the device of its layer.
            positions: Of the tokens, (N,).
            rotary: At these positions.
            attend: Stores keys and values, and attends over the histories they belong to.

        Returns:
            States after it, (N, E).
        """
        if step.bridge:
            return self.bridge(step)(x, positions)
        query, key, value = self.project(step.first, x, rotary)
        return damp(x, self.finish(step.first, x, attend(query, key, value)), step.parts)

    def project(self, index: int, x: Tensor, rotary: list[Rotary]) -> Projected:
        """The part of layer `index` before attention, on (N, E)."""
        return self.kernels.project(self.layers[index], x, rotary[self.family.kinds[index].rope])

    def keys_values(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys before their turn by position, and values, of layer `index`, (N, G, d) each, from its input (N, E)."""
        return self.family.keys_values(x, self.layers[index])

    def finish(self, index: int, x: Tensor, mixed: Tensor) -> Tensor:
        """The part of layer `index` after attention, from its input (N, E) and the result of attention (N, H × d)."""
        return self.kernels.finish(self.layers[index], x, mixed)

    def head(self, x: Tensor) -> Tensor:
        """Final norm and output projection of (M, E), on their own device; returns float32 logits (M, V)."""
        return self.kernels.head(self.ends, x.to(self.placement.last))


def damp(before: Tensor, after: Tensor, parts: int) -> Tensor:
    """Take 1 / parts of the way from one state to the other."""
    return after if parts == 1 else before + (after - before) / parts


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    available: Any = psutil.virtual_memory().available
    return int(available)


def _moved(weights: Weights, device: torch.device) -> Weights:
    """The same weights on a device."""
    return {name: _move(value, device) for name, value in weights.items()}


def _move(value: Any, device: torch.device) -> Any:
    if value is None or isinstance(value, Blocks):  # which are read on a CPU alone
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(*(_move(part, device) for part in value))


@contextmanager
def _brought(weights: Sequence[nn.Parameter], device: torch.device, bring: Bring | None) -> Iterator[None]:
    """Load weights for the block that takes what it needs of them, and free them afterwards.

    So fused and rounded copies never occupy memory together with all the weights they are made from.
    """
    if bring is None:
        yield
        return
    bring(weights, device)
    yield
    for weight in weights:
        weight.data = weight.data.new_empty(0)


def build_decoder(
    model: PreTrainedModel,
    *,
    precision: str | None = None,
    kv_memory: int | None = None,
    placement: Placement | None = None,
    bring: Bring | None = None,
) -> Decoder:
    """Take over the weights of a Hugging Face causal language model.

    Args:
        model: The model.
        precision: How to store matrices; None = as they are.
        kv_memory: Maximum number of bytes for keys and values; None = half of what is free.
        placement: Where each part runs; None = everything where the model is.
        bring: Called with the weights of one layer after another before they are used, which empties the model.
            None = they are in memory already, on the devices where they run, and stay there.

    Raises:
        UnsupportedArchitectureError: There is no family for it, or one of its options is not supported.
        DeviceError: The device has no kernel for this precision.
    """
    family = find_family(model.config)
    return Decoder(model, family, precision=precision, kv_memory=kv_memory, placement=placement, bring=bring)
