"""Other prices and mixes, hardware and energy as tables in the terminal, with what they assume. Computes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from polar_billing.reports import text
from polar_billing.values.money import plain
from polar_sdk.show.lines import printable
from polar_sdk.show.tables import add_numbers, add_row, as_text, new_table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from decimal import Decimal

    from rich.console import RenderableType
    from rich.table import Table

    from polar_billing.reports.hardware import HardwareReport
    from polar_billing.reports.report import Report
    from polar_billing.reports.text import Amounts, Unit
    from polar_billing.reports.what_if import Scenario, WhatIf

AS_CHARGED = "as charged"


def what_if_view(report: Report, amounts: Amounts) -> Iterator[RenderableType]:
    """Tables of scenarios and of the cost of the hardware; nothing if nothing was asked."""
    answered = report.what_if
    if answered is None:
        return
    if answered.scenarios:
        yield from (_scenarios(report, answered, amounts), Text())
        if len(report.tenants) > 1:
            yield from (_by_tenant(report, answered, amounts), Text())
    if report.token_pricing:
        yield from (_tokens(report, amounts), Text())
    if report.hardware is not None:
        yield from (_hardware(report, report.hardware, amounts), Text(), _margins(report.hardware, amounts), Text())
    yield as_text("What these figures assume", "bold")
    for assumption in answered.assumptions:
        yield as_text(f"· {assumption}")
    yield Text()


def energy_view(report: Report) -> Iterator[RenderableType]:
    """A table by tier and tenant and what it rests on; nothing if nothing was asked."""
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


def name_of(scenario: Scenario) -> tuple[str, str]:
    """Price book and mix of a scenario, in words."""
    return scenario.price_book, scenario.mix or "as recorded"


def _scenarios(report: Report, answered: WhatIf, amounts: Amounts) -> Table:
    unit, own = amounts.charges, report.currency
    table = new_table("What if", ["price book", "tiers"])
    per_1000 = f"{amounts.prices.name} per\n1,000 requests"
    add_numbers(table, "CU", f"charge\n{unit.name}".strip(), "\ndifference", per_1000.strip())
    with_cost = report.hardware is not None
    add_numbers(table, *(["hardware", "margin"] if with_cost else []))
    hardware = report.hardware
    margin = [] if hardware is None else [unit.show(hardware.cost), unit.show(hardware.margin, signed=True)]
    books = ", ".join(book.id for book in report.price_books)
    cells = [text.compute_units(report.figures.compute_units), unit.show(report.total), text.DASH]
    price = amounts.prices.show(report.figures.price_per_1000_requests)
    add_row(table, books, AS_CHARGED, *cells, price, *margin, style="bold")
    for scenario in answered.scenarios:
        cells = [text.compute_units(scenario.compute_units), _in(unit, scenario.charge, scenario, own)]
        cells += [unit.show(scenario.difference, signed=True)]
        cells += [_in(amounts.prices, scenario.per_1000_requests, scenario, own)]
        cells += [unit.show(scenario.hardware_cost), unit.show(scenario.margin, signed=True)] if with_cost else []
        add_row(table, *name_of(scenario), *cells)
    return table


def _in(unit: Unit, amount: Decimal | None, scenario: Scenario, own: str | None) -> str:
    """An amount of a scenario; with its currency, where that is not the report's."""
    if scenario.currency == own or amount is None:
        return unit.show(amount)
    return f"{text.money(amount)} {scenario.currency}"


def _by_tenant(report: Report, answered: WhatIf, amounts: Amounts) -> Table:
    unit, own = amounts.charges, report.currency
    table = new_table(f"What each tenant would pay, {unit.words}", ["tenant"])
    add_numbers(table, AS_CHARGED)
    for scenario in answered.scenarios:
        book, mix = name_of(scenario)
        add_numbers(table, "\n".join(map(printable, (book, *mix.split(", ")))))  # a heading may have lines, a name none
    for place, tenant in enumerate(report.tenants):
        others = (_in(unit, scenario.tenants[place].charge, scenario, own) for scenario in answered.scenarios)
        add_row(table, tenant.tenant, unit.show(tenant.total), *others)
    return table


def _tokens(report: Report, amounts: Amounts) -> Table:
    unit = amounts.charges
    table = new_table(f"Per-compute beside per-token prices, {unit.words}", ["tenant"])
    add_numbers(table, "per compute", "per token", "per token at\nequal revenue", "\ndifference")
    table.add_column("because compute is charged")
    for row in report.token_pricing:
        figures = map(unit.show, (row.per_compute, row.per_token, row.at_equal_revenue))
        add_row(table, row.tenant, *figures, unit.show(row.difference, signed=True), row.winner)
    return table


def _hardware(report: Report, hardware: HardwareReport, amounts: Amounts) -> Table:
    money = report.currency or ""
    table = new_table(f"Break-even at {plain(hardware.per_device_hour)} {money} per device-hour".strip(), ["", "now"])
    table.add_column("to break even")
    rate = hardware.break_even_tokens_per_second
    throughput = f"{text.rate(hardware.tokens_per_second)} tokens/s, {hardware.measured}"
    add_row(table, "throughput of a device", throughput, text.DASH if rate is None else f"{text.rate(rate)} tokens/s")
    unit, prices = amounts.charges, amounts.prices
    charged, cost = map(prices.show, (hardware.charge_per_million_tokens, hardware.cost_per_million_tokens))
    add_row(table, f"{prices.name} per million tokens", charged, cost)
    add_row(table, f"charge, {unit.name}", unit.show(report.figures.charge), unit.show(hardware.cost))
    left = unit.show(hardware.margin, signed=True)
    share = f" ({text.share(hardware.margin_share, signed=True)} of the charge)" if hardware.margin_share else ""
    add_row(table, f"margin, {unit.name}", f"{left}{share}", "0")
    return table


def _margins(hardware: HardwareReport, amounts: Amounts) -> Table:
    unit = amounts.charges
    table = new_table(f"Margin by tier and tenant, {unit.words or 'nothing rated'}", ["", "of"])
    add_numbers(table, "charge", "hardware", "margin")
    for row in (*hardware.by_tier, *hardware.by_tenant):
        kind, name = ("tier", text.tier_name(row.tier)) if row.tenant is None else ("tenant", row.tenant)
        add_row(table, kind, name, unit.show(row.charge), unit.show(row.cost), unit.show(row.margin, signed=True))
    return table
