"""Distillation: maps are trained through the frozen model, so that its predictions approach those of full depth.

The terms of the loss are means: the divergence of the token distributions; the error of the last states; the difference
between the choices' scores, centred per question, since only differences between choices matter; and the cross-entropy
on the right choice. The last is not distillation: it fits the maps to labels.

The base model's weights get no gradient. Full depth runs by the decoder's own kernels, as it serves, and what gradients
pass by torch. Every random choice depends on the seed and the step alone, so that a run that was interrupted and
resumed ends where an uninterrupted one does. Groups that share a segment train its map together. A pack's states at
full depth are computed once and kept, as long as they fit in some memory, so that later passes over the packs begin
with the first layer that a map stands for. Knows packs and tensors, no files.
"""

from __future__ import annotations

import random
from functools import cached_property
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from polar_sdk.engine.native import has_tiles, pairs
from polar_sdk.engine.products import InPanels, Plain
from polar_sdk.lab.checkpoint import Descent
from polar_sdk.lab.healing.packs import layers, put
from polar_sdk.lab.items import ChoiceItem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.maps import Map
    from polar_sdk.engine.types import Weights
    from polar_sdk.lab.checkpoint import Checkpoint
    from polar_sdk.lab.healing.method import Group, LossWeights, Method
    from polar_sdk.lab.healing.packs import Pack
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.programs.cost import Segment
    from polar_sdk.programs.program import Program


CHECKPOINT: Final = "maps"
"""Name of the checkpoint."""
_UNIT: Final = 0.1
"""Score difference that counts as 1, in nats per character: most decisions are closer than a few of these."""
_TEMPERATURE: Final = 0.3
"""Temperature of the cross-entropy, in nats per character."""
_SAMPLED_TOKENS: Final = 256
"""Predicted tokens of a pack whose whole distributions are compared."""
_MAX_KEPT: Final = 4 * 2**30
"""Memory for the states of packs at full depth: a hundred packs of the default model take 2.4 GB. Unit: bytes."""
_WARM_UP: Final = 15
"""Steps of each map over which the learning rate rises; not every map takes part in every step."""
_SOLVED: Final = "token."
"""Parts that stay as they were solved. What is read of the embedding passes through few directions, which move too far
at the others' rate: 60 steps took 12% off the loss of a cut with them and 17% without."""
_MEASURED: Final = -1
"""The step number of a loss that is measured, not trained."""


class ChoiceSlots(NamedTuple):
    """The choice of each of a pack's predicted tokens; Q questions of at most C choices."""

    slot: Tensor
    """For each predicted token, the entry of (Q × C) that it adds to; Q × C for tokens of no choice, (M,)."""
    characters: Tensor
    """Length of each choice, (Q, C); 1 where there is none."""
    valid: Tensor
    """Whether there is a choice, (Q, C)."""
    right: Tensor
    """Index of the right choice, (Q,)."""


class Predictions(NamedTuple):
    """Predictions of one program, or of identity, for a pack of M predicted tokens.

    Distributions are compared at a sample of S of them, which gives the same gradient on average, for a fraction of the
    head's cost.
    """

    logits: Tensor
    """Logits of the sample, (S, V)."""
    states: Tensor
    """The last states, (M, E)."""
    scores: Tensor | None = None
    """Scores of the choices, (Q, C), where there are some; see `choice_scores`."""


def slots_of(tasks: Sequence[Task], device: torch.device) -> ChoiceSlots | None:
    """The choices of a pack; None if it has no choice question."""
    questions = [task for task in tasks if isinstance(task.item, ChoiceItem)]
    if not questions:
        return None
    width = max(len(task.characters) for task in questions)
    spare, row = len(questions) * width, 0
    slot: list[int] = []
    for task in tasks:
        is_choice = isinstance(task.item, ChoiceItem)
        for column, tail in enumerate(task.question.continuations):
            slot += [row * width + column if is_choice else spare] * len(tail)
        row += is_choice
    rows = [[*task.characters, *[0] * (width - len(task.characters))] for task in questions]
    characters = torch.tensor(rows, dtype=torch.float32, device=device)
    right = [task.item.answer for task in questions if isinstance(task.item, ChoiceItem)]
    return ChoiceSlots(
        torch.tensor(slot, device=device), characters.clamp(min=1), characters > 0, torch.tensor(right, device=device)
    )


def choice_scores(logits: Tensor, targets: Tensor, choices: ChoiceSlots) -> Tensor:
    """Log-likelihood per character of each choice, (Q, C), from logits (M, V) of the tokens (M,)."""
    values = -F.cross_entropy(logits.float(), targets, reduction="none")
    sums = torch.zeros(choices.characters.numel() + 1, device=logits.device).index_add(0, choices.slot, values)
    return sums[:-1].view_as(choices.characters) / choices.characters


def loss_of(ours: Predictions, full: Predictions, choices: ChoiceSlots | None, weights: LossWeights) -> Tensor:
    """The loss of one pack under a program, a scalar, from its predictions and those of full depth."""
    heat = weights.temperature
    ours_log, full_log = (logits.float().div(heat).log_softmax(-1) for logits in (ours.logits, full.logits))
    loss = heat**2 * F.kl_div(ours_log, full_log, reduction="batchmean", log_target=True)
    if weights.hidden:
        states = full.states.float()
        loss = loss + weights.hidden * ((ours.states.float() - states).square().mean() / states.square().mean())
    if choices is None or ours.scores is None or full.scores is None:
        return loss
    scores, reference = _centred(ours.scores, choices), _centred(full.scores, choices)
    difference = F.huber_loss(scores / _UNIT, reference / _UNIT, reduction="none")
    loss = loss + weights.choices * difference[choices.valid].mean()
    if weights.labels:
        logits = ours.scores.masked_fill(~choices.valid, -1e9) / _TEMPERATURE
        loss = loss + weights.labels * F.cross_entropy(logits, choices.right)
    return loss


def _centred(scores: Tensor, choices: ChoiceSlots) -> Tensor:
    kept = scores * choices.valid
    return (scores - kept.sum(1, keepdim=True) / choices.valid.sum(1, keepdim=True)) * choices.valid


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
        decoder: A copy whose maps may be set; see `packs.own_copy`.
        method: How maps of their kind are made.
        groups: Segments that are used together.
    """

    def __init__(self, decoder: Decoder, method: Method, groups: Sequence[Group]) -> None:
        self._decoder, self._method, self._groups = decoder, method, tuple(groups)
        self._weights = method.options.weights
        self._scored = bool(self._weights.choices or self._weights.labels)
        # Without instructions for pairs of halves, torch multiplies them in up to 50 times the time of wider numbers.
        self.trains_in = decoder.dtype if _halves_pay(decoder.device) else torch.float32
        """Dtype of the maps, and of the states that they read, where gradients pass."""

    def means(
        self,
        packs: Sequence[Pack],
        *candidates: Mapping[Segment, Map],
        on_pack: Callable[[int, int], None] = lambda *_: None,
    ) -> list[dict[Group, float]]:
        """Mean loss of each group over packs, with each of some sets of maps."""
        totals = [dict.fromkeys(self._groups, 0.0) for _ in candidates]
        with torch.no_grad():
            for done, pack in enumerate(packs, 1):
                start = self.start(pack)
                full = self.full(start, _MEASURED)
                for total, maps in zip(totals, candidates, strict=True):
                    put(self._decoder, maps)
                    for group in self._groups:
                        total[group] += float(self.of(pack, start, full, self._method.program(group))) / len(packs)
                on_pack(done, len(packs))
        return totals

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

    @torch.no_grad()
    def full(self, start: _Start, step: int) -> tuple[Tensor, Predictions]:
        """The sample of a step, (S,), and what full depth predicts there."""
        dice, predicted = random.Random(f"{self._method.options.seed} {step} shown"), len(start.final)
        shown = sorted(dice.sample(range(predicted), min(_SAMPLED_TOKENS, predicted)))
        rows = torch.tensor(shown, device=self._decoder.device)
        return rows, Predictions(self._decoder.head(start.final[rows]), start.final, start.scores)

    def of(self, pack: Pack, start: _Start, full: tuple[Tensor, Predictions], program: Program) -> Tensor:
        """Loss of one program on one pack, with the maps that the decoder has."""
        decoder, (rows, predicted) = self._decoder, full
        first = min(segment[0] for segment in program.bridges + program.fills)
        entry = max(layer for layer in start.entries if layer <= first)
        x = start.entries[entry]
        if torch.is_grad_enabled():
            x = x.to(self.trains_in)
        states = pack.run(decoder, x, program.steps[entry:])[pack.sources]
        if not self._scored:
            return loss_of(Predictions(self._logits(states[rows]), states), predicted, None, self._weights)
        logits = self._logits(states)  # of all predicted tokens, which choices are scored by
        scores = None if start.choices is None else choice_scores(logits, pack.targets, start.choices)
        return loss_of(Predictions(logits[rows], states, scores), predicted, start.choices, self._weights)

    def _logits(self, states: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self._decoder.head(states)
        return self._decoder.family.logits(states, self._ends)

    @cached_property
    def _ends(self) -> Weights:
        """The decoder's ends with the head as numbers, which is large: it is not unpacked again for every program."""
        ends, inputs = self._decoder.ends, self._decoder.family.hidden
        head = ends["head"]
        return {**ends, "head": Plain(head.unpack(inputs), head.bias)} if isinstance(head, InPanels) else ends


class MapTrainer:
    """Trains the maps of all groups together from some maps on, one pack per step; see `MapLoss`."""

    def __init__(
        self,
        decoder: Decoder,
        packs: Sequence[Pack],
        method: Method,
        groups: Sequence[Group],
        maps: Mapping[Segment, Map],
        checkpoint: Checkpoint,
    ) -> None:
        self._decoder, self._packs, self._method, self._groups = decoder, packs, method, groups
        self.loss = MapLoss(decoder, method, groups)
        self._maps = dict(maps)
        self._values = {
            segment: [
                part.detach().float().clone().requires_grad_(not name.startswith(_SOLVED))
                for name, part in each.parts.items()
            ]
            for segment, each in maps.items()
        }
        values = [value for values in self._values.values() for value in values if value.requires_grad]
        self.descent = Descent(
            {str(place): value for place, value in enumerate(values)},
            torch.optim.Adam(values, betas=(0.9, 0.99)),
            checkpoint,
            CHECKPOINT,
            steps=method.options.distil,
            rate=method.options.learning_rate(decoder.family.hidden),
            warm_up=_WARM_UP * len(groups) // len(method.lessons(groups, 0)),
            floor=0.05,
            every=20,
        )
        self._starts: dict[int, _Start] = {}
        self._room = _MAX_KEPT
        """Bytes that more packs' states may take."""

    @property
    def maps(self) -> dict[Segment, Map]:
        """The maps as they are now, in float32."""
        return {
            segment: each.like(value.detach().clone() for value in self._values[segment])
            for segment, each in self._maps.items()
        }

    def gradients(self, step: int) -> float:
        """Add the gradients of a step; returns its loss."""
        index = self._pack_of(step)
        pack, start = self._packs[index], self._starts.get(index)
        device, total = self._decoder.device, 0.0
        with torch.autocast(device.type, torch.bfloat16, enabled=_halves_pay(device)):
            if start is None:
                start = self.loss.start(pack)
                if start.bytes <= self._room:
                    self._room -= start.bytes
                    self._starts[index] = start
            full = self.loss.full(start, step)
            programs = self._method.lessons(self._groups, step)
            for program in programs:  # one after another, so that one graph is held at a time
                used = program.bridges + program.fills
                maps = {segment: self._maps[segment].like(self._values[segment]) for segment in used}
                put(self._decoder, maps, self.loss.trains_in)
                loss = self.loss.of(pack, start, full, program) / len(programs)
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
        return total

    def _pack_of(self, step: int) -> int:
        """Index of a step's pack: each pack once per epoch, in an order of the epoch's own."""
        epoch, place = divmod(step, len(self._packs))
        order = list(range(len(self._packs)))
        random.Random(f"{self._method.options.seed} {epoch}").shuffle(order)
        return order[place]


def _halves_pay(device: torch.device) -> bool:
    """Whether products of bfloat16 take far less time there than those of float32; losses come out the same."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and (has_tiles() or pairs())
