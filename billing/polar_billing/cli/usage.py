"""The commands `polar usage` and `polar report`.

Arguments in, text out; the figures come from `reports`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_billing.cli import options as opt
from polar_billing.errors import QueryError

if TYPE_CHECKING:
    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import Selection
    from polar_billing.reports.mix import Savings
    from polar_billing.reports.report import Questions


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(
        "usage",
        epilog="Example: polar usage --tenant acme --month 2026-11 --by day --by tier",
    )(usage)
    app.command("report", epilog="Example: polar report --month 2026-11 --html report.html")(report)


def usage(
    ledger: opt.Ledger = None,
    tenant: opt.Tenant = None,
    month: opt.Month = None,
    since: opt.Since = None,
    until: opt.Until = None,
    zone: opt.Zone = "UTC",
    tier: opt.Tier = None,
    model: Annotated[str | None, typer.Option(help="Only this model.", metavar="NAME")] = None,
    tag: Annotated[
        list[str] | None, typer.Option(help="Only requests with this tag; may be repeated.", metavar="KEY=VALUE")
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="Group by tenant, tier, model, program, outcome, day, month, tag:KEY, …; may be repeated.",
            metavar="WHAT",
        ),
    ] = None,
    requests: Annotated[bool, typer.Option("--requests", help="List single requests, the latest first.")] = False,
    last: Annotated[int, typer.Option(min=1, help="Number of requests that --requests lists.")] = 20,
    prices: opt.Prices = None,
    currency: opt.Currency = None,
    as_json: opt.Json = False,
    csv: opt.Csv = None,
) -> None:
    """Show who used what: requests, tokens, layer visits, compute units and cost.

    By default it covers every tenant and all time.
    """
    selection = opt.selection_of(tenant, opt.period_of(month, since, until, zone), tier, model, tag or [])
    with opt.open_ledger(ledger) as store:
        if requests:
            _show_requests(store, selection, last, as_json)
            return
        from polar_billing.reports.csv import usage_csv
        from polar_billing.reports.query import usage_rows
        from polar_billing.reports.usage_tables import usage_view

        groups = by or ["tenant", "tier"]
        rows = usage_rows(store, selection, by=groups, prices=opt.book_of(prices), currency=currency)
        if csv is not None:
            opt.write_file(csv, usage_csv(rows))
        if as_json:
            opt.show_json([row.model_dump(mode="json") for row in rows])
        elif not rows:
            opt.say_nothing_found(store, selection)
        elif csv is None:
            opt.show(usage_view(rows, title=f"Usage, {selection.period.label}"))


def report(
    ledger: opt.Ledger = None,
    tenant: opt.Tenant = None,
    month: opt.Month = None,
    since: opt.Since = None,
    until: opt.Until = None,
    zone: opt.Zone = "UTC",
    tier: opt.Tier = None,
    prices: opt.Prices = None,
    currency: opt.Currency = None,
    as_json: opt.Json = False,
    csv: opt.Csv = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained HTML page.", metavar="FILE")] = None,
    what_if: Annotated[
        list[Path] | None,
        typer.Option(help="What would this price book have brought? May be repeated.", metavar="FILE"),
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help="What would this mix of tiers have brought, in percent of the requests? May be repeated.",
            metavar="TIER=PERCENT,…",
        ),
    ] = None,
    mix_from: Annotated[
        Path | None,
        typer.Option(
            help="What tiers save, from `polar evaluate --json`; by default from the router's certificate.",
            metavar="FILE",
        ),
    ] = None,
    promise: Annotated[
        list[str] | None,
        typer.Option(
            help="Promised p95 latency of a tier, instead of what the price book promises; may be repeated.",
            metavar="TIER=MS",
        ),
    ] = None,
    device_hour: Annotated[
        str | None, typer.Option(help="What a device costs per hour, in the report's currency.", metavar="AMOUNT")
    ] = None,
    tokens_per_second: Annotated[
        str | None,
        typer.Option(help="Throughput of a device; by default from the recorded times.", metavar="NUMBER"),
    ] = None,
    flops_per_joule: opt.FlopsPerJoule = None,
    energy_source: opt.EnergySource = None,
    energy_log: Annotated[
        Path | None, typer.Option(help="Measured energy, from `polar energy`.", metavar="FILE")
    ] = None,
    grid_intensity: opt.GridIntensity = None,
    grid_source: opt.GridSource = None,
) -> None:
    """Report usage and charges by tenant and tier, compared with full depth and per-token pricing.

    By default it covers every tenant and all time. The later options ask what would have been under other prices or
    tiers, and what the hardware costs; each answer says what it assumes.
    """
    selection = opt.selection_of(tenant, opt.period_of(month, since, until, zone), tier, None, [])
    with opt.open_ledger(ledger) as store:
        from polar_billing.reports.csv import report_csv
        from polar_billing.reports.energy import read_energy
        from polar_billing.reports.report import build_report
        from polar_billing.reports.usage_tables import report_view

        energy = read_energy(flops_per_joule, energy_source, energy_log, grid_intensity, grid_source)
        questions = _questions(what_if or [], mix or [], mix_from, promise or [], (device_hour, tokens_per_second))
        questions = replace(questions, energy=energy)
        built = build_report(store, selection, prices=opt.book_of(prices), currency=currency, questions=questions)
        if html is not None:
            from polar_billing.reports.html import report_html

            opt.write_file(html, report_html(built))
        if csv is not None:
            opt.write_file(csv, report_csv(built))
        if as_json:
            opt.show_json(built.model_dump(mode="json"))
        elif built.is_empty:
            opt.say_nothing_found(store, selection)
        elif csv is None and html is None:
            opt.show(report_view(built))


def _questions(
    books: list[Path],
    mixes: list[str],
    mix_from: Path | None,
    promises: list[str],
    hardware: tuple[str | None, str | None],
) -> Questions:
    from polar_billing.prices.book import PriceBook
    from polar_billing.reports.hardware import read_hardware
    from polar_billing.reports.mix import evaluated_savings, read_mix
    from polar_billing.reports.promises import read_promises
    from polar_billing.reports.report import Questions

    if mix_from is not None and not mixes:
        raise QueryError("--mix-from was given without a mix.", hint="Add one, e.g. --mix standard=70,economy=30.")
    evaluated = None if mix_from is None else evaluated_savings(mix_from)
    return Questions(
        books=tuple(PriceBook.load(file) for file in books),
        mixes=tuple(map(read_mix, mixes)),
        savings=_certified if evaluated is None else lambda _: evaluated,
        hardware=read_hardware(*hardware),
        promises=read_promises(promises),
    )


def _certified(fingerprint: str) -> Savings | None:
    """What the certificate of a model's router measured for each tier."""
    from polar_billing.reports.mix import TierSaving, as_share
    from polar_sdk.router.measured import measured_tiers

    measured = measured_tiers(fingerprint)
    if measured is None:
        return None
    source = f"{measured.prompts:,} calibration prompts, certificate of router {measured.router[:12]}"
    return {tier: TierSaving(tier=tier, saved=as_share(saved), source=source) for tier, saved in measured.saved.items()}


def _show_requests(store: Ledger, selection: Selection, last: int, as_json: bool) -> None:
    from polar_billing.reports.usage_tables import requests_view

    requests = list(store.read(selection, newest=last))
    currencies = {digest: book.currency for digest, book in store.price_books().items()}
    if as_json:
        opt.show_json(
            [
                {
                    "seq": stored.seq,
                    "stored_at": stored.stored_at.isoformat(),
                    "cost": None if stored.cost is None else f"{stored.cost:f}",
                    "currency": currencies[stored.price_book_hash],
                    "unrated": stored.unrated,
                    **stored.record.model_dump(mode="json"),
                }
                for stored in requests
            ]
        )
    elif not requests:
        opt.say_nothing_found(store, selection)
    else:
        opt.show(requests_view(requests, title=f"The last {len(requests)} requests", currencies=currencies))
