"""The commands about the ledger itself: `polar verify` and `receipt` prove it, `prune` deletes old facts.

Arguments in, text out; the work is done by `proof` and `ledger`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polar_billing.cli import options as opt
from polar_billing.errors import LedgerUnsoundError, OutputError, QueryError
from polar_sdk.reading import Unreadable, parse_object, read_bytes
from polar_sdk.show.lines import print_json, print_line
from polar_sdk.show.progress import ProgressBars, interruptible

_MAX_RECEIPT = 2**20
"""Unit: bytes."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("verify", epilog="Example: polar verify --ledger ledger.sqlite3")(verify)
    app.command("receipt", epilog="Example: polar receipt 01a21448-fc9b-79f1-b119-920a961c1e1e")(receipt)
    app.command("prune", epilog="Example: polar prune --before 2026-01-01")(prune)


def verify(
    ledger: opt.Ledger = None,
    tenant: opt.Tenant = None,
    receipt: Annotated[
        Path | None, typer.Option(help="Only check this receipt against the chain.", metavar="FILE", exists=False)
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Prove that nothing in the ledger was changed, deleted, inserted or moved since it was written.

    Needs only the database. It cannot detect a ledger that was rewritten as a whole or rolled back to an earlier state:
    for that, keep receipts, or the heads that this command prints, elsewhere, and compare them.
    """
    from polar_billing.proof.receipts import check_receipt
    from polar_billing.proof.verify import verify_in

    with opt.existing_ledger(ledger, recover=False) as store, store.snapshot() as connection:
        if receipt is not None:
            checked = check_receipt(connection, _read_receipt(receipt))
            if checked.wrong is not None:
                raise LedgerUnsoundError(f"receipt {str(receipt)!r}: {checked.wrong}")
            agrees = f"The receipt {receipt} agrees with the ledger {store.location}"
            fields = ", ".join(checked.unchecked)
            but = f", but {fields} cannot be checked: the facts of the request were pruned" if fields else ""
            print_line(f"{agrees}{but}.")
            return
        with (
            interruptible("no error was found so far, and nothing was changed; start again"),
            ProgressBars(at_once=False) as show,
        ):
            verified = verify_in(connection, tenant, show)
    heads = sorted(verified.heads.items())
    if as_json:
        print_json(
            {
                "sound": verified.sound,
                "links": verified.links,
                "heads": {name: {"number": head.number, "hash": head.hash.hex()} for name, head in heads},
                "findings": [vars(finding) for finding in verified.findings],
            }
        )
    elif verified.sound:
        print_line(f"The ledger {store.location} is sound: {verified.links:,} links of {len(verified.heads)} chains.")
        for name, head in heads:
            print_line(f"  {name or '(no tenant)'}: number {head.number:,}, hash {head.hash.hex()}")
    if not verified.sound:
        more = len(verified.findings) - 1
        also = f" {more} more: --json lists them." if more else ""
        raise LedgerUnsoundError(
            f"ledger {store.location!r} was changed after it was written. {verified.findings[0]}{also}"
        )


def _read_receipt(path: Path) -> dict[str, object]:
    try:
        return parse_object(read_bytes(path, _MAX_RECEIPT))
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be read ({error.strerror}).", hint="Check its path.") from error
    except Unreadable as error:
        raise QueryError(
            f"{str(path)!r} is not a receipt: {error}.", hint="Use what `polar receipt` printed."
        ) from error


def receipt(
    request: Annotated[
        str, typer.Argument(help="Id of the request, or its first 6 characters or more.", metavar="REQUEST")
    ],
    ledger: opt.Ledger = None,
    tenant: Annotated[
        str | None, typer.Option(help="Its tenant, if several have a request of this id.", metavar="NAME")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="The service that stored it, if several did.", metavar="NAME")
    ] = None,
) -> None:
    """Print the receipt of one request as JSON: what it cost, by which prices, and its place in the chain."""
    from polar_billing.proof.receipts import find_request, make_receipt

    with opt.existing_ledger(ledger) as store, store.snapshot() as connection:
        owner, stored_by, whole = find_request(connection, request, tenant, source)
        print_json(make_receipt(connection, owner, whole, source=stored_by))


def prune(
    before: Annotated[str, typer.Option(help="Delete facts of requests served before this day.", metavar="DATE")],
    ledger: opt.Ledger = None,
    tenant: opt.Tenant = None,
    zone: opt.Zone = "UTC",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Delete the facts of old requests; hashes, receipts and totals stay, and `polar verify` still passes.

    A tenant whose next statement is to charge some of it, stored late, is left out; the exit code is then 1.
    """
    from polar_billing.ledger import chain
    from polar_billing.ledger.retention import tenants_before
    from polar_billing.statements.retention import count_uncharged
    from polar_billing.statements.retention import prune as prune_tenant
    from polar_billing.values.periods import Period

    until = Period.between(None, before, zone).until
    assert until is not None  # it was given
    if not yes:
        typer.confirm(f"Delete the facts of every request served before {until.isoformat()}?", abort=True)
    with (
        opt.existing_ledger(ledger) as store,
        interruptible("tenants printed above are pruned; run the same command to continue"),
    ):
        with store.snapshot() as connection:
            tenants = tenants_before(connection, until) if tenant is None else [tenant]
        left_out = False
        for name in tenants:
            with store.transaction() as connection:
                chain.lock_heads(connection, [name])  # no usage of this tenant is being stored now
                late = count_uncharged(connection, name, until)
                requests = 0 if late else prune_tenant(connection, name, until)
            if late:
                left_out = True
                why = f"{late:,} requests were stored after the statement of their period, and are on none yet"
                print_line(f"error: {name} is not pruned: {why}. Issue its next statement first.", err=True)
            else:
                print_line(f"{name}: {requests:,} requests pruned.")
        if left_out:
            raise typer.Exit(1)
        if not tenants:
            print_line(f"Nothing was served before {until.isoformat()}.")
