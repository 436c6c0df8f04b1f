"""Segments as text: `12-15,17-20;12-20` is two groups. The bridges of a group are fitted one after another.

Knows layer numbers, no weights.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from polar_sdk.errors import BridgeError

if TYPE_CHECKING:
    from polar_sdk.cost import Segment

__all__ = ["parse_segments", "segments_text"]

_SEGMENT: Final = re.compile(r"\[?\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?\]?")


def parse_segments(text: str, depth: int) -> list[list[Segment]]:
    """Groups of segments, each in order.

    Args:
        text: Segments with commas between them, groups with semicolons.
        depth: Layers of the model.

    Raises:
        BridgeError: It does not parse, a segment does not fit the model, or two of one group overlap.
    """
    groups = [[_segment(part, depth) for part in group.split(",")] for group in text.split(";") if group.strip()]
    if not groups:
        raise BridgeError("no segment is given; write first and last layers, for example '12-15,17-20'.")
    for group in groups:
        group.sort()
        for one, other in pairwise(group):
            if other[0] <= one[1]:
                raise BridgeError(
                    f"segments {one[0]}-{one[1]} and {other[0]}-{other[1]} overlap; part them by ';' to fit both."
                )
        if sum(last - first + 1 for first, last in group) == depth:
            raise BridgeError(f"the segments cross all {depth} layers; leave at least one layer out.")
    return groups


def segments_text(groups: list[list[Segment]]) -> str:
    """The text form of groups."""
    return ";".join(",".join(f"{first}-{last}" for first, last in group) for group in groups)


def _segment(text: str, depth: int) -> Segment:
    match = _SEGMENT.fullmatch(text.strip())
    if match is None:
        raise BridgeError(f"segment {text.strip()!r} does not parse; write first and last layer, for example '12-15'.")
    first = int(match[1])
    last = first if match[2] is None else int(match[2])
    if not first <= last < depth:
        raise BridgeError(
            f"segment {text.strip()!r} does not fit: first and last layer must rise and lie between 0 and {depth - 1}."
        )
    return first, last
