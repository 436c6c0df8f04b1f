"""Errors over HTTP: one status, code and parameter for everything that can go wrong with a call.

PolarError
└── ApiError                    an answer with an HTTP status and OpenAI's error body
    ├── ClientLeftError         the client has left
    └── UpstreamError           a server behind this one failed, refused, or is gone (`upstream.errors`)

Clients decide by status, code and headers whether to try again, so these are part of the interface. Any other error is
a 500 without its text: a traceback belongs in the log.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.errors import (
    BudgetExceededError,
    CacheMemoryError,
    CertificateError,
    ContextWindowError,
    EmptyPromptError,
    InvalidRequestError,
    MissingExtraError,
    PolarError,
    ProgramError,
    QueueFullError,
    RequestTimeoutError,
    SinkError,
    TagError,
    ToleranceError,
    UnknownTierError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_RETRY_AFTER_S: Final = 120
"""Clients ignore a longer `retry-after`."""
_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


class ApiError(PolarError):
    """A call that is answered with an error.

    Attributes:
        status: HTTP status.
        code: What clients compare, such as `model_not_found`.
        param: The field at fault, or None.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_value",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, default)
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class ClientLeftError(ApiError):
    """The client closed the connection before its call was read or answered."""

    def __init__(self) -> None:
        super().__init__("the client closed the connection.", status=499, code="client_left")


def api_error(error: BaseException) -> ApiError:
    """The HTTP answer to an error of the engine, of the sink, or an unexpected one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BudgetExceededError):
        return _over_budget(error)
    for kind, status, code, param, headers in _KNOWN:
        if isinstance(error, kind):
            return ApiError(str(error), status=status, code=code, param=param, headers=headers)
    return ApiError("the server failed; see its log.", status=500, code="internal_error")


def shutting_down() -> ApiError:
    """The server takes no more requests, or ended this one."""
    return ApiError(
        "the server is shutting down; try another one, or again in a moment.",
        status=503,
        code="shutting_down",
        headers={"retry-after": "1"},
    )


_NO_RETRY: Final = {"x-should-retry": "false"}
_SOON: Final = {"retry-after": "1"}
_KNOWN: Final[tuple[tuple[type[PolarError], int, str, str | None, Mapping[str, str]], ...]] = (
    (ContextWindowError, 400, "context_length_exceeded", None, {}),
    (CacheMemoryError, 400, "context_length_exceeded", None, {}),
    (EmptyPromptError, 400, "invalid_value", None, {}),
    (UnknownTierError, 400, "invalid_value", "compute", {}),
    (ToleranceError, 400, "invalid_value", "compute", {}),
    (CertificateError, 400, "unsupported_value", "compute", {}),
    (TagError, 400, "invalid_value", "tags", {}),
    (MissingExtraError, 400, "unsupported_value", None, {}),
    (InvalidRequestError, 400, "invalid_value", None, {}),
    (ProgramError, 400, "invalid_value", "program", {}),
    # What ran until then is billed; the same call would run as long again.
    (RequestTimeoutError, 408, "timeout", None, _NO_RETRY),
    (QueueFullError, 503, "overloaded", None, _SOON),
    (SinkError, 503, "metering_unavailable", None, _SOON),
)
"""The first that fits counts."""


def _over_budget(error: BudgetExceededError) -> ApiError:
    headers = dict(_NO_RETRY)
    if error.resets_at is not None:
        seconds = math.ceil((error.resets_at - datetime.now(UTC)).total_seconds())
        if 0 <= seconds <= MAX_RETRY_AFTER_S:
            headers["retry-after"] = str(seconds)
    return ApiError(str(error), status=429, code="insufficient_quota", headers=headers)
