"""The canonical form of rows and links: what differs in a value, a type or a column is never hashed alike."""

from __future__ import annotations

import hashlib
import json
from math import inf, nan
from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st

from polar_billing.ledger.chain import digest_of, digest_of_plain, hash_of
from polar_billing.ledger.schema import CHAINED, head_table, link_table, metadata
from polar_billing.ledger.schema.proved import PROVED, ROWS_OUTSIDE, Proof, columns_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    Row = tuple[str, list[Any]]

TABLES = sorted(metadata.tables)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["beef", "", "null", "1", '{"bytes":"beef"}', '["x"]', "Infinity", "a\nb", "1.5"]
)
plain = st.none() | st.integers(-(2**63) + 1, 2**63 - 1) | texts
cells = plain | st.binary(max_size=4) | st.floats() | st.integers(-(2**80), 2**80) | st.booleans()


@st.composite
def rows(draw: st.DrawFn, values: st.SearchStrategy[Any] = cells) -> Row:
    name = draw(st.sampled_from(TABLES))
    width = len(metadata.tables[name].c)
    return name, draw(st.lists(values, min_size=width, max_size=width))


def meaning(subject: str, found: Sequence[Row]) -> object:
    """All that a row says: table, and for each column its name, the type of its value and the value; no nulls."""
    return (
        subject,
        [
            (name, [(column, type(v), v.hex() if isinstance(v, float) else v) for column, v in _named(name, values)])
            for name, values in found
        ],
    )


def _named(name: str, values: Sequence[Any]) -> list[tuple[str, Any]]:
    columns = metadata.tables[name].c.keys()
    return [(str(column), value) for column, value in zip(columns, values, strict=True) if value is not None]


def look_alikes(value: Any) -> list[Any]:
    """Values of other types that say the same, or are written with the same letters."""
    alike: list[Any] = [None, inf, -inf, nan, "", b"", 0, 0.0, -0.0, False, str(value), repr(value)]
    if isinstance(value, str):
        alike += [value.encode(), json.dumps(value), value.encode().hex()]
        alike += [bytes.fromhex(value)] if value == "beef" else []
    if isinstance(value, bytes):
        alike += [
            value.hex(),
            {"bytes": value.hex()}.__repr__(),
            json.dumps({"bytes": value.hex()}, separators=(",", ":")),
        ]
    if isinstance(value, (int, float)):
        alike += [bool(value), json.dumps({"float": float(value).hex()}) if abs(value) < 2**70 else "x"]
        alike += [float(value)] if isinstance(value, int) and abs(value) < 2**70 else []
    return alike


@given(rows(), st.data())
def test_a_cell_that_differs_in_value_or_type_changes_the_digest(row: Row, data: st.DataObject) -> None:
    name, values = row
    place = data.draw(st.integers(0, len(values) - 1))
    value = data.draw(st.sampled_from(look_alikes(values[place])) | cells)
    others = [*values[:place], value, *values[place + 1 :]]
    alike = meaning("usage", [row]) == meaning("usage", [(name, others)])
    assert (digest_of("usage", [row]) == digest_of("usage", [(name, others)])) == alike


@given(rows(), st.data())
def test_values_that_move_to_another_column_change_the_digest(row: Row, data: st.DataObject) -> None:
    name, values = row
    moved = data.draw(st.permutations(values))
    alike = meaning("usage", [row]) == meaning("usage", [(name, moved)])
    assert (digest_of("usage", [row]) == digest_of("usage", [(name, moved)])) == alike


@given(st.lists(rows(), max_size=3), st.lists(rows(), max_size=3), texts, texts)
def test_rows_and_parts_that_differ_have_other_digests(one: list[Row], two: list[Row], a: str, b: str) -> None:
    for subject, found in ((a, one), (b, one), (a, two), (a, one[::-1]), (a, one[:-1]), (a, [*one, *two])):
        alike = meaning(a, one) == meaning(subject, found)
        assert (digest_of(a, one) == digest_of(subject, found)) == alike


@given(st.lists(rows(plain), min_size=1, max_size=3))
def test_anybody_can_compute_a_digest(found: list[Row]) -> None:
    lines: list[Any] = [[1, "usage"]]
    for name, values in found:
        end = max((place for place, value in enumerate(values, 1) if value is not None), default=0)
        lines += [[name, [column.name for column in metadata.tables[name].c][:end]], values[:end]]
    text = "\n".join(json.dumps(line, separators=(",", ":"), ensure_ascii=False) for line in lines)
    assert digest_of("usage", found) == hashlib.sha256(text.encode()).digest()
    assert digest_of_plain("usage", found) == digest_of("usage", found)


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32), st.data())
def test_no_two_links_hash_alike(digest: bytes, previous: bytes, data: st.DataObject) -> None:
    links = st.tuples(texts, st.integers(1, 2**63 - 1), texts, texts)
    one, two = data.draw(links), data.draw(links)
    assert (hash_of(*one, digest, previous) == hash_of(*two, digest, previous)) == (one == two)
    assert (hash_of(*one, digest, previous) == hash_of(*one, previous, digest)) == (digest == previous)
    line = json.dumps([1, *one], separators=(",", ":"), ensure_ascii=False).encode()
    assert hash_of(*one, digest, previous) == hashlib.sha256(previous + digest + line).digest()


def test_a_type_that_no_column_declares_is_told_apart_too() -> None:
    from decimal import Decimal

    row = [1] * 4
    for value in (Decimal(1), True, 1.0, memoryview(b"\x01"), {"bytes": "01"}):
        changed = [value, *row[1:]]
        assert digest_of("x", [("polar_price_book", row)]) != digest_of("x", [("polar_price_book", changed)])
    assert digest_of("x", [("polar_price_book", [memoryview(b"a"), 1, 1, 1])]) == digest_of(
        "x", [("polar_price_book", [b"a", 1, 1, 1])]
    )


OF_CHAIN = {head_table, link_table, *(table for one in CHAINED.values() for table in (one.table, *one.parts))}


def test_every_column_of_every_table_is_declared_once() -> None:
    """One that is new fails here: declare it in `ledger/schema/proved.py`, then run `python docs/generate_proof.py`."""
    declared = {name: [column for one in parts for column in one.columns] for name, parts in PROVED.items()}
    assert {name: sorted(columns) for name, columns in declared.items()} == {
        name: sorted(map(str, table.c.keys())) for name, table in metadata.tables.items()
    }


def test_what_is_declared_chained_is_in_a_digest() -> None:
    for name, table in metadata.tables.items():
        chained = columns_of(name, Proof.CHAINED)
        assert chained == (set(table.c.keys()) if table in OF_CHAIN else set()), name


def test_what_is_not_chained_says_why() -> None:
    for name, parts in PROVED.items():
        for one in parts:
            assert bool(one.why) == (one.proof is not Proof.CHAINED), name
    for name in ROWS_OUTSIDE:
        assert not columns_of(name, Proof.CHAINED), name
    assert not set(ROWS_OUTSIDE) & {str(table.name) for table in OF_CHAIN}
