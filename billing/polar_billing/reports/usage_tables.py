"""Usage and reports as tables in the terminal.

The figures come from `query` and `report`; computes nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from polar_billing.reports import text
from polar_billing.reports.text import Amounts
from polar_billing.reports.what_if_tables import energy_view, what_if_view
from polar_billing.values.money import plain
from polar_sdk.show.lines import printable
from polar_sdk.show.tables import LABEL_WIDTH, add_labels, add_numbers, add_row, as_text, new_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rich.console import RenderableType
    from rich.table import Table

    from polar_billing.ledger.records import StoredUsage
    from polar_billing.reports.query import UsageRow
    from polar_billing.reports.report import Report
    from polar_billing.reports.summary import Figures, TenantReport, TierReport


def usage_view(rows: Sequence[UsageRow], *, title: str) -> RenderableType:
    """One line per group."""
    dimensions = list(rows[0].group)
    table = new_table(title, dimensions)
    currency = rows[0].currency or ""
    add_numbers(table, "requests", "tokens\nin", "\nout", "visits", "CU", "CU\nsaved", f"cost\n{currency}".strip())
    add_labels(table, "not completed", width=LABEL_WIDTH + 5)
    for row in rows:
        labels = [_label(name, value) for name, value in row.group.items()]
        add_row(
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
    table = new_table(title, [])
    table.add_column("served (UTC)", no_wrap=True)
    add_labels(table, "request", width=18)  # half a UUID
    add_labels(table, "tenant", "tier")
    add_labels(table, "program", width=LABEL_WIDTH + 2)
    add_numbers(table, "in", "out", "GFLOPs", "CU", "cost")
    add_labels(table, "outcome", width=LABEL_WIDTH + 1)
    for stored in usage:
        record = stored.record
        cost = text.DASH if stored.cost is None else f"{text.money(stored.cost)} {currencies[stored.price_book_hash]}"
        add_row(
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
    """The whole report: usage, latency and charges of every tenant, then each tenant's lines."""
    amounts = Amounts.of(report)
    parts: list[RenderableType] = [_heading(report), _tiers(report), *_drafts(report.figures), Text()]
    parts += [_service(report), Text()]
    parts += [_promises(report, amounts), Text()] if report.promises else []
    parts += [_comparison(report, amounts), Text()]
    parts += what_if_view(report, amounts)
    parts += energy_view(report)
    for tenant in report.tenants:
        parts += [_statement(tenant, report, amounts), Text()]
    parts += _unrated(report.figures.unrated.items())
    return Group(*parts)


def _heading(report: Report) -> Text:
    who = "all tenants" if report.tenant is None else f"tenant {report.tenant}"
    how = "rated again by" if report.rerated else "charged by"
    books = ", ".join(book.id for book in report.price_books) or text.DASH
    return Text.assemble(
        ("PoLar tiered pricing report", "bold"),
        f" · {printable(f'{who} · {report.period}')}\n",
        printable(f"ledger {report.ledger} · {how} price book {books}"),
        "\n",
    )


def _tiers(report: Report) -> Table:
    table = new_table("Usage", ["tenant", "tier"])
    add_numbers(
        table, "requests", "tokens\nin", "\nout", "CU", "CU of\nprompts", "\nanswers", "CU\nsaved", "saved", "router"
    )
    return _by_tier(table, report, _usage_cells)


def _drafts(figures: Figures) -> list[Text]:
    """A line about drafts, if there were any."""
    if not figures.tokens_drafted:
        return []
    kept, drafted = text.count(figures.tokens_accepted), text.count(figures.tokens_drafted)
    beyond = text.compute_units(figures.compute_units_drafts)
    return [as_text(f"Drafts: {kept} of {drafted} tokens kept; {beyond} CU executed beyond those above.", "dim")]


def _usage_cells(figures: Figures) -> list[str]:
    return [
        text.count(figures.requests),
        text.count(figures.tokens_input),
        text.count(figures.tokens_output),
        text.compute_units(figures.compute_units),
        text.compute_units(figures.compute_units_prompt),
        text.compute_units(figures.compute_units_answer),
        text.compute_units(figures.compute_units_saved, signed=True),
        text.share(figures.saved_share, signed=True),
        text.share(figures.router_share, decimals=2),
    ]


def _service(report: Report) -> Table:
    """Latency and outcome by tenant and tier."""
    table = new_table("Latency and outcome", ["tenant", "tier"])
    add_numbers(table, "p50", "p95", "p99")
    add_labels(table, "not completed", width=LABEL_WIDTH + 5)
    return _by_tier(table, report, _service_cells)


def _service_cells(figures: Figures) -> list[str]:
    return [
        text.milliseconds(figures.latency_ns_p50),
        text.milliseconds(figures.latency_ns_p95),
        text.milliseconds(figures.latency_ns_p99),
        text.outcomes(figures.outcomes),
    ]


def _by_tier(table: Table, report: Report, cells: Callable[[Figures], Sequence[str]]) -> Table:
    """A row for each tenant and tier, and one for the total."""
    for tenant in report.tenants:
        for name, tier in _rows(tenant):
            add_row(table, name, text.tier_name(tier.tier), *cells(tier.figures))
        table.add_section()
    add_row(table, "total", "", *cells(report.figures), style="bold")
    return table


def _rows(tenant: TenantReport) -> Iterator[tuple[str, TierReport]]:
    """A tenant's tiers; only the first carries the tenant's name."""
    for index, tier in enumerate(tenant.tiers):
        yield ("" if index else tenant.tenant), tier


def _promises(report: Report, amounts: Amounts) -> Table:
    table = new_table("Promised latency, 95th percentile", ["tenant", "tier"])
    add_numbers(table, "promised", "p50", "p95", "p99", "took longer", f"credit\n{amounts.charges.name}".strip())
    add_labels(table, "kept", "promised by")
    for promise in report.promises:
        times = (promise.latency_ms_p95_max * 10**6, promise.latency_ns_p50, promise.latency_ns_p95)
        add_row(
            table,
            promise.tenant,
            promise.tier,
            *map(text.milliseconds, (*times, promise.latency_ns_p99)),
            f"{promise.missed:,} of {promise.requests:,}",
            amounts.charges.show(promise.credit),
            "kept" if promise.kept else "missed",
            promise.source,
        )
    return table


def _comparison(report: Report, amounts: Amounts) -> Table:
    units = dict.fromkeys((amounts.charges.words, amounts.prices.words))
    charges, prices = amounts.charges.name, amounts.prices.name
    table = new_table(f"Charges, {' and '.join(units) or 'nothing rated'}", ["tenant", "tier"])
    add_numbers(table, f"charge\n{charges}".strip(), "at full\ndepth", "per\ntoken")
    add_numbers(table, f"{prices} per\n1,000 requests".strip(), f"{prices} per\nmillion tokens".strip())
    for tenant in report.tenants:
        for name, tier in _rows(tenant):
            add_row(table, name, text.tier_name(tier.tier), *_money_cells(tier.figures, amounts))
        if tenant.rounding:
            add_row(table, "", "rounding", amounts.charges.show(tenant.rounding), "", "", "", "")
        table.add_section()
    add_row(table, "total", "", *_money_cells(report.figures, amounts), style="bold")
    return table


def _money_cells(figures: Figures, amounts: Amounts) -> list[str]:
    return [
        amounts.charges.show(figures.charge),
        amounts.charges.show(figures.charge_full_depth),
        amounts.charges.show(figures.charge_per_token),
        amounts.prices.show(figures.price_per_1000_requests),
        amounts.prices.show(figures.price_per_million_tokens),
    ]


def _statement(tenant: TenantReport, report: Report, amounts: Amounts) -> Table:
    unit = amounts.charges
    table = new_table(f"Statement of {tenant.tenant}, {report.period}", ["tier", "item"])
    add_numbers(table, "quantity", f"{report.currency or ''} per unit".strip(), f"amount {unit.name}".strip())
    for line in tenant.lines:
        add_row(
            table,
            text.tier_name(line.tier),
            line.item,
            f"{plain(line.quantity)} {line.unit}",
            f"{plain(line.unit_price)} / {line.unit}",
            unit.show(line.amount),
        )
    add_row(table, "", "rounding", "", "", unit.show(tenant.rounding))
    table.add_section()
    add_row(table, "total", "", "", "", unit.show(tenant.total), style="bold")
    return table


def _label(dimension: str, value: str | None) -> str:
    if dimension == "tier":
        return text.tier_name(value)
    return text.DASH if value is None else value


def _unrated(reasons: Iterable[tuple[str, int]]) -> list[Text]:
    counts: Counter[str] = Counter()
    for reason, requests in reasons:
        counts[reason] += requests
    return [
        as_text(f"{requests:,} unrated, not in the amounts above: {reason}.", style="yellow")
        for reason, requests in sorted(counts.items())
    ]
