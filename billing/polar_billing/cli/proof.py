"""The commands that prove and keep the ledger: `polar verify`, `receipt`, `prune` and `migrate`.

Arguments in, text out; the work is done by `verify`, `proof`, `retention` and `migrate`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from polar_billing.cli.options import (
    JsonOption,
    LedgerOption,
    TenantOption,
    ZoneOption,
    existing_ledger,
    open_ledger,
    show_json,
)
from polar_billing.errors import LedgerUnsoundError, OutputError, QueryError


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("verify", epilog="Example: polar verify --ledger ledger.sqlite3")(verify)
    app.command("receipt", epilog="Example: polar receipt 0193e1a2 --tenant acme")(receipt)
    app.command("prune", epilog="Example: polar prune --before 2026-01-01")(prune)
    app.command("migrate", epilog="Example: polar migrate --ledger postgresql://polar@db/polar")(migrate)


def verify(
    ledger: LedgerOption = None,
    tenant: TenantOption = None,
    receipt: Annotated[
        Path | None, typer.Option(help="Check this receipt against the chain.", metavar="FILE", exists=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that nothing in the ledger was changed, deleted, inserted or moved since it was written.

    Needs nothing but the database. It cannot tell a ledger that was rewritten as a whole, or taken back to an earlier
    state, from a true one: keep receipts, or the heads that this prints, elsewhere, and check them here.
    """
    from polar_billing.proof.receipts import check_receipt
    from polar_billing.proof.verify import verify_in

    with existing_ledger(ledger, recover=False) as store, store.snapshot() as connection:
        if receipt is not None:
            checked = check_receipt(connection, _read_receipt(receipt))
            if checked is not None:
                raise LedgerUnsoundError(f"receipt {str(receipt)!r}: {checked}")
            typer.echo(f"The receipt {receipt} agrees with the ledger {store.location}.")
            return
        found = verify_in(connection, tenant)
    if as_json:
        show_json(
            {
                "sound": found.sound,
                "links": found.links,
                "heads": {
                    name: {"number": head.number, "hash": head.hash.hex()} for name, head in sorted(found.heads.items())
                },
                "findings": [vars(finding) for finding in found.findings],
            }
        )
    elif found.sound:
        typer.echo(f"The ledger {store.location} is sound: {found.links:,} links of {len(found.heads)} chains.")
        for name, head in sorted(found.heads.items()):
            typer.echo(f"  {name or '(no tenant)'}: number {head.number:,}, hash {head.hash.hex()}")
    if not found.sound:
        more = len(found.findings) - 1
        also = f" And {more} more; --json lists them." if more else ""
        raise LedgerUnsoundError(f"ledger {store.location!r} is not as it was written. {found.findings[0]}{also}")


def _read_receipt(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OutputError(f"receipt {str(path)!r} cannot be read ({error.strerror}).", hint="Name a file.") from error
    except ValueError as error:
        raise QueryError(f"receipt {str(path)!r} is not JSON.", hint="Use what `polar receipt` printed.") from error
    if not isinstance(found, dict):
        raise QueryError(f"receipt {str(path)!r} is no receipt.", hint="Use what `polar receipt` printed.")
    return found


def receipt(
    request: Annotated[str, typer.Argument(help="The request's id.", metavar="REQUEST")],
    ledger: LedgerOption = None,
    tenant: Annotated[str, typer.Option(help="The tenant it belongs to.", metavar="NAME")] = "default",
    source: Annotated[str, typer.Option(help="The meter that stored it.", metavar="NAME")] = "polar",
) -> None:
    """Print the receipt of one request as JSON: what it cost, by which prices, and its place in the chain."""
    from polar_billing.proof.receipts import make_receipt

    with existing_ledger(ledger) as store, store.snapshot() as connection:
        show_json(make_receipt(connection, tenant, request, source=source))


def prune(
    before: Annotated[str, typer.Option(help="Delete what was served before this day.", metavar="DATE")],
    ledger: LedgerOption = None,
    tenant: TenantOption = None,
    zone: ZoneOption = "UTC",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete the facts of old requests, keep their proof: hashes, receipts and totals stay, and verify still passes."""
    from polar_billing.ledger.retention import prune as prune_tenant
    from polar_billing.ledger.retention import tenants_before
    from polar_billing.values.periods import Period

    until = Period.between(None, before, zone).until
    assert until is not None  # it was given
    if not yes:
        typer.confirm(f"Delete the facts of every request served before {until.isoformat()}?", abort=True)
    with existing_ledger(ledger) as store:
        with store.snapshot() as connection:
            tenants = tenants_before(connection, until) if tenant is None else [tenant]
        for name in tenants:
            with store.transaction() as connection:
                done = prune_tenant(connection, name, until)
            typer.echo(f"{name}: {done.requests:,} requests pruned.")
        if not tenants:
            typer.echo(f"Nothing was served before {until.isoformat()}.")


def migrate(
    ledger: LedgerOption = None,
    to: Annotated[int | None, typer.Option(help="Schema version; the newest by default.", metavar="VERSION")] = None,
) -> None:
    """Bring a ledger of another polar-llm to this one's schema, in one transaction; back it up first."""
    from polar_billing.ledger.migrate import migrate as migrate_ledger
    from polar_billing.ledger.schema import SCHEMA_VERSION

    with open_ledger(ledger, recover=False) as store:
        before, after = migrate_ledger(store, SCHEMA_VERSION if to is None else to)
        if before == after:
            typer.echo(f"The ledger {store.location} has schema version {after} already.")
        else:
            typer.echo(f"The ledger {store.location} went from schema version {before} to {after}.")
