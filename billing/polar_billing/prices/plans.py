"""Plans: what a customer's contract adds to the rates of a book, rated over a whole statement period.

A plan has dated terms: a flat fee, a minimum, a discount, items priced in bands or packages, and what each tier
promises. Customers are on a plan from a given time on. Prepaid credits are deducted from statements.

This module holds and checks terms; `statements.charges` applies them.
"""

from __future__ import annotations

from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Final, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, field_validator, model_validator

from polar_billing.prices.entries import (
    Amount,
    Checked,
    Moment,
    Name,
    Percent,
    Price,
    Quantity,
    Share,
    Timeline,
)
from polar_billing.values.money import to_scaled
from polar_billing.values.periods import load_zone

if TYPE_CHECKING:
    from datetime import datetime
    from decimal import Decimal

Item = TypeVar("Item")
Counted = Literal["compute_units", "million_input_tokens", "million_output_tokens", "requests"]
_DECIMALS: Final = {"compute_units": 12, "million_input_tokens": 6, "million_output_tokens": 6, "requests": 0}


def in_order(what: str, *key: str) -> AfterValidator:
    """A check of a list in a book, which sorts its entries and refuses two with one key; `what` names the list."""
    read = attrgetter(*key)

    def ordered(items: tuple[Item, ...]) -> tuple[Item, ...]:
        entries = sorted(items, key=read)
        for item, following in pairwise(entries):
            if read(item) == read(following):
                name = " from ".join(str(getattr(item, part)) for part in key)
                raise ValueError(f"two {what} are {name}; keep one")
        return tuple(entries)

    return AfterValidator(ordered)


class Band(Checked):
    """One band; it ends at `up_to`, included."""

    up_to: Quantity | None = None
    """Unit: that of the item. None for the last band, which has no end."""
    unit_price: Price
    """Currency units per unit of the item."""


class _PeriodItem(Checked):
    per: Counted
    """The counted item. Units: CU, million prompt or sampled tokens, requests."""
    pool: bool = False
    """False: each tier is counted by itself and its price multiplied by the tier's multiplier.
    True: all tiers are counted together, each unit weighted by its tier's multiplier."""

    @property
    def decimals(self) -> int:
        """Counted quantities are integers of 10^-decimals of the unit."""
        return _DECIMALS[self.per]

    def _check_countable(self, quantity: Decimal, key: str) -> None:
        try:
            to_scaled(quantity, self.decimals)
        except ValueError:
            raise ValueError(f"{key} ({quantity}) has more than the {self.decimals} decimals of {self.per}") from None


class Banded(_PeriodItem):
    """Graduated bands (each part at its band's price) or volume bands (all of it at the last band's)."""

    model: Literal["graduated", "volume"]
    bands: Annotated[tuple[Band, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _rise_to_an_open_end(self) -> Self:
        if self.bands[-1].up_to is not None:
            raise ValueError("the last band has an end; leave out its up_to")
        bounds = [band.up_to for band in self.bands[:-1]]
        for bound in bounds:
            if bound is None:
                raise ValueError("a band before the last has no up_to")
            self._check_countable(bound, "up_to")
        for bound, following in pairwise(bounds):
            if bound is not None and following is not None and bound >= following:
                raise ValueError(f"bands must rise: up_to {following} follows {bound}")
        return self


class Package(_PeriodItem):
    """Blocks of `size`; every started block is charged in full."""

    model: Literal["package"]
    size: Quantity
    price: Amount
    """Currency units per block."""

    @model_validator(mode="after")
    def _can_be_counted(self) -> Self:
        self._check_countable(self.size, "size")
        return self


PeriodPrice = Annotated[Banded | Package, Field(discriminator="model")]


class Promise(Checked):
    """A tier's promise per statement period, and the credit if it was missed."""

    latency_ms_p95_max: Annotated[int, Field(strict=True, gt=0)] | None = None
    """95th percentile (nearest rank) of completed requests: queue, prefill and decode. Unit: milliseconds."""
    agreement_min: Share | None = None
    """Share of audited answers that agree with full depth, by the weights of their audits."""
    agreement_loss: Literal["differs", "strict"] = "differs"
    """The audits that it is settled from: those that lose a text that keeps fewer than three quarters of its tokens
    (`differs`) or fewer than 95 % of them (`strict`)."""
    audits_min: Annotated[int, Field(strict=True, gt=0, le=1_000_000)] = 100
    """Audits needed to settle it; with fewer it counts neither as kept nor as missed."""
    credit_percent: Percent
    """Share of the tier's discounted charges; given once, whether one or both were missed."""

    @model_validator(mode="after")
    def _promises_something(self) -> Self:
        if self.latency_ms_p95_max is None and self.agreement_min is None:
            raise ValueError("promises nothing; give latency_ms_p95_max or agreement_min")
        return self


class Terms(Checked):
    """The terms of a plan from one moment on, per statement period."""

    effective_from: Moment
    flat_fee: Amount | None = None
    """Currency units per period; pro rata for a part of a period."""
    minimum: Amount | None = None
    """Amount that usage is raised to, after the discount; pro rata for a part of a period."""
    discount_percent: Percent | None = None
    """Taken off every usage charge; not off the fee or the minimum."""
    items: tuple[PeriodPrice, ...] = ()
    """Items priced over the period; they replace the book's rate for that item on statements."""
    promises: dict[str, Promise] = Field(default_factory=dict)
    """By tier."""

    @model_validator(mode="after")
    def _one_price_per_item(self) -> Self:
        counted = [item.per for item in self.items]
        repeated = sorted({per for per in counted if counted.count(per) > 1})
        if repeated:
            raise ValueError(f"{repeated[0]} is priced twice; keep one of the items")
        return self


class Plan(Checked):
    """A plan: its own rates, if any, and terms."""

    prices: Timeline = ()
    """Rates of a request that replace the book's for tenants on this plan; empty for the book's."""
    terms: Annotated[tuple[Terms, ...], in_order("terms", "effective_from")] = ()
    """In order of `effective_from`; before the first the plan adds nothing."""

    def terms_at(self, moment: datetime) -> Terms | None:
        """The terms in force at a moment."""
        past = [terms for terms in self.terms if terms.effective_from <= moment]
        return past[-1] if past else None


class Customer(Checked):
    """A tenant's plan from one moment on."""

    tenant: Name
    plan: Name | None = None
    """None for the book's plain rates."""
    effective_from: Moment
    zone: str = "UTC"
    """IANA time zone of the tenant's statement periods."""

    @field_validator("zone")
    @classmethod
    def _is_a_zone(cls, name: str) -> str:
        load_zone(name)  # a PeriodError is a ValueError
        return name


class Credit(Checked):
    """Prepaid money of a tenant; it pays what statements come to until it is used up or has expired."""

    id: Name
    """Unique within the book."""
    tenant: Name
    amount: Amount
    effective_from: Moment
    """It pays statements whose period ends later than this."""
    expires_at: Moment | None = None
    """It pays no statement whose period begins at or after this time."""
    priority: Annotated[int, Field(strict=True, ge=0, le=1_000)] = 100
    """Lower numbers are used first, then credits that expire first."""

    @model_validator(mode="after")
    def _lasts(self) -> Self:
        if self.expires_at is not None and self.expires_at <= self.effective_from:
            raise ValueError(f"expires_at ({self.expires_at}) is not after {self.effective_from}")
        return self

    @property
    def order(self) -> tuple[int, bool, str, str, str]:
        """Sort key: what is used first."""
        expires = "" if self.expires_at is None else self.expires_at.isoformat()
        return (self.priority, self.expires_at is None, expires, self.effective_from.isoformat(), self.id)
