"""A file of the user's own prompts: JSONL, one object per line.

`prompt` is its text; `tenant`, `tier` and `max_tokens` may say more. Knows no model: whether a tier exists is found out
when the first request runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from polar_sdk.errors import DataError
from polar_sdk.reading import Unreadable, parse_object, read_text, shown

if TYPE_CHECKING:
    from pathlib import Path

MAX_TOKENS: Final = 24
"""Of an answer whose line says nothing. Unit: tokens."""
_MAX_FILE: Final = 64 * 2**20
"""Unit: bytes."""
_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
_Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class FilePrompt(BaseModel):
    """A line of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: _Text
    tenant: _Name | None = None
    tier: _Name | None = None
    max_tokens: int = Field(default=MAX_TOKENS, ge=1, le=100_000)


def read_prompts(path: Path) -> list[FilePrompt]:
    """Read a file of prompts.

    Raises:
        DataError: It is missing, empty or too large, or a line is not as it should be; the message names the line.
    """
    try:
        lines = read_text(path, _MAX_FILE).split("\n")
    except (OSError, Unreadable) as error:
        raise DataError(f"prompts {str(path)!r} cannot be read ({error}).") from error
    prompts = [_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise DataError(f'prompts {str(path)!r} has no line; give one object per line, such as {{"prompt": "Hello"}}.')
    return prompts


def _prompt(line: str, where: str) -> FilePrompt:
    try:
        return FilePrompt.model_validate(parse_object(line))
    except Unreadable as error:
        raise DataError(
            f'{where} is {error.fault}; write one object per line, such as {{"prompt": "Hello"}}.'
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise DataError(f"{where}: the key {key!r} is unknown; use prompt, tenant, tier and max_tokens.") from error
        reason = first["msg"][0].lower() + first["msg"][1:]
        given = "" if first["type"] == "missing" else f" (got {shown(first['input'])})"
        raise DataError(f"{where}: {key}: {reason}{given}.") from error
