"""The program: the sequence of steps that a prompt runs, as an immutable value.

A step visits a layer, or crosses several layers by a bridge. A *damped* visit goes only part of the way: of K damped
visits in a row, each moves the state by 1/K of what the layer would add. A *filled* visit is run by the answer, the
first token of the prompt and its last ones; for the tokens between them a fitted map writes the layer's keys and
values, and carries their states over it. Filled visits in a row are one *segment* with one map. Knows nothing of
weights, prices or policies: a program can say what it visits, not whether that is allowed (`policy.py`) or what it
costs (`cost.py`).

Text form (canonical, round-trips): items separated by one space, each a layer or an ascending run, optionally
repeated. `0-11 15x2 18-29` visits layers 0 to 11, then 15 twice, then 18 to 29. `12-14x2` visits 12 13 14 12 13 14.
`15~2` visits layer 15 twice, damped. `0-11 [12-19] 20-29` crosses layers 12 to 19 by their bridge. `0-19 (20-29)` fills
layers 20 to 29 for all of the prompt but its first and its last token; of `0-19 (20-29:8)` the last 8 tokens run.
The grammar, which `Program.parse` accepts with commas as well as spaces::

    program := item (separator item)*        item  := span ["x" count] | layer "~" count
    span    := layer | layer "-" layer               | "[" span "]" | "(" span [":" tail] ")"
    count   := 2, 3, …                       tail  := 1, 2, …

Layers go up to 9999 and a program has at most 4096 steps, so that the text of every program reads back.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from polar_sdk.errors import ProgramDepthError, ProgramSyntaxError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema


_ITEM = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?(?:([x~])([0-9]{1,4}))?")
_BRIDGE = re.compile(r"\[([0-9]{1,4})(?:-([0-9]{1,4}))?\]")
_FILL = re.compile(r"\(([0-9]{1,4})(?:-([0-9]{1,4}))?(?::([0-9]{1,4}))?\)")
_LAST_LAYER = 9999
"""Highest layer index that the grammar can write."""
MAX_STEPS = 4096
"""Maximum length of a program: a guard against typing errors such as `0-29x999`, far above any real depth."""
TAIL = 16
"""Last tokens of a prompt, mostly its question, that run where the laboratory fills layers: this takes a tenth to a
third off the divergence of long prompts, for 3 % of the savings on them. Unit: tokens."""


class Step(NamedTuple):
    """One step of a program. Steps sort by layer, so that sorting puts programs with a common start side by side."""

    first: int
    """The layer, or the first layer that a bridge crosses."""
    last: int
    """The same layer, or the last one that a bridge crosses."""
    parts: int = 1
    """A visit takes 1 / parts of the way from its input to the layer's output; 1 = a plain visit."""
    bridge: bool = False
    """Whether the step crosses its layers by a bridge instead of visiting one."""
    fill: int = 0
    """Number of the prompt's last tokens that run a filled visit, at least 1; 0 = all tokens run it."""
    segment: tuple[int, ...] = ()
    """First and last layer of the filled segment that a visit belongs to, by whose map it is filled; the program that
    holds the step sets it. Empty where it is not filled."""

    @property
    def unfilled(self) -> Step:
        """The step as the answer's tokens take it: itself, not filled."""
        return self._replace(fill=0, segment=()) if self.fill else self

    @property
    def plain(self) -> bool:
        """Whether it runs one layer, all the way."""
        return not self.bridge and self.parts == 1

    @property
    def begins_segment(self) -> bool:
        """Whether it is the first visit of a filled segment, where the segment's map is applied."""
        return bool(self.fill) and self.first == self.segment[0]

    @property
    def ends_segment(self) -> bool:
        """Whether it is the last visit of a filled segment."""
        return bool(self.fill) and self.first == self.segment[1]


@dataclass(frozen=True, slots=True)
class Program:
    """An immutable sequence of steps.

    Attributes:
        steps: What runs, in order. Layer indices stand for plain visits when a program is made from them.
    """

    steps: tuple[Step, ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __init__(self, steps: Iterable[Step | int]) -> None:
        all_steps = tuple(step if isinstance(step, Step) else Step(step, step) for step in steps)
        if not all_steps:
            raise ProgramSyntaxError("the program is empty; it needs at least one layer, for example '0-29'.")
        if (lowest := min(step.first for step in all_steps)) < 0:
            raise ProgramSyntaxError(f"layer {lowest} in a program is negative; layers start at 0.")
        if (highest := max(step.last for step in all_steps)) > _LAST_LAYER:
            raise ProgramSyntaxError(f"layer {highest} in a program is too high; the highest is {_LAST_LAYER}.")
        if len(all_steps) > MAX_STEPS:
            raise ProgramSyntaxError(
                f"the program has {len(all_steps)} steps; at most {MAX_STEPS} are allowed: skip more or loop less."
            )
        if all(step.bridge for step in all_steps):
            raise ProgramSyntaxError("the program visits no layer; it needs at least one, for example '0-29'.")
        _check_loops(all_steps)
        object.__setattr__(self, "steps", tuple(_in_segments(all_steps)))
        object.__setattr__(self, "_hash", hash(self.steps))

    def __hash__(self) -> int:
        # Kept: what is known of programs is looked up several times for each token of a row.
        return self._hash

    @classmethod
    def identity(cls, depth: int) -> Self:
        """Every layer once, in order: layers 0 … depth − 1."""
        return cls(range(depth))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form.

        Raises:
            ProgramSyntaxError: The text does not follow the grammar above.
        """
        steps: list[Step] = []
        for item in text.replace(",", " ").split():
            steps.extend(_parse_item(item, text))
            if len(steps) > MAX_STEPS:
                raise _too_long(text)
        return cls(steps)

    @classmethod
    def skipping(cls, depth: int, skips: Iterable[int]) -> Self:
        """Identity without the layers in `skips`.

        Raises:
            ProgramDepthError: A skip names a layer outside 0 … depth − 1.
        """
        return cls.editing(depth, dict.fromkeys(skips, 0))

    @classmethod
    def looping(cls, depth: int, visits: Mapping[int, int]) -> Self:
        """Identity with each layer in `visits` visited the given number of times in a row.

        Raises:
            ProgramDepthError: A key names a layer outside 0 … depth − 1.
        """
        return cls.editing(depth, visits)

    @classmethod
    def editing(cls, depth: int, visits: Mapping[int, int]) -> Self:
        """Identity with the number of visits of some layers changed: 0 skips, 1 executes, more loops."""
        for layer, count in visits.items():
            if not 0 <= layer < depth:
                raise ProgramDepthError(_depth_message(layer, depth))
            if count < 0:
                raise ProgramSyntaxError(f"layer {layer} cannot be visited {count} times; 0 skips it.")
        return cls(layer for layer in range(depth) for _ in range(visits.get(layer, 1)))

    @classmethod
    def bridging(cls, depth: int, segments: Iterable[tuple[int, int]]) -> Self:
        """Identity with each segment (first layer, last layer) crossed by its bridge.

        Raises:
            ProgramDepthError: A segment leaves the model, runs backwards or overlaps another.
        """
        steps: list[Step | int] = []
        start = 0
        for first, last in _apart("bridge", segments, depth):
            steps += [*range(start, first), Step(first, last, bridge=True)]
            start = last + 1
        return cls([*steps, *range(start, depth)])

    @classmethod
    def filling(cls, depth: int, segments: Iterable[tuple[int, int]], tail: int = 1) -> Self:
        """Identity with each segment (first layer, last layer) filled for the prompt but its last `tail` tokens.

        Raises:
            ProgramDepthError: A segment leaves the model, runs backwards or overlaps another.
        """
        if tail < 1:
            raise ProgramSyntaxError(f"tail={tail} prompt tokens run; the last one must: use 1 or more.")
        filled = {layer for first, last in _apart("fill", segments, depth) for layer in range(first, last + 1)}
        return cls(Step(layer, layer, fill=tail if layer in filled else 0) for layer in range(depth))

    @classmethod
    def of(cls, value: Program | str | Iterable[int]) -> Program:
        """A program from a program, its text form, or a sequence of layer indices.

        Raises:
            ProgramSyntaxError: It is none of these.
        """
        if isinstance(value, Program):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        try:
            return cls(step if isinstance(step, Step) else operator.index(step) for step in value)
        except TypeError as error:
            raise ProgramSyntaxError(
                f"program {value!r} is neither text nor a sequence of layers; write for example '0-11 15x2 18-29'."
            ) from error

    @property
    def text(self) -> str:
        """The canonical text form; `Program.parse(p.text) == p`."""
        return " ".join(_item_text(run, len(list(same))) for run, same in groupby(_runs(self.steps)))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layer of each visit, in order, without bridges."""
        return tuple(step.first for step in self.steps if not step.bridge)

    @property
    def bridges(self) -> tuple[tuple[int, int], ...]:
        """First and last layer of each bridge, in order."""
        return tuple((step.first, step.last) for step in self.steps if step.bridge)

    @property
    def fills(self) -> tuple[tuple[int, int], ...]:
        """First and last layer of each filled segment, in order."""
        return tuple((step.segment[0], step.segment[1]) for step in self.steps if step.begins_segment)

    @property
    def tail(self) -> int:
        """The largest number of last prompt tokens that run a filled visit; 0 if none is filled."""
        return max(step.fill for step in self.steps)

    @property
    def last_visit(self) -> int:
        """Place of the last step that visits a layer."""
        return max(place for place, step in enumerate(self.steps) if not step.bridge)

    @property
    def most_visits(self) -> int:
        """The number of visits of the layer that is visited most often."""
        return max(Counter(self.layers).values())

    def visits(self, depth: int) -> tuple[int, ...]:
        """Visits of each layer 0 … depth − 1."""
        counts = Counter(self.layers)
        return tuple(counts[layer] for layer in range(depth))

    def skips(self, depth: int) -> tuple[int, ...]:
        """Layers without a visit."""
        return tuple(layer for layer, count in enumerate(self.visits(depth)) if count == 0)

    def is_identity(self, depth: int) -> bool:
        """True if every layer runs once, in order."""
        return self.steps == tuple(Step(layer, layer) for layer in range(depth))

    def check_depth(self, depth: int) -> None:
        """Raise ProgramDepthError if a step goes beyond the last layer of the model."""
        if (deepest := max(step.last for step in self.steps)) >= depth:
            raise ProgramDepthError(f"program {self.text!r}: {_depth_message(deepest, depth)}")

    def __str__(self) -> str:
        return self.text

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # In policy files and reports a program is written in its text form.
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(
            cls.of,
            serialization=core_schema.plain_serializer_function_ser_schema(str, return_schema=core_schema.str_schema()),
        )


def _apart(kind: str, segments: Iterable[tuple[int, int]], depth: int) -> list[tuple[int, int]]:
    """Segments in order, of which none leaves the model, runs backwards or overlaps another."""
    ordered, start = sorted(segments), 0
    for first, last in ordered:
        if not start <= first <= last < depth:
            raise ProgramDepthError(
                f"{kind} {first}-{last} does not fit; it must be over layers between {start} and {depth - 1}."
            )
        start = last + 1
    return ordered


def _check_loops(steps: tuple[Step, ...]) -> None:
    for step, same in groupby(steps):
        if (count := len(list(same))) % step.parts:
            raise ProgramSyntaxError(
                f"layer {step.first} has {count} visits damped to 1/{step.parts}; use a multiple of {step.parts}."
            )
    visits = Counter(step.first for step in steps if not step.bridge)
    for step in steps:
        if not 0 <= step.fill <= _LAST_LAYER:
            raise ProgramSyntaxError(
                f"layer {step.first} is filled for all but the last {step.fill} prompt tokens; use 1 to {_LAST_LAYER}."
            )
        if step.fill and (visits[step.first] > 1 or step.parts > 1 or step.bridge):
            raise ProgramSyntaxError(
                f"layer {step.first} is filled and visited {visits[step.first]} times; a filled layer is visited "
                "once, undamped: fill other layers, or loop others."
            )


def _depth_message(layer: int, depth: int) -> str:
    return f"layer {layer} does not exist; the model has {depth} layers, numbered 0 to {depth - 1}."


def _parse_item(item: str, text: str) -> list[Step]:
    if (bridge := _BRIDGE.fullmatch(item)) is not None:
        first, last = _span(bridge[1], bridge[2], item, text)
        return [Step(first, last, bridge=True)]
    if (fill := _FILL.fullmatch(item)) is not None:
        return _parse_fill(fill, item, text)
    match = _ITEM.fullmatch(item)
    if match is None or (match[3] == "~" and match[2] is not None):
        raise ProgramSyntaxError(
            f"program {text!r} cannot be parsed at {item!r}; write layers and ranges, for example '0-11 15x2 18-29'."
        )
    first, last = _span(match[1], match[2], item, text)
    count = 1 if match[4] is None else int(match[4])
    if count < 1:
        raise ProgramSyntaxError(f"{item!r} in program {text!r} repeats 0 times; leave the layer out to skip it.")
    if (last - first + 1) * count > MAX_STEPS:
        raise _too_long(text)
    parts = count if match[3] == "~" else 1
    return [Step(layer, layer, parts) for layer in range(first, last + 1)] * count


def _parse_fill(match: re.Match[str], item: str, text: str) -> list[Step]:
    first, last = _span(match[1], match[2], item, text)
    tail = 1 if match[3] is None else int(match[3])
    if tail < 1:
        raise ProgramSyntaxError(
            f"{item!r} in program {text!r} runs none of the prompt's last tokens; the last one must run: use 1 or more."
        )
    return [Step(layer, layer, fill=tail) for layer in range(first, last + 1)]


def _span(first_text: str, last_text: str | None, item: str, text: str) -> tuple[int, int]:
    first = int(first_text)
    last = first if last_text is None else int(last_text)
    if last < first:
        raise ProgramSyntaxError(f"range {item!r} in program {text!r} runs backwards; write {last}-{first}.")
    return first, last


def _too_long(text: str) -> ProgramSyntaxError:
    return ProgramSyntaxError(
        f"program {text!r} has more than {MAX_STEPS} steps, which is the limit; skip more or loop less."
    )


def _runs(steps: tuple[Step, ...]) -> Iterator[Step]:
    """Split steps into maximal ascending runs, each as one step from its first layer to its last.

    A layer visited twice in a row stands alone, once per visit, so that a loop stays legible: `0-14 15x2 16-29`, not
    `0-15 15-29`. So do bridges and damped visits. Filled visits form runs of their own, by their tail.
    """
    start = 0
    for end in range(1, len(steps) + 1):
        if end == len(steps) or not _continues(steps, end):
            yield steps[start]._replace(last=steps[end - 1].last)
            start = end


def _in_segments(steps: tuple[Step, ...]) -> Iterator[Step]:
    """The steps, each filled one with the segment that it belongs to: a run of filled visits."""
    segments = {
        layer: (run.first, run.last) for run in _runs(steps) if run.fill for layer in range(run.first, run.last + 1)
    }
    for step in steps:
        yield step._replace(segment=segments[step.first]) if step.fill else step


def _continues(steps: tuple[Step, ...], at: int) -> bool:
    """Whether the step continues the run of the step before it."""
    before, step = steps[at - 1], steps[at]
    plain = (before.parts, before.bridge) == (step.parts, step.bridge) == (1, False)
    return (
        plain
        and before.fill == step.fill
        and step.first == before.first + 1
        and not _looped(steps, at)
        and not _looped(steps, at - 1)
    )


def _looped(steps: tuple[Step, ...], at: int) -> bool:
    before = at > 0 and steps[at - 1] == steps[at]
    after = at + 1 < len(steps) and steps[at + 1] == steps[at]
    return before or after


def _item_text(run: Step, count: int) -> str:
    span = str(run.first) if run.first == run.last else f"{run.first}-{run.last}"
    if run.bridge:
        return " ".join([f"[{span}]"] * count)
    if run.fill:
        return f"({span})" if run.fill == 1 else f"({span}:{run.fill})"
    if run.parts == 1:
        return span if count == 1 else f"{span}x{count}"
    return " ".join([f"{span}~{run.parts}"] * (count // run.parts))
