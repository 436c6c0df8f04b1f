"""Fills: fitted by passes of full depth over the packs (one, unless the sums of all segments are large), then trained.

A fill reads the normalised state where its segment begins, and the normalised embedding of the token: upper states hold
less of it than the layers that copy tokens from the prompt want to know. It aims at the keys (before their turn by
position) and values that each layer of the segment computes at full depth; where layers follow the segment, its carry
aims at the state after it, from the state alone. All of that shares one Gram matrix. Position 0 is left out: it is not
filled. Hidden units are drawn at random, as directions of states whose entries are made alike in spread; what they are
multiplied by is fitted, and training fits the units as well. Knows packs and tensors; no items and no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from time import monotonic
from typing import TYPE_CHECKING, Final

import torch

from polar_sdk.engine.maps import Fill, normalise, reads, rms
from polar_sdk.errors import MapError
from polar_sdk.lab.healing.distillation import MapLoss
from polar_sdk.lab.healing.method import FIT_TOKENS, TRAIN_TOKENS, Group, Lots, Method, drawn, segments_of
from polar_sdk.lab.healing.packs import make_packs
from polar_sdk.lab.healing.ridge import RidgeSums
from polar_sdk.programs.program import Program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.maps import Map
    from polar_sdk.lab.checkpoint import Checkpoint
    from polar_sdk.lab.healing.method import FillOptions
    from polar_sdk.lab.healing.packs import Pack
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.programs.cost import Segment
    from polar_sdk.router.map_set import MapSet
    from polar_sdk.show.progress import Progress


DEFAULT: Final = "default"
"""Asks for groups that are found by measuring; see `candidates`."""
_SHARES: Final = (0.1, 0.2, 0.27, 0.35, 0.43, 0.5)
"""Shares of the layers that are filled by default: 3, 6, 8, 10, 13 and 15 of 30."""
_SUMS: Final = 3 * 2**30
"""Memory for sums of one pass over the packs: twelve cuts of Qwen2.5-1.5B take 2.3 GB. Unit: bytes."""
SUMS: Final = "sums"
"""Name of their checkpoint."""
_KEEP_EVERY: Final = 60.0
"""Time between two of them. Unit: seconds."""
_TOKEN_SHARE: Final = 6
"""Size of a state over the rank of what is read of the embedding: that keeps nine tenths of what a full map gains
(Qwen2.5-Coder-0.5B: 12 % of the error of keys and values), for a fifth more FLOPs of the map."""
_DRAWN_ON: Final = 4
"""Packs whose states say how hidden units are drawn."""
_LESSONS: Final = 3
"""Maximum programs of a training step."""
_MAX_HELD_OUT: Final = 60
"""Maximum prompts that are measured on."""
CHOICE_PROMPTS: Final = 300
"""Maximum prompts that layers are fitted on where what to fill is chosen by measuring, …"""
CHOICE_HELD_OUT: Final = 40
"""… and measured on."""


@dataclass(frozen=True)
class FillMethod(Method):
    """How fills are made."""

    kind = "fill"
    separators = (",", "+")
    lowest = 1
    gap = 1
    to_the_end = True
    together = False

    options: FillOptions

    def seeks(self, text: str) -> bool:
        """See `Method.seeks`."""
        return DEFAULT in map(str.strip, text.split(self.separators[0]))

    def groups(self, text: str) -> list[Group]:
        """See `Method.groups`; `default` among them names none."""
        named = [part for part in text.split(self.separators[0]) if part.strip() != DEFAULT]
        return [] if self.seeks(text) and not named else super().groups(self.separators[0].join(named))

    def found(self, decoder: Decoder, lots: Lots, on_progress: Progress) -> list[Group]:
        """Those of the groups in `candidates` that change least.

        First each layer is filled alone, then the least harmful ones together, against a cut of as many.
        """
        if self.depth < 2 or not lots.trained:
            raise MapError(
                "which layers to fill cannot be measured: the model needs two layers, and a prompt "
                f"{self.options.tail + 2} tokens; name the layers, e.g. '24,20'."
            )
        packs = make_packs(decoder, drawn(lots.trained, CHOICE_PROMPTS), FIT_TOKENS)
        held_out = [task for task in lots.held_out if self._is_filled(task)] or lots.trained
        judged = make_packs(decoder, drawn(held_out, CHOICE_HELD_OUT), TRAIN_TOKENS)
        plain = self.options.model_copy(update={"rank": None, "units": 0})

        def losses(groups: Sequence[Group], stage: str) -> dict[Group, float]:
            fills = fit_fills(
                decoder, packs, segments_of(groups), plain, lambda done, total: on_progress(stage, done, total + 1)
            )
            return MapLoss(decoder, self, groups).means(judged, fills)[0]

        harms = losses([((layer, layer),) for layer in range(1, self.depth)], "layers to fill, one by one")
        rivals = candidates({group[0][0]: loss for group, loss in harms.items()}, self.depth)
        found = losses(list(dict.fromkeys(chain.from_iterable(rivals))), "layers to fill, together")
        return [min(groups, key=lambda group: found[group]) for groups in rivals]

    def lots(self, train: list[Task], held_out: list[Task]) -> Lots:
        """See `Method.lots`: training takes texts of which something is filled."""
        fitted = drawn(train, self.options.prompts)
        filled = [task for task in fitted if self._is_filled(task)]
        if self.options.distil and not filled:
            raise MapError(
                f"none of the {len(fitted)} prompts to train on is answered in text and has a token to fill between "
                f"its first and its last {self.options.tail}; give longer prompts, or a smaller tail."
            )
        return Lots(fitted, filled, drawn(held_out, _MAX_HELD_OUT))

    def _is_filled(self, task: Task) -> bool:
        """Whether a prompt is answered in text, and something of it is filled in training."""
        return task.kind != "choice" and len(task.question.prompt) > self.options.tail + 1

    def fit(
        self,
        decoder: Decoder,
        tasks: Sequence[Task],
        groups: Sequence[Group],
        known: Mapping[Segment, Map],
        checkpoint: Checkpoint,
        on_progress: Progress,
    ) -> dict[Segment, Map]:
        """See `Method.fit`."""
        missing = [segment for segment in segments_of(groups) if segment not in known]
        if not missing:
            return dict(known)
        packs = make_packs(decoder, tasks, FIT_TOKENS)
        fitted = fit_fills(
            decoder,
            packs,
            missing,
            self.options,
            lambda done, total: on_progress("fitting fills", done, total),
            checkpoint,
        )
        return {**known, **fitted}

    def errors(
        self, decoder: Decoder, tasks: Sequence[Task], groups: Sequence[Group], made: MapSet
    ) -> dict[Segment, float]:
        """See `Method.errors`."""
        fills, packs = made.fills, make_packs(decoder, tasks, FIT_TOKENS)
        error = dict.fromkeys(fills, 0.0)
        total = dict.fromkeys(fills, 0.0)
        with torch.inference_mode():
            for pack in packs:
                written: dict[Segment, Tensor] = {}
                embedded = pack.packed.embedded[pack.later].float()
                for layer, x in pack.states(decoder, max(last for _, last in fills)):
                    targets = keys_values(decoder, layer, x)[pack.later].float()
                    for segment, fill in fills.items():
                        if segment[0] == layer:
                            written[segment] = fill.to(torch.float32, x.device)(x[pack.later].float(), embedded)
                        if segment[0] <= layer <= segment[1]:
                            ours = written[segment][:, layer - segment[0]].flatten(1)
                            error[segment] += float((ours - targets).square().sum())
                            total[segment] += float((targets - targets.mean(0)).square().sum())
        return {segment: error[segment] / total[segment] if total[segment] else float("nan") for segment in fills}

    def program(self, group: Group) -> Program:
        """See `Method.program`."""
        return Program.filling(self.depth, group, self.options.tail)

    def lessons(self, groups: Sequence[Group], step: int) -> list[Program]:
        """The programs of a few groups, in turns: a step takes as long however many there are."""
        count = min(_LESSONS, len(groups))
        return [self.program(groups[(step * count + place) % len(groups)]) for place in range(count)]


def candidates(harms: Mapping[int, float], depth: int) -> list[list[Group]]:
    """For each of a few shares of the layers, the groups to choose from: all from a cut on, or the least harmful ones.

    Args:
        harms: Loss where a layer alone is filled, by layer from 1 on.
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


def fit_fills(
    decoder: Decoder,
    packs: Sequence[Pack],
    segments: Sequence[Segment],
    options: FillOptions,
    on_pack: Callable[[int, int], None],
    checkpoint: Checkpoint | None = None,
) -> dict[Segment, Fill]:
    """Fit fills of several segments, in float32: in one pass over the packs, or more where their sums are large.

    Args:
        decoder: Runs at full depth.
        packs: Prompts to fit on.
        segments: First and last layer of each.
        options: Ridge, rank, hidden units and seed.
        on_pack: Called with the number of packs done, and of all.
        checkpoint: Where the sums are kept every few minutes; None keeps none.
    """
    family, units = decoder.family, options.units
    token = token_rank(options, family.hidden)
    inputs, width = family.hidden * (2 if token else 1) + units, 2 * family.kv_heads * family.head_dim
    hidden = _drawn(decoder, packs[:_DRAWN_ON], {first for first, _ in segments}, options) if units else {}
    fitted: dict[Segment, Fill] = {}
    outputs = {
        (first, last): [width] * (last - first + 1) + [family.hidden] * (last < decoder.depth - 1)
        for first, last in segments
    }
    passes = list(_passes(outputs, inputs))
    on_pack(0, len(passes) * len(packs))
    for number, some in enumerate(passes):
        sums = {segment: RidgeSums(inputs, outputs[segment], decoder.device) for segment in some}
        kept = _KeptSums(checkpoint, number, sums)
        with torch.inference_mode():
            for done, pack in enumerate(packs[kept.done :], kept.done + 1):
                _add(decoder, pack, sums, hidden, token=bool(token))
                kept.keep(done)
                on_pack(number * len(packs) + done, len(passes) * len(packs))
        for segment, total in sums.items():
            fitted[segment] = _solved(decoder, segment, total, options, hidden.get(segment[0], ()))
    return fitted


class _KeptSums:
    """The sums of one pass over the packs in a checkpoint, from which an interrupted pass goes on."""

    def __init__(self, checkpoint: Checkpoint | None, number: int, sums: Mapping[Segment, RidgeSums]) -> None:
        self._checkpoint, self._number, self._sums = checkpoint, number, sums
        self._saved = monotonic()
        self.done = 0
        """Packs that are in the sums."""
        found = None if checkpoint is None else checkpoint.load(SUMS)
        if found is not None and found[1]["number"] == number:
            for (first, last), each in sums.items():
                start = f"{first}-{last}."
                each.restore({name.removeprefix(start): of for name, of in found[0].items() if name.startswith(start)})
            self.done = int(found[1]["done"])

    def keep(self, done: int) -> None:
        """Write the sums of that many packs, unless they were written a moment ago."""
        if self._checkpoint is None or monotonic() < self._saved + _KEEP_EVERY:
            return
        tensors = {
            f"{first}-{last}.{name}": each
            for (first, last), sums in self._sums.items()
            for name, each in sums.tensors().items()
        }
        self._checkpoint.save(SUMS, tensors, {"number": self._number, "done": done})
        self._saved = monotonic()


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
    decoder: Decoder, packs: Sequence[Pack], entries: set[int], options: FillOptions
) -> dict[int, tuple[Tensor, ...]]:
    """Random hidden units for the states before some layers: each sees a direction of the states made alike in spread.

    A few entries of a state are a hundred times as large as all others, and would be all that a unit sees.
    """
    read: dict[int, list[Tensor]] = {layer: [] for layer in entries}
    with torch.inference_mode():
        for pack in packs:
            for layer, x in pack.states(decoder, max(entries)):
                if layer in read:
                    read[layer].append(normalise(x)[pack.later].float())
    drawn: dict[int, tuple[Tensor, ...]] = {}
    for layer, found in sorted(read.items()):
        inputs = torch.cat(found)
        dice = torch.Generator().manual_seed(options.seed * 10_000 + layer)
        directions = torch.randn(inputs.shape[1], options.units, generator=dice).to(inputs.device)
        weight = directions / inputs.std(0).clamp(min=1e-6).unsqueeze(1) / inputs.shape[1] ** 0.5
        shift = torch.randn(options.units, generator=dice).to(inputs.device) / 2
        drawn[layer] = (weight.clone(), (shift - inputs.mean(0) @ weight).clone())
    return drawn


def token_rank(options: FillOptions, width: int) -> int:
    """Rank of what a map reads of the embedding, of so many numbers; 0 = nothing."""
    return width // _TOKEN_SHARE if options.token is None else min(options.token, width)


def _add(
    decoder: Decoder,
    pack: Pack,
    sums: Mapping[Segment, RidgeSums],
    hidden: Mapping[int, tuple[Tensor, ...]],
    *,
    token: bool,
) -> None:
    later = pack.later
    embedded = [normalise(pack.packed.embedded[later].float())] if token else []
    inputs: dict[int, Tensor] = {}
    entries: dict[int, Tensor] = {}
    for layer, x in pack.states(decoder, min(max(last for _, last in sums) + 1, decoder.depth - 1)):
        for first, last in (segment for segment in sums if segment[1] + 1 == layer):  # here its carry arrives
            moved = (x[later].float() - entries[first]) / rms(entries[first])
            sums[first, last].add_outputs(layer - first, inputs[first], moved)
        begun = [segment for segment in sums if segment[0] == layer]
        if begun:
            entries[layer] = x[later].float()
            inputs[layer] = torch.cat((reads(entries[layer], hidden.get(layer, ())), *embedded), 1)
        for segment in begun:
            sums[segment].add_inputs(inputs[layer])
        through = [segment for segment in sums if segment[0] <= layer <= segment[1]]
        if through:
            targets = keys_values(decoder, layer, x)[later]
            for segment in through:
                sums[segment].add_outputs(layer - segment[0], inputs[segment[0]], targets)


def _solved(
    decoder: Decoder, segment: Segment, sums: RidgeSums, options: FillOptions, hidden: tuple[Tensor, ...]
) -> Fill:
    """One map for all layers of a segment; of low rank, its layers share the first factor. The carry has full rank."""
    family, count = decoder.family, segment[1] - segment[0] + 1
    state, token = family.hidden + options.units, token_rank(options, family.hidden)
    found = sums.solve(options.ridge, options.rank, slice(count), inputs=state, beside=token)
    bias = found.bias.view(-1, 2, family.kv_heads, family.head_dim)
    carry: tuple[Tensor, ...] = ()
    if segment[1] < decoder.depth - 1:
        move = sums.solve(options.ridge, sets=slice(count, None), inputs=state)
        carry = (move.weight[0], move.bias.clone())
    return Fill(found.weight, bias.clone(), hidden, carry, found.beside)


def keys_values(decoder: Decoder, layer: int, x: Tensor) -> Tensor:
    """Keys before their turn, then values, of a layer from its input (N, E); (N, 2 × G × d)."""
    key, value = decoder.keys_values(layer, x)
    return torch.stack((key, value), 1).flatten(1)
