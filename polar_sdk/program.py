"""The program: the sequence of layer indices that a prompt runs, as an immutable value.

Knows nothing of weights, prices or policies: it can say what it visits, not whether that is allowed (`policy.py`)
or what it costs (`cost.py`).

Text form (canonical, round-trips): items separated by one space, each a layer or an ascending run, optionally
repeated. `0-11 15x2 18-29` visits layers 0 to 11, then 15 twice, then 18 to 29. `12-14x2` visits 12 13 14 12 13 14.
The grammar, which `Program.parse` accepts with commas as well as spaces::

    program := item (separator item)*        item  := span ["x" count]
    span    := layer | layer "-" layer       count := 2, 3, …

Layers go up to 9999 and a program has at most 4096 visits, so that the text of every program reads back.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Self

from polar_sdk.errors import ProgramDepthError, ProgramSyntaxError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

__all__ = ["Program"]

_ITEM = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?(?:x([0-9]{1,4}))?")
_LAST_LAYER = 9999
"""Highest layer index that the grammar can write."""
_MOST_VISITS = 4096
"""Longest program there is: a guard against typing errors such as `0-29x999`, far above any real depth."""

_Run = tuple[int, int]
"""First and last layer of an ascending run, both included."""


@dataclass(frozen=True, slots=True)
class Program:
    """An immutable sequence of layer visits.

    Attributes:
        layers: Layer index of each visit, in order; position = visit number.
    """

    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ProgramSyntaxError("the program is empty; it needs at least one layer, for example '0-29'.")
        if min(self.layers) < 0:
            raise ProgramSyntaxError(f"layer {min(self.layers)} in a program is negative; layers start at 0.")
        if max(self.layers) > _LAST_LAYER:
            raise ProgramSyntaxError(
                f"layer {max(self.layers)} in a program is too high; the highest is {_LAST_LAYER}."
            )
        if len(self.layers) > _MOST_VISITS:
            raise ProgramSyntaxError(
                f"the program has {len(self.layers)} visits, of at most {_MOST_VISITS}; leave layers out or loop less."
            )

    @classmethod
    def identity(cls, depth: int) -> Self:
        """Every layer once, in order: layers 0 … depth − 1."""
        return cls(tuple(range(depth)))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form.

        Raises:
            ProgramSyntaxError: The text does not follow the grammar above.
        """
        items = text.replace(",", " ").split()
        layers: list[int] = []
        for item in items:
            layers.extend(_parse_item(item, text))
            if len(layers) > _MOST_VISITS:
                raise _too_long(text)
        return cls(tuple(layers))

    @classmethod
    def skipping(cls, depth: int, skips: Iterable[int]) -> Self:
        """Identity without the layers in `skips`.

        Raises:
            ProgramDepthError: A skip names a layer outside 0 … depth − 1.
        """
        return cls.editing(depth, dict.fromkeys(skips, 0))

    @classmethod
    def looping(cls, depth: int, visits: Mapping[int, int]) -> Self:
        """Identity with each layer in `visits` visited that many times in a row.

        Raises:
            ProgramDepthError: A key names a layer outside 0 … depth − 1.
        """
        return cls.editing(depth, visits)

    @classmethod
    def editing(cls, depth: int, visits: Mapping[int, int]) -> Self:
        """Identity with the number of visits of some layers set: 0 skips, 1 executes, more loops."""
        for layer, count in visits.items():
            if not 0 <= layer < depth:
                raise ProgramDepthError(_depth_message(layer, depth))
            if count < 0:
                raise ProgramSyntaxError(f"layer {layer} cannot be visited {count} times; 0 skips it.")
        return cls(tuple(layer for layer in range(depth) for _ in range(visits.get(layer, 1))))

    @classmethod
    def of(cls, value: Program | str | Iterable[int]) -> Program:
        """Take a program, its text form, or a path of layer indices.

        Raises:
            ProgramSyntaxError: It is none of these.
        """
        if isinstance(value, Program):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        try:
            return cls(tuple(map(operator.index, value)))
        except TypeError as error:
            raise ProgramSyntaxError(
                f"program {value!r} is neither text nor whole numbers; write for example '0-11 15x2 18-29'."
            ) from error

    @property
    def text(self) -> str:
        """The canonical text form; `Program.parse(p.text) == p`."""
        runs = list(_runs(self.layers))
        return " ".join(_item_text(run, len(list(same))) for run, same in groupby(runs))

    @property
    def most_visits(self) -> int:
        """The highest number of visits that any one layer has."""
        return max(Counter(self.layers).values())

    def visits(self, depth: int) -> tuple[int, ...]:
        """Visits of each layer 0 … depth − 1."""
        counts = Counter(self.layers)
        return tuple(counts[layer] for layer in range(depth))

    def skips(self, depth: int) -> tuple[int, ...]:
        """Layers without a visit."""
        return tuple(layer for layer, count in enumerate(self.visits(depth)) if count == 0)

    def is_identity(self, depth: int) -> bool:
        """True where every layer runs once, in order."""
        return self.layers == tuple(range(depth))

    def check_depth(self, depth: int) -> None:
        """Raise ProgramDepthError if a visit lies beyond the model."""
        if (deepest := max(self.layers)) >= depth:
            raise ProgramDepthError(f"program {self.text!r}: {_depth_message(deepest, depth)}")

    def __str__(self) -> str:
        return self.text

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # In policy files and reports a program stands as its text form.
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(
            cls.of,
            serialization=core_schema.plain_serializer_function_ser_schema(str, return_schema=core_schema.str_schema()),
        )


def _depth_message(layer: int, depth: int) -> str:
    return f"layer {layer} does not exist; the model has {depth} layers, numbered 0 to {depth - 1}."


def _parse_item(item: str, text: str) -> list[int]:
    match = _ITEM.fullmatch(item)
    if match is None:
        raise ProgramSyntaxError(
            f"program {text!r} does not parse at {item!r}; write layers and ranges, for example '0-11 15x2 18-29'."
        )
    first = int(match[1])
    last = first if match[2] is None else int(match[2])
    count = 1 if match[3] is None else int(match[3])
    if last < first:
        raise ProgramSyntaxError(f"range {item!r} in program {text!r} runs backwards; write {last}-{first}.")
    if count < 1:
        raise ProgramSyntaxError(f"{item!r} in program {text!r} repeats 0 times; leave the layer out to skip it.")
    if (last - first + 1) * count > _MOST_VISITS:
        raise _too_long(text)
    return list(range(first, last + 1)) * count


def _too_long(text: str) -> ProgramSyntaxError:
    return ProgramSyntaxError(
        f"program {text!r} has more than {_MOST_VISITS} visits, the most there may be; leave layers out or loop less."
    )


def _runs(layers: tuple[int, ...]) -> Iterator[_Run]:
    """Split visits into maximal ascending runs; a layer visited twice in a row stands alone, once per visit.

    Standing alone keeps a loop legible: `0-14 15x2 16-29`, not `0-15 15-29`.
    """
    start = 0
    for end in range(1, len(layers) + 1):
        if end == len(layers) or layers[end] != layers[end - 1] + 1 or _looped(layers, end) or _looped(layers, end - 1):
            yield layers[start], layers[end - 1]
            start = end


def _looped(layers: tuple[int, ...], at: int) -> bool:
    before = at > 0 and layers[at - 1] == layers[at]
    after = at + 1 < len(layers) and layers[at + 1] == layers[at]
    return before or after


def _item_text(run: _Run, count: int) -> str:
    first, last = run
    span = str(first) if first == last else f"{first}-{last}"
    return span if count == 1 else f"{span}x{count}"
