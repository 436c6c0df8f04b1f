"""Usage and reports as tables in the terminal.

The figures come from `query` and `report`; nothing is computed here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from polar_billing import text
from polar_billing.money import plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import RenderableType

    from polar_billing.query import UsageRow
    from polar_billing.report import Figures, Report, TenantReport
    from polar_billing.storage import StoredUsage

_LABEL_WIDTH: Final = 8
_WIDEST: Final = 1_000

__all__ = ["report_view", "requests_view", "show", "usage_view"]


def show(view: RenderableType, console: Console) -> None:
    """Print a view; where the console is too narrow for the digits, lines run over rather than lose any."""
    needed = console.measure(view, options=console.options.update(width=_WIDEST)).minimum
    console.width = max(console.width, needed)
    console.print(view)


def usage_view(rows: Sequence[UsageRow], *, title: str) -> RenderableType:
    """One line per group."""
    dimensions = list(rows[0].group)
    table = _table(title, dimensions)
    currency = rows[0].currency or ""
    _numbers(table, "requests", "tokens\nin", "\nout", "visits", "CU", "CU\nsaved", f"cost\n{currency}".strip())
    table.add_column("not completed", overflow="fold", min_width=_LABEL_WIDTH + 5)
    for row in rows:
        labels = [_label(name, value) for name, value in row.group.items()]
        _add(
            table,
            *labels,
            text.count(row.requests),
            text.count(row.tokens_input),
            text.count(row.tokens_output),
            text.count(row.visits),
            text.compute_units(row.compute_units),
            text.compute_units(row.compute_units_saved, signed=True),
            text.money(row.cost),
            text.outcomes(row.outcomes),
        )
    return Group(table, *_unrated(reason for row in rows for reason in row.unrated.items()))


def requests_view(usage: Sequence[StoredUsage], *, title: str, currencies: dict[str, str]) -> RenderableType:
    """One line per request; `currencies` by the hash of the price book."""
    table = _table(title, [])
    table.add_column("served (UTC)", no_wrap=True)
    table.add_column("request", overflow="fold", min_width=18)  # half a UUID
    for name in ("tenant", "tier"):
        table.add_column(name, overflow="fold", min_width=_LABEL_WIDTH)
    table.add_column("program", overflow="fold", min_width=_LABEL_WIDTH + 2)
    _numbers(table, "in", "out", "GFLOPs", "CU", "cost")
    table.add_column("outcome", overflow="fold", min_width=_LABEL_WIDTH + 1)
    for stored in usage:
        record = stored.record
        cost = text.DASH if stored.cost is None else f"{text.money(stored.cost)} {currencies[stored.price_book_hash]}"
        _add(
            table,
            f"{record.started_at:%Y-%m-%d %H:%M:%S}",
            record.request_id,
            record.tenant,
            text.tier_name(record.tier),
            record.program or text.DASH,
            text.count(record.tokens.input),
            text.count(record.tokens.output),
            f"{record.flops.total / 10**9:,.1f}",
            f"{record.compute_units:,.4f}",
            cost,
            str(record.outcome),
        )
    return Group(table, *_unrated((stored.unrated, 1) for stored in usage if stored.unrated is not None))


def report_view(report: Report) -> RenderableType:
    """The whole report: tiers over all tenants, then each tenant's statement."""
    parts: list[RenderableType] = [_heading(report), _tiers(report), Text(), _comparison(report), Text()]
    for tenant in report.tenants:
        parts += [_statement(tenant, report), Text()]
    parts += _unrated(report.figures.unrated.items())
    return Group(*parts)


def _heading(report: Report) -> Text:
    who = "every tenant" if report.tenant is None else f"tenant {report.tenant}"
    how = "rated again by" if report.rerated else "as charged by"
    books = ", ".join(book.id for book in report.price_books) or text.DASH
    return Text.assemble(
        ("PoLar tiered pricing report", "bold"),
        f" · {_printable(who)} · {report.period}\nledger {report.ledger} · {how} price book {books}\n",
    )


def _tiers(report: Report) -> Table:
    table = _table(None, ["tenant", "tier"])
    _numbers(table, "requests", "tokens\nin", "\nout", "CU", "CU\nsaved", "saved", "router", "p50", "p95")
    table.add_column("not completed", overflow="fold", min_width=_LABEL_WIDTH + 5)
    for tenant in report.tenants:
        for tier in tenant.tiers:
            _add(table, tenant.tenant, text.tier_name(tier.tier), *_usage_cells(tier.figures))
        table.add_section()
    _add(table, "total", "", *_usage_cells(report.figures), style="bold")
    return table


def _usage_cells(figures: Figures) -> list[str]:
    return [
        text.count(figures.requests),
        text.count(figures.tokens_input),
        text.count(figures.tokens_output),
        text.compute_units(figures.compute_units),
        text.compute_units(figures.compute_units_saved, signed=True),
        text.share(figures.saved_share, signed=True),
        text.share(figures.router_share, decimals=2),
        text.milliseconds(figures.latency_ns_p50),
        text.milliseconds(figures.latency_ns_p95),
        text.outcomes(figures.outcomes),
    ]


def _comparison(report: Report) -> Table:
    table = _table(f"Charges, {report.currency or 'nothing rated'}", ["tenant", "tier"])
    _numbers(table, "charge", "at full depth", "per token", "per 1,000\nrequests", "per million\ntokens")
    for tenant in report.tenants:
        for tier in tenant.tiers:
            _add(table, tenant.tenant, text.tier_name(tier.tier), *_money_cells(tier.figures))
        if tenant.rounding:
            _add(table, tenant.tenant, "rounding", text.money(tenant.rounding), "", "", "", "")
        table.add_section()
    _add(table, "total", "", *_money_cells(report.figures), style="bold")
    return table


def _money_cells(figures: Figures) -> list[str]:
    return [
        text.money(figures.charge),
        text.money(figures.charge_full_depth),
        text.money(figures.charge_per_token),
        text.money(figures.price_per_1000_requests),
        text.money(figures.price_per_million_tokens),
    ]


def _statement(tenant: TenantReport, report: Report) -> Table:
    currency = report.currency or ""
    table = _table(f"Statement of {tenant.tenant}, {report.period}", ["tier", "item"])
    _numbers(table, "quantity", "unit price", f"amount {currency}".strip())
    for line in tenant.lines:
        _add(
            table,
            text.tier_name(line.tier),
            line.item,
            f"{plain(line.quantity)} {line.unit}",
            f"{plain(line.unit_price)} / {line.unit}",
            text.money(line.amount),
        )
    _add(table, "", "rounding", "", "", text.money(tenant.rounding))
    table.add_section()
    _add(table, "total", "", "", "", text.money(tenant.total), style="bold")
    return table


def _table(title: str | None, labels: Iterable[str]) -> Table:
    heading = None if title is None else Text(_printable(title))
    table = Table(box=box.SIMPLE_HEAD, title=heading, title_justify="left", title_style="bold")
    table.show_edge = False
    table.pad_edge = False
    table.padding = (0, 1, 0, 0)
    for label in labels:
        table.add_column(label, overflow="fold", min_width=_LABEL_WIDTH)
    return table


def _add(table: Table, *cells: str, style: str | None = None) -> None:
    """Add a row of plain texts: a tenant called `[red]` is a name, not markup."""
    table.add_row(*(Text(_printable(cell)) for cell in cells), style=style)


def _printable(text: str) -> str:
    """A name must not steer the terminal either."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _numbers(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)


def _label(dimension: str, value: str | None) -> str:
    if dimension == "tier":
        return text.tier_name(value)
    return text.DASH if value is None else value


def _unrated(reasons: Iterable[tuple[str, int]]) -> list[Text]:
    counted: dict[str, int] = {}
    for reason, number in reasons:
        counted[reason] = counted.get(reason, 0) + number
    return [
        Text(f"{number:,} unrated, in no amount above: {reason}.", style="yellow")
        for reason, number in sorted(counted.items())
    ]
