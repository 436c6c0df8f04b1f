"""The commands `polar statement`, `credit-note` and `reprice`.

Arguments in, text out; the work is done by `statements` and `reports`.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from polar_billing.cli import options as opt
from polar_billing.errors import BillingError, QueryError, StoreDamagedError, StoreError, UnknownTenantError
from polar_sdk.show.lines import print_json, print_line
from polar_sdk.show.progress import ProgressBars, through

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.prices.book import PriceBook
    from polar_billing.statements.issue import CreditNote
    from polar_billing.statements.issued import IssuedStatement
    from polar_billing.statements.statement import Statement


class _Found(NamedTuple):
    statement: Statement
    issued: IssuedStatement | None
    """None for a draft."""
    notes: Sequence[CreditNote] = ()

    @property
    def document(self) -> dict[str, Any]:
        """It as JSON."""
        return {
            "issued_at": None if self.issued is None else self.issued.issued_at.isoformat(),
            **self.statement.model_dump(mode="json"),
            "credit_notes": [
                {
                    "reference": note.reference,
                    "amount": f"{note.amount:f}",
                    "reason": note.reason,
                    "issued_at": note.issued_at.isoformat(),
                }
                for note in self.notes
            ],
        }


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("statement", epilog="Example: polar statement --tenant acme --month 2026-11 --issue")(statement)
    app.command(
        "credit-note",
        epilog="Example: polar credit-note st-bed28afc5bc63c0d59496f63 5 --tenant acme --reason outage --reference 7",
    )(credit_note)
    app.command("reprice", epilog="Example: polar reprice --book other.toml --month 2026-11")(reprice)


def statement(
    tenant: opt.Tenant = None,
    ledger: opt.Ledger = None,
    month: opt.Month = None,
    since: opt.Since = None,
    until: opt.Until = None,
    zone: Annotated[
        str | None,
        typer.Option(help="IANA time zone of the period; by default the customer's, or UTC.", metavar="ZONE"),
    ] = None,
    issue: Annotated[
        bool, typer.Option("--issue", help="Issue the statement: store, chain and book it, once.")
    ] = False,
    book: opt.Book = None,
    trace: Annotated[int | None, typer.Option(help="List the usage records of this line.", metavar="LINE")] = None,
    as_json: opt.Json = False,
    csv: opt.Csv = None,
) -> None:
    """Show what tenants owe for a period, line by line; without a period, list the issued statements.

    A statement is a draft until it is issued, and never changes afterwards: usage that is stored later becomes a
    correction on the next one. A tenant whose statement fails keeps no other back: it is a line on standard error, and
    the exit code is 1.
    """
    if tenant is None and (trace is not None or csv is not None):
        raise QueryError("--trace and --csv need a single statement.", hint="Name its tenant with --tenant.")
    period = (month, since, until, zone)
    listing = month is None and since is None and until is None
    if listing and (issue or book is not None or trace is not None or csv is not None):
        raise QueryError(
            "--issue, --book, --trace and --csv need a period, and none is given.", hint="Add --month YYYY-MM."
        )
    opt.period_of(month, since, until, zone or "UTC")  # refuses what no tenant's calendar has
    prices = opt.book_of(book)
    with opt.open_ledger(ledger) as store:
        from polar_billing.statements.period import known_tenants

        if listing:
            _list(store, tenant, as_json)
            return
        with store.snapshot() as connection:
            tenants = [tenant] if tenant is not None else known_tenants(connection)
        found, failed = [], []
        with ProgressBars(at_once=False) as show:
            for one in through(show, "statements", tenants, len(tenants)):
                try:
                    found.append(_statement(store, one, period, issue, prices))
                except BillingError as error:
                    of_store = isinstance(error, StoreError) and not isinstance(error, StoreDamagedError)
                    if tenant is not None or of_store:  # the next tenant would fare no better
                        raise
                    if not isinstance(error, UnknownTenantError):  # a price book names it, and that is all
                        failed.append(f"error: no statement of {one}: {' '.join(str(error).split())}")
        if tenant is None:
            _show_all(found, failed, as_json)
        elif trace is not None:
            _trace(store, found[0].issued, trace, as_json)
        else:
            _show(found[0], as_json, csv)


def _show_all(found: list[_Found], failed: list[str], as_json: bool) -> None:
    if as_json:
        print_json([one.document for one in found])
    elif not (found or failed):
        print_line("There is no usage yet.")
    for one in [] if as_json else found:
        _show(one, as_json, None)
    for line in failed:
        print_line(line, err=True)
    if failed:
        raise typer.Exit(1)


def _statement(
    store: Ledger,
    tenant: str,
    period_options: opt.PeriodOptions,
    issue: bool,
    prices: PriceBook | None,
) -> _Found:
    import polar_billing
    from polar_billing.statements.issue import credit_notes

    period = opt.period_of_tenant(store, tenant, prices, period_options)
    if issue:
        issued = polar_billing.issue_statement(store, tenant, period, book=prices)
    else:
        earlier = polar_billing.issued_statements(store, tenant) if prices is None else []
        same = next((one for one in earlier if one.statement.period == period), None)
        if same is None:
            return _Found(polar_billing.draft_statement(store, tenant, period, book=prices), None)
        issued = same
    notes = [note for note in credit_notes(store, tenant) if note.statement == issued.statement.id]
    return _Found(issued.statement, issued, notes)


def _list(store: Ledger, tenant: str | None, as_json: bool) -> None:
    from polar_billing.reports.billing_tables import issued_view
    from polar_billing.statements.issue import credit_notes, issued_statements

    def owner(one: IssuedStatement) -> str:
        return one.statement.tenant

    whose = opt.tenant_or_all(tenant)
    issued = sorted(issued_statements(store, whose), key=owner)
    notes: defaultdict[str, list[CreditNote]] = defaultdict(list)
    for note in credit_notes(store, whose):
        notes[note.statement].append(note)
    if as_json:
        print_json([_Found(one.statement, one, notes[one.statement.id]).document for one in issued])
        return
    for name, own in groupby(issued, owner):
        opt.show(issued_view([(one, notes[one.statement.id]) for one in own], name))
    if not issued:
        of_tenant = "" if tenant is None else f" of {tenant}"
        print_line(f"No statement{of_tenant} has been issued yet. For a draft, name a month: --month 2026-11.")


def _show(found: _Found, as_json: bool, csv: Path | None) -> None:
    from polar_billing.reports.billing_tables import statement_view
    from polar_billing.reports.csv import statement_csv

    if csv is not None:
        opt.write_file(csv, statement_csv(found.statement, found.notes))
    if as_json:
        print_json(found.document)
    elif csv is None:
        opt.show(statement_view(*found))


def _trace(store: Ledger, issued: IssuedStatement | None, number: int, as_json: bool) -> None:
    from polar_billing.statements.tracing import usage_of_line

    if issued is None:
        raise QueryError("a draft cannot be traced.", hint="Issue it with --issue.")
    lines = issued.statement.lines
    if not 1 <= number <= len(lines):
        raise QueryError(
            f"statement {issued.statement.id!r} has no line {number}.", hint=f"Its lines are 1 to {len(lines)}."
        )
    seqs = usage_of_line(store, issued, lines[number - 1])
    if as_json:
        print_json(seqs)
    else:
        for line in map(str, seqs) if seqs else ["No usage is charged by this line."]:
            print_line(line)


def credit_note(
    statement_id: Annotated[str, typer.Argument(help="The statement's id.", metavar="STATEMENT")],
    amount: Annotated[str, typer.Argument(help="Amount to credit, in the statement's currency.", metavar="AMOUNT")],
    tenant: opt.OneTenant,
    reason: Annotated[str, typer.Option(help="Reason, in words.", metavar="TEXT")],
    reference: Annotated[str, typer.Option(help="Your own reference; repeating it has no effect.", metavar="TEXT")],
    ledger: opt.Ledger = None,
) -> None:
    """Credit an amount on an issued statement, which itself does not change."""
    import polar_billing
    from polar_billing.values.money import read_amount

    value = read_amount(amount)
    with opt.existing_ledger(ledger) as store:
        note = polar_billing.credit_note(store, tenant, statement_id, value, reason=reason, reference=reference)
        print_line(f"Credit note {note.reference}: {note.amount:f} off statement {note.statement}.")


def reprice(
    book: Annotated[Path, typer.Option(help="The other price book.", metavar="FILE")],
    ledger: opt.Ledger = None,
    tenant: opt.Tenant = None,
    month: opt.Month = None,
    since: opt.Since = None,
    until: opt.Until = None,
    zone: opt.Zone = "UTC",
    as_json: opt.Json = False,
    csv: opt.Csv = None,
) -> None:
    """Show what each tenant's usage would cost under another price book, and the difference.

    The default period is this month.
    """
    from polar_billing.prices.book import PriceBook
    from polar_billing.values.periods import Period, Window

    period = opt.period_of(month, since, until, zone)
    if month is None and since is None and until is None:
        period = Period.containing(datetime.now(UTC), Window.MONTH, zone)
    other = PriceBook.load(book)
    with opt.open_ledger(ledger) as store:
        import polar_billing
        from polar_billing.reports.billing_tables import repriced_view
        from polar_billing.reports.csv import repriced_csv

        with ProgressBars(at_once=False) as show:
            rows = polar_billing.reprice(store, opt.tenant_or_all(tenant), period, other, progress=show)
    if csv is not None:
        opt.write_file(csv, repriced_csv(rows))
    if as_json:
        print_json([row.model_dump(mode="json") for row in rows])
    elif not rows:
        print_line(f"No usage in {period.label}.")
    elif csv is None:
        opt.show(repriced_view(rows, period.label))
