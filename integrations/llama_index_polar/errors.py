"""The one error that this package adds to `polar_sdk.errors`, whose errors pass through it unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_sdk.errors import PolarError

if TYPE_CHECKING:
    from polar_sdk import UsageRecord

__all__ = ["PolarTimeoutError"]


class PolarTimeoutError(PolarError, TimeoutError):
    """A request was stopped because it ran longer than `timeout`; what it executed is on its usage record.

    Attributes:
        usage: The record of the stopped request, exact to the last executed layer.
    """

    retryable = True

    def __init__(self, message: str, *, hint: str | None = None, usage: UsageRecord | None = None) -> None:
        super().__init__(message, hint=hint)
        self.usage = usage
