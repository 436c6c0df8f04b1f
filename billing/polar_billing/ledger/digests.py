"""What is hashed: the canonical form of a row and of a link, in both versions of the hash chain.

Version 2. A row is the SHA-256 over lines of JSON: `[2,subject]`, then two lines for the row and for each row of
another table that belongs to it, `[table,[column, …]]` and `[value, …]`, in the order of the columns up to the last
value that is not null. So a column added later, at the end and null in older rows, changes no digest. An integer is a
number, text is a string, null is null, and a value of any other type is an object that names the type: bytes are
`{"bytes":"beef"}`, a float is `{"float":"0x1.8p+0"}`. Rows that differ in nothing but a column's name, a value or its
type never have the same form. A link is the SHA-256 over the hash before it, the digest of its row (32 bytes each) and
`[2,tenant,number,subject,key]`.

Version 1, that of schemas 2 and 3, knew no names and no types: bytes were written as hexadecimal text, and infinity as
null. It tells rows apart only where every cell is of the type that its column declares, which is checked first
(`polar_billing.ledger.cells`). It holds for links before a chain's anchor and for no other; its links hash a list of
four, so that no link is one of both versions. Knows no connection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, Final, NamedTuple

from polar_billing.ledger.schema import metadata
from polar_billing.values.canonical import canonical_json

Rows = Iterable[tuple[str, Sequence[Any]]]
"""A row and then its parts: name of the table, values in the order of its columns."""

_PLAIN: Final = frozenset({int, str, type(None)})
"""Types that JSON tells apart by itself; integers of 64 bits."""


class ChainVersion(NamedTuple):
    """How one version of the chain hashes."""

    digest_of: Callable[[str, Rows], bytes]
    """Subject, and a row with its parts as the database returns them → its digest."""
    hash_of: Callable[[str, int, str, str, bytes, bytes], bytes]
    """Tenant, number, subject, key, digest and the hash before it → the hash of the link."""


def digest_of(subject: str, rows: Rows) -> bytes:
    """The digest of a row and its parts, whatever types the database returned; version 2.

    Args:
        subject: What links call the table.
        rows: The row, then its parts.
    """
    rows = list(rows)
    if all(_PLAIN.issuperset(map(type, values)) for _, values in rows):
        with suppress(TypeError):  # an integer beyond JSON's range, which only an altered table returns
            return digest_of_plain(subject, rows)
    return digest_of_plain(subject, [(table, tuple(map(_typed_cell, values))) for table, values in rows])


def digest_of_plain(subject: str, rows: Rows) -> bytes:
    """The same for rows of 64-bit integers, text and None alone: those of usage that are about to be written."""
    lines = [_kind(subject)]
    for table, values in rows:
        end = len(values)
        while end and values[end - 1] is None:
            end -= 1
        lines.append(_names(table, end))
        lines.append(canonical_json(values if end == len(values) else values[:end]))
    return hashlib.sha256(b"\n".join(lines)).digest()


def hash_of(tenant: str, number: int, subject: str, key: str, digest: bytes, previous: bytes) -> bytes:
    """The hash of a link, over everything it says and the hash before it; version 2."""
    return hashlib.sha256(previous + digest + canonical_json((2, tenant, number, subject, key))).digest()


# A digest is made for every request that is stored, so what repeats is written once.
@lru_cache(maxsize=64)
def _kind(subject: str) -> bytes:
    return canonical_json((2, subject))


@lru_cache(maxsize=1024)
def _names(table: str, end: int) -> bytes:
    return canonical_json((table, list(map(str, metadata.tables[table].c.keys()))[:end]))


def _typed_cell(value: Any) -> Any:
    """A value whose JSON names its type, unless JSON has that type."""
    if type(value) in _PLAIN and not (isinstance(value, int) and not -(2**63) <= value < 2**64):
        return value
    if isinstance(value, (bytes, memoryview)):
        return {"bytes": value.hex()}
    if isinstance(value, float):  # JSON has no infinity, and no float that is not also another number's text
        return {"float": value.hex()}
    return {type(value).__name__: repr(value)}  # no column declares such a type; an altered table may return it


def _first_digest_of(subject: str, rows: Rows) -> bytes:
    lines = [subject.encode()]
    for table, values in rows:
        end = max((place for place, value in enumerate(values, 1) if value is not None), default=0)
        lines.append(canonical_json((table, *map(_untyped, values[:end]))))
    return hashlib.sha256(b"\n".join(lines)).digest()


def _untyped(value: Any) -> Any:
    if isinstance(value, (bytes, memoryview)):
        return value.hex()
    return value if isinstance(value, float) else _typed_cell(value)


def _first_hash_of(tenant: str, number: int, subject: str, key: str, digest: bytes, previous: bytes) -> bytes:
    return hashlib.sha256(previous + digest + canonical_json((tenant, number, subject, key))).digest()


FIRST: Final = ChainVersion(_first_digest_of, _first_hash_of)
"""Of links that schemas 2 and 3 wrote."""

CURRENT: Final = ChainVersion(digest_of, hash_of)
"""Version 2, of every link since schema 4."""
