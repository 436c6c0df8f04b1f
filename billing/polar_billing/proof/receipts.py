"""Receipts that can be proved: one request's cost, and its place in the hash chain of its tenant.

A receipt is a small JSON object that the tenant keeps. `check_receipt` checks that it has exactly the fields of a
receipt, checks every value against the ledger, and follows the chain from it to the head; so the holder of a receipt
notices if the ledger was rewritten. Knows no prices.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import func, select, union_all

from polar_billing.errors import QueryError
from polar_billing.ledger.append import find_known
from polar_billing.ledger.books import read_book
from polar_billing.ledger.chain import Head, Link, digest_of, hash_of, raw_rows
from polar_billing.ledger.records import Identity, StoredUsage, source_named
from polar_billing.ledger.schema import (
    CHAINED,
    head_table,
    link_table,
    price_book_table,
    pruned_table,
    receipt_table,
    usage_table,
)
from polar_billing.proof.chain_check import ChainCheck
from polar_billing.proof.column_types import well_typed
from polar_billing.proof.verify import MALFORMED
from polar_billing.values.money import STORED_SCALE, from_scaled
from polar_sdk.reading import shown
from polar_sdk.usage import COMPUTE_UNIT_VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import ColumnElement, Connection


FORMAT: Final = "polar-receipt-1"
_SUBJECT: Final = "usage"
_IDENTITY: Final = ("tenant", "source", "request_id")
_TABLES: Final = (usage_table, receipt_table, pruned_table, price_book_table, link_table, head_table)
"""The tables that a receipt is checked against."""
_LOST_WITH_FACTS: Final = "compute_units"
"""The field of a receipt that a pruned ledger no longer knows."""
_MAX_SHOWN: Final = 100
"""Unit: characters."""
_MIN_PREFIX: Final = 6
"""Characters of an id that stand for the whole, where no other id begins so."""
_MAX_LISTED: Final = 5
_requests: Final = union_all(
    *(select(table.c.tenant, table.c.source, table.c.request_id) for table in (usage_table, pruned_table))
).subquery()
"""The identity of every request, pruned ones included."""


@dataclass(frozen=True)
class ReceiptCheck:
    """The result of checking a receipt."""

    wrong: str | None
    """The first disagreement with the ledger; None if nothing was found."""
    unchecked: tuple[str, ...] = ()
    """Fields that the ledger can no longer check, because retention deleted the facts."""


def find_request(connection: Connection, request_id: str, tenant: str | None, source: str | None) -> Identity:
    """The one request of that id, or else whose id alone begins so; tenant and source may be left out.

    Raises:
        QueryError: There is none, or there are several.
    """
    requests = _requests.c
    named = ((requests.tenant, tenant), (requests.source, source))
    of = [column == name for column, name in named if name is not None]

    def of_id(name: str) -> set[Identity]:
        rows = connection.execute(select(_requests).where(requests.request_id == name, *of))
        return {(row.tenant, row.source, row.request_id) for row in rows}

    found: set[Identity] = set()
    if all(can_be_stored(name) for name in (request_id, tenant, source) if name is not None):
        found = of_id(request_id) or of_id(_whole_id(connection, request_id, of))
    if not found:
        whose = "" if tenant is None else f" of tenant {tenant!r}"
        by = "" if source is None else f" from source {source!r}"
        raise QueryError(
            f"no request {shown(request_id)}{whose}{by} is in the ledger.",
            hint=f"`polar usage --requests` lists requests, and {_MIN_PREFIX} characters of an id may suffice; "
            "statement lines are named like st-…/1.",
        )
    if len(found) > 1:
        tenants, sources, (name,) = (sorted(names) for names in map(set, zip(*found, strict=True)))
        option, others = ("--tenant", tenants) if len(tenants) > 1 else ("--source", sources)
        raise QueryError(
            f"{len(found)} requests have the id {shown(name)}.",
            hint=f"Name one with {option}: {', '.join(map(shown, others[:_MAX_LISTED]))}.",
        )
    return found.pop()


def _whole_id(connection: Connection, prefix: str, of: Sequence[ColumnElement[bool]]) -> str:
    """The one id that begins with a prefix; the prefix itself where it is too short, or no id begins so."""
    if len(prefix) < _MIN_PREFIX:
        return prefix
    name = _requests.c.request_id
    begins = func.substr(name, 1, len(prefix)) == prefix  # on SQLite, LIKE takes small letters for capital ones
    query = select(name).where(begins, *of).distinct().order_by(name).limit(_MAX_LISTED)
    ids = list(connection.execute(query).scalars())
    if len(ids) > 1:
        raise QueryError(
            f"several requests have an id that begins with {shown(prefix)}.",
            hint=f"Give more characters; the first ids are {', '.join(map(shown, ids))}.",
        )
    return ids[0] if ids else prefix


def make_receipt(connection: Connection, tenant: str, request_id: str, *, source: str | None = None) -> dict[str, Any]:
    """The receipt of one stored request, JSON-like; of the `source` of this process if none is given.

    Raises:
        QueryError: The ledger holds no such request of this tenant.
    """
    source = source_named(source)
    identity = (tenant, source, request_id)
    known = find_known(connection, [identity]).get(identity) if all(map(can_be_stored, identity)) else None
    if known is None:
        raise QueryError(
            f"request {request_id!r} of tenant {tenant!r} and source {source!r} is not in the ledger.",
            hint="List requests with `polar usage --requests --tenant NAME`.",
        )
    digest, stored = known
    link = _link(connection, link_table.c.subject == _SUBJECT, link_table.c.key == str(stored.seq))
    if link is None:
        raise QueryError(f"request number {stored.seq} has no link in the chain.", hint="Run `polar verify`.")
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


def check_receipt(connection: Connection, receipt: Mapping[str, Any]) -> ReceiptCheck:
    """Check a receipt against the ledger: its fields, their values, and the chain from its link to the head.

    Raises:
        QueryError: It is not a receipt.
    """
    if receipt.get("format") != FORMAT:
        raise QueryError(
            f"receipt format {_shown(receipt.get('format'))} is not {FORMAT!r}.",
            hint="Use the output of `polar receipt`.",
        )
    tenant, source, request_id = (_name(receipt, field) for field in _IDENTITY)
    with well_typed(connection, _TABLES) as wrong:
        checked = _checked(connection, receipt, tenant, source, request_id)
    cells = [cell.what for cell in wrong if cell.tenant in {tenant, ""}]
    if checked.wrong is None or not cells:
        return checked
    return replace(checked, wrong=f"{checked.wrong} Perhaps because {cells[0]}")  # its row was hidden


def _checked(
    connection: Connection, receipt: Mapping[str, Any], tenant: str, source: str, request_id: str
) -> ReceiptCheck:
    try:
        stored = make_receipt(connection, tenant, request_id, source=source)
    except QueryError:
        request = f"request {_shown(request_id)} of tenant {_shown(tenant)}"
        return ReceiptCheck(f"{request} is not in the ledger; it was deleted or never stored.")
    except MALFORMED as error:
        return ReceiptCheck(f"the request in the ledger cannot be read ({type(error).__name__}).")
    # After pruning this field stays unchecked: the facts are gone, the proof is not.
    pruned = stored[_LOST_WITH_FACTS] is None and isinstance(receipt.get(_LOST_WITH_FACTS), str)
    unchecked = (_LOST_WITH_FACTS,) if pruned else ()
    wrong = _differing(receipt, {**stored, **{field: receipt[field] for field in unchecked}})
    return ReceiptCheck(wrong or _wrong_from(connection, tenant, int(stored["chain"]["number"])), unchecked)


def _name(receipt: Mapping[str, Any], field: str) -> str:
    """One of the three texts that identify the request; a receipt without it names nothing."""
    value = receipt.get(field)
    if not isinstance(value, str) or not can_be_stored(value):
        raise QueryError(
            f"{field} of the receipt is {_shown(value)}, which matches nothing.",
            hint="Use the output of `polar receipt`.",
        )
    return value


def can_be_stored(text: str) -> bool:
    """False for text that no ledger holds: with half of a surrogate pair, or with NUL."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\x00" not in text


def _differing(receipt: Mapping[str, Any], stored: Mapping[str, Any], within: str = "") -> str | None:
    """The first field that is missing, too many or of another value than in the ledger."""
    for field, value in stored.items():
        name = f"{within}{field}"
        if field not in receipt:
            return f"{name} is missing from the receipt; it is {value!r} in the ledger."
        on_receipt = receipt[field]
        if isinstance(value, dict) and isinstance(on_receipt, dict):
            if (wrong := _differing(on_receipt, value, f"{name}.")) is not None:
                return wrong
        elif type(on_receipt) is not type(value) or on_receipt != value:
            return f"{name} is {_shown(on_receipt)} on the receipt and {value!r} in the ledger."
    extra = next((field for field in receipt if field not in stored), None)
    return None if extra is None else f"{within}{_shown(extra)} is on the receipt, and no receipt has such a field."


def _shown(value: object) -> str:
    """A value of a receipt, which may be of any kind, size and depth, for one line."""
    return repr(value) if isinstance(value, str) and len(value) <= _MAX_SHOWN else reprlib.repr(value)


def _wrong_from(connection: Connection, tenant: str, number: int) -> str | None:
    """The first fault of the request's row, or of the chain from its link to the head."""
    link = _link(connection, link_table.c.tenant == tenant, link_table.c.number == number)
    assert link is not None  # the receipt was made of it
    if hash_of(link.tenant, link.number, link.subject, link.key, link.digest, link.previous) != link.hash:
        return f"number {number} of the chain was changed."
    rows = raw_rows(connection, CHAINED[_SUBJECT], [int(link.key)]).get(link.key)
    if rows is not None and digest_of(_SUBJECT, rows) != link.digest:
        return f"the request was changed after it was stored (number {number} of the chain)."
    head = connection.execute(select(head_table).where(head_table.c.tenant == tenant)).one_or_none()
    end = Head() if head is None else Head(head.number, bytes(head.hash))
    fault = ChainCheck(connection, tenant, rows=False).first_fault(end, after=Head(link.number, link.hash))
    return None if fault is None else f"number {fault.number} of the chain {fault.what}"


def _link(connection: Connection, *where: ColumnElement[bool]) -> Link | None:
    row = connection.execute(select(link_table).where(*where)).one_or_none()
    return None if row is None else Link(*row[:4], *map(bytes, row[4:]))
