"""A look at a running engine, as the server that runs it hands it over; without a server there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


class Tier(Protocol):
    """A tier that a router's certificate promises something about."""

    @property
    def name(self) -> str:
        """Multiplier of the tier."""

    @property
    def promise(self) -> str:
        """In words."""

    @property
    def saved(self) -> float:
        """Mean share of full depth's FLOPs that it saved on the calibration prompts."""


class Live(Protocol):
    """One look at a running engine; see `polar_server.telemetry.live`."""

    @property
    def model(self) -> str:
        """Id of the model."""

    @property
    def tokens_per_second(self) -> float | None:
        """Sampled tokens, over the last seconds; None before there is anything to compare with."""

    @property
    def running(self) -> int:
        """Rows: requests with a place in the engine."""

    @property
    def places(self) -> int:
        """Rows that run at most."""

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""

    @property
    def pages_used(self) -> int:
        """Pages of keys and values in use."""

    @property
    def pages(self) -> int:
        """Pages of keys and values that there are."""

    @property
    def answers(self) -> int:
        """Calls that are being answered."""

    @property
    def unrecorded(self) -> int:
        """Requests that ended and whose record is not stored."""

    @property
    def draining(self) -> bool:
        """Whether it ends, and takes no more requests."""

    @property
    def router(self) -> str:
        """The router that chooses programs, in words."""

    @property
    def void(self) -> str | None:
        """Reason that the router's certificate does not hold here; None where it does, or where there is none."""

    @property
    def tiers(self) -> Sequence[Tier]:
        """The tiers of its certificate; empty where there is none."""
