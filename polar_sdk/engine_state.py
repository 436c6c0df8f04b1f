"""The state of a running engine, passed from the server that runs it to what displays it.

Knows neither the engine nor a page.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TierLook:
    """A tier that the router's certificate promises something about."""

    name: str
    promise: str
    """In words."""
    saved: float
    """Mean share of full depth's FLOPs that it saved on the calibration prompts."""


@dataclass(frozen=True)
class Look:
    """The engine at one moment."""

    model: str
    """Its id."""
    tokens_per_second: float | None
    """Sampled tokens over the last seconds; None at the first look."""
    running: int
    """Requests with a place."""
    places: int
    """Requests that run together at most."""
    waiting: int
    """Requests that wait for a place."""
    pages_used: int
    """Pages of keys and values in use."""
    pages: int
    """Pages that there are."""
    answers: int
    """Calls that are being answered."""
    unrecorded: int
    """Requests that ended and whose record is not stored."""
    unusual: bool
    """Whether its prompts of late are unlike those of the calibration."""
    unaudited: int
    """Requests that were chosen to be audited and were not: too many waited, or for too long."""
    draining: bool
    """Whether the server ends."""
    router: str
    """The router, in words."""
    void: str | None
    """Why the router's certificate does not hold; None if it does, or where there is none."""
    tiers: tuple[TierLook, ...]
    """Tiers with a promise of its certificate."""
