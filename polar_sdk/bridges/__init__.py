"""Bridges: maps that carry the hidden state over a segment of layers. Fitted here, run by the engine."""

from polar_sdk.bridges.heal import Healer, HealOptions
from polar_sdk.bridges.segments import parse_segments
from polar_sdk.bridges.store import BridgeSet, SegmentRecord

__all__ = ["BridgeSet", "HealOptions", "Healer", "SegmentRecord", "parse_segments"]
