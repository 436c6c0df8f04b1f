"""A tenant's view of itself: its usage, spending and receipts, and nothing of any other tenant.

The figures are those of `polar usage`, the receipts those of `polar receipt`. Knows no HTTP.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from polar_billing.errors import CurrencyMixError, QueryError
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import Selection
from polar_billing.proof.receipts import make_receipt
from polar_billing.reports.query import usage_rows
from polar_billing.values.periods import Period, Window

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_ROWS: Final = 10_000
"""Groups of usage that one call may list."""


class Accounts:
    """The tenants of a ledger, each for itself. Safe in several threads and processes.

    Args:
        ledger: A ledger, a URL or the path of a SQLite file; None for `POLAR_LEDGER` or the default file.
    """

    def __init__(self, ledger: Ledger | str | None = None) -> None:
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger)

    def usage(
        self,
        tenant: str,
        *,
        by: Sequence[str] = ("tier",),
        month: str | None = None,
        since: str | None = None,
        until: str | None = None,
        zone: str = "UTC",
        currency: str | None = None,
    ) -> dict[str, Any]:
        """Usage and spend of a tenant in a period, JSON-like.

        Args:
            tenant: The tenant.
            by: Dimensions to group by, as in `polar usage --by`.
            month: `YYYY-MM`; default without the next two: current month.
            since: First day or moment.
            until: First day or moment after it.
            zone: Time zone of days and months.
            currency: Leave out what is rated in another currency.

        Raises:
            PeriodError: There is no such period.
            QueryError: It cannot be grouped so, several currencies were charged, or there are too many groups.
            StoreError: The ledger cannot be read.
        """
        period = _period(month, since, until, zone)
        try:
            rows = usage_rows(self.ledger, Selection(tenant, period), by=by, currency=currency)
        except CurrencyMixError as error:  # its hint is for the command line
            raise QueryError(
                "this usage was charged in several currencies, which cannot be added; choose one."
            ) from error
        if len(rows) > MAX_ROWS:
            raise QueryError(
                f"there are {len(rows):,} groups; at most {MAX_ROWS:,} are listed: choose a shorter period."
            )
        return {
            "tenant": tenant,
            "since": None if period.since is None else period.since.isoformat(),
            "until": None if period.until is None else period.until.isoformat(),
            "zone": period.zone,
            "rows": [row.model_dump(mode="json") for row in rows],
        }

    def receipt(self, tenant: str, request_id: str) -> dict[str, Any] | None:
        """The receipt of a tenant's request, JSON-like; None if the tenant has no such request."""
        with self.ledger.snapshot() as connection:
            try:
                return make_receipt(connection, tenant, request_id)
            except QueryError:  # or its price book is gone, which is for `polar verify` to tell
                return None


def _period(month: str | None, since: str | None, until: str | None, zone: str) -> Period:
    if month is not None and not (since is None and until is None):
        raise QueryError("month was given together with since or until; give one of them.")
    if month is not None:
        return Period.month(month, zone)
    if since is None and until is None:
        return Period.containing(datetime.now(UTC), Window.MONTH, zone)
    return Period.between(since, until, zone)
