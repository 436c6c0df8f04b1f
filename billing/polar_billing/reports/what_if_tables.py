"""Answers to a report's questions as tables in the terminal, each with what it assumes. Computes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from polar_billing.reports import text
from polar_billing.values.money import plain
from polar_sdk.show.tables import add_numbers, add_row, as_text, new_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.table import Table

    from polar_billing.reports.hardware import HardwareReport
    from polar_billing.reports.report import Report
    from polar_billing.reports.what_if import Scenario, WhatIf

AS_CHARGED = "as charged"


def what_if_view(report: Report) -> Iterator[RenderableType]:
    """Tables of what would have been, and of what the hardware costs; nothing where nothing was asked."""
    answered = report.what_if
    if answered is None:
        return
    if answered.scenarios:
        yield from (_scenarios(report, answered), Text())
        if len(report.tenants) > 1:
            yield from (_by_tenant(report, answered), Text())
    if report.token_pricing:
        yield from (_tokens(report), Text())
    if report.hardware is not None:
        yield from (_hardware(report, report.hardware), Text(), _margins(report, report.hardware), Text())
    yield as_text("What these figures assume", "bold")
    for assumption in answered.assumptions:
        yield as_text(f"· {assumption}")
    yield Text()


def name_of(scenario: Scenario) -> tuple[str, str]:
    """Price book and mix of a scenario, in words."""
    return scenario.price_book, scenario.mix or "as recorded"


def _scenarios(report: Report, answered: WhatIf) -> Table:
    table = new_table("What if", ["price book", "tiers"])
    add_numbers(table, "CU", f"charge\n{report.currency or ''}".strip(), "\ndifference", "per 1,000\nrequests")
    with_cost = report.hardware is not None
    add_numbers(table, *(["hardware", "margin"] if with_cost else []))
    books = ", ".join(book.id for book in report.price_books)
    hardware = report.hardware
    margin = [] if hardware is None else [text.money(hardware.cost), text.signed_money(hardware.margin)]
    units = text.compute_units(report.figures.compute_units)
    per_1000 = text.money(report.figures.price_per_1000_requests)
    add_row(table, books, AS_CHARGED, units, text.money(report.total), text.DASH, per_1000, *margin, style="bold")
    for scenario in answered.scenarios:
        charge = text.money(scenario.charge)
        charge += f" {scenario.currency}" if scenario.currency != report.currency else ""
        cells = [text.compute_units(scenario.compute_units), charge, text.signed_money(scenario.difference)]
        cells.append(text.money(scenario.per_1000_requests))
        cells += [text.money(scenario.hardware_cost), text.signed_money(scenario.margin)] if with_cost else []
        add_row(table, *name_of(scenario), *cells)
    return table


def _by_tenant(report: Report, answered: WhatIf) -> Table:
    table = new_table("What each tenant would pay", ["tenant"])
    add_numbers(table, AS_CHARGED)
    for scenario in answered.scenarios:
        book, mix = name_of(scenario)
        add_numbers(table, "\n".join([book, *mix.split(", ")]))
    for place, tenant in enumerate(report.tenants):
        others = (text.money(scenario.tenants[place].charge) for scenario in answered.scenarios)
        add_row(table, tenant.tenant, text.money(tenant.total), *others)
    return table


def _tokens(report: Report) -> Table:
    table = new_table(f"Per-compute beside per-token prices, {report.currency}", ["tenant"])
    add_numbers(table, "per compute", "per token", "per token at\nequal revenue", "\ndifference")
    table.add_column("because compute is charged")
    for row in report.token_pricing:
        amounts = (row.per_compute, row.per_token, row.at_equal_revenue)
        add_row(table, row.tenant, *map(text.money, amounts), text.signed_money(row.difference), row.winner)
    return table


def _hardware(report: Report, hardware: HardwareReport) -> Table:
    money = report.currency or ""
    table = new_table(f"Break-even at {plain(hardware.per_device_hour)} {money} per device-hour".strip(), ["", "now"])
    table.add_column("to break even")
    rate = hardware.break_even_tokens_per_second
    throughput = f"{plain(hardware.tokens_per_second)} tokens/s, {hardware.measured}"
    add_row(table, "throughput of a device", throughput, text.DASH if rate is None else f"{plain(rate)} tokens/s")
    charged = text.money(hardware.charge_per_million_tokens)
    add_row(table, "charge per million tokens", charged, text.money(hardware.cost_per_million_tokens))
    add_row(table, "charge", text.money(report.figures.charge), text.money(hardware.cost))
    margin = f"{text.signed_money(hardware.margin)} ({text.share(hardware.margin_share, signed=True)} of the charge)"
    add_row(table, "margin", text.DASH if hardware.margin is None else margin, "0")
    return table


def _margins(report: Report, hardware: HardwareReport) -> Table:
    table = new_table(f"Margin by tier and tenant, {report.currency or 'nothing rated'}", ["", "of"])
    add_numbers(table, "charge", "hardware", "margin")
    for row in (*hardware.by_tier, *hardware.by_tenant):
        kind, name = ("tier", text.tier_name(row.tier)) if row.tenant is None else ("tenant", row.tenant)
        amounts = (text.money(row.charge), text.money(row.cost), text.signed_money(row.margin))
        add_row(table, kind, name, *amounts)
    return table
