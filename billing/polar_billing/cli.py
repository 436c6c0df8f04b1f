"""The commands `polar usage` and `polar report`.

Arguments in, text out; the figures come from `query` and `report`. Heavy imports wait until a command runs,
so that `polar --help` stays quick and works without the billing extra.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polar_billing.errors import MissingExtraError, OutputError, QueryError

if TYPE_CHECKING:
    from polar_billing.periods import Period
    from polar_billing.price_book import PriceBook
    from polar_billing.storage import LedgerStorage, Selection

__all__ = ["register"]

LedgerOption = Annotated[
    str | None,
    typer.Option(help="Ledger URL or SQLite file; POLAR_LEDGER or the user's data folder by default.", metavar="URL"),
]
TenantOption = Annotated[
    str | None, typer.Option(help="Only this tenant; without it every tenant of the ledger.", metavar="NAME")
]
MonthOption = Annotated[str | None, typer.Option(help="A calendar month, e.g. 2026-11.", metavar="YYYY-MM")]
SinceOption = Annotated[str | None, typer.Option(help="First day or moment of the period.", metavar="DATE")]
UntilOption = Annotated[str | None, typer.Option(help="End of the period, itself excluded.", metavar="DATE")]
ZoneOption = Annotated[str, typer.Option(help="IANA time zone that dates are meant in.", metavar="ZONE")]
TierOption = Annotated[str | None, typer.Option(help="Only this tier.", metavar="NAME")]
PricesOption = Annotated[
    Path | None,
    typer.Option(
        help="Rate all of it by this price book, not by the book each request was charged by.", metavar="FILE"
    ),
]
CurrencyOption = Annotated[str | None, typer.Option(help="Only what is charged in this currency.", metavar="CODE")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to standard output.")]
CsvOption = Annotated[Path | None, typer.Option(help="Write CSV to this file; - for standard output.", metavar="FILE")]


def register(app: typer.Typer) -> None:
    """Add the commands of this package to the `polar` program."""
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
    from polar_billing.query import usage_rows
    from polar_billing.render_csv import usage_csv
    from polar_billing.render_terminal import usage_view

    selection = _selection(tenant, _period(month, since, until, zone), tier, model, tag or [])
    with _open(ledger) as store:
        if requests:
            _show_requests(store, selection, last, as_json)
            return
        groups = by or ["tenant", "tier"]
        rows = usage_rows(store, selection, by=groups, prices=_book(prices), currency=currency)
        if csv is not None:
            _write(csv, usage_csv(rows))
        if as_json:
            _print_json([row.model_dump(mode="json") for row in rows])
        elif not rows:
            _say_nothing_found(store, selection)
        elif csv is None:
            _print(usage_view(rows, title=f"Usage, {selection.period.label}"))


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
    html: Annotated[Path | None, typer.Option(help="Write one self-contained HTML file.", metavar="FILE")] = None,
) -> None:
    """Report usage and charges by tenant and tier, beside full depth and per-token pricing.

    Without --tenant it is the operator's view over every tenant, and without a period over all time.
    """
    from polar_billing.render_csv import report_csv
    from polar_billing.render_terminal import report_view
    from polar_billing.report import build_report

    selection = _selection(tenant, _period(month, since, until, zone), tier, None, [])
    with _open(ledger) as store:
        made = build_report(store, selection, prices=_book(prices), currency=currency)
        if html is not None:
            from polar_billing.render_html import report_html

            _write(html, report_html(made))
        if csv is not None:
            _write(csv, report_csv(made))
        if as_json:
            _print_json(made.model_dump(mode="json"))
        elif made.is_empty:
            _say_nothing_found(store, selection)
        elif csv is None and html is None:
            _print(report_view(made))


def _show_requests(store: LedgerStorage, selection: Selection, last: int, as_json: bool) -> None:
    from polar_billing.render_terminal import requests_view

    found = list(store.read(selection, newest=last))
    currencies = {digest: book.currency for digest, book in store.price_books().items()}
    if as_json:
        _print_json(
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
        _say_nothing_found(store, selection)
    else:
        _print(requests_view(found, title=f"The last {len(found)} requests", currencies=currencies))


def _open(ledger: str | None) -> LedgerStorage:
    """The ledger; where its database library is missing, the error says which extra brings it."""
    try:
        from polar_billing.ledger import Ledger
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"this command needs {error.name!r}.",
            hint="Install the extra billing of polar-llm, in a clone: `pip install '.[billing]'`.",
        ) from error
    return Ledger(ledger)


def _period(month: str | None, since: str | None, until: str | None, zone: str) -> Period:
    from polar_billing.periods import Period

    if month is None:
        return Period.between(since, until, zone)
    if since is not None or until is not None:
        raise QueryError("--month was given together with --since or --until.", hint="Give one of the two.")
    return Period.month(month, zone)


def _selection(tenant: str | None, period: Period, tier: str | None, model: str | None, tags: list[str]) -> Selection:
    from polar_billing.storage import ALL_TENANTS, Selection

    pairs = {}
    for text in tags:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise QueryError(f"tag {text!r} is not KEY=VALUE.", hint="Write it like --tag team=search.")
        pairs[key] = value
    return Selection(ALL_TENANTS if tenant is None else tenant, period, tier, model, pairs)


def _book(prices: Path | None) -> PriceBook | None:
    from polar_billing.price_book import PriceBook

    return None if prices is None else PriceBook.load(prices)


def _say_nothing_found(store: LedgerStorage, selection: Selection) -> None:
    from polar_billing.storage import ALL_TENANTS, Selection

    if next(store.read(Selection(ALL_TENANTS), newest=1), None) is None:
        typer.echo(f'No usage yet in the ledger {store.location}. Run `polar run "Hello"` and look again.')
        return
    what = [f"period {selection.period.label}"]
    what += [f"tenant {selection.tenant}"] if isinstance(selection.tenant, str) else []
    what += [f"tier {selection.tier}"] if selection.tier else []
    what += [f"model {selection.model}"] if selection.model else []
    what += [f"tag {key}={value}" for key, value in selection.tags.items()]
    typer.echo(f"No usage for {', '.join(what)} in the ledger {store.location}; it holds other usage.")


def _print(view: Any) -> None:
    from rich.console import Console

    from polar_billing.render_terminal import show

    console = Console()
    if not console.is_terminal or console.is_dumb_terminal:
        console = Console(width=200, no_color=True, force_terminal=False)
    show(view, console)


def _print_json(data: object) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def _write(path: Path, content: str) -> None:
    if str(path) == "-":
        typer.echo(content, nl=False)
        return
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{str(path)!r} cannot be written ({error.strerror}).", hint="Check that its folder exists."
        ) from error
    typer.echo(f"Wrote {path}.", err=True)
