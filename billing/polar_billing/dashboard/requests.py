"""Single requests: the latest, and one with its receipt, checked against the ledger. Knows no HTML."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from polar_billing.ledger.append import joined
from polar_billing.ledger.records import Selection, conditions, from_row
from polar_billing.ledger.schema import usage_table
from polar_billing.proof.receipts import ReceiptCheck, check_receipt, make_receipt
from polar_billing.proof.verify import MALFORMED

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from polar_billing.ledger.records import AllTenants, StoredUsage


class Receipt(NamedTuple):
    """A request, its receipt as the ledger has it, and whether the ledger still agrees with itself about it."""

    stored: StoredUsage
    receipt: dict[str, Any]
    check: ReceiptCheck


def latest_requests(connection: Connection, tenant: str | AllTenants, count: int) -> list[StoredUsage]:
    """The latest requests by service time, the last first."""
    usage = usage_table.c
    query = joined().where(*conditions(Selection(tenant), usage, usage.started_at, None, None))
    query = query.order_by(usage.started_at.desc(), usage.seq.desc()).limit(count)
    return list(map(from_row, connection.execute(query)))


def receipt_of(connection: Connection, tenant: str | AllTenants, seq: int) -> Receipt | None:
    """A stored request by its number, its receipt, and what checking that finds: values, row, and chain to the head.

    None where there is no such request, or its tenant is another one.
    """
    usage = usage_table.c
    query = joined().where(usage.seq == seq, *conditions(Selection(tenant), usage, usage.started_at, None, None))
    row = connection.execute(query).first()
    if row is None:
        return None
    stored = from_row(row)
    try:
        receipt = make_receipt(connection, stored.record.tenant, stored.record.request_id, source=stored.source)
        return Receipt(stored, receipt, check_receipt(connection, receipt))
    except MALFORMED as error:  # its price book or its link is gone, or was changed past this package
        return Receipt(stored, {}, ReceiptCheck(str(error)))
