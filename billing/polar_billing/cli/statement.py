"""The commands `polar statement`, `credit-note` and `reprice`.

Arguments in, text out; the work is done by `statements`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_billing.cli.options import (
    CsvOption,
    JsonOption,
    LedgerOption,
    MonthOption,
    SinceOption,
    TenantOption,
    UntilOption,
    ZoneOption,
    book_of,
    existing_ledger,
    open_ledger,
    period_of,
    show,
    show_json,
    write_file,
)
from polar_billing.errors import AmountError, QueryError

if TYPE_CHECKING:
    from polar_billing.ledger.ledger import Ledger
    from polar_billing.statements.lines import Agreement
    from polar_billing.statements.statement import Statement
    from polar_billing.statements.store import IssuedStatement


OneTenant = Annotated[str, typer.Option(help="Whose statement.", metavar="NAME")]
BookOption = Annotated[
    Path | None, typer.Option(help="Charge by this price book, not by the one in force.", metavar="FILE")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("statement", epilog="Example: polar statement --tenant acme --month 2026-11 --issue")(statement)
    app.command(
        "credit-note", epilog="Example: polar credit-note st-1f… 12.50 --tenant acme --reason outage --reference 7"
    )(credit_note)
    app.command("reprice", epilog="Example: polar reprice --book other.toml --month 2026-11")(reprice)


def statement(
    tenant: OneTenant,
    ledger: LedgerOption = None,
    month: MonthOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    zone: Annotated[
        str | None, typer.Option(help="IANA time zone of the period; the customer's, or UTC.", metavar="ZONE")
    ] = None,
    issue: Annotated[bool, typer.Option("--issue", help="Issue it: store, chain and book it, once.")] = False,
    book: BookOption = None,
    agreement: Annotated[
        list[str] | None,
        typer.Option(help="Answers that agreed with full depth, of those compared.", metavar="TIER=AGREED/COMPARED"),
    ] = None,
    agreement_from: Annotated[
        Path | None,
        typer.Option(help="Take the same from a file that `polar evaluate --json` wrote.", metavar="FILE"),
    ] = None,
    trace: Annotated[int | None, typer.Option(help="List the usage that this line is about.", metavar="LINE")] = None,
    as_json: JsonOption = False,
    csv: CsvOption = None,
) -> None:
    """Show what a tenant owes for a period, line by line; without a period list what was issued.

    Until it is issued it is a draft. An issued statement never changes: usage that is stored later becomes a correction
    on the next one.
    """
    with open_ledger(ledger) as store:
        if month is None and since is None and until is None:
            _list(store, tenant, as_json)
            return
        agreements = _agreements(agreement, agreement_from)
        made, found = _make(store, tenant, (month, since, until, zone), issue, book, agreements)
        if trace is not None:
            _trace(store, found, trace, as_json)
        else:
            _show(made, found, as_json, csv)


def _make(
    store: Ledger,
    tenant: str,
    named: tuple[str | None, str | None, str | None, str | None],
    issue: bool,
    book: Path | None,
    agreements: dict[str, Agreement],
) -> tuple[Statement, IssuedStatement | None]:
    """The statement, and the same as the ledger holds it where it was issued."""
    import polar_billing
    from polar_billing.statements.books import zone_of

    prices = book_of(book)
    month, since, until, zone = named
    period = period_of(month, since, until, zone or zone_of(store, tenant, prices, month))
    if issue:
        found = polar_billing.issue_statement(store, tenant, period, book=prices, agreement=agreements)
        return found.statement, found
    for one in polar_billing.issued_statements(store, tenant) if prices is None else []:
        if one.statement.period == period:
            return one.statement, one
    return polar_billing.draft_statement(store, tenant, period, book=prices, agreement=agreements), None


def _list(store: Ledger, tenant: str, as_json: bool) -> None:
    from polar_billing.reports.billing_tables import issued_view
    from polar_billing.statements.issue import issued_statements

    found = issued_statements(store, tenant)
    if as_json:
        show_json([one.statement.model_dump(mode="json") for one in found])
    elif found:
        show(issued_view(found, tenant))
    else:
        typer.echo(f"No statement of {tenant} was issued yet. Name a month for a draft: --month 2026-11.")


def _show(made: Statement, found: IssuedStatement | None, as_json: bool, csv: Path | None) -> None:
    from polar_billing.reports.billing_tables import statement_view
    from polar_billing.reports.csv import statement_csv

    if csv is not None:
        write_file(csv, statement_csv(made))
    if as_json:
        issued_at = None if found is None else found.issued_at.isoformat()
        show_json({"issued_at": issued_at, **made.model_dump(mode="json")})
    elif csv is None:
        show(statement_view(made, found))


def _trace(store: Ledger, found: IssuedStatement | None, number: int, as_json: bool) -> None:
    from polar_billing.statements.audit import usage_of_line

    if found is None:
        raise QueryError("a draft has no trace yet.", hint="Issue it with --issue.")
    if not 1 <= number <= len(found.statement.lines):
        raise QueryError(
            f"statement {found.statement.id!r} has no line {number}.", hint=f"It has {len(found.statement.lines)}."
        )
    numbers = usage_of_line(store, found, found.statement.lines[number - 1])
    if as_json:
        show_json(numbers)
    else:
        typer.echo("\n".join(map(str, numbers)) or "This line is about no usage.")


def _agreements(texts: list[str] | None, file: Path | None) -> dict[str, Agreement]:
    from polar_billing.statements.lines import Agreement
    from polar_billing.statements.promises import evaluated_agreement

    found = {} if file is None else evaluated_agreement(file)
    for text in texts or []:
        tier, _, counts = text.partition("=")
        agreed, slash, compared = counts.partition("/")
        if not (tier and slash and agreed.isdecimal() and compared.isdecimal()) or int(agreed) > int(compared):
            raise QueryError(f"agreement {text!r} is not TIER=AGREED/COMPARED.", hint="Write it like premium=970/1000.")
        found[tier] = Agreement(int(agreed), int(compared))
    return found


def credit_note(
    statement_id: Annotated[str, typer.Argument(help="The statement's id.", metavar="STATEMENT")],
    amount: Annotated[str, typer.Argument(help="What to take off it, in its currency.", metavar="AMOUNT")],
    tenant: OneTenant,
    reason: Annotated[str, typer.Option(help="Why, in words.", metavar="TEXT")],
    reference: Annotated[str, typer.Option(help="Your number for it; used again it does nothing.", metavar="TEXT")],
    ledger: LedgerOption = None,
) -> None:
    """Take an amount off an issued statement, which itself stays as it is."""
    import polar_billing

    try:
        value = Decimal(amount)
    except InvalidOperation as error:
        raise AmountError(f"amount {amount!r} is not a number.", hint="Write it like 12.50.") from error
    with existing_ledger(ledger) as store:
        note = polar_billing.credit_note(store, tenant, statement_id, value, reason=reason, reference=reference)
        typer.echo(f"Credit note {note.reference}: {note.amount:f} off statement {note.statement}.")


def reprice(
    book: Annotated[Path, typer.Option(help="The other price book.", metavar="FILE")],
    ledger: LedgerOption = None,
    tenant: TenantOption = None,
    month: MonthOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    zone: ZoneOption = "UTC",
    as_json: JsonOption = False,
    csv: CsvOption = None,
) -> None:
    """Show what the same usage would come to under another price book, and the difference per tenant.

    Without a period it is about this month.
    """
    from polar_billing.prices.book import PriceBook

    period = period_of(month, since, until, zone)
    if month is None and since is None and until is None:
        now = datetime.now(UTC)
        period = period_of(f"{now:%Y-%m}", None, None, zone)
    other = PriceBook.load(book)
    with open_ledger(ledger) as store:
        import polar_billing
        from polar_billing.ledger.records import ALL_TENANTS
        from polar_billing.reports.billing_tables import repriced_view
        from polar_billing.reports.csv import repriced_csv

        rows = polar_billing.reprice(store, ALL_TENANTS if tenant is None else tenant, period, other)
    if csv is not None:
        write_file(csv, repriced_csv(rows))
    if as_json:
        show_json([row.model_dump(mode="json") for row in rows])
    elif not rows:
        typer.echo(f"No usage in {period.label}.")
    elif csv is None:
        show(repriced_view(rows, period.label))
