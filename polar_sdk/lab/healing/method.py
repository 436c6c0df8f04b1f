"""Methods: how one kind of map is asked for, fitted, trained and measured. `bridges` and `fills` are the two.

What they have in common is done by `heal` and `training`. Knows no files.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from polar_sdk.errors import MapError
from polar_sdk.programs.cost import Segment

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.maps import Map
    from polar_sdk.lab.healing.options import HealOptions
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
    texts_only: ClassVar[bool]
    """Whether choice questions are left out."""
    together: ClassVar[bool]
    """Whether training is kept for all groups or for none."""

    options: HealOptions
    depth: int

    def groups(self, text: str) -> list[Group] | None:
        """The groups that a text asks for; None = those that `found` finds.

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
                f"segment {text.strip()!r} does not fit: first ≤ last is needed, both between {self.lowest} and {end}."
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
