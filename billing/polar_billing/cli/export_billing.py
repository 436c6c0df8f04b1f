"""The command `polar export-billing`.

Arguments in, files out; the formats are in `exports`.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_billing.cli import options as opt
from polar_billing.errors import QueryError
from polar_sdk.show.lines import print_line
from polar_sdk.show.progress import ProgressBars, interruptible, through

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polar_billing.exports.stripe import MeterEvents
    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import Selection, StoredUsage
    from polar_billing.statements.period import StatementOfPeriod
    from polar_billing.values.periods import Period


_OUT = Path("-")


class Format(StrEnum):
    """Formats of `polar export-billing`."""

    FOCUS = "focus"
    FOCUS_PARQUET = "focus-parquet"
    CLOUDEVENTS = "cloudevents"
    STRIPE = "stripe"
    USAGE_PARQUET = "usage-parquet"
    REPORT_PARQUET = "report-parquet"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "export-billing", epilog="Example: polar export-billing --format focus --month 2026-11 --out focus.csv"
    )(export_billing)


def export_billing(
    format_: Annotated[
        Format,
        typer.Option(
            "--format",
            help="focus (FOCUS 1.2 as CSV), focus-parquet, cloudevents (JSON batch), stripe (meter events, one JSON "
            "object a line), usage-parquet or report-parquet.",
            metavar="NAME",
        ),
    ],
    ledger: opt.Ledger = None,
    tenant: opt.Tenant = None,
    month: opt.Month = None,
    since: opt.Since = None,
    until: opt.Until = None,
    zone: Annotated[
        str | None,
        typer.Option(help="IANA time zone of the dates; by default UTC, for focus each customer's.", metavar="ZONE"),
    ] = None,
    out: Annotated[Path, typer.Option(help="The file to write; - is standard output.", metavar="FILE")] = _OUT,
    book: Annotated[
        Path | None,
        typer.Option(
            help="Price book for drafts (focus) or for rating (report-parquet), instead of the one in force.",
            metavar="FILE",
        ),
    ] = None,
    currency: opt.Currency = None,
    provider: Annotated[str, typer.Option(help="For focus: name of the provider.", metavar="NAME")] = "PoLar",
    customers: Annotated[
        Path | None,
        typer.Option(help='For stripe: TOML lines like acme = "cus_…", one per tenant.', metavar="FILE"),
    ] = None,
    flops_per_joule: opt.FlopsPerJoule = None,
    energy_source: opt.EnergySource = None,
    grid_intensity: opt.GridIntensity = None,
    grid_source: opt.GridSource = None,
) -> None:
    """Write usage and statements for other systems.

    focus and stripe need a period with both ends. For focus, issued statements of the period are exported, and drafts
    where there is none. Energy is modelled for cloudevents and usage-parquet.
    """
    if format_.endswith("-parquet") and str(out) == "-":
        raise QueryError(f"--format {format_} writes a file.", hint="Name it with --out FILE.")
    from polar_billing.reports.energy import read_energy

    energy = read_energy(flops_per_joule, energy_source, None, grid_intensity, grid_source)
    period = opt.period_of(month, since, until, zone or "UTC")
    with (
        opt.open_ledger(ledger) as store,
        interruptible("no file was written; start again"),
        ProgressBars(at_once=False) as show,
    ):
        selection = opt.selection_of(tenant, period, None, None, [])

        def usage() -> Iterator[StoredUsage]:
            return through(show, "requests", store.read(selection), store.count(selection))

        match format_:
            case Format.FOCUS | Format.FOCUS_PARQUET:
                statements = _statements(store, tenant, (month, since, until, zone), book)
                _write_focus(statements, provider, out, format_)
            case Format.CLOUDEVENTS:
                from polar_billing.exports.cloud_events import batch_text

                opt.write_pieces(out, batch_text(usage(), store.price_books, energy))
            case Format.STRIPE:
                _write_meter_events(store, selection, customers, out, show)
            case Format.USAGE_PARQUET:
                from polar_billing.exports.parquet import write_usage

                _say_written(out, write_usage(out, usage(), store.price_books, energy))
            case Format.REPORT_PARQUET:
                from polar_billing.exports.parquet import write_report
                from polar_billing.reports.report import build_report

                report = build_report(store, selection, prices=opt.book_of(book), currency=currency, progress=show)
                _say_written(out, write_report(out, report))


def _statements(
    store: Ledger, tenant: str | None, options: opt.PeriodOptions, book: Path | None
) -> list[StatementOfPeriod]:
    from polar_billing.statements.period import statements_of_period

    prices = opt.book_of(book)

    def period_of(name: str) -> Period:
        return opt.period_of_tenant(store, name, prices, options)

    return statements_of_period(store, opt.tenant_or_all(tenant), period_of, book=prices)


def _write_focus(statements: list[StatementOfPeriod], provider: str, out: Path, format_: Format) -> None:
    from polar_billing.exports.focus import focus_csv, focus_rows

    rows = focus_rows(statements, provider=provider)
    if format_ is Format.FOCUS:
        opt.write_file(out, focus_csv(rows))
        return
    from polar_billing.exports.parquet import write_focus

    _say_written(out, write_focus(out, rows))


def _write_meter_events(
    store: Ledger, selection: Selection, customers: Path | None, out: Path, show: ProgressBars
) -> None:
    from polar_billing.exports.stripe import MeterEvents, charging_books, check_whole, read_customers, whole_months
    from polar_billing.ledger.records import Selection

    months = whole_months(selection.period)
    check_whole(store, selection.tenant, months)
    events = MeterEvents(charging_books(store), read_customers(customers), selection.period)
    chosen = Selection(selection.tenant, months)
    usage = through(show, "requests", store.read(chosen, as_stored=True), store.count(chosen))
    opt.write_pieces(out, (f"{json.dumps(event)}\n" for event in events.of(usage)))
    _say_leftovers(events)


def _say_leftovers(events: MeterEvents) -> None:
    from polar_billing.exports.stripe import MAX_AGE_DAYS
    from polar_billing.values.money import plain

    for left in events.leftovers():
        what = f"{plain(left.quantity)} CU of {left.tenant}, {left.meter}"
        print_line(f"In {left.month}, {what}, are less than one unit and are in no event.", err=True)
    if events.unrated:
        print_line(f"warning: {events.unrated} requests without a price are in no event.", err=True)
    if events.oldest is not None and events.oldest < datetime.now(UTC) - timedelta(days=MAX_AGE_DAYS):
        print_line(f"warning: Stripe refuses events older than {MAX_AGE_DAYS} days, and some are older.", err=True)


def _say_written(out: Path, rows: int) -> None:
    print_line(f"Wrote {rows} rows to {out}.", err=True)
