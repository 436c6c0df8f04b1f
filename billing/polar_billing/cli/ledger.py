"""The commands that keep the ledger: `polar prune` and `migrate`.

Arguments in, text out; the work is done by `ledger`.
"""

from __future__ import annotations

from typing import Annotated

import typer

from polar_billing.cli import options as opt
from polar_sdk.show.lines import print_line


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("prune", epilog="Example: polar prune --before 2026-01-01")(prune)
    app.command("migrate", epilog="Example: polar migrate --ledger postgresql://polar@db/polar")(migrate)


def prune(
    before: Annotated[str, typer.Option(help="Delete facts of requests served before this day.", metavar="DATE")],
    ledger: opt.Ledger = None,
    tenant: opt.Tenant = None,
    zone: opt.Zone = "UTC",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Delete the facts of old requests; hashes, receipts and totals stay, and `polar verify` still passes."""
    from polar_billing.ledger.retention import prune as prune_tenant
    from polar_billing.ledger.retention import tenants_before
    from polar_billing.values.periods import Period

    until = Period.between(None, before, zone).until
    assert until is not None  # it was given
    if not yes:
        typer.confirm(f"Delete the facts of every request served before {until.isoformat()}?", abort=True)
    with opt.existing_ledger(ledger) as store:
        with store.snapshot() as connection:
            tenants = tenants_before(connection, until) if tenant is None else [tenant]
        for name in tenants:
            with store.transaction() as connection:
                pruned = prune_tenant(connection, name, until)
            print_line(f"{name}: {pruned.requests:,} requests pruned.")
        if not tenants:
            print_line(f"Nothing was served before {until.isoformat()}.")


def migrate(ledger: opt.Ledger = None) -> None:
    """Migrate a ledger of an earlier polar-llm version to this one's schema, in one transaction; back it up first."""
    from polar_billing.ledger.migrate import migrate as migrate_ledger

    with opt.open_ledger(ledger, recover=False) as store:
        before, after = migrate_ledger(store)
        if before == after:
            print_line(f"The ledger {store.location} already has schema version {after}.")
        else:
            print_line(f"The ledger {store.location} was migrated from schema version {before} to {after}.")
