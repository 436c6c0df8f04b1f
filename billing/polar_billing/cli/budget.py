"""`polar budget`: set budgets, show what is left of them, close them, and look at what is held.

Arguments in, text out; the figures come from `polar_billing.budgets`. Heavy imports wait until a command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polar_billing.cli.options import (
    CsvOption,
    JsonOption,
    LedgerOption,
    TenantOption,
    open_ledger,
    show,
    show_json,
    write_file,
)
from polar_billing.errors import BudgetError

if TYPE_CHECKING:
    from polar_billing.budgets.budget import Level
    from polar_billing.budgets.keeper import Budgets
    from polar_billing.ledger.records import AllTenants
    from polar_billing.prices.book import PriceBook


_Tenant = Annotated[str, typer.Argument(help="Whose budget.", metavar="TENANT")]
_Unit = Annotated[str, typer.Argument(help="A currency's code, or CU for compute units.", metavar="UNIT")]
_Project = Annotated[str | None, typer.Option(help="Budget of this project alone.", metavar="NAME")]
_User = Annotated[str | None, typer.Option(help="Budget of this user alone.", metavar="NAME")]
_Key = Annotated[str | None, typer.Option(help="Budget of this key alone.", metavar="NAME")]
_Window = Annotated[str, typer.Option(help="day, week or month.", metavar="WINDOW")]

_budget = typer.Typer(no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add `polar budget` to the command `polar`."""
    app.add_typer(_budget, name="budget")


@_budget.callback(epilog="Example: polar budget show --tenant acme")
def budget() -> None:
    """Limit what a tenant, project, user or key may use per day, week or month."""


@_budget.command("set", epilog="Example: polar budget set acme 50 USD --window day --user ann --zone Europe/Berlin")
def set_(
    tenant: _Tenant,
    limit: Annotated[str, typer.Argument(help="Most per window, for example 12.50.", metavar="LIMIT")],
    unit: _Unit,
    window: _Window = "month",
    project: _Project = None,
    user: _User = None,
    key: _Key = None,
    over_budget: Annotated[
        str,
        typer.Option(help="refuse, or shallower: serve a cheaper tier that fits.", metavar="POLICY"),
    ] = "refuse",
    zone: Annotated[
        str | None,
        typer.Option(
            help="IANA time zone of the windows; that of the tenant in the price book by default, or else UTC.",
            metavar="ZONE",
        ),
    ] = None,
    prices: Annotated[
        Path | None, typer.Option(help="Price book; the one that meters charge by, by default.", metavar="FILE")
    ] = None,
    ledger: LedgerOption = None,
) -> None:
    """Set a budget; it supersedes the one of the same tenant, name, unit and window."""
    budgets = _open(ledger)
    from polar_billing.budgets.budget import Budget, OverBudget
    from polar_billing.prices.current import Prices
    from polar_billing.values.periods import Window

    book = Prices(budgets.ledger.price_choices, prices).of(tenant)
    level, name = _scope(project, user, key)
    made = Budget(
        tenant,
        limit,  # type: ignore[arg-type]  # text is checked and turned into a Decimal there
        unit,
        level,
        name,
        window=window,  # type: ignore[arg-type]  # likewise
        zone=zone or _zone_of(tenant, book),
        over_budget=over_budget,  # type: ignore[arg-type]
    )
    assert isinstance(made.window, Window)
    assert isinstance(made.over_budget, OverBudget)
    budgets.set(made, book)
    (standing,) = (one for one in budgets.standings(tenant) if one.budget.key == made.key)
    typer.echo(
        f"The {made.window}'s budget of {made.who} is {made.say(made.limit_count)}; {made.say(standing.left)} left."
    )


@_budget.command("show", epilog="Example: polar budget show --tenant acme --json")
def show_(
    tenant: TenantOption = None, as_json: JsonOption = False, csv: CsvOption = None, ledger: LedgerOption = None
) -> None:
    """Show what is spent, held and left of every budget, and when it resets."""
    budgets = _open(ledger)
    from polar_billing.reports.billing_tables import standing_row

    rows = [standing_row(one) for one in budgets.standings(_whose(tenant))]
    _print(rows, as_json, csv, title="Budgets", nothing=f"No budgets{_of(tenant)} in the ledger.")


@_budget.command(epilog="Example: polar budget close acme USD --window day --user ann")
def close(
    tenant: _Tenant,
    unit: _Unit,
    window: _Window = "month",
    project: _Project = None,
    user: _User = None,
    key: _Key = None,
    ledger: LedgerOption = None,
) -> None:
    """Lift a budget; what it was stays in the ledger."""
    budgets = _open(ledger)
    level, name = _scope(project, user, key)
    closed = budgets.close(tenant, level=level, name=name, unit=unit, window=window)
    typer.echo(f"The {closed.window}'s budget of {closed.who}, {closed.say(closed.limit_count)}, is closed.")


@_budget.command(epilog="Example: polar budget holds --tenant acme")
def holds(
    tenant: TenantOption = None,
    expire: Annotated[bool, typer.Option("--expire", help="First free what is held past its time.")] = False,
    as_json: JsonOption = False,
    csv: CsvOption = None,
    ledger: LedgerOption = None,
) -> None:
    """Show what is held for requests that are running now."""
    budgets = _open(ledger)
    from polar_billing.reports.billing_tables import hold_row

    if expire and (freed := budgets.expire(_whose(tenant))):
        typer.echo(f"{freed} expired.", err=True)
    rows = [hold_row(one) for one in budgets.holds(_whose(tenant))]
    _print(rows, as_json, csv, title="Holds", nothing=f"Nothing is held{_of(tenant)}.")


@_budget.command(epilog="Example: polar budget recheck --tenant acme")
def recheck(
    tenant: TenantOption = None,
    repair: Annotated[bool, typer.Option("--repair", help="Replace the counters that differ.")] = False,
    as_json: JsonOption = False,
    ledger: LedgerOption = None,
) -> None:
    """Add up holds and usage again, and say which counters differ; exit code 1 if any does."""
    budgets = _open(ledger)
    from polar_billing.reports.billing_tables import standing_row

    found = budgets.recheck(_whose(tenant), repair=repair)
    rows = [{**standing_row(one.counted), "should_be": standing_row(one.computed)} for one in found]
    if as_json:
        show_json(rows)
    elif not rows:
        typer.echo("Every counter is what holds and usage add up to.")
    for one in () if as_json else found:
        amounts = [one.counted.budget.say(count) for count in (one.counted.spent, one.computed.spent)]
        held = [one.counted.budget.say(count) for count in (one.counted.held, one.computed.held)]
        typer.echo(
            f"{one.counted.budget.who}, {one.counted.period.label}: spent {amounts[0]}, should be {amounts[1]}; "
            f"held {held[0]}, should be {held[1]}."
        )
    if found and not repair:
        raise typer.Exit(1)


def _open(ledger: str | None) -> Budgets:
    opened = open_ledger(ledger)
    from polar_billing.budgets.keeper import Budgets

    return Budgets(opened)


def _scope(project: str | None, user: str | None, key: str | None) -> tuple[Level, str | None]:
    from polar_billing.budgets.budget import Level

    named = {Level.PROJECT: project, Level.USER: user, Level.KEY: key}
    given = [(level, name) for level, name in named.items() if name is not None]
    if len(given) > 1:
        raise BudgetError("a budget was given for several of --project, --user and --key.", hint="Give one of them.")
    return given[0] if given else (Level.TENANT, None)


def _zone_of(tenant: str, book: PriceBook) -> str:
    from datetime import UTC, datetime

    customer = book.customer_at(datetime.now(UTC), tenant)
    return "UTC" if customer is None else customer.zone


def _whose(tenant: str | None) -> str | AllTenants:
    from polar_billing.ledger.records import ALL_TENANTS

    return ALL_TENANTS if tenant is None else tenant


def _of(tenant: str | None) -> str:
    return "" if tenant is None else f" of tenant {tenant!r}"


def _print(rows: list[dict[str, Any]], as_json: bool, csv: Path | None, *, title: str, nothing: str) -> None:
    from polar_billing.reports.billing_tables import rows_view
    from polar_billing.reports.csv import write_rows

    if csv is not None and rows:
        write_file(csv, write_rows(list(rows[0]), rows))
    if as_json:
        show_json(rows)
    elif not rows:
        typer.echo(nothing)
    elif csv is None:
        show(rows_view(rows, title))
