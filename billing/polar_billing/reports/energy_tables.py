"""Energy and carbon of a report as tables in the terminal. Computes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from polar_billing.reports import text
from polar_sdk.show.tables import add_numbers, add_row, as_text, new_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from polar_billing.reports.report import Report


def energy_view(report: Report) -> Iterator[RenderableType]:
    """A table by tier and tenant and what it rests on; nothing where nothing was asked."""
    energy = report.energy
    if energy is None:
        return
    table = new_table(f"Energy, {energy.basis}: {text.rate(energy.kwh)} kWh", ["", "of"])
    with_carbon = energy.carbon_grams is not None
    add_numbers(table, "joules", *(["g CO2e"] if with_carbon else []))
    for row in (*energy.by_tier, *energy.by_tenant):
        kind, name = ("tier", text.tier_name(row.tier)) if row.tenant is None else ("tenant", row.tenant)
        add_row(table, kind, name, text.money(row.joules), *([text.money(row.carbon_grams)] if with_carbon else []))
    total = [text.money(energy.joules), *([text.money(energy.carbon_grams)] if with_carbon else [])]
    add_row(table, "all", "", *total, style="bold")
    yield table
    if energy.joules_saved is not None:
        yield as_text(f"At full depth it would have been {text.signed_money(energy.joules_saved)} joules more.")
    yield as_text(energy.said)
    yield Text()
