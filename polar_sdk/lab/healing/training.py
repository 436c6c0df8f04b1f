"""Training of maps through the frozen rest of the model, so that its predictions approach those of full depth.

The base model's weights get no gradient. Every random choice depends on the seed and the step alone, so that a run that
was interrupted and resumed ends where an uninterrupted one does. Groups that share a segment train its map together.
A pack's states at full depth are computed once and kept, as long as they fit in some memory, so that later passes over
the packs begin with the first layer that a map stands for. Knows packs and tensors, no items.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from polar_sdk.engine.native import has_tiles
from polar_sdk.lab.healing.loss import ChoiceSlots, Predictions, choice_scores, loss_of, slots_of
from polar_sdk.lab.healing.packs import layers, put

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.maps import Map
    from polar_sdk.lab.checkpoint import Checkpoint
    from polar_sdk.lab.healing.method import Group, Method
    from polar_sdk.lab.healing.packs import Pack
    from polar_sdk.programs.cost import Segment
    from polar_sdk.programs.program import Program


CHECKPOINT: Final = "maps"
"""Name of the checkpoint."""
_WARM_UP: Final = 15
"""Steps over which the learning rate rises."""
_CHECKPOINT_EVERY: Final = 20
"""Steps between checkpoints."""
_SAMPLED_TOKENS: Final = 256
"""Predicted tokens of a pack whose whole distributions are compared."""
_MAX_KEPT: Final = 4 * 2**30
"""Memory for the states of packs at full depth: a hundred packs of the default model take 2.4 GB. Unit: bytes."""
_MEASURED: Final = -1
"""The step number of a loss that is measured, not trained."""


class _Start(NamedTuple):
    """The share of one pack in every step: N tokens, M of them predicted."""

    entries: dict[int, Tensor]
    """States before the first layer that a map of each group stands for, (N, E), at full depth."""
    final: Tensor
    """Identity's last states where it predicts, (M, E)."""
    choices: ChoiceSlots | None
    scores: Tensor | None
    """Identity's scores of the choices, (Q, C)."""

    @property
    def bytes(self) -> int:
        """Size of its states. Unit: bytes."""
        return self.final.nbytes + sum(states.nbytes for states in self.entries.values())


class MapLoss:
    """How far programs with maps are from full depth.

    Args:
        decoder: A copy whose maps may be set; see `packs.trainable_copy`.
        method: How maps of their kind are made.
        groups: Segments that are used together.
    """

    def __init__(self, decoder: Decoder, method: Method, groups: Sequence[Group]) -> None:
        self._decoder, self._method, self._groups = decoder, method, tuple(groups)
        self._weights = method.options.weights

    def means(self, packs: Sequence[Pack], maps: Mapping[Segment, Map]) -> dict[Group, float]:
        """Mean loss of each group over packs."""
        put(self._decoder, maps)
        totals = dict.fromkeys(self._groups, 0.0)
        with torch.no_grad():
            for pack in packs:
                start = self.start(pack)
                for group in self._groups:
                    totals[group] += float(self.of(pack, start, self._method.program(group), _MEASURED))
        return {group: total / len(packs) for group, total in totals.items()}

    @torch.no_grad()
    def start(self, pack: Pack) -> _Start:
        """The share of a pack, computed at full depth."""
        decoder, depth = self._decoder, self._decoder.depth
        firsts, entries = {group[0][0] for group in self._groups}, {}
        for layer, x in pack.states(decoder, depth - 1):
            if layer in firsts:
                entries[layer] = x
        final = pack.run(decoder, x, layers(depth - 1, depth))[pack.sources]
        choices = slots_of(pack.tasks, decoder.device) if self._scored else None
        scores = None if choices is None else choice_scores(decoder.head(final), pack.targets, choices)
        return _Start(entries, final, choices, scores)

    @property
    def _scored(self) -> bool:
        return bool(self._weights.choices or self._weights.labels)

    def of(self, pack: Pack, start: _Start, program: Program, step: int) -> Tensor:
        """Loss of one program on one pack, with the maps that the decoder has."""
        decoder = self._decoder
        first = min(segment[0] for segment in program.bridges + program.fills)
        entry = max(layer for layer in start.entries if layer <= first)
        states = pack.run(decoder, start.entries[entry], program.steps[entry:])[pack.sources]
        rows = _sampled(len(start.final), self._method.options.seed, step).to(decoder.device)
        with torch.no_grad():
            full = Predictions(decoder.head(start.final[rows]), start.final, start.scores)
        if not self._scored:
            return loss_of(Predictions(decoder.head(states[rows]), states), full, None, self._weights)
        logits = decoder.head(states)  # of all predicted tokens, which choices are scored by
        scores = None if start.choices is None else choice_scores(logits, pack.targets, start.choices)
        return loss_of(Predictions(logits[rows], states, scores), full, start.choices, self._weights)


class MapTrainer:
    """Trains the maps of all groups together, one pack per step.

    Args:
        decoder: A copy whose maps may be set; see `packs.trainable_copy`.
        packs: The prompts to train on.
        method: How maps of their kind are made.
        groups: Segments that are used together.
        maps: The maps that training starts from.
        checkpoint: Checkpoint of this run, from which training goes on if there is one.
    """

    def __init__(
        self,
        decoder: Decoder,
        packs: Sequence[Pack],
        method: Method,
        groups: Sequence[Group],
        maps: Mapping[Segment, Map],
        checkpoint: Checkpoint,
    ) -> None:
        self._decoder, self._packs, self._checkpoint = decoder, packs, checkpoint
        self._method, self._groups, self._options = method, groups, method.options
        self.loss = MapLoss(decoder, method, groups)
        self._maps = dict(maps)
        self._values = {
            segment: [part.detach().float().clone().requires_grad_() for part in each.parts.values()]
            for segment, each in maps.items()
        }
        self._all = [value for values in self._values.values() for value in values]
        self._adam = torch.optim.Adam(self._all, lr=self._options.rate, betas=(0.9, 0.99))
        self._starts: dict[int, _Start] = {}
        self._room = _MAX_KEPT
        """Bytes that more packs' states may take."""
        self._done = 0
        self.losses: list[float] = []
        """One per step."""

    def run(self, on_step: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Train to the end, from the checkpoint on; whatever stops it leaves a checkpoint."""
        self._resume()
        consistent = True
        try:
            while self._done < self._options.distil:
                self._backward(self._done)
                consistent = False  # interrupted from here on, the values would be half old and half new
                self._adam.step()
                self._done += 1
                consistent = True
                if self._done % _CHECKPOINT_EVERY == 0:
                    self._keep()
                on_step(self._done, self._options.distil)
        except BaseException:
            if consistent:
                self._keep()
            raise

    @property
    def maps(self) -> dict[Segment, Map]:
        """The maps as they are now, in float32."""
        return {
            segment: each.like(value.detach().clone() for value in self._values[segment])
            for segment, each in self._maps.items()
        }

    def _backward(self, step: int) -> None:
        """Gradients of one step."""
        options, device = self._options, self._decoder.device
        cosine = 0.5 * (1 + math.cos(math.pi * step / max(options.distil, 1)))
        rise = min(1, (step + 1) / _WARM_UP)
        for group in self._adam.param_groups:
            group["lr"] = options.rate * rise * (0.05 + 0.95 * cosine)
        self._adam.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=_halves_pay(device)):
            loss = self._gradients(step, self._pack_of(step))
        torch.nn.utils.clip_grad_norm_(self._all, 1.0)
        del self.losses[step:]
        self.losses.append(loss)

    def _gradients(self, step: int, index: int) -> float:
        """Add the gradients of one step on the pack of that index; returns the loss."""
        pack, start = self._packs[index], self._starts.get(index)
        if start is None:
            start = self.loss.start(pack)
            if start.bytes <= self._room:
                self._room -= start.bytes
                self._starts[index] = start
        total = 0.0
        programs = self._method.lessons(self._groups, step)
        for program in programs:  # one after another, so that one graph is held at a time
            used = program.bridges + program.fills
            put(self._decoder, {segment: self._maps[segment].like(self._values[segment]) for segment in used})
            loss = self.loss.of(pack, start, program, step) / len(programs)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _keep(self) -> None:
        tensors = {f"{index}.value": value.detach() for index, value in enumerate(self._all)}
        for index, value in enumerate(self._all):
            tensors |= {f"{index}.{name}": moment for name, moment in self._adam.state.get(value, {}).items()}
        self._checkpoint.save(CHECKPOINT, tensors, {"done": self._done, "losses": self.losses})

    def _resume(self) -> None:
        if (found := self._checkpoint.load(CHECKPOINT)) is None:
            return
        tensors, facts = found
        self._done, self.losses = int(facts["done"]), list(facts["losses"])
        for index, value in enumerate(self._all):
            own = {name.partition(".")[2]: each for name, each in tensors.items() if name.startswith(f"{index}.")}
            with torch.no_grad():
                value.copy_(own.pop("value"))
            if own:  # Adam counts its steps on the CPU
                self._adam.state[value] = {
                    name: moment if name == "step" else moment.to(value.device) for name, moment in own.items()
                }

    def _pack_of(self, step: int) -> int:
        """Index of a step's pack: each pack once per epoch, in an order of the epoch's own."""
        epoch, place = divmod(step, len(self._packs))
        order = list(range(len(self._packs)))
        random.Random(f"{self._options.seed} {epoch}").shuffle(order)
        return order[place]


def _halves_pay(device: torch.device) -> bool:
    """Whether products of bfloat16 take far less time there than those of float32; losses come out the same."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and has_tiles()


def _sampled(predicted: int, seed: int, step: int) -> Tensor:
    """Some of the predicted tokens, (S,), whose whole distributions are compared in this step."""
    dice = random.Random(f"{seed} {step} shown")
    return torch.tensor(sorted(dice.sample(range(predicted), min(_SAMPLED_TOKENS, predicted))))
