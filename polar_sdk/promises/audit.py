"""An audit: one answer of a tier compared with full depth, as a fact; and the state of the promise that it tested.

Facts only: what was compared, for which promise, and what that cost. Knows no prompt, no store and no money.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal, NamedTuple, Self
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from polar_sdk.promises.monitor import State

Count = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
"""SHA-256, hexadecimal."""
Share = Annotated[float, Field(gt=0, lt=1)]
AuditedLoss = Literal["differs", "strict"]
"""The loss counted: `differs`, a text that keeps fewer than three quarters of its tokens; `strict`, fewer than 95 %."""


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Audit(_Facts):
    """One answer judged under one promise. A tier with two promises (`strict` beside `differs`) makes two of a run."""

    audit_id: Annotated[str, StringConstraints(min_length=36, max_length=36)]
    """UUIDv7; the idempotency key."""
    request_id: Name
    """The request whose answer was judged."""
    tenant: Name
    """The tenant of the request; it does not pay for the audit."""
    tier: Name
    """The tier that served it."""
    promise: Digest
    """The promise: certificate, tier and loss."""
    loss: AuditedLoss = "differs"
    alpha: Share
    """Maximum share of answers lost that is promised."""
    delta: Share
    """Maximum probability that the promise is wrong."""
    lost: bool
    """Whether the answer counts as lost."""
    compared: Count
    """Tokens of the answer that were compared. Unit: tokens."""
    kept: Count
    """Those of them that full depth would choose too; included in `compared`. Unit: tokens."""
    weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The usual share of audits over the share when it was chosen: below 1 while more requests are audited. For a mean
    over all requests; the monitor takes each audit for one, since who is audited does not depend on the answer."""
    prompt_tokens: Count
    flops: Count
    """Executed by the audit, both runs together; 0 in all but the first of several that judge one run. Unit: FLOPs."""
    audit_request_id: Name | None
    """The usage record, of the provider's own tenant, of the run at full depth. Where the tier's program had to run
    again beside it, that record's id is this one and `.tier`. None if nothing ran: the request was served at full
    depth, so that nothing can be lost."""
    at: AwareDatetime
    """When it was judged, UTC."""

    @field_validator("audit_id")
    @classmethod
    def _is_uuid7(cls, value: str) -> str:
        if UUID(value).version != 7:
            raise ValueError(f"{value!r} is not a UUIDv7")
        return value

    @field_validator("at")
    @classmethod
    def _to_utc(cls, value: datetime) -> datetime:
        return value.astimezone(UTC)

    @model_validator(mode="after")
    def _kept_were_compared(self) -> Self:
        if self.kept > self.compared:
            raise ValueError(
                f"kept tokens ({self.kept}) exceed compared tokens ({self.compared}), of which they are a part"
            )
        return self


class PromiseTerms(NamedTuple):
    """A promise that audits test."""

    digest: str
    tier: str
    loss: AuditedLoss
    alpha: float
    delta: float
    choices: bool
    """Whether it is also on answers that are one of given choices, without knowing which of them is right."""


class PromiseStanding(_Facts):
    """Where one promise stands, by all its audits."""

    promise: Digest
    tier: Name
    state: State
    audits: Count
    losses: Count
    """Audits whose answer was lost."""
    since: AwareDatetime
    """When the state began, UTC."""
    reason: str
    """Why it is so, in words."""
    doubtful: bool = False
    """Whether the audits of late speak so much against it that more of its requests should be audited."""
