"""The interface between engine and billing: the usage record, the bound that precedes it, and the sink for both.

Facts only: no prices, no torch, no framework. Old records can therefore be rated again under another price book. A
record counts only work that was actually executed; a cancelled or failed request is counted up to the last layer it
finished. A bound states, before a request runs, the maximum that it can use.
"""

from __future__ import annotations

import os
import time
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from polar_sdk.promises.standing import Standings

if TYPE_CHECKING:
    from polar_sdk.promises.audit import Audit, PromiseStanding

SCHEMA_VERSION: Final = 3
"""Version of the fields of a record; it rises whenever one is added or changes its meaning."""
FLOPS_FORMULA = "torch-1"
"""Version of the FLOPs formula: one multiply-accumulate is 2 FLOPs; matrix products and attention count, as
`torch.utils.flop_counter.FlopCounterMode` counts them (attention as the full rectangle queries × keys)."""

COMPUTE_UNIT_VERSION = "cu-1"
FLOPS_PER_COMPUTE_UNIT = 10**12
"""One compute unit (CU) is 10^12 executed FLOPs. Unit: FLOPs per CU."""

NonNegative = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
UPSTREAM: Final = "upstream"
"""Device of requests that another server computed."""
WORKER_TAG: Final = "polar.worker"
"""Tag of records of requests that a vLLM with programs computed: the id of that vLLM's run."""
DISPUTED_TAG: Final = "polar.disputed"
"""Tag of records of requests for which another server reported impossible figures: the kind of figure."""
UNSTATED_TAG: Final = "polar.unstated"
"""Tag of records of requests for which another server did not report everything: `cached` if the number of cached
prompt tokens is unknown. None are then counted as cached, so the FLOPs of the prompt are an upper bound."""
FALLBACK_TAG: Final = "polar.fallback_from"
"""Tag of records of requests served by a safer tier because audits put their own tier's promise at risk: the tier or
tolerance requested."""
AUDIT_TAG: Final = "polar.audit_of"
"""Tag of records of audits, which belong to the provider: id of the request whose answer is audited."""
STOPPED_TAG: Final = "polar.stopped_by"
"""Tag of records of answers that an option ended: `repeats`."""
AS_STORED: Final = {"as_stored": True}
"""Validation context for records that were accepted earlier, whatever their names."""
_CONTROL: Final = {
    "Cc": "control character",
    "Cf": "control character",
    "Zl": "control character",
    "Zp": "control character",
    "Cs": "lone surrogate",
}
"""By Unicode category: control, format, line separator, paragraph separator, surrogate."""
Receipt = Mapping[str, Any]
"""Answer of a sink, JSON-like: `cost` (exact decimal as text), `currency`, `cost_details`, … The engine passes it on
unread; it may be empty if the sink has no prices."""


def _check_name(name: str, info: ValidationInfo) -> str:
    return name if info.context == AS_STORED else _flawless(name, flaw_of_name(name))


def _check_tags(tags: Mapping[str, str], info: ValidationInfo) -> Mapping[str, str]:
    if info.context != AS_STORED:
        for key, value in tags.items():
            _flawless(key, flaw_of_name(key))
            _flawless(value, flaw_of_text(value))
    return tags


def _flawless(text: str, flaw: str | None) -> str:
    if flaw is not None:
        raise ValueError(f"{text[:40]!r} {flaw}; remove it")
    return text


Identifier = Annotated[str, StringConstraints(min_length=1, max_length=200), AfterValidator(_check_name)]
"""The name of a tenant or a request, unchanged: two names that differ are never charged as one."""
Tags = Annotated[Mapping[str, str], AfterValidator(_check_tags)]


class Outcome(StrEnum):
    """How a request ended."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    ERROR = "error"
    CACHED = "cached"
    """Answered from a cache outside the engine; 0 FLOPs were executed."""


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenUsage(_Facts):
    """Tokens of one request. Unit: tokens."""

    input: NonNegative = 0
    """Prompt tokens, chat template included."""
    cached: NonNegative = 0
    """Prompt tokens whose keys and values were reused; included in `input`."""
    output: NonNegative = 0
    """Tokens sampled, the end-of-text token and tokens hidden by a stop string included."""
    drafted: NonNegative = 0
    """Tokens that a draft head guessed, or that ran before it was known whether they belong to the answer."""
    accepted: NonNegative = 0
    """Drafted tokens that belong to the answer, each of which saved a pass; included in `drafted`."""

    @model_validator(mode="after")
    def _parts_are_no_more_than_the_whole(self) -> Self:
        for part, whole in (("accepted", "drafted"), ("cached", "input")):
            some, every = getattr(self, part), getattr(self, whole)
            if some > every:
                raise ValueError(f"{part} tokens ({some}) exceed {whole} tokens ({every}), of which they are a part")
        return self


class VisitUsage(_Facts):
    """Executed layer visits, one number per layer of the model (index = layer). Unit: visits.

    A visit is one execution of one layer for this request, for any number of tokens: each time the program visits the
    layer, a prefill in one piece counts one, and every decode pass counts one, whether it yields one token or, with
    drafts, several. If a layer runs for some tokens of a piece and is filled for the others, the piece counts both in
    `prefill` and in `prefill_filled`.
    """

    prefill: tuple[NonNegative, ...] = ()
    prefill_filled: tuple[NonNegative, ...] = ()
    """Pieces of the prompt for which a map wrote the layer's keys and values; empty if no layer was filled."""
    decode: tuple[NonNegative, ...] = ()

    @property
    def total(self) -> int:
        """Visits that ran, of all layers, prefill and decode together."""
        return sum(self.prefill) + sum(self.decode)


class FlopUsage(_Facts):
    """Executed FLOPs by part. Unit: FLOPs; one multiply-accumulate is 2.

    The parts are what the answer needed, that is, what runs without drafts. What was executed beyond that is `drafts`.
    """

    embed: NonNegative = 0
    """Embedding lookup: a gather, so 0 for every supported family."""
    layers_prefill: NonNegative = 0
    layers_decode: NonNegative = 0
    head: NonNegative = 0
    """The output projection, for the positions whose logits were computed."""
    router: NonNegative = 0
    total: NonNegative = 0
    """FLOPs that the answer needed: the sum of the five parts above."""
    drafts: NonNegative = 0
    """Executed for drafted tokens that were not kept, by wider passes and by guessing; not in `total`."""

    @property
    def executed(self) -> int:
        """All that was executed, drafts included. Unit: FLOPs."""
        return self.total + self.drafts

    @property
    def answer(self) -> int:
        """FLOPs after the prompt: decode steps, and the head for each of its tokens. Unit: FLOPs."""
        return self.layers_decode + self.head

    @property
    def prompt(self) -> int:
        """FLOPs before the answer: embedding, router, and the layers over the prompt. Unit: FLOPs."""
        return self.total - self.answer

    @model_validator(mode="after")
    def _total_is_the_sum(self) -> Self:
        parts = self.embed + self.layers_prefill + self.layers_decode + self.head + self.router
        if self.total != parts:
            raise ValueError(f"total FLOPs ({self.total}) differ from the sum of the parts ({parts})")
        if self.executed >= 2**63:
            raise ValueError(f"executed FLOPs ({self.executed}) leave 64 bits")
        return self


class UsageRecord(_Facts):
    """The facts of one request."""

    schema_version: Literal[3] = SCHEMA_VERSION
    request_id: Identifier
    """Made by the caller, or a UUIDv7; the idempotency key within a tenant."""
    tenant: Identifier = "default"
    tags: Tags = Field(default_factory=dict)
    model: Name
    """The name the model was requested by: alias, hub id or path."""
    model_fingerprint: Name
    """SHA-256 of configuration and weights, hexadecimal."""
    router: Name
    """Router kind: identity, static, …"""
    router_version: Name
    tier: Name | None = None
    """The tier requested (economy, standard, premium, exact); None if a program was named by hand."""
    program: str
    """Canonical text of the program, e.g. `0-11 15x2 18-29`; empty for a cached answer."""
    outcome: Outcome
    finish_reason: Literal["stop", "length", "cancelled", "error", "cached"]
    error: str | None = None
    """Class name of the error, if the outcome is `error`."""
    tokens: TokenUsage = TokenUsage()
    visits: VisitUsage = VisitUsage()
    loops_stopped: NonNegative = 0
    """Loops that the guard stopped because an extra visit breached it; their later visits did not run. Unit: loops."""
    flops: FlopUsage = FlopUsage()
    flops_formula: str = FLOPS_FORMULA
    identity_flops: NonNegative = 0
    """FLOPs of the same tokens at full depth, without a router. Unit: FLOPs."""
    kv_bytes_peak: NonNegative = 0
    """Largest key and value storage of this request. Unit: bytes."""
    device: str = "none"
    dtype: str = "none"
    started_at: AwareDatetime
    """Service time: when the engine accepted the request, UTC."""
    queue_ns: NonNegative = 0
    """Time waited before prefill began. Unit: nanoseconds."""
    prefill_ns: NonNegative = 0
    decode_ns: NonNegative = 0

    @field_validator("started_at")
    @classmethod
    def _to_utc(cls, value: datetime) -> datetime:
        return value.astimezone(UTC)

    @model_validator(mode="after")
    def _drafts_have_tokens(self) -> Self:
        if self.flops.drafts and not self.tokens.drafted:
            raise ValueError(f"{self.flops.drafts} FLOPs of drafts were executed, but no token was drafted")
        return self

    @property
    def compute_units(self) -> float:
        """Compute units that the answer needed, for display; billing uses the integers. Unit: CU."""
        return self.flops.total / FLOPS_PER_COMPUTE_UNIT

    @property
    def flops_saved(self) -> int:
        """FLOPs saved against full depth; negative if loops or the router cost more. Unit: FLOPs.

        Both sides are without drafts: accepted drafts save time, not FLOPs.
        """
        return self.identity_flops - self.flops.total


class Offer(_Facts):
    """One program that a request may be served with, and the maximum it can use."""

    tier: Name | None = None
    """The tier it is for; None if a program or a router was named instead."""
    program: str
    """Canonical text of the program."""
    flops_bound: NonNegative
    """FLOPs of an answer of maximum length, router included. Unit: FLOPs."""
    drafts_bound: NonNegative = 0
    """FLOPs that drafts may execute beyond that. Unit: FLOPs."""


class UsageBound(_Facts):
    """The maximum that a request can use, exact and known before it computes anything."""

    request_id: Identifier
    id_is_new: bool = False
    """True if the id was made for this request (`new_request_id`), so that no other request can have it."""
    tenant: Identifier
    tags: Tags = Field(default_factory=dict)
    tokens_input: NonNegative
    """Prompt tokens, chat template included."""
    tokens_output_max: NonNegative
    """Maximum number of tokens of the answer."""
    offers: Annotated[tuple[Offer, ...], Field(min_length=1)]
    """In order of preference: first what was requested, then cheaper ones, the cheapest last."""
    at: AwareDatetime
    """Service time, UTC: `started_at` of the record to come."""

    @field_validator("at")
    @classmethod
    def _to_utc(cls, value: datetime) -> datetime:
        return value.astimezone(UTC)


class UsageSink(ABC):
    """Receives usage records: a meter, a log file, a list in a test.

    Implementations must be thread-safe. For each request the engine calls `reserve` before it computes, `watch` when it
    starts, and then exactly once either `emit`, however the request ends, or `release` if it never started.
    """

    def check(self) -> None:  # noqa: B027  (a sink without preconditions need not override it)
        """Raise SinkError if a record could not be stored now; called before a request computes anything.

        Raises:
            SinkError: The store is missing, read-only or full.
        """

    def reserve(self, bound: UsageBound) -> int:
        """Choose which of its offers a request may be served with; called before the request computes anything.

        A sink with budgets holds the maximum that the offer can use until `emit` or `release`. By default there are no
        budgets. A sink that stores each request once refuses an id that is in use or was used (unless
        `bound.id_is_new`), so that no answer is given whose record it could not store.

        Returns:
            Index of the offer to serve.

        Raises:
            BudgetExceededError: No offer fits what is left of a budget.
            SinkError: The budgets cannot be read now.
        """
        return 0

    def quote(self, bound: UsageBound) -> tuple[Receipt | None, ...]:
        """The maximum price of each offer, before anything runs; by default, there are no prices.

        Returns:
            For each offer `cost` (exact decimal as text; None if it would be unrated, and `unrated` says why),
            `currency` and `price_book`, or None if the sink has no prices.

        Raises:
            SinkError: The prices cannot be read now.
        """
        return (None,) * len(bound.offers)

    def release(self, tenant: str, request_id: str) -> None:  # noqa: B027
        """Release what `reserve` held for a request that never started; without a hold, do nothing.

        Raises:
            SinkError: The store cannot do so now; the hold then expires.
        """

    def watch(self, tenant: str, request_id: str, end: Callable[[Exception], None]) -> None:  # noqa: B027
        """Note that a request runs, so that what `reserve` held for it stays held; by default, do nothing.

        Args:
            tenant: Whose request.
            request_id: The request.
            end: Ends it with an error, if the hold is lost nevertheless; its record follows. To be called at most once,
                from any thread; it returns at once.
        """

    @property
    def wants_marks(self) -> bool:
        """Whether `mark` does something; otherwise it is not called."""
        return False

    def mark(self, record: UsageRecord) -> None:  # noqa: B027
        """Note what a running request has used so far; by default, do nothing.

        A long answer is marked repeatedly, so that its work is billed even if the process is killed. A mark states only
        what has been executed, and is included in the next mark and in the record of `emit`; each supersedes the
        earlier ones. No mark of a request comes after its record. Called by a separate thread.

        Args:
            record: The record that `emit` would get if the request were cancelled now.

        Raises:
            SinkError: It cannot be noted now; the previous mark stays valid.
        """

    def receipt(self, record: UsageRecord) -> Receipt | None:
        """The receipt that `emit` would return now; stores nothing. None, the default, if only `emit` knows it.

        Raises:
            SinkError: The prices cannot be read now.
        """
        return None

    @abstractmethod
    def emit(self, record: UsageRecord) -> Receipt | None:
        """Store one record durably, exactly once per (tenant, request_id).

        Returns:
            A receipt for the caller, or None if the sink has no prices.

        Raises:
            SinkError: The record could not be stored.
        """

    @property
    def keeps_audits(self) -> bool:
        """Whether audits outlive this process; otherwise a model audits only if it is asked to."""
        return False

    @property
    def settled_tiers(self) -> frozenset[str]:
        """Tiers whose promises are settled from audits, so that no model may serve them with a share of 0."""
        return frozenset()

    def audited(self, audit: Audit) -> None:  # noqa: B027
        """Store one audit durably, exactly once per `audit_id`; by default, do nothing.

        Called by a separate thread, after the usage record that paid for the audit.

        Raises:
            SinkError: It could not be stored; it is passed again later.
        """

    def standings(self) -> Mapping[str, PromiseStanding]:
        """The state of audited promises, by digest of the promise; by default, none was audited.

        Called about once a second by a separate thread, never on the path of a request.

        Raises:
            SinkError: They cannot be read now.
        """
        return {}

    def close(self) -> None:  # noqa: B027
        """Flush and release the sink's resources; further calls to `emit` may fail."""


class ForwardingSink(UsageSink):
    """Passes every call on to another sink; a base class for sinks that only observe some calls.

    Args:
        inner: The sink that stores.
    """

    def __init__(self, inner: UsageSink) -> None:
        self.inner = inner

    def check(self) -> None:
        """As the inner sink."""
        self.inner.check()

    def reserve(self, bound: UsageBound) -> int:
        """As the inner sink."""
        return self.inner.reserve(bound)

    def quote(self, bound: UsageBound) -> tuple[Receipt | None, ...]:
        """As the inner sink."""
        return self.inner.quote(bound)

    def release(self, tenant: str, request_id: str) -> None:
        """As the inner sink."""
        self.inner.release(tenant, request_id)

    def watch(self, tenant: str, request_id: str, end: Callable[[Exception], None]) -> None:
        """As the inner sink."""
        self.inner.watch(tenant, request_id, end)

    @property
    def wants_marks(self) -> bool:
        """As the inner sink."""
        return self.inner.wants_marks

    def mark(self, record: UsageRecord) -> None:
        """As the inner sink."""
        self.inner.mark(record)

    def receipt(self, record: UsageRecord) -> Receipt | None:
        """As the inner sink."""
        return self.inner.receipt(record)

    def emit(self, record: UsageRecord) -> Receipt | None:
        """As the inner sink."""
        return self.inner.emit(record)

    @property
    def keeps_audits(self) -> bool:
        """As the inner sink."""
        return self.inner.keeps_audits

    @property
    def settled_tiers(self) -> frozenset[str]:
        """As the inner sink."""
        return self.inner.settled_tiers

    def audited(self, audit: Audit) -> None:
        """As the inner sink."""
        self.inner.audited(audit)

    def standings(self) -> Mapping[str, PromiseStanding]:
        """As the inner sink."""
        return self.inner.standings()

    def close(self) -> None:
        """As the inner sink."""
        self.inner.close()


class NullSink(UsageSink):
    """Keeps nothing: metering turned off with `ledger=None`."""

    def emit(self, record: UsageRecord) -> None:
        """Drop the record."""


class ListSink(UsageSink):
    """Keeps records and audits in lists, for tests and notebooks."""

    def __init__(self) -> None:
        self.records: list[UsageRecord] = []
        self.audits: list[Audit] = []
        self._standings = Standings()

    def emit(self, record: UsageRecord) -> None:
        """Append the record."""
        self.records.append(record)

    def audited(self, audit: Audit) -> None:
        """Append the audit."""
        self.audits.append(audit)
        self._standings.audited(audit)

    def standings(self) -> Mapping[str, PromiseStanding]:
        """The state by the audits in the list."""
        return self._standings.current()


def flaw_of_name(name: str) -> str | None:
    """The flaw, in words, that makes a text unfit to name a tenant, a tag or a request; None if there is none.

    A name that only looks like another would be charged separately from it, or be mistaken for it.
    """
    if name != name.strip():
        return "begins or ends with white space"
    return flaw_of_text(name)


def flaw_of_text(text: str) -> str | None:
    """The first control character or lone surrogate of a text, in words; None if there is none.

    Control characters include the null character, line breaks, invisible characters and those that turn the direction
    of writing. No usage record or ledger can hold half of a surrogate pair.
    """
    if text.isprintable():  # as most are; whoever has a flaw is not
        return None
    for character in text:
        if (what := _CONTROL.get(unicodedata.category(character))) is not None:
            return f"contains the {what} U+{ord(character):04X}"
    return None


def new_request_id() -> str:
    """Make a UUIDv7 (RFC 9562, section 5.7): sortable by creation time, 74 random bits."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds << 80) | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | (0x7 << 76)
    value = value & ~(0x3 << 62) | (0x2 << 62)
    return str(UUID(int=value))
