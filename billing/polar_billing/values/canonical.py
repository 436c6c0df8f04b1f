"""JSON whose bytes follow from its content alone: what is hashed, and what the spool and the ledger keep.

Compact UTF-8 without spaces; a mapping has its keys sorted. `json.dumps(…, sort_keys=True, separators=(",", ":"),
ensure_ascii=False)` of the standard library writes the same bytes, so that anybody can check a hash; tests hold this
module to it. Knows no tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import orjson

if TYPE_CHECKING:
    from polar_sdk.usage import UsageRecord


_OPTIONS: Final = orjson.OPT_SORT_KEYS | orjson.OPT_UTC_Z


def canonical_json(value: object) -> bytes:
    """Write mappings, sequences, texts, 64-bit integers and None."""
    return orjson.dumps(value, _as_mapping, _OPTIONS)


def record_json(record: UsageRecord) -> bytes:
    """Write a usage record.

    A field that records of version 1 of the ledger did not have is absent while it is 0, so that their replays keep
    their hash.
    """
    facts = dict(vars(record))
    if not facts["loops_stopped"]:
        del facts["loops_stopped"]
    for part in ("flops", "tokens", "visits"):  # spares the writer a call back for each
        facts[part] = vars(facts[part])
    return orjson.dumps(facts, _as_mapping, _OPTIONS)


def content_hash(record: UsageRecord) -> str:
    """SHA-256 over a record's JSON, hexadecimal: equal for an identical replay, in any order of its tags."""
    return hashlib.sha256(record_json(record)).hexdigest()


def _as_mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else vars(value)
