"""The commands `polar budget set`, `show`, `close`, `holds` and `recheck`.

Arguments in, text out; the work is done by `budgets`.
"""

from __future__ import annotations

from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polar_billing.cli import options as opt
from polar_billing.errors import BudgetError
from polar_sdk.show.lines import print_json, print_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polar_billing.budgets.budget import Level
    from polar_billing.budgets.enforcement import Budgets


_Tenant = Annotated[str, typer.Argument(help="The tenant.", metavar="TENANT")]
_Unit = Annotated[str, typer.Argument(help="Currency code, or CU for compute units.", metavar="UNIT")]
_Project = Annotated[str | None, typer.Option(help="Budget of this project only.", metavar="NAME")]
_User = Annotated[str | None, typer.Option(help="Budget of this user only.", metavar="NAME")]
_Key = Annotated[str | None, typer.Option(help="Budget of this key only.", metavar="NAME")]
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
    limit: Annotated[str, typer.Argument(help="Maximum per window, e.g. 12.50.", metavar="LIMIT")],
    unit: _Unit,
    window: _Window = "month",
    project: _Project = None,
    user: _User = None,
    key: _Key = None,
    over_budget: Annotated[
        str,
        typer.Option(help="refuse, or shallower: serve by a cheaper tier that fits.", metavar="ACTION"),
    ] = "refuse",
    zone: Annotated[
        str | None,
        typer.Option(
            help="IANA time zone of the windows; by default the tenant's in the price book, otherwise UTC.",
            metavar="ZONE",
        ),
    ] = None,
    prices: Annotated[
        Path | None, typer.Option(help="Price book; by default the one in force.", metavar="FILE")
    ] = None,
    ledger: opt.Ledger = None,
) -> None:
    """Set a budget; it supersedes the one of the same tenant, name, unit and window.

    Processes that run enforce a tenant's first budget within 5 seconds, and what is set later at once.
    """
    with _open(ledger) as budgets:
        from polar_billing.budgets.budget import Budget, OverBudget
        from polar_billing.prices.in_force import Prices
        from polar_billing.values.periods import Window

        book = Prices(budgets.ledger.price_choices, prices).of(tenant)
        customer = book.customer_at(datetime.now(UTC), tenant)
        level, name = _scope(project, user, key)
        new = Budget(
            tenant,
            limit,  # type: ignore[arg-type]  # text is checked and turned into a Decimal there
            unit,
            level,
            name,
            window=window,  # type: ignore[arg-type]  # likewise
            zone=zone or ("UTC" if customer is None else customer.zone),
            over_budget=over_budget,  # type: ignore[arg-type]
        )
        assert isinstance(new.window, Window)
        assert isinstance(new.over_budget, OverBudget)
        budgets.set(new, book)
        (standing,) = (standing for standing in budgets.standings(tenant) if standing.budget.key == new.key)
        print_line(
            f"The {new.window}'s budget of {new.who} is {new.say(new.limit_count)}; {new.say(standing.left)} left."
        )


@_budget.command("show", epilog="Example: polar budget show --tenant acme --json")
def show_(tenant: opt.Tenant = None, as_json: opt.Json = False, csv: opt.Csv = None, ledger: opt.Ledger = None) -> None:
    """Show what is spent, held and left in every budget, and when it resets."""
    with _open(ledger) as budgets:
        from polar_billing.reports.billing_tables import standing_row

        rows = [standing_row(standing) for standing in budgets.standings(opt.tenant_or_all(tenant))]
        _print(rows, as_json, csv, title="Budgets", nothing=f"No budgets{_of(tenant)} in the ledger.")


@_budget.command(epilog="Example: polar budget close acme USD --window day --user ann")
def close(
    tenant: _Tenant,
    unit: _Unit,
    window: _Window = "month",
    project: _Project = None,
    user: _User = None,
    key: _Key = None,
    ledger: opt.Ledger = None,
) -> None:
    """Close a budget; its definitions stay in the ledger."""
    with _open(ledger) as budgets:
        level, name = _scope(project, user, key)
        closed = budgets.close(tenant, level=level, name=name, unit=unit, window=window)
        print_line(f"The {closed.window}'s budget of {closed.who}, {closed.say(closed.limit_count)}, is closed.")


@_budget.command(epilog="Example: polar budget holds --tenant acme")
def holds(
    tenant: opt.Tenant = None,
    expire: Annotated[bool, typer.Option("--expire", help="First expire holds that are due.")] = False,
    as_json: opt.Json = False,
    csv: opt.Csv = None,
    ledger: opt.Ledger = None,
) -> None:
    """Show what is held for running requests."""
    with _open(ledger) as budgets:
        from polar_billing.reports.billing_tables import hold_row

        if expire and (freed := budgets.expire(opt.tenant_or_all(tenant))):
            print_line(f"{freed} expired.", err=True)
        rows = [hold_row(hold) for hold in budgets.holds(opt.tenant_or_all(tenant))]
        _print(rows, as_json, csv, title="Holds", nothing=f"Nothing is held{_of(tenant)}.")


@_budget.command(epilog="Example: polar budget recheck --tenant acme")
def recheck(
    tenant: opt.Tenant = None,
    repair: Annotated[bool, typer.Option("--repair", help="Replace the counters that differ.")] = False,
    as_json: opt.Json = False,
    ledger: opt.Ledger = None,
) -> None:
    """Recompute the counters from holds and usage, and show counters and holds that differ; exit code 1 if any does."""
    with _open(ledger) as budgets:
        from polar_billing.reports.billing_tables import standing_row

        differences = budgets.recheck(opt.tenant_or_all(tenant), repair=repair)
        holds = budgets.recheck_holds(opt.tenant_or_all(tenant))
        if as_json:
            rows: list[dict[str, Any]] = [
                {**standing_row(difference.counted), "should_be": standing_row(difference.computed)}
                for difference in differences
            ]
            print_json([*rows, *map(vars, holds)])
        else:
            for wrong in (*differences, *holds):
                print_line(str(wrong))
            if not differences and not holds:
                print_line("Every counter agrees with holds and usage.")
        if holds or (differences and not repair):
            raise typer.Exit(1)


@contextmanager
def _open(ledger: str | None) -> Iterator[Budgets]:
    with opt.open_ledger(ledger) as opened:
        from polar_billing.budgets.enforcement import Budgets

        yield Budgets(opened)


def _scope(project: str | None, user: str | None, key: str | None) -> tuple[Level, str | None]:
    from polar_billing.budgets.budget import Level

    named = {Level.PROJECT: project, Level.USER: user, Level.KEY: key}
    scopes = [(level, name) for level, name in named.items() if name is not None]
    if len(scopes) > 1:
        raise BudgetError("several of --project, --user and --key were given.", hint="Give one of them.")
    return scopes[0] if scopes else (Level.TENANT, None)


def _of(tenant: str | None) -> str:
    return "" if tenant is None else f" of tenant {tenant!r}"


def _print(rows: list[dict[str, Any]], as_json: bool, csv: Path | None, *, title: str, nothing: str) -> None:
    from polar_billing.reports.billing_tables import rows_view, with_figures
    from polar_billing.reports.csv import write_rows

    if csv is not None and rows:
        opt.write_file(csv, write_rows(list(rows[0]), map(with_figures, rows)))
    if as_json:
        print_json(rows)
    elif not rows:
        print_line(nothing)
    elif csv is None:
        opt.show(rows_view(rows, title))
