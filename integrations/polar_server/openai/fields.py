"""Fields of a request body: what each may hold, checked one by one, and said in the OpenAPI document.

A table of kinds is both the check and the schema, so that the document cannot promise what the server refuses. A field
that no table knows is reported, never dropped in silence. Knows no endpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from polar_sdk.reading import shown
from polar_server.errors import ApiError

Check = Callable[[str, Any], Any]
"""Returns the value as the server takes it, or raises what `invalid` makes."""


def invalid(param: str, why: str, *, code: str = "invalid_value") -> ApiError:
    """The refusal of a field."""
    return ApiError(f"{param}: {why}", code=code, param=param)


def unsupported(param: str, why: str) -> ApiError:
    """The refusal of a field that this server cannot serve."""
    return ApiError(f"{param} is not supported: {why}", code="unsupported_value", param=param)


@dataclass(frozen=True, slots=True)
class Field:
    """One field: how it is checked, and its JSON schema."""

    check: Check
    schema: Mapping[str, Any]


def number(low: float, high: float) -> Field:
    """A number within bounds, both included."""

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise invalid(name, f"{shown(value)} is not a number.")
        if not low <= value <= high:
            raise invalid(name, f"{shown(value)} is out of range; use {low:g} to {high:g}.")
        return float(value)

    return Field(check, {"type": "number", "minimum": low, "maximum": high})


def integer(low: int, high: int) -> Field:
    """A whole number within bounds, both included."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise invalid(name, f"{shown(value)} is not a whole number.")
        if not low <= value <= high:
            raise invalid(name, f"{shown(value)} is out of range; use {low} to {high}.")
        return value

    return Field(check, {"type": "integer", "minimum": low, "maximum": high})


def flag() -> Field:
    """True or false."""

    def check(name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise invalid(name, f"{shown(value)} is neither true nor false.")
        return value

    return Field(check, {"type": "boolean"})


def text(longest: int = 1_000_000) -> Field:
    """A text."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise invalid(name, f"{shown(value)} is not text.")
        if len(value) > longest:
            raise invalid(name, f"the text has {len(value):,} characters; use at most {longest:,}.")
        return value

    return Field(check, {"type": "string", "maxLength": longest})


def one_of(*values: str) -> Field:
    """One of a few texts."""

    def check(name: str, value: Any) -> str:
        if value not in values:
            raise invalid(name, f"{shown(value)} is not one of {', '.join(values)}.", code="unsupported_value")
        return str(value)

    return Field(check, {"type": "string", "enum": list(values)})


def texts(most: int, longest: int) -> Field:
    """A text, or a list of a few; becomes a list."""
    single = text(longest)

    def check(name: str, value: Any) -> list[str]:
        several = value if isinstance(value, list) else [value]
        if len(several) > most:
            raise invalid(name, f"there are {len(several)}; use at most {most}.")
        for each in several:
            if single.check(name, each) == "":
                raise invalid(name, "an empty text ends every answer at once; remove it.")
        return several

    schema = dict(single.schema)
    return Field(check, {"oneOf": [schema, {"type": "array", "items": schema, "maxItems": most}]})


def mapping(most: int, longest: int) -> Field:
    """An object of a few texts."""
    single = text(longest)

    def check(name: str, value: Any) -> dict[str, str]:
        if not isinstance(value, dict):
            raise invalid(name, f"{shown(value)} is not an object.")
        if len(value) > most:
            raise invalid(name, f"there are {len(value)} entries; use at most {most}.")
        return {key: single.check(f"{name}.{key[:64]}", each) for key, each in value.items()}

    return Field(check, {"type": "object", "maxProperties": most, "additionalProperties": dict(single.schema)})


def anything(schema: Mapping[str, Any] | None = None) -> Field:
    """A value that its reader checks."""
    return Field(lambda _, value: value, schema or {})


def only(*values: Any, why: str) -> Field:
    """A field of the API that has one meaning here: any of `values` says so, and anything else is refused."""

    def check(name: str, value: Any) -> None:
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values):
            raise unsupported(name, why)

    return Field(check, {"enum": [*values, None]})


@dataclass(frozen=True)
class Body:
    """A request body, checked field by field."""

    values: Mapping[str, Any]
    unknown: tuple[str, ...]
    """Fields that no table knows."""

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field; the default where it is absent or null."""
        return self.values.get(name, default)


_SHOWN: Final = 8


def read(body: Mapping[str, Any], table: Mapping[str, Field], *, strict: bool) -> Body:
    """Check every field of a body.

    Raises:
        ApiError: A field holds what it may not, or with `strict` is unknown.
    """
    values = {
        name: table[name].check(name, value) for name, value in body.items() if name in table and value is not None
    }
    unknown = tuple(name for name in body if name not in table)
    if unknown and strict:
        names = ", ".join(name[:64] for name in unknown[:_SHOWN])
        raise ApiError(f"unknown fields: {names}; remove them.", code="unknown_parameter", param=unknown[0][:64])
    return Body(values, unknown)
