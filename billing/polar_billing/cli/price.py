"""The commands `polar price add`, `show`, `diff` and `quote`.

Arguments in, text out; the work is done by `prices` and `ledger.books`.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_billing.cli.options import JsonOption, LedgerOption, open_ledger, show, show_json
from polar_billing.errors import QueryError

if TYPE_CHECKING:
    from polar_billing.prices.book import PriceBook


FileArgument = Annotated[Path, typer.Argument(help="A price book, TOML.", metavar="FILE")]
BookOption = Annotated[
    Path | None, typer.Option(help="This price book, not the one that meters charge by.", metavar="FILE")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    price = typer.Typer(
        no_args_is_help=True,
        help="Price books: put in force, show, compare, quote.",
        epilog="Example: polar price show",
    )
    price.command("add", epilog="Example: polar price add prices.toml")(add)
    price.command("show", epilog="Example: polar price show prices.toml")(show_book)
    price.command("diff", epilog="Example: polar price diff prices.toml")(diff)
    price.command(
        "quote", epilog="Example: polar price quote --tier standard --flops 14000000000000 --input 512 --output 256"
    )(quote)
    app.add_typer(price, name="price")


def add(
    file: FileArgument,
    for_all: Annotated[
        bool, typer.Option("--for-all", help="Also for tenants that no book names, in place of the book so far.")
    ] = False,
    ledger: LedgerOption = None,
) -> None:
    """Put a price book, or a revision of one, in force in the ledger: meters charge by it from now on.

    A revision keeps everything that has been in force, or has rated a use, as it was; it adds entries that begin later.
    A further book charges the tenants among its customers; with --for-all it charges all others as well.
    """
    from polar_billing.prices.book import PRICE_BOOK_VARIABLE, PriceBook

    book = PriceBook.load(file)
    with open_ledger(ledger) as store:
        from polar_billing.ledger.books import add_book
        from polar_billing.prices.current import InForce

        added = add_book(store, book, for_all=for_all)
        what = "is in force now" if added else "was in force already"
        typer.echo(f"Price book {book.id} ({book.content_hash[:12]}) {what} in the ledger {store.location}.")
        others = InForce(store.price_choices()).book(None, datetime.max.replace(tzinfo=UTC))
        if others is not None and others.id != book.id:
            named = len({one.tenant for one in book.customers})
            whom = f"the {named:,} tenant(s) it names" if named else "nobody, as it names no tenant"
            typer.echo(f"It charges {whom}; {others.id} charges all others, until --for-all says otherwise.")
        if file_named := os.environ.get(PRICE_BOOK_VARIABLE):
            typer.echo(f"Meters here charge by {file_named} all the same, as {PRICE_BOOK_VARIABLE} says.")


def show_book(
    file: Annotated[
        Path | None, typer.Argument(help="A price book; without it those in force in the ledger.", metavar="[FILE]")
    ] = None,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show price books: rates, plans, customers and prepaid credits."""
    from polar_billing.reports.billing_tables import book_view

    books = _books(file, ledger)
    if as_json:
        show_json([{"content_hash": book.content_hash, **book.model_dump(mode="json")} for book in books])
    elif not books:
        typer.echo("No price book in the ledger yet. `polar price add FILE` puts one in force.")
    else:
        for book in books:
            show(book_view(book))


def diff(
    file: FileArgument,
    other: Annotated[
        Path | None,
        typer.Argument(help="The book it is compared with; without it the one of its id in force.", metavar="[OLD]"),
    ] = None,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a price book changes, and what of that lies in the past and would be refused."""
    from polar_billing.prices.book import PriceBook
    from polar_billing.prices.revisions import changes

    new = PriceBook.load(file)
    old = PriceBook.load(other) if other is not None else _in_force(new.id, ledger)
    now = datetime.now(UTC)
    found = [(change, change.effective_from is None or change.effective_from <= now) for change in changes(old, new)]
    if as_json:
        show_json([{"path": change.path, "old": change.old, "new": change.new, "past": past} for change, past in found])
    elif not found:
        typer.echo("The two price books say the same.")
    else:
        for change, past in found:
            typer.echo(f"{change}{'   (past: refused)' if past else ''}")


def quote(
    flops: Annotated[int, typer.Option(min=0, help="Most FLOPs the request can execute.", metavar="NUMBER")],
    input_tokens: Annotated[int, typer.Option("--input", min=0, help="Prompt tokens.", metavar="NUMBER")] = 0,
    output_tokens: Annotated[int, typer.Option("--output", min=0, help="Most tokens sampled.", metavar="NUMBER")] = 0,
    tenant: Annotated[str, typer.Option(help="Who asks.", metavar="NAME")] = "default",
    tier: Annotated[str | None, typer.Option(help="The tier; none for a program by hand.", metavar="NAME")] = None,
    at: Annotated[str | None, typer.Option(help="When it is served; now by default.", metavar="DATE")] = None,
    book: BookOption = None,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say the most a request can cost before it runs; a request within these bounds never costs more."""
    from polar_billing.prices.quote import quote as quote_request
    from polar_billing.values.periods import Period

    moment = Period.between(at, None).since or datetime.now(UTC)
    prices = _charging(tenant, book, moment, ledger)
    most = quote_request(prices, tenant, tier, flops, input_tokens, output_tokens, moment)
    amount = None if most.amount is None else f"{most.amount:f}"
    if as_json:
        show_json({"amount": amount, "currency": most.currency, "unrated": most.unrated, "price_book": prices.id})
    elif amount is None:
        typer.echo(f"Unrated: {most.unrated}.")
    else:
        typer.echo(f"At most {amount} {most.currency}, by price book {prices.id}.")


def _books(file: Path | None, ledger: str | None) -> list[PriceBook]:
    from polar_billing.prices.book import PriceBook

    if file is not None:
        return [PriceBook.load(file)]
    with open_ledger(ledger) as store, store.snapshot() as connection:
        from polar_billing.ledger.books import books_in_force

        return [book for _, book in sorted(books_in_force(connection).items())]


def _in_force(book_id: str, ledger: str | None) -> PriceBook:
    for book in _books(None, ledger):
        if book.id == book_id:
            return book
    raise QueryError(f"the ledger has no price book {book_id!r}.", hint="Name the book to compare with.")


def _charging(tenant: str, named: Path | None, moment: datetime, ledger: str | None) -> PriceBook:
    """What a meter charges a tenant by."""
    with open_ledger(ledger) as store:
        from polar_billing.prices.current import Prices

        return Prices(store.price_choices, named).of(tenant, moment)
