"""The one meeting point of engine and billing: the usage record, the bound that precedes it, and the sink for both.

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
"""Version of the fields of a record; it rises whenever one is added or means something else."""
FLOPS_FORMULA = "torch-1"
"""Version of the FLOPs formula: one multiply-accumulate is 2 FLOPs; matrix products and attention count, as
`torch.utils.flop_counter.FlopCounterMode` counts them (attention as the full rectangle queries × keys)."""

COMPUTE_UNIT_VERSION = "cu-1"
FLOPS_PER_COMPUTE_UNIT = 10**12
"""One compute unit (CU) is 10^12 executed FLOPs. Unit: FLOPs per CU."""

NonNegative = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
UPSTREAM: Final = "upstream"
"""Device of what another server computed."""
WORKER_TAG: Final = "polar.worker"
"""Tag of a usage record of a request that a vLLM with programs computed: which run of it, by an id of its own."""
DISPUTED_TAG: Final = "polar.disputed"
"""Tag of records of which somebody else computed, and claimed what cannot be: the kind of the claim."""
UNSTATED_TAG: Final = "polar.unstated"
"""Tag of records of which somebody else computed, and did not say all: `cached` where it is not known how many tokens
of the prompt were cached. None count as cached, so that the FLOPs of the prompt are the most that can have run."""
FALLBACK_TAG: Final = "polar.fallback_from"
"""Tag of records of requests that were served by a safer tier, because audits put the promise of theirs at risk: the
tier requested, or the tolerance."""
AUDIT_TAG: Final = "polar.audit_of"
"""Tag of records of audits, which are the provider's own: id of the request whose answer is audited."""
STOPPED_TAG: Final = "polar.stopped_by"
"""Tag of records of answers that an option ended: `repeats`."""
AS_STORED: Final = {"as_stored": True}
"""Validation context for records that were accepted before, whatever their names."""
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
unread; it may be empty where the sink prices nothing."""


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
"""The name of a tenant or a request, as it is: two names that differ are never charged as one."""
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
    """Tokens that were guessed by a draft head or run before it was known whether they belong to the answer."""
    accepted: NonNegative = 0
    """Those of them that did, and so spared the answer a pass; included in `drafted`."""

    @model_validator(mode="after")
    def _parts_are_no_more_than_the_whole(self) -> Self:
        for part, whole in (("accepted", "drafted"), ("cached", "input")):
            some, every = getattr(self, part), getattr(self, whole)
            if some > every:
                raise ValueError(f"{part} tokens ({some}) exceed {whole} tokens ({every}), of which they are a part")
        return self


class VisitUsage(_Facts):
    """Executed layer visits, one number per layer of the model (index = layer). Unit: visits.

    A visit is one execution of one layer for this request, however many tokens it carries: a prefill in one piece
    counts one, and every pass that decodes counts one, whether it brings one token or, with drafts, several, per time
    the program visits the layer. Where a layer runs for some tokens of a piece and is filled for the others, the piece
    counts in `prefill` and in `prefill_filled`.
    """

    prefill: tuple[NonNegative, ...] = ()
    prefill_filled: tuple[NonNegative, ...] = ()
    """Pieces of the prompt for which a map wrote the layer's keys and values; empty where it did for no layer."""
    decode: tuple[NonNegative, ...] = ()

    @property
    def total(self) -> int:
        """Visits that ran, of all layers, prefill and decode together."""
        return sum(self.prefill) + sum(self.decode)


class FlopUsage(_Facts):
    """Executed FLOPs by part. Unit: FLOPs; one multiply-accumulate is 2.

    The parts are what the answer needed: what runs where nothing is drafted. What was executed beyond that is `drafts`.
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
    """Executed for drafted tokens that the answer did not keep, for their company and to guess them; not in `total`."""

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
    """The tier requested (economy, standard, premium, exact); None where a program was named by hand."""
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
        """FLOPs saved against full depth; negative where loops or the router cost more. Unit: FLOPs.

        Both sides are without drafts: those that were accepted save time, not FLOPs.
        """
        return self.identity_flops - self.flops.total


class Offer(_Facts):
    """One program that a request may be served with, and the maximum it can use."""

    tier: Name | None = None
    """The tier it stands for; None where a program or a router was named instead."""
    program: str
    """Canonical text of the program."""
    flops_bound: NonNegative
    """FLOPs if the answer is as long as it may be, those of the router included. Unit: FLOPs."""
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
    """Takes usage records: a meter, a log file, a list in a test.

    Implementations must be thread-safe. For each request the engine calls `reserve` before it computes, `watch` when it
    begins, and then exactly once either `emit`, however the request ends, or `release` if it never began.
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
            For each offer `cost` (exact decimal as text; None where it would be unrated, and `unrated` says why),
            `currency` and `price_book`, or None where the sink prices nothing.

        Raises:
            SinkError: The prices cannot be read now.
        """
        return (None,) * len(bound.offers)

    def release(self, tenant: str, request_id: str) -> None:  # noqa: B027
        """Release what `reserve` held for a request that never began; without a hold, do nothing.

        Raises:
            SinkError: The store cannot do so now; the hold then ends when it expires.
        """

    def watch(self, tenant: str, request_id: str, end: Callable[[Exception], None]) -> None:  # noqa: B027
        """Note that a request runs, so that what `reserve` held for it stays held; by default, do nothing.

        Args:
            tenant: Whose request.
            request_id: The request.
            end: Ends it with an error, if what was held is lost all the same; its record follows. To be called at most
                once, from any thread; it returns at once.
        """

    @property
    def wants_marks(self) -> bool:
        """Whether `mark` does something; else nobody makes marks for it."""
        return False

    def mark(self, record: UsageRecord) -> None:  # noqa: B027
        """Note what a request that still runs has used so far; by default, do nothing.

        A long answer is marked as it goes on, so that its work is not forgotten if the process is killed. What a mark
        says has been executed, and is a part of what the next one and the record in `emit` say; each supersedes those
        before it. No mark of a request comes after its record. Called by a thread of its own.

        Args:
            record: As `emit` would get it, if the request were cancelled now.

        Raises:
            SinkError: It cannot be noted now; the mark before holds.
        """

    def receipt(self, record: UsageRecord) -> Receipt | None:
        """The receipt that `emit` would return now; stores nothing. None, the default, where only `emit` knows.

        Raises:
            SinkError: The prices cannot be read now.
        """
        return None

    @abstractmethod
    def emit(self, record: UsageRecord) -> Receipt | None:
        """Store one record durably, exactly once per (tenant, request_id).

        Returns:
            A receipt for the caller, or None if the sink prices nothing.

        Raises:
            SinkError: The record could not be stored.
        """

    @property
    def keeps_audits(self) -> bool:
        """Whether audits outlive this process; else a model audits only where it is asked to."""
        return False

    @property
    def settled_tiers(self) -> frozenset[str]:
        """Tiers whose promises are settled from audits, so that no model may serve them with a share of 0."""
        return frozenset()

    def audited(self, audit: Audit) -> None:  # noqa: B027
        """Store one audit durably, exactly once per `audit_id`; by default, do nothing.

        Called by a thread of its own, after the usage record that paid for the audit.

        Raises:
            SinkError: It could not be stored; it is offered again.
        """

    def standings(self) -> Mapping[str, PromiseStanding]:
        """Where audited promises stand, by digest of the promise; by default, none was audited.

        Called about once a second by a thread of its own, never on the path of a request.

        Raises:
            SinkError: They cannot be read now.
        """
        return {}

    def close(self) -> None:  # noqa: B027
        """Flush and release the sink's resources; further calls to `emit` may fail."""


class ForwardingSink(UsageSink):
    """Passes every call on to another sink; a base for those that only want to see some of them.

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
        """By the audits in the list."""
        return self._standings.current()


def flaw_of_name(name: str) -> str | None:
    """The flaw that makes a text unfit to name a tenant, a tag or a request, in words; None if nothing does.

    A name that only looks like another one would be charged apart from it, or be mistaken for it.
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
