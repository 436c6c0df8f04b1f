"""Values as text that depends only on their content: what is hashed, and what is stored.

JSON is compact UTF-8 without spaces; a mapping has its keys sorted. `json.dumps(…, sort_keys=True, separators=(",",
":"), ensure_ascii=False)` of the standard library writes the same bytes, so that anybody can check a hash; tests check
this module against it. Moments are microseconds. Knows no tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import orjson

if TYPE_CHECKING:
    from polar_sdk.usage import UsageRecord


EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_OPTIONS: Final = orjson.OPT_SORT_KEYS | orjson.OPT_UTC_Z


def canonical_json(value: object) -> bytes:
    """Write mappings, sequences, texts, 64-bit integers and None."""
    return orjson.dumps(value, _as_mapping, _OPTIONS)


def canonical_text(value: object) -> str:
    """The same as text."""
    return canonical_json(value).decode()


def record_json(record: UsageRecord) -> bytes:
    """Write a usage record."""
    parts = {part: vars(getattr(record, part)) for part in ("flops", "tokens", "visits")}  # spares a call back for each
    return orjson.dumps({**vars(record), **parts}, _as_mapping, _OPTIONS)


def _as_mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else vars(value)


def to_microseconds(moment: datetime) -> int:
    """Count the microseconds since 1970-01-01T00:00Z, in integers."""
    since = moment - EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
