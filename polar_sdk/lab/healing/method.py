"""Methods: how one kind of map is specified, fitted, trained and measured, and with which options.

`bridges` and `fills` are the two; what they have in common is done by `heal` and `distillation`. Knows no files.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple, Self

from pydantic import BaseModel, Field, ValidationError

from polar_sdk.errors import MapError
from polar_sdk.programs.cost import Segment
from polar_sdk.programs.program import TAIL
from polar_sdk.promises.losses import ANSWER_TOKENS
from polar_sdk.router.map_set import Storage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.maps import Map
    from polar_sdk.lab.checkpoint import Checkpoint
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.programs.program import Program
    from polar_sdk.router.map_set import MapKind, MapSet
    from polar_sdk.show.progress import Progress


Group = tuple[Segment, ...]
"""Segments that one program uses, ascending."""
FIT_TOKENS: Final = 4096
"""Maximum tokens of a pack that the closed form reads."""
TRAIN_TOKENS: Final = 2048
"""Maximum tokens of a training batch: the head's weights are read once for it, and its logits are held twice."""
_SEGMENT: Final = re.compile(r"[\[(]?\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?[\])]?")
_BRIDGE_RATE: Final = 2e-4
"""Learning rate of bridges."""
_FILL_RATE: Final = 3e-4
"""Maximum learning rate of fills, …"""
_FILL_RATE_BY_SIZE: Final = 0.27
"""… and that rate times the size of a state: at 3e-4, maps of 896 numbers improved, and one of 1,536 got worse."""
_SOFTENING: Final = 2.0
"""Temperature at which token distributions are compared where fills are trained."""


class LossWeights(NamedTuple):
    """Weights of the terms of the training's loss; see `distillation`."""

    temperature: float = 1.0
    """T at which token distributions are compared; their divergence counts T² times."""
    hidden: float = 0.0
    """Weight of the squared error of the last states, over their mean square (SwiftKV, arXiv 2410.03960)."""
    choices: float = 0.0
    """Weight of the difference between the choices' scores."""
    labels: float = 0.0
    """Weight of the cross-entropy on the right choice; 0 uses no label."""


class HealOptions(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """How maps of every kind are fitted."""

    ridge: float = Field(default=1e-3, gt=0)
    """Penalty as a multiple of the mean variance of an entry of what the maps read."""
    rank: int | None = Field(default=None, ge=1)
    """Maximum rank of each map; None = full."""
    distil: int = Field(default=0, ge=0)
    """Steps of training on top of the closed form."""
    rate: float | None = Field(default=None, gt=0)
    """Highest learning rate of the training; None = that of `learning_rate`."""
    seed: int = 0
    """Seed of everything that is drawn."""
    answer_tokens: int = Field(default=24, ge=1)
    """Maximum tokens of identity's answers to prompts."""
    start: str | None = None
    """Folder of maps to start from; those of the segments in it are not fitted again, and keep rank and units."""

    @property
    def weights(self) -> LossWeights:
        """Weights of the terms of the training's loss."""
        return LossWeights()

    def learning_rate(self, width: int) -> float:
        """The highest learning rate, for a model with states of that size."""
        return _BRIDGE_RATE if self.rate is None else self.rate

    @classmethod
    def of(cls, **options: object) -> Self:
        """Options by name.

        Raises:
            MapError: One of them is unknown or out of range.
        """
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                raise MapError(f"{name!r} is not an option here; use {', '.join(cls.model_fields)}.") from error
            raise MapError(f"{name}={first['input']} is not valid: {first['msg']}.") from error


class BridgeOptions(HealOptions):
    """How bridges are fitted."""

    choices: float = Field(default=1.0, ge=0)
    """Weight of the difference between the choices' scores in the training."""
    labels: float = Field(default=0.0, ge=0)
    """Weight of the right choices in the training; more than 0 fits the maps to labels, which is fine-tuning."""
    drop: float = Field(default=0.25, ge=0, lt=1)
    """Probability that a bridge is left out in every other training step and its layers run instead, so that bridges
    also serve programs that use only some of them."""
    storage: ClassVar[Storage] = "exact"

    @property
    def weights(self) -> LossWeights:
        """The divergence, and what is known of choices."""
        return LossWeights(choices=self.choices, labels=self.labels)


class FillOptions(HealOptions):
    """How fills are fitted."""

    answer_tokens: int = Field(default=ANSWER_TOKENS, ge=1)
    """Maximum tokens of identity's answers to prompts."""
    units: int = Field(default=0, ge=0)
    """Hidden units of each map; 0 = none, so that it is affine."""
    token: int | None = Field(default=None, ge=0)
    """Rank of what each map reads of the token's embedding; None = a sixth of its size, 0 = nothing."""
    prompts: int = Field(default=2000, ge=1)
    """Maximum prompts to fit and to train on, drawn by hash."""
    tail: int = Field(default=TAIL, ge=1)
    """Last tokens of each prompt that run all layers in the training, as `search` lets them; the last one must."""
    hidden: float = Field(default=1.0, ge=0)
    """Weight of the error of the last states in the training."""
    storage: Storage = "int8"
    """How weights are stored."""

    @property
    def weights(self) -> LossWeights:
        """The divergence of softened distributions, and the error of the last states."""
        return LossWeights(temperature=_SOFTENING, hidden=self.hidden)

    def learning_rate(self, width: int) -> float:
        """See `HealOptions.learning_rate`; the wider a state, the more of its numbers move an output at once."""
        return min(_FILL_RATE, _FILL_RATE_BY_SIZE / width) if self.rate is None else self.rate


class Lots(NamedTuple):
    """Tasks by use."""

    fitted: list[Task]
    """For the closed form."""
    trained: list[Task]
    """For training."""
    held_out: list[Task]
    """For measuring."""


@dataclass(frozen=True)
class Method(ABC):
    """How maps of one kind are made for a model.

    Attributes:
        options: How to fit.
        depth: Layers of the model.
    """

    kind: ClassVar[MapKind]
    separators: ClassVar[tuple[str, str]]
    """Between groups, and between the segments of a group."""
    lowest: ClassVar[int]
    """First layer that a segment may begin with."""
    gap: ClassVar[int]
    """Layers that must run between two segments of a group."""
    to_the_end: ClassVar[bool]
    """Whether a segment of which only the first layer is given reaches to the model's last layer."""
    together: ClassVar[bool]
    """Whether training is kept for all groups or for none."""

    options: HealOptions
    depth: int

    def seeks(self, text: str) -> bool:
        """Whether a text asks for groups that `found` finds."""
        return False

    def groups(self, text: str) -> list[Group]:
        """The groups that a text names.

        Raises:
            MapError: It does not parse, a segment does not fit the model, or two of one group are too near.
        """
        between, within = self.separators
        parts = [part for part in text.split(between) if part.strip()]
        if not parts:
            raise MapError(f"no segment for {self.kind}s is given; write first and last layers, e.g. '12-15'.")
        return list(dict.fromkeys(self._group(part.split(within)) for part in parts))

    def _group(self, parts: Iterable[str]) -> Group:
        group = tuple(sorted(map(self._segment, parts)))
        for before, after in pairwise(group):
            if after[0] - before[1] <= self.gap:
                rule = "a layer must run between them" if self.gap else "they overlap"
                raise MapError(
                    f"segments {before[0]}-{before[1]} and {after[0]}-{after[1]} do not fit one program: {rule}; "
                    f"separate them by {self.separators[0]!r} for a program each."
                )
        if sum(last - first + 1 for first, last in group) == self.depth:
            raise MapError(f"the segments cover all {self.depth} layers; keep at least one layer.")
        return group

    def _segment(self, text: str) -> Segment:
        match = _SEGMENT.fullmatch(text.strip())
        if match is None:
            raise MapError(f"segment {text.strip()!r} does not parse; write first and last layer, e.g. '12-15'.")
        first, end = int(match[1]), self.depth - 1
        last = int(match[2] or (end if self.to_the_end else first))
        if not self.lowest <= first <= last <= end:
            raise MapError(
                f"segment {text.strip()!r} does not fit: it needs first ≤ last, both between {self.lowest} and {end}."
            )
        return first, last

    def found(self, decoder: Decoder, lots: Lots, on_progress: Progress) -> list[Group]:
        """Groups that are found by measuring, where a text may ask for that.

        Raises:
            MapError: There is nothing to measure on.
        """
        raise NotImplementedError

    @abstractmethod
    def lots(self, train: list[Task], held_out: list[Task]) -> Lots:
        """The tasks of two splits by use.

        Raises:
            MapError: There is nothing to train on.
        """

    @abstractmethod
    def fit(
        self,
        decoder: Decoder,
        tasks: Sequence[Task],
        groups: Sequence[Group],
        known: Mapping[Segment, Map],
        checkpoint: Checkpoint,
        on_progress: Progress,
    ) -> dict[Segment, Map]:
        """The maps of all groups in closed form; those that are known stay as they are."""

    @abstractmethod
    def errors(
        self, decoder: Decoder, tasks: Sequence[Task], groups: Sequence[Group], made: MapSet
    ) -> dict[Segment, float]:
        """The error of each map; see `MapRecord.error`."""

    @abstractmethod
    def program(self, group: Group) -> Program:
        """The program that uses a whole group."""

    def lessons(self, groups: Sequence[Group], step: int) -> list[Program]:
        """The programs that a training step runs: by default those of all groups."""
        return [self.program(group) for group in groups]


def segments_of(groups: Iterable[Group]) -> list[Segment]:
    """The segments of groups, each once: groups share the map of one that they both have."""
    return list(dict.fromkeys(segment for group in groups for segment in group))


def drawn(tasks: Sequence[Task], limit: int) -> list[Task]:
    """At most N tasks, drawn by their hashes: a file may be sorted by kind."""
    return sorted(tasks, key=lambda task: task.id)[:limit]
