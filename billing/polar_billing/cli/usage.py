"""The commands `polar usage` and `polar report`.

Arguments in, text out; the figures come from `query` and `report`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_billing.cli.options import (
    CsvOption,
    CurrencyOption,
    JsonOption,
    LedgerOption,
    MonthOption,
    PricesOption,
    SinceOption,
    TenantOption,
    TierOption,
    UntilOption,
    ZoneOption,
    book_of,
    open_ledger,
    period_of,
    say_nothing_found,
    selection_of,
    show,
    show_json,
    write_file,
)

if TYPE_CHECKING:
    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import Selection


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(
        "usage",
        epilog="Example: polar usage --tenant acme --month 2026-11 --by day --by tier",
    )(usage)
    app.command("report", epilog="Example: polar report --month 2026-11 --html report.html")(report)


def usage(
    ledger: LedgerOption = None,
    tenant: TenantOption = None,
    month: MonthOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    zone: ZoneOption = "UTC",
    tier: TierOption = None,
    model: Annotated[str | None, typer.Option(help="Only this model.", metavar="NAME")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Only requests with this tag.", metavar="KEY=VALUE")] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(help="Group by tenant, tier, model, program, outcome, day, month, tag:KEY, …", metavar="WHAT"),
    ] = None,
    requests: Annotated[bool, typer.Option("--requests", help="List single requests, the latest first.")] = False,
    last: Annotated[int, typer.Option(min=1, help="How many requests --requests lists.")] = 20,
    prices: PricesOption = None,
    currency: CurrencyOption = None,
    as_json: JsonOption = False,
    csv: CsvOption = None,
) -> None:
    """Show who used what: requests, tokens, layer visits, compute units and cost.

    Without --tenant it shows every tenant of the ledger, and without a period all time.
    """
    selection = selection_of(tenant, period_of(month, since, until, zone), tier, model, tag or [])
    with open_ledger(ledger) as store:
        if requests:
            _show_requests(store, selection, last, as_json)
            return
        from polar_billing.reports.csv import usage_csv
        from polar_billing.reports.query import usage_rows
        from polar_billing.reports.usage_tables import usage_view

        groups = by or ["tenant", "tier"]
        rows = usage_rows(store, selection, by=groups, prices=book_of(prices), currency=currency)
        if csv is not None:
            write_file(csv, usage_csv(rows))
        if as_json:
            show_json([row.model_dump(mode="json") for row in rows])
        elif not rows:
            say_nothing_found(store, selection)
        elif csv is None:
            show(usage_view(rows, title=f"Usage, {selection.period.label}"))


def report(
    ledger: LedgerOption = None,
    tenant: TenantOption = None,
    month: MonthOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    zone: ZoneOption = "UTC",
    tier: TierOption = None,
    prices: PricesOption = None,
    currency: CurrencyOption = None,
    as_json: JsonOption = False,
    csv: CsvOption = None,
    compare: Annotated[
        list[Path] | None, typer.Option(help="Show the same usage under this price book as well.", metavar="FILE")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained HTML file.", metavar="FILE")] = None,
) -> None:
    """Report usage and charges by tenant and tier, beside full depth and per-token pricing.

    Without --tenant it is the operator's view over every tenant, and without a period over all time.
    """
    from polar_billing.prices.book import PriceBook

    selection = selection_of(tenant, period_of(month, since, until, zone), tier, None, [])
    with open_ledger(ledger) as store:
        from polar_billing.reports.csv import report_csv
        from polar_billing.reports.report import build_report
        from polar_billing.reports.usage_tables import report_view

        books = [PriceBook.load(file) for file in compare or []]
        made = build_report(store, selection, prices=book_of(prices), currency=currency, compare=books)
        if html is not None:
            from polar_billing.reports.html import report_html

            write_file(html, report_html(made))
        if csv is not None:
            write_file(csv, report_csv(made))
        if as_json:
            show_json(made.model_dump(mode="json"))
        elif made.is_empty:
            say_nothing_found(store, selection)
        elif csv is None and html is None:
            show(report_view(made))


def _show_requests(store: Ledger, selection: Selection, last: int, as_json: bool) -> None:
    from polar_billing.reports.usage_tables import requests_view

    found = list(store.read(selection, newest=last))
    currencies = {digest: book.currency for digest, book in store.price_books().items()}
    if as_json:
        show_json(
            [
                {
                    "seq": stored.seq,
                    "stored_at": stored.stored_at.isoformat(),
                    "cost": None if stored.cost is None else f"{stored.cost:f}",
                    "currency": currencies[stored.price_book_hash],
                    "unrated": stored.unrated,
                    **stored.record.model_dump(mode="json"),
                }
                for stored in found
            ]
        )
    elif not found:
        say_nothing_found(store, selection)
    else:
        show(requests_view(found, title=f"The last {len(found)} requests", currencies=currencies))
