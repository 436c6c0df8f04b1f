"""The commands `polar report` and `polar energy`.

Arguments in, text or a log out; the figures come from `reports`, and counters are read by `metering.energy`.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_billing.cli import options as opt
from polar_billing.errors import OutputError, QueryError
from polar_sdk.show.lines import print_json, print_line
from polar_sdk.show.progress import ProgressBars

if TYPE_CHECKING:
    from polar_billing.reports.mix import Savings


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("report", epilog="Example: polar report --month 2026-11 --html report.html")(report)
    app.command("energy", epilog="Example: polar energy energy.jsonl --every 10")(energy)


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
        typer.Option(help="Also show charges under this price book; may be repeated.", metavar="FILE"),
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help="Also show charges for this mix of tiers, in percent of the requests; may be repeated.",
            metavar="TIER=PERCENT,…",
        ),
    ] = None,
    mix_from: Annotated[
        Path | None,
        typer.Option(
            help="Savings of the tiers, from `polar evaluate --json`; by default from the router's certificate.",
            metavar="FILE",
        ),
    ] = None,
    promise: Annotated[
        list[str] | None,
        typer.Option(
            help="Promised p95 latency of a tier, instead of the price book's promise; may be repeated.",
            metavar="TIER=MS",
        ),
    ] = None,
    device_hour: Annotated[
        str | None, typer.Option(help="Cost of a device per hour, in the report's currency.", metavar="AMOUNT")
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

    By default, it covers every tenant and all time. --what-if and later options show what other prices or tiers would
    have charged, and what hardware and energy cost; each figure states its assumptions.
    """
    selection = opt.selection_of(tenant, opt.period_of(month, since, until, zone), tier, None, [])
    with opt.open_ledger(ledger) as store:
        from polar_billing.prices.book import PriceBook
        from polar_billing.reports.csv import report_csv
        from polar_billing.reports.energy import read_energy
        from polar_billing.reports.hardware import read_hardware
        from polar_billing.reports.html import report_html
        from polar_billing.reports.mix import evaluated_savings, read_mix
        from polar_billing.reports.promises import read_promises
        from polar_billing.reports.report import Questions, build_report
        from polar_billing.reports.usage_tables import report_view

        if mix_from is not None and not mix:
            raise QueryError("--mix-from was given without a mix.", hint="Add one, e.g. --mix standard=70,economy=30.")
        evaluated = None if mix_from is None else evaluated_savings(mix_from)
        questions = Questions(
            books=tuple(map(PriceBook.load, what_if or ())),
            mixes=tuple(map(read_mix, mix or ())),
            savings=certified if evaluated is None else lambda _: evaluated,
            hardware=read_hardware(device_hour, tokens_per_second),
            energy=read_energy(flops_per_joule, energy_source, energy_log, grid_intensity, grid_source),
            promises=read_promises(promise or ()),
        )
        book = opt.book_of(prices)
        with ProgressBars(at_once=False) as show:
            built = build_report(store, selection, prices=book, currency=currency, questions=questions, progress=show)
        if html is not None:
            opt.write_file(html, report_html(built))
        if csv is not None:
            opt.write_file(csv, report_csv(built))
        if as_json:
            print_json(built.model_dump(mode="json"))
        elif built.is_empty:
            opt.say_nothing_found(store, selection)
        elif csv is None and html is None:
            opt.show(report_view(built))


def certified(fingerprint: str) -> Savings | None:
    """The savings that the certificate of a model's router has measured."""
    from polar_billing.reports.mix import TierSaving, as_share
    from polar_sdk.router.savings import measured_tiers

    measured = measured_tiers(fingerprint)
    if measured is None:
        return None
    source = f"{measured.prompts:,} calibration prompts, certificate of router {measured.router[:12]}"
    return {tier: TierSaving(tier=tier, saved=as_share(saved), source=source) for tier, saved in measured.saved.items()}


def energy(
    log: Annotated[Path, typer.Argument(help="Log file; lines are appended.", metavar="FILE")],
    every: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds between two lines.", metavar="SECONDS")] = 10,
    for_: Annotated[
        float | None,
        typer.Option("--for", min=0.1, help="Stop after this many seconds; by default at Ctrl-C.", metavar="SECONDS"),
    ] = None,
) -> None:
    """Log the energy that this machine uses while it serves, from its own counters (RAPL, NVML).

    `polar report --energy-log FILE` distributes it by executed FLOPs.
    """
    from polar_billing.metering.energy import energy_counters, record_energy

    counters = energy_counters()
    try:
        with log.open("a", encoding="utf-8") as file:
            print_line(f"Logging {', '.join(counter.name for counter in counters)} to {log}.", err=True)
            with suppress(KeyboardInterrupt):
                record_energy(file, counters, every, for_)
    except OSError as error:
        raise OutputError.of(log, error) from error
