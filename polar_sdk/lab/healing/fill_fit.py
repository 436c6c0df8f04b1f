"""Fit fills in closed form, by passes of full depth over the packs: one, unless the sums of all segments are large.

A fill reads the normalised state where its segment begins, and aims at the keys (before their turn by position) and
values that each layer of the segment computes at full depth; where layers follow the segment, its carry aims at the
state after it. All of that shares one Gram matrix. Position 0 is left out: it is not filled. Hidden units are drawn at
random, as directions of states whose entries are made alike in spread; what they are multiplied by is fitted, and
training fits the units as well. Knows packs and tensors; no items and no files.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import torch

from polar_sdk.engine.fill import Fill, normalise, reads, rms
from polar_sdk.errors import FillError
from polar_sdk.lab.healing.bridge_fit import layers
from polar_sdk.lab.healing.ridge import RidgeSums
from polar_sdk.programs.cost import Segment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.lab.healing.bridge_fit import Pack


Group = tuple[Segment, ...]
"""Segments that one program fills, ascending; with a layer between any two, for side by side they would be one."""
DEFAULT: Final = "default"
"""Asks for groups that are found by measuring; see `candidates`."""
_SHARES: Final = (0.1, 0.2, 0.27, 0.35, 0.43, 0.5)
"""Shares of the layers that are filled by default: 3, 6, 8, 10, 13 and 15 of 30."""
_SUMS: Final = 2 * 2**30
"""Memory for sums of one pass over the packs. Unit: bytes."""
_DRAWN_ON: Final = 4
"""Packs whose states say how hidden units are drawn."""
_FILL: Final = re.compile(r"\(?\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?\)?")


def candidates(harms: Mapping[int, float], depth: int) -> list[list[Group]]:
    """For each of a few shares of the layers, the groups to choose from: all from a cut on, or the least harmful ones.

    Args:
        harms: Of each layer from 1 on, the loss where it is filled alone.
        depth: Layers of the model.
    """
    ranked = sorted(harms, key=lambda layer: (harms[layer], -layer))
    counts = sorted({count for share in _SHARES if 1 <= (count := round(share * depth)) < depth})
    return [list(dict.fromkeys((((depth - count, depth - 1),), _runs(ranked[:count])))) for count in counts]


def _runs(layers: Iterable[int]) -> Group:
    """Layers as segments of layers that follow each other."""
    runs: list[Segment] = []
    for layer in sorted(layers):
        first = runs.pop()[0] if runs and runs[-1][1] == layer - 1 else layer
        runs.append((first, layer))
    return tuple(runs)


def parse_fills(text: str, depth: int) -> list[Group]:
    """What to fill, from text such as `27,24,18-21+23`.

    Each part is what one program fills: a cut, which reaches to the last layer, a segment, or several of these with a
    plus between them.

    Raises:
        FillError: It does not parse, a segment does not fit the model or begins at layer 0, or two that one program
            fills are not apart.
    """
    return list(dict.fromkeys(_group(part, depth) for part in text.split(",")))


def segments_of(groups: Iterable[Group]) -> list[Segment]:
    """The segments of groups, each once: groups share the map of one that they both have."""
    return list(dict.fromkeys(segment for group in groups for segment in group))


def _group(text: str, depth: int) -> Group:
    group = tuple(sorted(_segment(part, depth) for part in text.split("+")))
    for before, after in pairwise(group):
        if after[0] <= before[1] + 1:
            raise FillError(
                f"fill {text.strip()!r} does not fit: a layer must run between {before[0]}-{before[1]} and "
                f"{after[0]}-{after[1]}; write one segment, or a comma for a program each."
            )
    return group


def _segment(text: str, depth: int) -> Segment:
    match = _FILL.fullmatch(text.strip())
    if match is None:
        raise FillError(f"fill {text.strip()!r} does not parse; write a cut or first and last layer, e.g. '24,20-23'.")
    first = int(match[1])
    last = depth - 1 if match[2] is None else int(match[2])
    if not 1 <= first <= last < depth:
        raise FillError(f"fill {text.strip()!r} does not fit: 1 ≤ first ≤ last ≤ {depth - 1} is needed.")
    return first, last


def fit_fills(
    decoder: Decoder,
    packs: Sequence[Pack],
    segments: Sequence[Segment],
    *,
    strength: float,
    rank: int | None,
    units: int = 0,
    seed: int = 0,
    on_pack: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Segment, Fill]:
    """Fit fills of several segments, in float32: in one pass over the packs, or more where their sums are large.

    Args:
        decoder: Runs at full depth.
        packs: What to fit on.
        segments: First and last layer of each.
        strength: See `RidgeSums.solve`.
        rank: See `RidgeSums.solve`; of each segment's map.
        units: Hidden units of each segment's map.
        seed: Of the units.
        on_pack: Called with the number of packs done, and of all.
    """
    family = decoder.family
    inputs, width = family.hidden + units, 2 * family.kv_heads * family.head_dim
    hidden = _drawn(decoder, packs[:_DRAWN_ON], {first for first, _ in segments}, units, seed) if units else {}
    fitted: dict[Segment, Fill] = {}
    outputs = {
        (first, last): [width] * (last - first + 1) + [family.hidden] * (last < decoder.depth - 1)
        for first, last in segments
    }
    passes = list(_passes(outputs, inputs))
    for number, some in enumerate(passes):
        sums = {segment: RidgeSums(inputs, outputs[segment], decoder.device) for segment in some}
        with torch.inference_mode():
            for done, pack in enumerate(packs, 1):
                _add(decoder, pack, sums, hidden)
                on_pack(number * len(packs) + done, len(passes) * len(packs))
        for segment, total in sums.items():
            fitted[segment] = _solved(decoder, segment, total, strength, rank, hidden.get(segment[0], ()))
    return fitted


def _passes(outputs: Mapping[Segment, Sequence[int]], inputs: int) -> Iterator[list[Segment]]:
    """The segments, with the widths of their outputs, in lots whose sums fit in memory together."""
    some: list[Segment] = []
    used = 0
    for segment, widths in outputs.items():
        need = 8 * inputs * (inputs + sum(widths))
        if some and used + need > _SUMS:
            yield some
            some, used = [], 0
        some.append(segment)
        used += need
    if some:
        yield some


def _drawn(
    decoder: Decoder, packs: Sequence[Pack], entries: set[int], units: int, seed: int
) -> dict[int, tuple[Tensor, ...]]:
    """Random hidden units for the states before some layers: each sees a direction of the states made alike in spread.

    A few entries of a state are a hundred times as large as all others, and would be all that a unit sees.
    """
    read: dict[int, list[Tensor]] = {layer: [] for layer in entries}
    with torch.inference_mode():
        for pack in packs:
            later = pack.packed.positions != 0
            for layer, x in states(decoder, pack, max(entries)):
                if layer in read:
                    read[layer].append(normalise(x)[later].float())
    drawn: dict[int, tuple[Tensor, ...]] = {}
    for layer, found in sorted(read.items()):
        inputs = torch.cat(found)
        dice = torch.Generator().manual_seed(seed * 10_000 + layer)
        directions = torch.randn(inputs.shape[1], units, generator=dice).to(inputs.device)
        weight = directions / inputs.std(0).clamp(min=1e-6).unsqueeze(1) / inputs.shape[1] ** 0.5
        shift = torch.randn(units, generator=dice).to(inputs.device) / 2
        drawn[layer] = (weight.clone(), (shift - inputs.mean(0) @ weight).clone())
    return drawn


def _add(
    decoder: Decoder, pack: Pack, sums: Mapping[Segment, RidgeSums], hidden: Mapping[int, tuple[Tensor, ...]]
) -> None:
    later = pack.packed.positions != 0
    inputs: dict[int, Tensor] = {}
    entries: dict[int, Tensor] = {}
    for layer, x in states(decoder, pack, min(max(last for _, last in sums) + 1, decoder.depth - 1)):
        for first, last in (segment for segment in sums if segment[1] + 1 == layer):  # here its carry arrives
            moved = (x[later].float() - entries[first]) / rms(entries[first])
            sums[first, last].add_outputs(layer - first, inputs[first], moved)
        begun = [segment for segment in sums if segment[0] == layer]
        if begun:
            entries[layer] = x[later].float()
            inputs[layer] = reads(entries[layer], hidden.get(layer, ()))
        for segment in begun:
            sums[segment].add_inputs(inputs[layer])
        through = [segment for segment in sums if segment[0] <= layer <= segment[1]]
        if through:
            targets = keys_values(decoder, layer, x)[later]
            for segment in through:
                sums[segment].add_outputs(layer - segment[0], inputs[segment[0]], targets)


def _solved(
    decoder: Decoder,
    segment: Segment,
    sums: RidgeSums,
    strength: float,
    rank: int | None,
    hidden: tuple[Tensor, ...],
) -> Fill:
    """One map for all layers of a segment; of low rank, its layers share the first factor. The carry has full rank."""
    family, layers_written = decoder.family, segment[1] - segment[0] + 1
    found = sums.solve(strength, rank, slice(layers_written))
    bias = found.bias.view(-1, 2, family.kv_heads, family.head_dim)
    carry: tuple[Tensor, ...] = ()
    if segment[1] < decoder.depth - 1:
        move = sums.solve(strength, sets=slice(layers_written, None))
        carry = (move.weight[0].clone(), move.bias.clone())
    return Fill(tuple(factor.clone() for factor in found.weight), bias.clone(), hidden, carry)


def states(decoder: Decoder, pack: Pack, last: int) -> Iterator[tuple[int, Tensor]]:
    """The states (N, E) before each layer up to `last`, at full depth."""
    x = pack.packed.embedded
    for layer, step in enumerate(layers(0, last + 1)):
        yield layer, x
        if layer < last:
            x = pack.run(decoder, x, [step])


def keys_values(decoder: Decoder, layer: int, x: Tensor) -> Tensor:
    """Keys before their turn, then values, of a layer from its input (N, E); (N, 2 × G × d)."""
    key, value = decoder.keys_values(layer, x)
    return torch.stack((key, value), 1).flatten(1)


def fill_errors(decoder: Decoder, packs: Sequence[Pack], fills: Mapping[Segment, Fill]) -> dict[Segment, float]:
    """Per segment, the share of the variance of keys and values that its fill leaves unexplained on held-out packs."""
    error = dict.fromkeys(fills, 0.0)
    total = dict.fromkeys(fills, 0.0)
    with torch.inference_mode():
        for pack in packs:
            later = pack.packed.positions != 0
            written: dict[Segment, Tensor] = {}
            for layer, x in states(decoder, pack, max(last for _, last in fills)):
                for segment, fill in fills.items():
                    if segment[0] == layer:
                        written[segment] = fill.to(torch.float32, x.device)(x[later].float())
                targets = keys_values(decoder, layer, x)[later].float()
                for segment in (segment for segment in fills if segment[0] <= layer <= segment[1]):
                    ours = written[segment][:, layer - segment[0]].flatten(1)
                    error[segment] += float((ours - targets).square().sum())
                    total[segment] += float((targets - targets.mean(0)).square().sum())
    return {segment: error[segment] / total[segment] if total[segment] else float("nan") for segment in fills}
