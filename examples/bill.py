"""The bill at the end of every example: what one run used, and what that costs, by tenant and tier.

Each run has its own ledger in a temporary folder, so yours is not touched. In your own code, leave out `ledger=`: usage
then goes to your ledger, and `polar usage` shows it.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from decimal import Decimal
from typing import TYPE_CHECKING

from polar_billing import ALL_TENANTS, Ledger, Selection, usage_rows

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def ledger_of_this_run() -> Iterator[str]:
    """The URL of a fresh ledger; when the block ends, its bill is printed and the ledger is removed."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        url = f"sqlite:///{folder}/ledger.sqlite3"
        yield url
        print_bill(Ledger(url))


def print_bill(ledger: Ledger) -> None:
    """Print one line per tenant and tier, and their sum."""
    print("\nThe bill, from the ledger")
    total, currency = Decimal(0), ""
    for row in usage_rows(ledger, Selection(ALL_TENANTS), by=["tenant", "tier"]):
        who, on = row.group["tenant"], row.group["tier"] or "by hand"
        tokens = f"{row.tokens_input} + {row.tokens_output} tokens"
        left = row.outcomes.get("cancelled", 0)
        print(
            f"  {who:<8} {on:<9} {row.requests:>2} requests  {tokens:<17} {row.compute_units:.4f} CU  "
            f"{row.cost} {row.currency}{f'  ({left} left early)' if left else ''}"
        )
        total, currency = total + (row.cost or 0), row.currency or currency
    print(f"  total: {total} {currency}")
