"""Usage, reports, and promises with their audits as tables in the terminal.

The figures come from `query`, `report` and `drift`; computes nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from rich.console import Group
from rich.text import Text

from polar_billing.reports import text
from polar_billing.reports.text import Amounts
from polar_billing.reports.what_if_tables import energy_view, what_if_view
from polar_billing.values.money import exact_sum, plain
from polar_sdk.show.lines import printable
from polar_sdk.show.tables import LABEL_WIDTH, add_labels, add_numbers, add_row, as_text, new_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from rich.console import RenderableType
    from rich.table import Table

    from polar_billing.ledger.records import StoredUsage
    from polar_billing.reports.drift import PromiseDrift, Saved
    from polar_billing.reports.query import UsageRow
    from polar_billing.reports.report import Report
    from polar_billing.reports.summary import Figures, TenantReport
    from polar_billing.reports.text import Unit

    Columns = Mapping[str, Callable[[Figures], str]]
    """Heading → what stands in the column."""

_NOT_COMPLETED: Final = "not completed"
_USAGE: Final[Columns] = {
    "requests": lambda figures: text.count(figures.requests),
    "tokens\nin": lambda figures: text.count(figures.tokens_input),
    "\nout": lambda figures: text.count(figures.tokens_output),
    "CU": lambda figures: text.compute_units(figures.compute_units),
    "CU of\nprompts": lambda figures: text.compute_units(figures.compute_units_prompt),
    "\nanswers": lambda figures: text.compute_units(figures.compute_units_answer),
    "CU\nsaved": lambda figures: text.compute_units(figures.compute_units_saved, signed=True),
    "saved": lambda figures: text.share(figures.saved_share, signed=True),
    "router": lambda figures: text.share(figures.router_share, decimals=2),
}
_SERVICE: Final[Columns] = {
    "p50": lambda figures: text.milliseconds(figures.latency_ns_p50),
    "p95": lambda figures: text.milliseconds(figures.latency_ns_p95),
    "p99": lambda figures: text.milliseconds(figures.latency_ns_p99),
    _NOT_COMPLETED: lambda figures: text.outcomes(figures.outcomes),
}


def usage_view(rows: Sequence[UsageRow], *, title: str) -> RenderableType:
    """One line per group."""
    dimensions = list(rows[0].group)
    table = new_table(title, dimensions)
    currency = rows[0].currency or ""
    add_numbers(table, "requests", "tokens\nin", "\nout", "visits", "CU", "CU\nsaved", f"cost\n{currency}".strip())
    add_labels(table, _NOT_COMPLETED, width=LABEL_WIDTH + 5)
    for row in rows:
        nothing = {"tier": text.NO_TIER}
        add_row(
            table,
            *(nothing.get(name, text.DASH) if value is None else value for name, value in row.group.items()),
            text.count(row.requests),
            text.count(row.tokens_input),
            text.count(row.tokens_output),
            text.count(row.visits),
            text.compute_units(row.compute_units),
            text.compute_units(row.compute_units_saved, signed=True),
            text.money(row.cost),
            text.outcomes(row.outcomes),
        )
    return Group(table, *unrated_notes(reason for row in rows for reason in row.unrated.items()))


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
    return Group(table, *unrated_notes((stored.unrated, 1) for stored in usage if stored.unrated is not None))


def report_view(report: Report) -> RenderableType:
    """The whole report: usage, latency and charges of every tenant, then each tenant's lines."""
    amounts, figures = Amounts.of(report), report.figures
    parts: list[RenderableType] = [_heading(report), _by_tier(report, "Usage", _USAGE)]
    if figures.tokens_drafted:
        kept, drafted = text.count(figures.tokens_accepted), text.count(figures.tokens_drafted)
        beyond = text.compute_units(figures.compute_units_drafts)
        line = f"Drafts: {kept} of {drafted} tokens kept; {beyond} CU executed beyond those above."
        parts.append(as_text(line, "dim"))
    parts += [Text(), _by_tier(report, "Latency and outcome", _SERVICE), Text()]
    parts += [_promises(report, amounts), Text()] if report.promises else []
    parts += [promises_view(report.audited, history=False), Text()] if report.audited else []
    parts += [_comparison(report, amounts), Text()]
    parts += what_if_view(report, amounts)
    parts += energy_view(report)
    for tenant in report.tenants:
        parts += [_charges(tenant, report, amounts), *_issued(tenant), Text()]
    parts += unrated_notes(report.figures.unrated.items())
    parts += [
        as_text(f"{requests:,} disputed ({claim}), charged by what the server counted itself.", style="yellow")
        for claim, requests in report.disputed.items()
    ]
    if report.pruned:
        line = f"{report.pruned:,} requests of this period were pruned, and are left out here."
        parts.append(as_text(line, style="yellow"))
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


def _by_tier(report: Report, title: str, columns: Columns, rounding: Unit | None = None) -> Table:
    """A row for each tenant and tier, and one for the total; with a unit, one for each tenant's rounding as well."""
    table = new_table(title, ["tenant", "tier"])
    for name in columns:
        if name == _NOT_COMPLETED:
            add_labels(table, name, width=LABEL_WIDTH + 5)
        else:
            add_numbers(table, name)
    for tenant in report.tenants:
        for place, tier in enumerate(tenant.tiers):
            cells = (show(tier.figures) for show in columns.values())
            add_row(table, "" if place else tenant.tenant, text.tier_name(tier.tier), *cells)
        if rounding is not None and tenant.rounding:
            add_row(table, "", "rounding", rounding.show(tenant.rounding), *[""] * (len(columns) - 1))
        table.add_section()
    add_row(table, "total", "", *(show(report.figures) for show in columns.values()), style="bold")
    return table


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
    charges, prices = amounts.charges, amounts.prices
    units = dict.fromkeys((charges.words, prices.words))
    columns: Columns = {
        f"charge\n{charges.name}".strip(): lambda figures: charges.show(figures.charge),
        "at full\ndepth": lambda figures: charges.show(figures.charge_full_depth),
        "per\ntoken": lambda figures: charges.show(figures.charge_per_token),
        f"{prices.name} per\n1,000 requests".strip(): lambda figures: prices.show(figures.price_per_1000_requests),
        f"{prices.name} per\nmillion tokens".strip(): lambda figures: prices.show(figures.price_per_million_tokens),
    }
    return _by_tier(report, f"Charges, {' and '.join(units) or 'nothing rated'}", columns, rounding=charges)


def _charges(tenant: TenantReport, report: Report, amounts: Amounts) -> Table:
    unit = amounts.charges
    table = new_table(f"Charges of {tenant.tenant}, {report.period}", ["tier", "item"])
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


def _issued(tenant: TenantReport) -> Iterator[Text]:
    """A line for each issued statement, which says what is to be paid, and how it comes to another sum."""
    for statement, notes, due in tenant.statements_due():
        amounts = {
            "total with plan and late usage": statement.total,
            "prepaid": exact_sum((use.used for use in statement.credits), statement.decimals),
            "credit notes": exact_sum((note.amount for note in notes), statement.decimals),
            "due": due,
        }
        shown = (f"{what} {text.money(amount)}" for what, amount in amounts.items())
        yield as_text(f"Statement {statement.id}, {statement.period.label}: {', '.join(shown)} {statement.currency}.")
    for cut in tenant.statements_cut:
        yield as_text(f"Not shown, as its period is only partly this one: statement {cut}.")


def unrated_notes(reasons: Iterable[tuple[str, int]]) -> list[Text]:
    """A line for each reason that requests have no price."""
    counts: Counter[str] = Counter()
    for reason, requests in reasons:
        counts[reason] += requests
    return [
        as_text(f"{requests:,} unrated, not in the amounts above: {reason}.", style="yellow")
        for reason, requests in sorted(counts.items())
    ]


def promises_view(promises: Sequence[PromiseDrift], *, history: bool = True) -> RenderableType:
    """Promises one line each, and then each change of their states."""
    table = new_table("Promises and their audits", ["tier", "promise", "state", "since (UTC)"])
    add_numbers(table, "audits", "lost", "share lost", "promised", "evidence")
    for one in promises:
        interval = f"{text.share_of_float(one.low)} to {text.share_of_float(one.high)}"
        figures = (text.count(one.audits), text.count(one.losses), interval, f"≤ {text.share_of_float(one.alpha)}")
        style = "bold red" if one.state != "in force" else ""
        since = f"{one.since:%Y-%m-%d %H:%M}"
        add_row(table, one.tier, one.promise[:12], one.state, since, *figures, f"{one.evidence:.2f}", style=style)
    return Group(table, Text(), _promise_history(promises)) if history else table


def _promise_history(promises: Sequence[PromiseDrift]) -> Table:
    table = new_table("How they came to stand there", ["tier", "promise", "since (UTC)", "state"])
    add_labels(table, "by these audits")
    changes = [(change, one) for one in promises for change in one.history]
    for change, one in sorted(changes, key=lambda pair: (pair[0].since, pair[1].tier)):
        add_row(table, one.tier, one.promise[:12], f"{change.since:%Y-%m-%d %H:%M}", change.state, change.reason)
    return table


def saved_view(saved: Sequence[Saved], tag: str, period: str) -> Table:
    """Savings by tier, kind and length."""
    table = new_table(
        f"Saved against full depth by {tag} and length of prompts, {period}", ["tier", tag, "prompt tokens"]
    )
    add_numbers(table, "requests", "saved", "next tier", "would save")
    for one in saved:
        kind = text.DASH if one.kind is None else one.kind
        figures = (text.count(one.requests), text.share(one.saved, signed=True))
        add_row(table, one.tier, kind, length(one), *figures, one.next_tier or text.DASH, text.share(one.next_saved))
    return table


def length(saved: Saved) -> str:
    """The length of prompts in words."""
    return "longer" if saved.tokens_max is None else f"up to {saved.tokens_max:,}"
