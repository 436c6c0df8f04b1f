"""Receipts that can be proved: one request's cost, and its place in the hash chain of its tenant.

A receipt is a small JSON object that the tenant keeps. `check_receipt` checks every value of it against the ledger, and
walks the chain from it to the head; so the holder of a receipt notices if the ledger was rewritten. Knows no prices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, select

from polar_billing.errors import QueryError
from polar_billing.ledger.append import find_known
from polar_billing.ledger.books import read_book
from polar_billing.ledger.chain import Link, digest_of, hash_of, raw_rows
from polar_billing.ledger.records import StoredUsage
from polar_billing.ledger.schema import CHAINED, link_table
from polar_billing.proof.verify import wrong_link_after
from polar_billing.values.money import STORED_SCALE, from_scaled
from polar_sdk.usage import COMPUTE_UNIT_VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection


FORMAT: Final = "polar-receipt-1"
_SUBJECT: Final = "usage"


def make_receipt(connection: Connection, tenant: str, request_id: str, *, source: str = "polar") -> dict[str, Any]:
    """The receipt of one stored request, JSON-like.

    Args:
        connection: A transaction that sees one state of the ledger.
        tenant: The tenant that the request belongs to.
        request_id: Its id.
        source: Which meter stored it.

    Raises:
        QueryError: The ledger holds no such request of this tenant.
    """
    known = find_known(connection, [(tenant, source, request_id)]).get((tenant, source, request_id))
    if known is None:
        raise QueryError(
            f"request {request_id!r} of tenant {tenant!r} and source {source!r} is not in the ledger.",
            hint="List requests with `polar usage --requests --tenant NAME`.",
        )
    digest, stored = known
    link = _link_of(connection, str(stored.seq))
    flops = stored.record.flops.total if isinstance(stored, StoredUsage) else None
    book = read_book(connection, stored.price_book_hash)
    if book is None:
        raise QueryError(
            f"price book {stored.price_book_hash} of request {request_id!r} is not in the ledger.",
            hint="Run `polar verify`.",
        )
    return {
        "format": FORMAT,
        "tenant": tenant,
        "source": source,
        "request_id": request_id,
        "content_hash": digest,
        "compute_unit_version": COMPUTE_UNIT_VERSION,
        "compute_units": None if flops is None else f"{from_scaled(flops, 12):f}",
        "cost": None if stored.cost is None else f"{stored.cost:.{STORED_SCALE}f}",
        "currency": book.currency,
        "unrated": stored.unrated,
        "price_book": book.id,
        "price_book_hash": stored.price_book_hash,
        "stored_at": stored.stored_at.isoformat(),
        "chain": {
            "number": link.number,
            "row": link.key,
            "digest": link.digest.hex(),
            "previous": link.previous.hex(),
            "hash": link.hash.hex(),
        },
    }


def check_receipt(connection: Connection, receipt: Mapping[str, Any]) -> str | None:
    """Check a receipt against the ledger.

    Returns:
        What does not agree, or None if all of it does.

    Raises:
        QueryError: It is not a receipt.
    """
    if receipt.get("format") != FORMAT or not isinstance(receipt.get("chain"), dict):
        raise QueryError(
            f"receipt format {receipt.get('format')!r} is not {FORMAT!r}.", hint="Use the output of `polar receipt`."
        )
    names = [receipt.get(name) for name in ("tenant", "request_id", "source")]
    if not all(isinstance(name, str) for name in names):
        raise QueryError("the receipt names no tenant, request and source.", hint="Use the output of `polar receipt`.")
    tenant, request_id, source = map(str, names)
    try:
        now = make_receipt(connection, tenant, request_id, source=source)
    except QueryError:
        return f"request {request_id!r} of tenant {tenant!r} is not in the ledger; it was deleted or never stored."
    for name, value in receipt.items():
        if name == "compute_units" and now[name] is None:
            continue  # pruned: the facts are gone, the proof is not
        if now.get(name) != value:
            return f"{name} is {value!r} on the receipt and {now.get(name)!r} in the ledger."
    return _wrong_from(connection, tenant, int(now["chain"]["number"]))


def _wrong_from(connection: Connection, tenant: str, number: int) -> str | None:
    """What is wrong with the request's row, or with the chain from its link to the head."""
    link = _link_at(connection, tenant, number)
    if hash_of(link.tenant, link.number, link.subject, link.key, link.digest, link.previous) != link.hash:
        return f"number {number} of the chain was changed."
    rows = raw_rows(connection, CHAINED[_SUBJECT], [int(link.key)]).get(link.key)
    if rows is not None and digest_of(_SUBJECT, rows) != link.digest:
        return f"the request was changed after it was stored (number {number} of the chain)."
    wrong = wrong_link_after(connection, link)
    return None if wrong is None else f"number {wrong.number} of the chain {wrong.what}"


def _link_at(connection: Connection, tenant: str, number: int) -> Link:
    where = and_(link_table.c.tenant == tenant, link_table.c.number == number)
    row = connection.execute(select(link_table).where(where)).one()
    return Link(*row[:4], *map(bytes, row[4:]))


def _link_of(connection: Connection, key: str) -> Link:
    where = and_(link_table.c.subject == _SUBJECT, link_table.c.key == key)
    row = connection.execute(select(link_table).where(where)).one_or_none()
    if row is None:
        raise QueryError(f"request number {key} has no link in the chain.", hint="Run `polar verify`.")
    return Link(*row[:4], *map(bytes, row[4:]))
