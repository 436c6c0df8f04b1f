"""The cost of the hardware that served some usage, at a stated price per device-hour, and what is left of the charges.

Device time comes from a stated throughput, or from the recorded times: the time in which a device had at least one
request, counted once even if it had several. Idle hours are in neither. It is distributed by the FLOPs that answers
needed: drafts run in rows that would be idle.
"""

from __future__ import annotations

from array import array
from decimal import Decimal
from typing import TYPE_CHECKING, Final, Literal

from polar_billing.errors import QueryError
from polar_billing.prices.rating import COMPUTE
from polar_billing.reports import Part
from polar_billing.values.canonical import to_microseconds
from polar_billing.values.money import (
    STORED_SCALE,
    divide_half_even,
    exact_difference,
    from_scaled,
    quotient,
    read_bounded,
    to_scaled,
)

if TYPE_CHECKING:
    from polar_billing.reports.summary import Figures, Summary
    from polar_sdk.usage import UsageRecord

_NS_PER_HOUR: Final = 3_600 * 10**9
_RATE_DECIMALS: Final = 3
_MAX_PRICE: Final = 10**6
_MAX_RATE: Final = 10**9


class Hardware(Part):
    """The stated price and throughput of a device."""

    per_device_hour: Decimal
    """Unit: currency units."""
    tokens_per_second: Decimal | None
    """Throughput of one device, prompt and answer together; None to take it from the recorded times."""


class Margin(Part):
    """A charge less the cost of its compute."""

    tenant: str | None
    """None over all tenants."""
    tier: str | None
    """None for programs named by hand, and where `tenant` is named."""
    charge: Decimal | None
    cost: Decimal
    """Its share of the device time, by the FLOPs that its answers needed; unrated and free requests included."""
    margin: Decimal | None
    """`charge - cost`."""


class HardwareReport(Part):
    """The cost of the hardware beside the charges. Amounts: the report's currency."""

    per_device_hour: Decimal
    tokens: int
    """Prompt and answer tokens of all requests."""
    tokens_per_second: Decimal
    """Throughput of one device while it had work."""
    measured: Literal["stated", "recorded"]
    devices: tuple[str, ...]
    """The devices of the recorded times."""
    device_seconds: Decimal
    cost: Decimal
    margin: Decimal | None
    margin_share: Decimal | None
    """Margin as a share of the charge."""
    cost_per_million_tokens: Decimal
    """The break-even price: a million tokens at it pay for the device."""
    charge_per_million_tokens: Decimal | None
    break_even_tokens_per_second: Decimal | None
    """The throughput at which the charge pays for the device; None if nothing is charged."""
    by_tier: tuple[Margin, ...]
    by_tenant: tuple[Margin, ...]


def read_hardware(per_device_hour: str | None, tokens_per_second: str | None) -> Hardware | None:
    """Read the options about the hardware; None if they say nothing.

    Raises:
        QueryError: A number is out of range, or a throughput was given without a price.
    """
    price = read_bounded(per_device_hour, "--device-hour", most=_MAX_PRICE, decimals=STORED_SCALE)
    rate = read_bounded(tokens_per_second, "--tokens-per-second", most=_MAX_RATE, decimals=_RATE_DECIMALS)
    if price is None:
        if rate is not None:
            raise QueryError(
                "--tokens-per-second was given without a price of the device.", hint="Add one, e.g. --device-hour 0.80."
            )
        return None
    return Hardware(per_device_hour=price, tokens_per_second=rate)


class BusyTime:
    """Adds up in which time devices had work, from the recorded times of requests in any order."""

    def __init__(self) -> None:
        self._spans: dict[str, tuple[array[int], array[int]]] = {}

    def add(self, record: UsageRecord) -> None:
        """Take in one request: from the end of its wait to the end of its decoding."""
        if busy := record.prefill_ns + record.decode_ns:
            begin = to_microseconds(record.started_at) * 1_000 + record.queue_ns
            begins, ends = self._spans.setdefault(record.device, (array("q"), array("q")))
            begins.append(begin)
            ends.append(begin + busy)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that had work, by name."""
        return tuple(sorted(self._spans))

    @property
    def ns(self) -> int:
        """Time in which each device had at least one request, added up over the devices. Unit: nanoseconds."""
        total = 0
        for spans in self._spans.values():
            reached = -(2**63)
            for begin, end in sorted(zip(*spans, strict=True)):
                if end > reached:
                    total += end - max(begin, reached)
                    reached = end
        return total


def hardware_report(hardware: Hardware, busy: BusyTime, summary: Summary) -> HardwareReport:
    """Set the cost of the hardware beside the charges; a throughput that was not stated is the recorded one.

    Raises:
        QueryError: No throughput was stated, and the usage has no times or no tokens.
    """
    decimals, figures = summary.decimals, summary.figures
    tokens = figures.tokens_input + figures.tokens_output
    stated = hardware.tokens_per_second
    if stated is not None:
        device_ns = divide_half_even(tokens * 10**9 * 10**_RATE_DECIMALS, to_scaled(stated, _RATE_DECIMALS))
    else:
        device_ns = busy.ns
        if not device_ns or not tokens:
            raise QueryError(
                "this usage has no recorded times to compute a throughput from.",
                hint="State it: --tokens-per-second 40.",
            )
    price = to_scaled(hardware.per_device_hour, STORED_SCALE)

    def money(numerator: int, denominator: int) -> Decimal:
        """A part of the price of one device-nanosecond, in the report's decimals."""
        step = int(10 ** (STORED_SCALE - decimals))
        return quotient(numerator * price, denominator * _NS_PER_HOUR * step, decimals)

    whole = to_scaled(figures.compute_units, COMPUTE.decimals)

    def margin(part: Figures, tenant: str | None, tier: str | None) -> Margin:
        flops = to_scaled(part.compute_units, COMPUTE.decimals)
        cost = money(device_ns * flops, whole) if whole else from_scaled(0, decimals)
        left = None if part.charge is None else exact_difference(part.charge, cost, decimals)
        return Margin(tenant=tenant, tier=tier, charge=part.charge, cost=cost, margin=left)

    cost, charge = money(device_ns, 1), figures.charge
    left = None if charge is None else exact_difference(charge, cost, decimals)
    per_token = None if not charge or not tokens else (to_scaled(charge, decimals), tokens)
    return HardwareReport(
        per_device_hour=hardware.per_device_hour,
        tokens=tokens,
        tokens_per_second=stated if stated is not None else _rate(tokens * 10**9, device_ns),
        measured="recorded" if stated is None else "stated",
        devices=() if stated is not None else busy.devices,
        device_seconds=quotient(device_ns, 10**6, 3),
        cost=cost,
        margin=left,
        margin_share=None
        if left is None or not charge
        else quotient(to_scaled(left, decimals) * 10**6, to_scaled(charge, decimals), 6),
        cost_per_million_tokens=money(device_ns * 10**6, tokens) if tokens else from_scaled(0, decimals),
        charge_per_million_tokens=None if per_token is None else quotient(per_token[0] * 10**6, per_token[1], decimals),
        break_even_tokens_per_second=None
        if per_token is None
        else _rate(price * per_token[1], per_token[0] * int(10 ** (STORED_SCALE - decimals)) * 3_600),
        by_tier=tuple(margin(tier.figures, None, tier.tier) for tier in summary.tiers),
        by_tenant=tuple(margin(each.figures, each.tenant, None) for each in summary.tenants),
    )


def _rate(numerator: int, denominator: int) -> Decimal:
    return quotient(numerator * 10**_RATE_DECIMALS, denominator, _RATE_DECIMALS)
