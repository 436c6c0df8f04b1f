"""What an upstream's refusal or silence is for the client of this server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from polar_sdk.reading import Unreadable, parse_object
from polar_server.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Mapping

_MAX_BODY_BYTES: Final = 2**20
_MAX_TEXT: Final = 500
_SOON: Final = {"retry-after": "1"}


class UpstreamError(ApiError):
    """A server behind this one failed, refused, or is gone."""

    def __init__(
        self, message: str, *, status: int = 502, code: str = "upstream_error", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message, status=status, code=code, headers=headers)


def unreachable(base: str, error: Exception) -> UpstreamError:
    """Nobody answers there."""
    kind = type(error).__name__
    message = f"{base} cannot be reached ({kind}); ask again in a moment."
    return UpstreamError(message, status=503, code="upstream_unavailable", headers=_SOON)


def refused(base: str, status: int, content: bytes, headers: Mapping[str, str]) -> UpstreamError:
    """The upstream answered with an error."""
    said, code = _said(content)
    if status in {400, 413, 422}:
        kept = code if code == "context_length_exceeded" or "context length" in said else None
        return UpstreamError(
            f"{base} refused: {said}", status=400, code="context_length_exceeded" if kept else "upstream_refused"
        )
    if status in {429, 503}:
        retry = {"retry-after": headers.get("retry-after", "1")}
        return UpstreamError(f"{base} is busy: {said}", status=503, code="overloaded", headers=retry)
    if status in {401, 403, 404}:
        said += " (check the URL and model of --backend, and POLAR_BACKEND_KEY)"
    return UpstreamError(f"{base} failed with status {status}: {said}")


def _said(content: bytes) -> tuple[str, str | None]:
    """The message and the code in an error's body."""
    try:
        body = parse_object(content, max_bytes=_MAX_BODY_BYTES)
    except Unreadable:
        return "it did not say why.", None
    inner = body.get("error", body)
    inner = inner if isinstance(inner, dict) else {"message": inner}
    code = inner.get("code")
    return str(inner.get("message", "it did not say why."))[:_MAX_TEXT], code if isinstance(code, str) else None
