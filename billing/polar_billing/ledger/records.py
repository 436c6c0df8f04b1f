"""The records of the ledger: entries, stored and pruned usage, selections.

Also the conversion of a usage record to one row of `polar_usage` and back, written out field by field instead of
derived, so that a new field of the record cannot be missed in the schema; the round trip is tested over generated
records. Rows are trusted when read: they were validated when written and cannot change. Opens nothing.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from polar_billing.values.canonical import canonical_text, record_json, to_microseconds
from polar_billing.values.money import to_units
from polar_billing.values.periods import ALL_TIME, Period
from polar_sdk.errors import InvalidRequestError
from polar_sdk.usage import FlopUsage, Outcome, TokenUsage, UsageRecord, VisitUsage, flaw_of_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from decimal import Decimal

    from sqlalchemy import ColumnElement, Row

    from polar_billing.prices.book import PriceBook


Identity = tuple[str, str, str]
"""Tenant, source, request id: a request's unique key."""


REUSED_TAG: Final = "polar.reused_id"
"""Tag of a usage record whose request id another request had taken: that id."""

INTERRUPTED_TAG: Final = "polar.interrupted"
"""Tag of a usage record of a request that was running when its process was killed: that request's id."""


SOURCE_VARIABLE: Final = "POLAR_SOURCE"
DEFAULT_SOURCE: Final = "polar"
_MAX_SOURCE: Final = 200
"""Unit: characters."""


def source_named(name: str | None = None) -> str:
    """A source, the name of the service that meters; None for the one that `POLAR_SOURCE` names, or else `polar`.

    Request ids, and the keys of repeated requests, are unique per tenant and source. So the replicas of one service
    have one name, and none of them stores, charges or answers again what another one did; services that make ids of
    their own accord in one ledger have different names.

    Raises:
        InvalidRequestError: It is not a valid name.
    """
    found = name if name is not None else os.environ.get(SOURCE_VARIABLE) or DEFAULT_SOURCE
    flaw = flaw_of_name(found)
    if not 1 <= len(found) <= _MAX_SOURCE:
        flaw = f"has {len(found)} characters; use 1 to {_MAX_SOURCE}"
    if flaw is not None:
        raise InvalidRequestError(
            f"source {found[:40]!r} {flaw}.", hint=f"Set {SOURCE_VARIABLE} to the service's name."
        )
    return found


class AllTenants:
    """Takes the place of a tenant: the operator's view. A query never spans tenants by omission."""

    def __repr__(self) -> str:
        return "ALL_TENANTS"


ALL_TENANTS: Final = AllTenants()


@dataclass(frozen=True)
class Selection:
    """Which usage to read; every condition must hold."""

    tenant: str | AllTenants
    period: Period = ALL_TIME
    """Over service time."""
    tier: str | None = None
    """None for every tier, requests without one included."""
    model: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


class StoredUsage(NamedTuple):
    """One request as the ledger holds it."""

    seq: int
    """Rises with every record stored; never used twice."""
    source: str
    record: UsageRecord
    stored_at: datetime
    """When the ledger took it in, UTC; service time is `record.started_at`."""
    price_book_hash: str
    """The book that the receipt was made by."""
    cost: Decimal | None
    """The cost on the receipt, 12 decimals; None where unrated. Unit: currency units of the book."""
    unrated: str | None


@dataclass(frozen=True)
class PrunedUsage:
    """A request whose facts retention deleted: its number, its content hash and its receipt."""

    seq: int
    source: str
    stored_at: datetime
    price_book_hash: str
    cost: Decimal | None
    unrated: str | None

    def of(self, record: UsageRecord) -> StoredUsage:
        """The stored request again, with the record that a replay brought."""
        return StoredUsage(self.seq, self.source, record, self.stored_at, self.price_book_hash, self.cost, self.unrated)


@dataclass(frozen=True)
class Entry:
    """One record on its way into the ledger, with what its receipt says."""

    record: UsageRecord
    source: str
    book: PriceBook
    """The book that the receipt was made by."""
    cost: Decimal | None
    """None where unrated. Unit: currency units of the book."""
    unrated: str | None = None

    def __post_init__(self) -> None:
        _ = self.cost_units  # raises AmountError here, in the call it belongs to, if the ledger cannot hold it

    @cached_property
    def identity(self) -> Identity:
        """The unique key."""
        return (self.record.tenant, self.source, self.record.request_id)

    @cached_property
    def cost_units(self) -> int | None:
        """The cost as the ledger holds it. Unit: 10^-12 of a currency unit."""
        return None if self.cost is None else to_units(self.cost)

    def renamed(self) -> Entry:
        """The same use under an id made of its content, for a record whose id another request has taken."""
        return self._under_new_id("reused", REUSED_TAG)

    def interrupted(self) -> Entry:
        """The same use, up to a mark, under an id made of its content: nobody knows more of its request."""
        return self._under_new_id("interrupted", INTERRUPTED_TAG)

    def _under_new_id(self, kind: str, tag: str) -> Entry:
        """Stored twice, it has the same id twice: after a crash nothing is charged again."""
        record = self.record
        tags = {**record.tags, tag: record.request_id}
        changes = {"request_id": f"{kind}-{self.content_hash[:32]}", "tags": tags}
        return replace(self, record=record.model_copy(update=changes))

    @cached_property
    def canonical(self) -> bytes:
        """The record's JSON; written once, for the spool and for the hash."""
        return record_json(self.record)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over it, hexadecimal."""
        return hashlib.sha256(self.canonical).hexdigest()


def to_raw(seq: int, entry: Entry, stored_at: int) -> tuple[Any, ...]:
    """The row of `polar_usage` as the database holds it, in the order of its columns; moments in microseconds."""
    record = entry.record
    visits = record.visits
    return (
        seq,
        record.tenant,
        entry.source,
        record.request_id,
        entry.content_hash,
        record.schema_version,
        to_microseconds(record.started_at),
        stored_at,
        canonical_text(record.tags) if record.tags else "{}",
        *_how_it_ran(record),
        str(record.outcome),
        record.finish_reason,
        record.error,
        *_tokens(record),
        canonical_text(visits.prefill),
        canonical_text(visits.decode),
        *_work(record),
        canonical_text(visits.prefill_filled) if visits.prefill_filled else None,
        *(_drafts(record) if record.tokens.drafted else _NO_DRAFTS),
    )


_how_it_ran: Final = attrgetter("model", "model_fingerprint", "router", "router_version", "tier", "program")
_NO_DRAFTS: Final = (None, None, None)
_drafts: Final = attrgetter("tokens.drafted", "tokens.accepted", "flops.drafts")
_tokens: Final = attrgetter("tokens.input", "tokens.cached", "tokens.output")
_work: Final = attrgetter(
    *("flops.embed", "flops.layers_prefill", "flops.layers_decode", "flops.head", "flops.router", "flops.total"),
    *("flops_formula", "identity_flops", "kv_bytes_peak", "device", "dtype"),
    *("queue_ns", "prefill_ns", "decode_ns", "loops_stopped"),
)


def receipt_to_raw(seq: int, entry: Entry) -> tuple[Any, ...]:
    """The row of `polar_receipt` as the database holds it, in the order of its columns."""
    return (seq, entry.book.content_hash, entry.cost_units, entry.unrated)


def from_row(row: Row[Any]) -> StoredUsage:
    """The stored usage of a row of `polar_usage` joined with its receipt."""
    record = UsageRecord.model_construct(
        schema_version=row.record_version,
        request_id=row.request_id,
        tenant=row.tenant,
        tags=row.tags,
        model=row.model,
        model_fingerprint=row.model_fingerprint,
        router=row.router,
        router_version=row.router_version,
        tier=row.tier,
        program=row.program,
        outcome=Outcome(row.outcome),
        finish_reason=row.finish_reason,
        error=row.error,
        tokens=TokenUsage.model_construct(
            input=row.tokens_input,
            cached=row.tokens_cached,
            output=row.tokens_output,
            drafted=row.tokens_drafted or 0,
            accepted=row.tokens_accepted or 0,
        ),
        visits=VisitUsage.model_construct(
            prefill=row.visits_prefill, prefill_filled=row.visits_prefill_filled or (), decode=row.visits_decode
        ),
        flops=FlopUsage.model_construct(
            embed=row.flops_embed,
            layers_prefill=row.flops_layers_prefill,
            layers_decode=row.flops_layers_decode,
            head=row.flops_head,
            router=row.flops_router,
            total=row.flops_total,
            drafts=row.flops_drafts or 0,
        ),
        loops_stopped=row.loops_stopped,
        flops_formula=row.flops_formula,
        identity_flops=row.identity_flops,
        kv_bytes_peak=row.kv_bytes_peak,
        device=row.device,
        dtype=row.dtype,
        started_at=row.started_at,
        queue_ns=row.queue_ns,
        prefill_ns=row.prefill_ns,
        decode_ns=row.decode_ns,
    )
    return StoredUsage(row.seq, row.source, record, row.stored_at, row.price_book_hash, row.cost, row.unrated)


def conditions(selection: Selection, columns: Any, moment: Any, since: Any, until: Any) -> list[ColumnElement[bool]]:
    """The conditions of a selection in SQL, over usage or over its sums by hour; its tags are left to the caller.

    `moment` is the column that says when, in the unit of the two bounds; None for no limit.
    """
    where = [] if isinstance(selection.tenant, AllTenants) else [columns.tenant == selection.tenant]
    where += [] if selection.tier is None else [columns.tier == selection.tier]
    where += [] if selection.model is None else [columns.model == selection.model]
    return where + in_span(moment, since, until)


def in_span(moment: Any, since: Any, until: Any) -> list[ColumnElement[bool]]:
    """The conditions of a half-open span in SQL; None for no limit."""
    begun = [] if since is None else [moment >= since]
    return begun if until is None else [*begun, moment < until]
