"""Options and helpers that the commands share. Heavy imports wait until a command runs. Knows no command."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polar_billing.errors import MissingExtraError, QueryError, StoreDamagedError
from polar_sdk.errors import PolarError
from polar_sdk.show.lines import print_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from polar_billing.ledger.ledger import Ledger as LedgerStore
    from polar_billing.ledger.records import AllTenants, Selection
    from polar_billing.prices.book import PriceBook
    from polar_billing.values.periods import Period


Ledger = Annotated[
    str | None,
    typer.Option(help="Ledger URL or SQLite file; by default POLAR_LEDGER or the user's data folder.", metavar="URL"),
]
Tenant = Annotated[str | None, typer.Option(help="Only this tenant; by default every tenant.", metavar="NAME")]
OneTenant = Annotated[str, typer.Option(help="The tenant.", metavar="NAME")]
Month = Annotated[str | None, typer.Option(help="A calendar month, e.g. 2026-11.", metavar="YYYY-MM")]
Since = Annotated[str | None, typer.Option(help="Start of the period: a date, or a date and time.", metavar="DATE")]
Until = Annotated[str | None, typer.Option(help="End of the period (exclusive).", metavar="DATE")]
Zone = Annotated[str, typer.Option(help="IANA time zone of the dates.", metavar="ZONE")]
Tier = Annotated[str | None, typer.Option(help="Only this tier.", metavar="NAME")]
Prices = Annotated[
    Path | None,
    typer.Option(help="Rate everything by this price book instead of the one on each receipt.", metavar="FILE"),
]
Book = Annotated[
    Path | None, typer.Option(help="Charge by this price book instead of the one in force.", metavar="FILE")
]
Currency = Annotated[str | None, typer.Option(help="Only usage charged in this currency.", metavar="CODE")]
FlopsPerJoule = Annotated[
    str | None, typer.Option(help="To model energy: FLOPs that the device executes per joule.", metavar="NUMBER")
]
EnergySource = Annotated[str | None, typer.Option(help="Source of --flops-per-joule, in words.", metavar="TEXT")]
GridIntensity = Annotated[
    str | None, typer.Option(help="Carbon intensity of the grid, in grams of CO2e per kWh.", metavar="NUMBER")
]
GridSource = Annotated[str | None, typer.Option(help="Source of --grid-intensity, in words.", metavar="TEXT")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to standard output.")]
Csv = Annotated[Path | None, typer.Option(help="Write CSV to this file; - is standard output.", metavar="FILE")]


PeriodOptions = tuple[str | None, str | None, str | None, str | None]
"""Month, start, end and zone."""


@contextmanager
def open_ledger(ledger: str | None, *, recover: bool = True) -> Iterator[LedgerStore]:
    """Open the ledger; if its database library is missing, the error says which extra installs it.

    With `recover`, first store what ended processes left in their spools, and warn about what still waits.
    """
    try:
        from polar_billing.ledger.ledger import Ledger
        from polar_billing.metering.spool import recover_abandoned, warning_of
    except ModuleNotFoundError as error:
        raise MissingExtraError.of("this command", error, "billing") from error
    with Ledger(ledger) as opened, _meaningful(opened.location):
        if recover:
            recover_abandoned(opened)
            if (warning := warning_of(opened)) is not None:
                print_line(f"warning: {warning}", err=True)
        yield opened


@contextmanager
def _meaningful(location: str) -> Iterator[None]:
    """Turn errors caused by values that others changed into one clear line: such values may raise anything."""
    try:
        yield
    except (PolarError, UnicodeEncodeError):  # the latter by an argument
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise StoreDamagedError(
            f"ledger {location!r} holds a value that cannot be read ({what}).", hint="See what `polar verify` finds."
        ) from error


@contextmanager
def existing_ledger(ledger: str | None, *, recover: bool = True) -> Iterator[LedgerStore]:
    """Open a ledger that must exist: for commands that would prove nothing, or do harm, on a misspelt name.

    Raises:
        StoreNotFoundError: There is none.
    """
    with open_ledger(ledger, recover=recover) as store:
        store.check_exists()
        yield store


def period_of(month: str | None, since: str | None, until: str | None, zone: str) -> Period:
    """The period that the options name."""
    from polar_billing.values.periods import Period

    if month is None:
        return Period.between(since, until, zone)
    if since is not None or until is not None:
        raise QueryError("--month was given together with --since or --until.", hint="Give one of the two.")
    return Period.month(month, zone)


def period_of_tenant(store: LedgerStore, tenant: str, book: PriceBook | None, options: PeriodOptions) -> Period:
    """The period of a tenant's statement that the options name; the zone is the tenant's where none is named."""
    from polar_billing.statements.books import month_of, zone_of

    month, since, until, zone = options
    if month is not None and since is None and until is None and zone is None:
        return month_of(store, tenant, month, book)
    return period_of(month, since, until, zone or zone_of(store, tenant, book))


def tenant_or_all(tenant: str | None) -> str | AllTenants:
    """The tenant, or all of them where none is named."""
    from polar_billing.ledger.records import ALL_TENANTS

    return ALL_TENANTS if tenant is None else tenant


def selection_of(tenant: str | None, period: Period, tier: str | None, model: str | None, tags: list[str]) -> Selection:
    """The selection that the options name."""
    from polar_billing.ledger.records import Selection

    return Selection(tenant_or_all(tenant), period, tier, model, tags_of(tags))


def tags_of(texts: Iterable[str]) -> dict[str, str]:
    """Tags, each written KEY=VALUE."""
    tags = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise QueryError(f"tag {text[:40]!r} is not KEY=VALUE.", hint="Write it like --tag team=search.")
        tags[key] = value
    return tags


def book_of(prices: Path | None) -> PriceBook | None:
    """The price book in a file; None if no file is named."""
    from polar_billing.prices.book import PriceBook

    return None if prices is None else PriceBook.load(prices)


def say_nothing_found(store: LedgerStore, selection: Selection) -> None:
    """Print that there is no usage, and under which conditions."""
    from polar_billing.ledger.records import ALL_TENANTS, Selection

    if pruned := store.count_pruned(selection):
        print_line(f"No usage is left: {pruned:,} requests were pruned, and `polar usage --by tier` has their sums.")
        return
    if next(store.read(Selection(ALL_TENANTS), newest=1), None) is None:
        print_line(f'No usage yet in the ledger {store.location}. Run `polar run "Hello"` and look again.')
        return
    conditions = [f"period {selection.period.label}"]
    conditions += [f"tenant {selection.tenant}"] if isinstance(selection.tenant, str) else []
    conditions += [f"tier {selection.tier}"] if selection.tier else []
    conditions += [f"model {selection.model}"] if selection.model else []
    conditions += [f"tag {key}={value}" for key, value in selection.tags.items()]
    print_line(f"No usage for {', '.join(conditions)} in the ledger {store.location}; it holds other usage.")


def show(view: Any) -> None:
    """Print a view to the terminal, or as plain text elsewhere."""
    from polar_sdk.show.tables import show as show_table

    show_table(view)


def write_file(path: Path, content: str) -> None:
    """Write a file, or standard output if the path is `-`."""
    write_pieces(path, [content])


def write_pieces(path: Path, pieces: Iterable[str]) -> None:
    """Write a file piece by piece, whole or not at all; or standard output if the path is `-`.

    What was there stays until the new file is whole.
    """
    if str(path) == "-":
        for piece in pieces:
            typer.echo(piece, nl=False)
        return
    from polar_billing.exports.output import whole

    with whole(path) as draft, draft.open("w", encoding="utf-8") as file:
        file.writelines(pieces)
    print_line(f"Wrote {path}.", err=True)
