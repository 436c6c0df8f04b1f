"""The common entry of every reader of JSON, TOML and decimal text: parsed within limits, or refused with a reason.

Files are untrusted. Python's parsers end deeply nested text with a RecursionError and read no integer of more than
4,300 digits; what they do not bound is limited here: bytes and dotted keys before they parse, the depth of the result
afterwards, so that callers may recurse over it. What exceeds a limit or does not parse raises `Unreadable`, whose text
says what was found and what the limit is, without a full stop; each reader turns it into its own error, which names the
file and the fix.

Knows no file of the project, and at run time only the standard library.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import BaseModel

M = TypeVar("M", bound="BaseModel")
MAX_BYTES: Final = 16 * 2**20
"""Size of a JSON file, unless its reader sets another."""
MAX_TOML_BYTES: Final = 2 * 2**20
MAX_DEPTH: Final = 64
"""Levels of lists and mappings in each other."""
MAX_DIGITS: Final = 100
"""Digits of a number."""
ANSWER_DIGITS: Final = 4300
"""Digits of a number in a model's answer, whose length its tokens bound: Python reads none of more."""
MAX_EXPONENT: Final = 100
"""Exponent of a decimal number, in both directions."""
MAX_KEY_PARTS: Final = 16
"""Parts of a dotted key in TOML."""
_MAX_SHOWN: Final = 60
"""Characters of a value in a message."""

_LONG_KEY: Final = re.compile(
    rf"""(?<![\w.-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){{{MAX_KEY_PARTS}}}"""
)
"""A dotted key of TOML with more parts than are read, over which `tomllib` takes seconds and gigabytes."""


class Unreadable(ValueError):  # noqa: N818  (never leaves a reader; what does is the reader's own error)
    """A text is beyond a limit or does not parse; the message says what and which limit."""

    @property
    def fault(self) -> str:
        """The message as it follows "the file is": what is wrong with a number is not what the file is."""
        reason = str(self)
        return reason if reason.startswith(("not ", "larger ", "nested ")) else f"beyond a limit: {reason}"


def shown(value: object) -> str:
    """A value for a message: its `repr`, cut off where it is long, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits has no text
        return f"a value of type {type(value).__name__} that is too long to show"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def read_bytes(path: str | Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a file that is not too large.

    Raises:
        OSError: It cannot be read.
        Unreadable: It is larger, or its path is not valid.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(max_bytes + 1)  # also where the size is not known before: a pipe, /dev/zero
    except ValueError as error:  # a null character in the path
        raise Unreadable(f"the path is not valid ({error})") from error
    check_size(content, max_bytes)
    return content


def read_text(path: str | Path, max_bytes: int = MAX_BYTES) -> str:
    """The content of a UTF-8 file that is not too large.

    Raises:
        OSError: It cannot be read.
        Unreadable: It is larger, or not UTF-8.
    """
    return _text(read_bytes(path, max_bytes))


def check_size(content: bytes | str, max_bytes: int) -> None:
    """Refuse what is too large.

    Raises:
        Unreadable: It is.
    """
    if len(content) > max_bytes:
        raise Unreadable(f"larger than the {max_bytes:,} bytes that are read")


def parse_json(content: bytes | str, *, max_bytes: int = MAX_BYTES, max_digits: int = MAX_DIGITS) -> Any:
    """The value of a JSON text; `NaN` and `Infinity` count as numbers, as Python writes them.

    Args:
        content: The text; bytes are UTF-8.
        max_bytes: Of the whole text.
        max_digits: Of a number; Python reads none of more than 4,300.

    Raises:
        Unreadable: It is not JSON or beyond a limit.
    """
    check_size(content, max_bytes)
    text = _text(content)
    try:
        value = json.loads(text, parse_int=_number(int, max_digits), parse_float=_number(float, max_digits))
    except json.JSONDecodeError as error:
        raise Unreadable(f"not valid JSON (line {error.lineno}: {error.msg})") from error
    except RecursionError as error:
        raise Unreadable(f"nested more than {MAX_DEPTH} levels deep") from error
    if text.count("[") + text.count("{") > MAX_DEPTH:  # otherwise it cannot nest too deeply
        _check_values(value)
    return value


def parse_object(content: bytes | str, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The mapping that a JSON text holds.

    Raises:
        Unreadable: It is not JSON, not an object, or beyond a limit.
    """
    value = parse_json(content, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise Unreadable("not a JSON object")
    return value


def read_document(path: str | Path, model: type[M], damaged: Callable[[str], Exception]) -> M:
    """A JSON file, or one of TOML by its name, as a pydantic model.

    Args:
        path: The file.
        model: Checks what it holds.
        damaged: Makes the reader's own error of what is wrong with the file.
    """
    try:
        if Path(path).suffix == ".toml":
            return model.model_validate(parse_toml(read_text(path, MAX_TOML_BYTES)))
        return model.model_validate(parse_json(read_bytes(path)))
    except OSError as error:
        raise damaged(f"cannot be read ({error.strerror})") from error
    except Unreadable as error:
        raise damaged(f"is {error.fault}") from error
    except ValueError as error:
        raise damaged(f"is not valid: {first_flaw(error)}") from error


def first_flaw(error: Any) -> str:
    """The first flaw of a pydantic `ValidationError`: where it is, and what is wrong."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "file"
    return f"{where}: {first['msg'].rstrip('.')}"


def not_finite(value: object) -> float | None:
    """The first nan or infinity in a value of JSON; None if there is none."""
    if isinstance(value, float) and not math.isfinite(value):
        return value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return next((flaw for part in parts if (flaw := not_finite(part)) is not None), None)


def parse_toml(text: str, *, max_bytes: int = MAX_TOML_BYTES) -> dict[str, Any]:
    """The mapping of a TOML text; numbers with a point or an exponent are `Decimal`.

    Raises:
        Unreadable: It is not TOML or beyond a limit.
    """
    check_size(text, max_bytes)
    if _LONG_KEY.search(text):
        raise Unreadable(f"a dotted key has more than {MAX_KEY_PARTS} parts")
    try:
        value = tomllib.loads(text, parse_float=parse_decimal)
    except Unreadable:
        raise
    except RecursionError as error:
        raise Unreadable(f"nested more than {MAX_DEPTH} levels deep") from error
    except (ValueError, OverflowError) as error:
        raise Unreadable(f"not valid TOML: {error}") from error
    _check_values(value, MAX_DIGITS)
    return value


def parse_decimal(value: str | int | Decimal) -> Decimal:
    """A decimal number whose digits and exponent are limited; nan and infinity are for the caller to judge.

    Without the limits, `int()` or a fixed notation of `0e999999999` takes minutes and gigabytes.

    Raises:
        Unreadable: It is not a number, or beyond a limit.
    """
    if isinstance(value, str) and len(value) > 2 * MAX_DIGITS:
        raise Unreadable(f"number {shown(value)} has {len(value):,} characters; at most {2 * MAX_DIGITS} are read")
    if isinstance(value, int) and value.bit_length() > 4 * MAX_DIGITS:
        raise Unreadable(f"number {shown(value)} has more than {MAX_DIGITS} digits")
    try:
        number = Decimal(value)
    except (InvalidOperation, ValueError, TypeError) as error:
        raise Unreadable(f"{shown(value)} is not a number") from error
    _, digits, exponent = number.as_tuple()
    if isinstance(exponent, int) and (len(digits) > MAX_DIGITS or abs(exponent) > MAX_EXPONENT):
        raise Unreadable(
            f"number {shown(str(number))} has too many digits or too large an exponent; "
            f"at most {MAX_DIGITS} digits and an exponent from -{MAX_EXPONENT} to {MAX_EXPONENT} are read"
        )
    return number


def _text(content: bytes | str) -> str:
    if isinstance(content, str):
        return content
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 text (byte {error.start})") from error


def _check_values(value: Any, max_digits: int | None = None) -> None:
    """Refuse lists and mappings that are deeper in each other than is read, and integers with too many digits."""
    level, depth = [value], 0
    while level:
        containers = [part for part in level if isinstance(part, dict | list)]
        if max_digits is not None and any(type(part) is int and part.bit_length() > 4 * max_digits for part in level):
            raise Unreadable(f"a number has more than {max_digits} digits")
        if containers and depth == MAX_DEPTH:
            raise Unreadable(f"nested more than {MAX_DEPTH} levels deep")
        level = [part for parts in containers for part in (parts.values() if isinstance(parts, dict) else parts)]
        depth += 1


def _number(kind: type[int | float], max_digits: int) -> Callable[[str], int | float]:
    """How numbers of a kind are read."""

    def read(digits: str) -> int | float:
        if len(digits) > max_digits:
            raise Unreadable(f"number {shown(digits)} has {len(digits):,} digits; at most {max_digits:,} are read")
        return kind(digits)

    return read
