"""Energy and carbon of usage: measured and distributed, or modelled from executed FLOPs; the report says which.

    modelled   executed FLOPs / FLOPs per joule, a figure that somebody states with its source
    measured   an energy log over the period, distributed by executed FLOPs

Nothing is assumed: without a stated efficiency or a log there is no energy, and without a stated intensity of the grid
no carbon. Amounts of tiers and of tenants sum to the total. Knows no output format.
"""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from itertools import accumulate
from typing import TYPE_CHECKING, Final, Literal

from polar_billing.errors import QueryError
from polar_billing.metering.energy import Interval, read_energy_log
from polar_billing.prices.rating import COMPUTE
from polar_billing.reports import Part
from polar_billing.values.money import divide_half_even, from_scaled, plain, quotient, read_bounded, to_scaled

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from pathlib import Path

    from polar_billing.reports.summary import Figures, Summary
    from polar_billing.values.periods import Period

_SCALE: Final = 3
"""Decimals of what is stated."""
_DECIMALS: Final = 6
"""Decimals of joules and grams: an integer counts microjoules and micrograms."""
_MAX_EFFICIENCY: Final = 10**15
_MAX_INTENSITY: Final = 10_000
_PER_KWH: Final = 3_600_000


class EnergyBasis(Part):
    """The stated efficiency, or the measured log, and the carbon of the grid."""

    flops_per_joule: Decimal | None = None
    """Efficiency of the whole device at work; None if a log was given."""
    source: str
    """Source of that figure, or the log."""
    intervals: tuple[Interval, ...] = ()
    grid_grams_per_kwh: Decimal | None = None
    """Carbon dioxide equivalents. Unit: grams per kWh."""
    grid_source: str | None = None

    @property
    def kind(self) -> Literal["measured", "modelled"]:
        """`modelled` where an efficiency was stated."""
        return "modelled" if self.flops_per_joule is not None else "measured"

    def modelled_uj(self, flops: int) -> int:
        """The energy of some FLOPs at the stated efficiency. Unit: microjoules."""
        assert self.flops_per_joule is not None
        return divide_half_even(flops * 10 ** (_DECIMALS + _SCALE), to_scaled(self.flops_per_joule, _SCALE))

    def of_flops(self, flops: int) -> tuple[Decimal, Decimal | None]:
        """The modelled energy of some FLOPs in joules, and its carbon in grams, each rounded once."""
        used = self.modelled_uj(flops)
        carbon = self.carbon_ug(used)
        return from_scaled(used, _DECIMALS), None if carbon is None else from_scaled(carbon, _DECIMALS)

    def carbon_ug(self, microjoules: int) -> int | None:
        """Carbon of some energy; None without an intensity. Unit: micrograms."""
        if self.grid_grams_per_kwh is None:
            return None
        grams = to_scaled(self.grid_grams_per_kwh, _SCALE)
        return divide_half_even(microjoules * grams, _PER_KWH * 10**_SCALE)


class EnergyShare(Part):
    """The energy of one tier or tenant."""

    tenant: str | None
    tier: str | None
    joules: Decimal
    carbon_grams: Decimal | None


class EnergyReport(Part):
    """The energy of a report's usage; the sums over tiers, and over tenants, are the total."""

    basis: Literal["measured", "modelled"]
    source: str
    flops_per_joule: Decimal | None
    measured_seconds: Decimal | None
    """Part of the period that the log covers; None where energy is modelled."""
    joules: Decimal
    joules_saved: Decimal | None
    """Full depth less what the answers needed, at the same efficiency: drafts count in `joules` and not here, since
    full depth would have them, too. None if it is measured: full depth was not run."""
    grid_grams_per_kwh: Decimal | None
    grid_source: str | None
    carbon_grams: Decimal | None
    by_tier: tuple[EnergyShare, ...]
    by_tenant: tuple[EnergyShare, ...]

    @property
    def kwh(self) -> Decimal:
        """The total. Unit: kWh, 6 decimals."""
        return quotient(to_scaled(self.joules, _DECIMALS), _PER_KWH, _DECIMALS)

    @property
    def said(self) -> str:
        """The basis of the figures, in a sentence or two."""
        if self.flops_per_joule is not None:
            per_joule = plain(self.flops_per_joule)
            how = f"Modelled: executed FLOPs, drafts included, at {per_joule} FLOPs per joule ({self.source})."
        else:
            seconds = plain(self.measured_seconds or Decimal(0))
            how = (
                f"Measured: {self.source}, {seconds} s of the period, all that the machine used in them, idle or not; "
                "shared out by executed FLOPs."
            )
        if self.grid_grams_per_kwh is None:
            return how
        return f"{how} Carbon at {plain(self.grid_grams_per_kwh)} g CO2e per kWh ({self.grid_source})."


def read_energy(
    flops_per_joule: str | None, source: str | None, log: Path | None, grid: str | None, grid_source: str | None
) -> EnergyBasis | None:
    """Read the options about energy; None if they say nothing.

    Raises:
        QueryError: A number is out of range, a figure lacks its source, or there is nothing to use it on.
    """
    if flops_per_joule is not None and log is not None:
        raise QueryError("--flops-per-joule and --energy-log were both given.", hint="Give only one of them.")
    _together("--flops-per-joule", flops_per_joule, "--energy-source", source)
    _together("--grid-intensity", grid, "--grid-source", grid_source)
    if flops_per_joule is None and log is None:
        if grid is not None:
            raise QueryError(
                "--grid-intensity was given without energy.", hint="Add --flops-per-joule or --energy-log."
            )
        return None
    return EnergyBasis(
        flops_per_joule=read_bounded(flops_per_joule, "--flops-per-joule", most=_MAX_EFFICIENCY, decimals=_SCALE),
        source=source if source is not None else f"energy log {log.name}" if log is not None else "",
        intervals=() if log is None else tuple(read_energy_log(log)),
        grid_grams_per_kwh=read_bounded(grid, "--grid-intensity", most=_MAX_INTENSITY, decimals=_SCALE),
        grid_source=grid_source,
    )


def _together(option: str, value: str | None, source_option: str, source: str | None) -> None:
    if (value is None) != (source is None or not source.strip()):
        raise QueryError(
            f"{option} and {source_option} belong together: every figure needs its source.",
            hint=f'Give both, e.g. {source_option} "measured on this machine, 2026-11".',
        )


def energy_report(basis: EnergyBasis, summary: Summary, period: Period) -> EnergyReport:
    """Work out the energy of a period's usage.

    Raises:
        QueryError: It was to be measured, and the log has nothing of the period.
    """
    executed = _executed(summary.figures)
    seconds, saved = None, None
    if basis.kind == "modelled":
        total = basis.modelled_uj(executed)
        needed = to_scaled(summary.figures.compute_units, COMPUTE.decimals)
        full_depth = to_scaled(summary.figures.compute_units_full_depth, COMPUTE.decimals)
        saved = from_scaled(basis.modelled_uj(full_depth) - basis.modelled_uj(needed), _DECIMALS)
    else:
        total, covered = _measured(basis.intervals, period.since, period.until)
        if not covered:
            raise QueryError(f"{basis.source} has nothing of {period.label}.", hint="Name a log of that period.")
        seconds = quotient(covered // timedelta(microseconds=1), 10**3, 3)
    carbon = basis.carbon_ug(total)

    def shares(members: Sequence[tuple[str | None, str | None, Figures]]) -> tuple[EnergyShare, ...]:
        parts = [_executed(figures) for _, _, figures in members]
        grams = [None] * len(parts) if carbon is None else share_out(carbon, parts)
        return tuple(
            EnergyShare(
                tenant=tenant,
                tier=tier,
                joules=from_scaled(joules, _DECIMALS),
                carbon_grams=None if each is None else from_scaled(each, _DECIMALS),
            )
            for (tenant, tier, _), joules, each in zip(members, share_out(total, parts), grams, strict=True)
        )

    return EnergyReport(
        basis=basis.kind,
        source=basis.source,
        flops_per_joule=basis.flops_per_joule,
        measured_seconds=seconds,
        joules=from_scaled(total, _DECIMALS),
        joules_saved=saved,
        grid_grams_per_kwh=basis.grid_grams_per_kwh,
        grid_source=basis.grid_source,
        carbon_grams=None if carbon is None else from_scaled(carbon, _DECIMALS),
        by_tier=shares([(None, tier.tier, tier.figures) for tier in summary.tiers]),
        by_tenant=shares([(each.tenant, None, each.figures) for each in summary.tenants]),
    )


def _executed(figures: Figures) -> int:
    """The FLOPs that answers needed, and those that drafts executed beyond them."""
    return sum(to_scaled(units, COMPUTE.decimals) for units in (figures.compute_units, figures.compute_units_drafts))


def share_out(total: int, parts: Sequence[int]) -> list[int]:
    """Deal a total out in proportion to parts, in whole numbers that sum to it; nothing where every part is 0."""
    whole = sum(parts)
    if not whole:
        return [0] * len(parts)
    reached = [divide_half_even(total * part, whole) for part in accumulate(parts)]
    return [now - before for before, now in zip([0, *reached], reached, strict=False)]


def _measured(intervals: Sequence[Interval], since: datetime | None, until: datetime | None) -> tuple[int, timedelta]:
    """The microjoules that a log has of a period, and how long that is; intervals over its ends count in proportion."""
    total, covered = 0, timedelta()
    for interval in intervals:
        begin = interval.since if since is None else max(since, interval.since)
        end = interval.until if until is None else min(until, interval.until)
        if end > begin:
            used = sum(interval.microjoules.values())
            micro = timedelta(microseconds=1)
            total += divide_half_even(used * ((end - begin) // micro), (interval.until - interval.since) // micro)
            covered += end - begin
    return total, covered
