"""What exports read from a ledger: the books to charge by, and whether usage is whole. Knows no format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_billing.ledger.books import books_in_force, read_books
from polar_billing.ledger.records import AllTenants
from polar_billing.statements.draft import check_kept
from polar_billing.statements.period import known_tenants

if TYPE_CHECKING:
    from polar_billing.ledger.ledger import Ledger
    from polar_billing.prices.book import PriceBook
    from polar_billing.values.periods import Period


def charging_books(ledger: Ledger) -> dict[str, PriceBook]:
    """The revision in force of the book of each receipt, by the content hash of the receipt's book.

    Statements charge by it, and it agrees with the receipts about the past.
    """
    ledger.price_books()  # records on their way bring in their books
    with ledger.snapshot() as connection:
        in_force = books_in_force(connection)
        return {digest: in_force[book.id] for digest, book in read_books(connection).items()}


def check_whole(ledger: Ledger, tenant: str | AllTenants, period: Period) -> None:
    """Refuse a period of which retention has deleted usage.

    Raises:
        PeriodError: Some was deleted, or the period lacks an end.
    """
    with ledger.snapshot() as connection:
        for name in known_tenants(connection) if isinstance(tenant, AllTenants) else [tenant]:
            check_kept(connection, name, period)
