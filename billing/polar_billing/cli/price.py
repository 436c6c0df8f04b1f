"""The commands `polar price add`, `show`, `diff` and `quote`.

Arguments in, text out; the work is done by `prices` and `ledger`.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_billing.cli import options as opt
from polar_billing.errors import QueryError
from polar_sdk.show.lines import print_json, print_line

if TYPE_CHECKING:
    from polar_billing.prices.book import PriceBook


_File = Annotated[Path, typer.Argument(help="A price book (TOML).", metavar="FILE")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    price = typer.Typer(
        no_args_is_help=True,
        help="Put price books in force, show and compare them, and quote prices.",
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
    file: _File,
    for_all: Annotated[
        bool,
        typer.Option("--for-all", help="Also charge the tenants that no book names, instead of the previous book."),
    ] = False,
    ledger: opt.Ledger = None,
) -> None:
    """Put a price book, or a revision of one, in force in the ledger: meters charge by it from now on.

    A revision may only add entries that begin later: what has been in force, or has rated usage, stays as it was. A
    further book charges the tenants among its customers; with --for-all it charges all other tenants as well.
    """
    from polar_billing.prices.book import PRICE_BOOK_VARIABLE, PriceBook

    book = PriceBook.load(file)
    with opt.open_ledger(ledger) as store:
        from polar_billing.ledger.books import add_book
        from polar_billing.prices.in_force import InForce

        added = add_book(store, book, for_all=for_all)
        state = "is in force now" if added else "was in force already"
        print_line(f"Price book {book.id} ({book.content_hash[:12]}) {state} in the ledger {store.location}.")
        others = InForce(store.price_choices()).book(None, datetime.max.replace(tzinfo=UTC))
        if others is not None and others.id != book.id:
            named = len({customer.tenant for customer in book.customers})
            whom = f"the {named:,} tenant(s) it names" if named else "nobody, as it names no tenant"
            print_line(f"It charges {whom}; {others.id} charges all others; --for-all changes that.")
        if file_named := os.environ.get(PRICE_BOOK_VARIABLE):
            print_line(f"Meters here still charge by {file_named}, because {PRICE_BOOK_VARIABLE} is set.")


def show_book(
    file: Annotated[
        Path | None, typer.Argument(help="A price book; by default those in force in the ledger.", metavar="[FILE]")
    ] = None,
    ledger: opt.Ledger = None,
    as_json: opt.Json = False,
) -> None:
    """Show price books: rates, plans, customers and prepaid credits."""
    from polar_billing.reports.billing_tables import book_view

    books = _books(file, ledger)
    if as_json:
        print_json([{"content_hash": book.content_hash, **book.model_dump(mode="json")} for book in books])
    elif not books:
        print_line("No price book in the ledger yet; `polar price add FILE` puts one in force.")
    else:
        for book in books:
            opt.show(book_view(book))


def diff(
    file: _File,
    other: Annotated[
        Path | None,
        typer.Argument(help="The book to compare with; by default the book of the same id in force.", metavar="[OLD]"),
    ] = None,
    ledger: opt.Ledger = None,
    as_json: opt.Json = False,
) -> None:
    """Show what a price book changes, and which changes are in the past and would be refused."""
    from polar_billing.prices.book import PriceBook
    from polar_billing.prices.revisions import changes

    new = PriceBook.load(file)
    old = next((book for book in _books(other, ledger) if other is not None or book.id == new.id), None)
    if old is None:
        raise QueryError(f"the ledger has no price book {new.id!r}.", hint="Name the file to compare with.")
    now = datetime.now(UTC)
    compared = [(change, change.effective_from is None or change.effective_from <= now) for change in changes(old, new)]
    if as_json:
        print_json(
            [{"path": change.path, "old": change.old, "new": change.new, "past": past} for change, past in compared]
        )
    elif not compared:
        print_line("The two price books are the same.")
    else:
        for change, past in compared:
            print_line(f"{change}{'   (past: refused)' if past else ''}")


def quote(
    flops: Annotated[int, typer.Option(min=0, help="Maximum FLOPs that the request executes.", metavar="NUMBER")],
    input_tokens: Annotated[int, typer.Option("--input", min=0, help="Number of prompt tokens.", metavar="NUMBER")] = 0,
    output_tokens: Annotated[
        int, typer.Option("--output", min=0, help="Maximum number of tokens sampled.", metavar="NUMBER")
    ] = 0,
    tenant: Annotated[str, typer.Option(help="The tenant.", metavar="NAME")] = "default",
    tier: Annotated[
        str | None, typer.Option(help="The tier; by default none: a program by hand.", metavar="NAME")
    ] = None,
    at: Annotated[str | None, typer.Option(help="When the request is served; by default now.", metavar="DATE")] = None,
    book: opt.Book = None,
    ledger: opt.Ledger = None,
    as_json: opt.Json = False,
) -> None:
    """Quote the maximum price of a request before it runs; within the given limits it never costs more."""
    from polar_billing.prices.quote import quote as quote_request
    from polar_billing.values.periods import Period

    moment = Period.between(at, None).since or datetime.now(UTC)
    with opt.open_ledger(ledger) as store:
        from polar_billing.prices.in_force import Prices

        prices = Prices(store.price_choices, book).of(tenant, moment)  # by which a meter charges
    quoted = quote_request(prices, tenant, tier, flops, input_tokens, output_tokens, moment)
    amount = None if quoted.amount is None else f"{quoted.amount:f}"
    if as_json:
        print_json({"amount": amount, "currency": quoted.currency, "unrated": quoted.unrated, "price_book": prices.id})
    elif amount is None:
        print_line(f"Unrated: {quoted.unrated}.")
    else:
        print_line(f"At most {amount} {quoted.currency}, by price book {prices.id}.")


def _books(file: Path | None, ledger: str | None) -> list[PriceBook]:
    from polar_billing.prices.book import PriceBook

    if file is not None:
        return [PriceBook.load(file)]
    with opt.open_ledger(ledger) as store, store.snapshot() as connection:
        from polar_billing.ledger.books import books_in_force

        return [book for _, book in sorted(books_in_force(connection).items())]
