"""Tampering with a ledger past this package, on both stores: every cell of every table, and every row.

Each cell is set to another value and to values of other
types; rows are deleted, added, and trade values or places. Each change is found, or is of what
`ledger/schema/proved.py` declares to be outside the proof; what the database itself refuses is no change. Of a chained
table the first bad number is named.

A seeded sample runs by default, on SQLite with every column in it; all of them are `long`, and run by `make tamper`.
Each test prints a line of what became of its changes.
"""

from __future__ import annotations

import random
from collections import Counter
from contextlib import contextmanager, suppress
from itertools import islice, pairwise
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from sqlalchemy import and_, column, delete, insert, inspect, select, table
from sqlalchemy.exc import DBAPIError

from polar_billing.ledger.schema import CHAINED, metadata
from polar_billing.ledger.schema.proved import PROVED, ROWS_OUTSIDE, Proof, columns_of
from polar_billing.proof.verify import verify_in
from tests.billing.storing import unguarded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sqlalchemy import Connection, TableClause

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.schema import Chained
    from polar_billing.proof.chain_check import Finding

    Row = dict[str, Any]
    Place = tuple[str, int]

SEED, SAMPLE, PARTS_OF_ALL = 12, 30, 5
VALUES_PER_CELL = 4
TENANTS = ("acme", "globex")
LINK, HEAD = "polar_chain_link", "polar_chain_head"
PARTS = {str(part.name): chained for chained in CHAINED.values() for part in chained.parts}
OF_CHAIN = {str(one.table.name) for one in CHAINED.values()} | set(PARTS) | {LINK, HEAD}


def part_of(name: str) -> tuple[Chained, str]:
    """The chained table that a table is, or is a part of, and the column that says which of its rows."""
    chained = PARTS.get(name) or next(one for one in CHAINED.values() if one.table.name == name)
    return chained, next((column for part, column in chained.parts.items() if part.name == name), chained.key)


class Changed(NamedTuple):
    """The fate of a cell that was set."""

    declared: bool
    """Whether it is of the declared type."""
    stored: Any
    """The value in the database, which may be a number near the one that was given; on SQLite of integers only."""
    findings: list[Finding]


class Stranger:
    """Changes a ledger past this package: without triggers and foreign keys. Every change is taken back."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.on_sqlite = connection.dialect.name == "sqlite"
        look = inspect(connection)
        self.columns = {name: [one["name"] for one in look.get_columns(name)] for name in PROVED}
        self.keys = {name: list(map(str, look.get_pk_constraint(name)["constrained_columns"])) for name in PROVED}
        self.links = {(row["subject"], row["key"]): (row["tenant"], row["number"]) for row in self.rows(LINK)}

    def table(self, name: str) -> TableClause:
        """A table as the database knows it, without the column types of the package."""
        return table(name, *map(column, self.columns[name]))

    def rows(self, name: str) -> list[Row]:
        one = self.table(name)
        found = self.connection.execute(select(one).order_by(*(one.c[key] for key in self.keys[name]))).mappings()
        return [dict(row) for row in found]

    def set_cell(self, name: str, row: Row, column_name: str, value: Any) -> Changed | None:
        """Set one cell and verify.

        None for a cell that is as it was, or that the database refuses to set.
        """
        where = " AND ".join(f"{key} = ?" for key in self.keys[name])
        new, given = (value, ()) if value == NOT_UTF_8 else ("?", (value,))
        cell, old = f'"{column_name}"', row[column_name]
        is_same = f"{cell} IS ?" if self.on_sqlite else f"{cell} IS NOT DISTINCT FROM ?"
        holds = f"typeof({cell})" if self.on_sqlite else f"CASE WHEN {cell} IS NULL THEN 'null' ELSE 'declared' END"
        stored = f"CASE typeof({cell}) WHEN 'integer' THEN {cell} END" if self.on_sqlite else cell
        update = f"UPDATE {name} SET {cell} = {new} WHERE {where} RETURNING {holds}, {stored}, {is_same}"
        values = (*given, *(row[key] for key in self.keys[name]), old)
        with self._taken_back():
            try:
                storage, became, same = self.connection.exec_driver_sql(
                    update if self.on_sqlite else update.replace("?", "%s"), values
                ).one()
            except DBAPIError:
                return None
            if same:
                return None
            declared = self._is_declared(name, column_name, storage)
            return Changed(declared, became, verify_in(self.connection).findings)

    @contextmanager
    def _taken_back(self) -> Iterator[None]:
        """A change that is undone. It is released as well: PostgreSQL would nest thousands, and run out of locks."""
        self.connection.exec_driver_sql("SAVEPOINT change")
        try:
            yield
        finally:
            self.connection.exec_driver_sql("ROLLBACK TO SAVEPOINT change")
            self.connection.exec_driver_sql("RELEASE SAVEPOINT change")

    def _is_declared(self, name: str, column_name: str, storage: str) -> bool:
        declared = metadata.tables[name].c[column_name]
        if storage == "null":
            return bool(declared.nullable)
        kind = declared.type.compile(dialect=self.connection.dialect).partition("(")[0]
        return not self.on_sqlite or storage == STORAGE.get(kind, "text")

    def replaced(self, name: str, gone: Sequence[Row], come: Sequence[Row]) -> list[Finding] | None:
        """Delete and insert rows, and verify; None if the database refuses."""
        one, keys = self.table(name), self.keys[name]
        with self._taken_back():
            try:
                for row in gone:
                    where = and_(*(one.c[key] == row[key] for key in keys))
                    assert self.connection.execute(delete(one).where(where)).rowcount == 1
                for row in come:
                    self.connection.execute(insert(one).values(row))
            except DBAPIError:
                return None
            return verify_in(self.connection).findings

    def acceptable(self, name: str, row: Row) -> set[Place]:
        """The links that may be named for a row of a chained table: its own, or what first misses it."""
        if name in {LINK, HEAD}:
            place = row["tenant"], row["number"]
        else:
            chained, key = part_of(name)
            place = self.links[chained.subject, str(row[key])]
        tenant, number = place
        if name == HEAD:  # whether the chain or its end is wrong cannot be told; a chain with a false name begins at 1
            return {place, (tenant, number + 1), (tenant, 1)}
        if name == "polar_pruned":  # the request that it is the proof of is missing without it
            return {place, self.links["usage", str(row["seq"])]}
        return {place}


def places(findings: Sequence[Finding]) -> set[Place]:
    """The tenants and numbers that were named, 0 for none."""
    return {(finding.tenant, finding.number or 0) for finding in findings}


@pytest.fixture(scope="module")
def stranger(full_ledger: Ledger) -> Iterator[Stranger]:
    """That ledger in the hands of a stranger."""
    with full_ledger.transaction() as connection:
        assert verify_in(connection).findings == []
        with unguarded(connection):
            taken_back = connection.begin_nested()
            yield Stranger(connection)
            taken_back.rollback()


NOT_UTF_8 = "CAST(x'C328' AS TEXT)"
STORAGE = {"INTEGER": "integer", "BIGINT": "integer", "TEXT": "text", "BLOB": "blob"}


def other(value: Any, is_text: bool) -> Any:
    """Another value that the same column can hold."""
    if value is None:
        return "x" if is_text else 1
    if isinstance(value, int):
        return value + 1_000_003
    if isinstance(value, bytes):
        return bytes([value[0] ^ 1]) + value[1:]
    return value[:-1] + ("x" if value[-1:] != "x" else "y")


def is_text(name: str, column_name: str) -> bool:
    return metadata.tables[name].c[column_name].type.compile().startswith(("TEXT", "VARCHAR"))


def values_for(name: str, column_name: str, value: Any, of_others: Sequence[Any]) -> Iterator[Any]:
    """Other values for a cell: of its type, of types that look alike to a hash or to SQL, and of any other."""
    yield other(value, is_text(name, column_name))
    with suppress(ValueError, TypeError):
        yield value.hex() if isinstance(value, bytes) else bytes.fromhex(value)
    with suppress(ValueError, TypeError):
        yield str(value) if isinstance(value, int) else int(value)
    yield from of_others
    yield from (None, "", -7, 0, 1.5, inf, 3_000_000_000, 2**63 - 1, -(2**63), 2.0**70, "x", "[" * 5_000, "9" * 30)
    yield from (b"", b"\xbe\xef", bytes(32), NOT_UTF_8)


class Change(NamedTuple):
    """One change of a ledger, and what must come of it."""

    name: str
    column: str
    """Empty for whole rows."""
    row: Row
    value: Any = None
    """The value to set the cell to."""
    gone: tuple[Row, ...] = ()
    come: tuple[Row, ...] = ()


def judged(stranger: Stranger, change: Change) -> str:
    """Make the change, verify, take it back: found, outside, refused or missed."""
    name, column_name = change.name, change.column
    findings: list[Finding] | None
    if change.gone or change.come:
        declared, stored, findings = True, None, stranger.replaced(name, change.gone, change.come)
    else:
        done = stranger.set_cell(name, change.row, column_name, change.value)
        declared, stored, findings = done or (True, None, None)
    if findings is None:
        return "refused"
    if not declared:  # the cell itself is named
        return (
            "found"
            if any(f"column {column_name} of row" in str(one) and name in str(one) for one in findings)
            else "missed"
        )
    if name in OF_CHAIN:
        return "found" if places(findings) & _wanted(stranger, change, stored) else "missed"
    if findings:
        return "found"
    is_outside = column_name in columns_of(name, Proof.OUTSIDE) if column_name else name in ROWS_OUTSIDE
    rows = change.gone or (change.row,)
    is_open = name == "polar_hold" and any(row["state"] != "settled" for row in rows)
    return "outside" if is_outside or is_open else "missed"


def _wanted(stranger: Stranger, change: Change, stored: Any) -> set[Place]:
    if not change.gone and change.come:  # its like slips in among the rows of its tenant
        (added,) = change.come
        return {place for one in ("", added.get("tenant", "")) for place in _all_places(stranger, one)}
    rows = change.gone or (change.row,)
    if change.name == LINK and change.column == "number" and isinstance(stored, int):  # or where it went to
        rows = (*rows, {**change.row, "number": stored})
    if change.name not in {LINK, HEAD}:
        chained, key = part_of(change.name)
        if change.column == key and (chained.subject, str(stored)) in stranger.links:
            # It went to another row, or took the place of one that was pruned, and that one may come first.
            rows = (*rows, {**change.row, key: stored})
    return {place for row in rows for place in stranger.acceptable(change.name, row)}


def _all_places(stranger: Stranger, tenant: str) -> set[Place]:
    last = max((number for name, number in stranger.links.values() if name == tenant), default=0)
    return {(tenant, number) for number in range(last + 2)}


def changed_cells(stranger: Stranger) -> Iterator[Change]:
    """Every cell, each set to some of the values: which ones turns from cell to cell."""
    turn = 0
    for name in PROVED:
        rows = stranger.rows(name)
        if not rows and not stranger.keys[name]:  # the database refuses what cannot be found
            rows = [dict.fromkeys(stranger.columns[name])]
        for column_name in stranger.columns[name]:
            stored = sorted({row[column_name] for row in rows} - {None})[:4]
            for row in rows:
                first, *values = values_for(name, column_name, row[column_name], stored)
                yield Change(name, column_name, row, first)
                for _ in range(VALUES_PER_CELL - 1):
                    turn += 1
                    yield Change(name, column_name, row, values[turn * 7 % len(values)])


def changed_rows(stranger: Stranger) -> Iterator[Change]:
    """Every row deleted, and its like added."""
    for name in PROVED:
        once = {key for one in _uniques(stranger, name) for key in one}
        new = {*stranger.keys[name], *once} - ({"tenant"} if name != HEAD else set())
        for row in stranger.rows(name):
            yield Change(name, "", row, gone=(row,))
            added = {**row, **{key: other(row[key], is_text(name, key)) for key in new}}
            yield Change(name, "", row, come=(added,))


def _uniques(stranger: Stranger, name: str) -> Iterator[list[str]]:
    look = inspect(stranger.connection)
    for constraint in look.get_unique_constraints(name):
        yield list(map(str, constraint["column_names"]))
    for index in look.get_indexes(name):
        if index["unique"]:
            yield list(map(str, index["column_names"]))


def traded(stranger: Stranger) -> Iterator[Change]:
    """Every pair of neighbours of every table: each value apart, and the whole rows."""
    for name in PROVED:
        keys = stranger.keys[name]
        for one, two in pairwise(stranger.rows(name)):
            single = [[part] for part in one if one[part] != two[part] and part not in keys]
            for parts in (*single, keys):
                come = tuple({**row, **{part: of[part] for part in parts}} for row, of in ((one, two), (two, one)))
                if come != (two, one):  # else they say the same
                    yield Change(name, "" if parts is keys else parts[0], one, gone=(one, two), come=come)


every_kind = pytest.mark.parametrize("changes", [changed_cells, changed_rows, traded], ids=["cells", "rows", "traded"])


@every_kind
def test_a_change_is_found_or_outside_the_proof(
    stranger: Stranger, changes: Callable[[Stranger], Iterator[Change]]
) -> None:
    every = [*changes(stranger)]
    shuffled = random.Random(SEED).sample(every, len(every))
    first_of_each = {(change.name, change.column): change for change in shuffled} if stranger.on_sqlite else {}
    judge([*first_of_each.values(), *islice(shuffled, SAMPLE)], stranger, changes.__name__)


@pytest.mark.long
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("part", range(PARTS_OF_ALL))
@every_kind
def test_every_change_is_found_or_outside_the_proof(
    stranger: Stranger, changes: Callable[[Stranger], Iterator[Change]], part: int
) -> None:
    judge([*changes(stranger)][part::PARTS_OF_ALL], stranger, changes.__name__)


def judge(changes: Sequence[Change], stranger: Stranger, kind: str) -> None:
    """Make each change and take it back: no traceback, and nothing is missed."""
    became, missed = Counter[str](), []
    for change in changes:
        verdict = judged(stranger, change)
        became[verdict] += 1
        missed += [change] if verdict == "missed" else []
    tried = became.total() - became["refused"]
    where = f"{stranger.connection.dialect.name}, {kind.replace('_', ' ')}"
    counts = ", ".join(f"{became[verdict]:,} {verdict}" for verdict in ("found", "outside", "missed"))
    print(f"\n{where}: {tried:,} tried, {counts}; {became['refused']:,} more refused by the database or no change")
    assert missed == [], "\n".join(map(str, missed[:20]))
    assert became["found"] > tried // 2


JSON_COLUMNS = (
    ("polar_usage", "tags"),
    ("polar_usage", "visits_prefill"),
    ("polar_usage", "visits_prefill_filled"),
    ("polar_usage", "visits_decode"),
    ("polar_prune", "totals"),
    ("polar_prune", "statements"),
    ("polar_statement", "document"),
    ("polar_statement", "late"),
    ("polar_price_book", "document"),
)
OTHER_SHAPES = ("0", "null", "[]", "[0]", '["x"]', "{}", '{"project": 1}', '"x"', "[[", "")


def test_json_of_another_shape_is_found(stranger: Stranger) -> None:
    """Whoever reads it may ask a number for its keys, or a text for its rows."""
    for name, column_name in JSON_COLUMNS:
        row = stranger.rows(name)[0]
        for shape in OTHER_SHAPES:
            done = stranger.set_cell(name, row, column_name, shape)
            assert done is None or done.findings != [], (row[column_name], shape)


def test_a_number_that_no_sum_can_hold_is_found(stranger: Stranger) -> None:
    """Numbers are added up in the database, and SQLite's sums end in an error where 64 bits do not hold them."""
    for row in stranger.rows("polar_usage")[:3]:
        change = Change("polar_usage", "tokens_input", row, 2**63 - 1)
        assert judged(stranger, change) == "found", change


def test_every_table_is_filled(stranger: Stranger) -> None:
    """So that the tests above try what they say."""
    for name in PROVED:
        rows = stranger.rows(name)
        assert name in {"polar_probe", "polar_clock", "polar_schema"} or len(rows) >= 2, name
        tenants = {row.get("tenant") for row in rows}
        assert "tenant" not in stranger.columns[name] or {*TENANTS} <= tenants, name
    assert {row["state"] for row in stranger.rows("polar_hold")} == {"held", "settled", "released", "expired"}
    assert any(row["late"] != "[]" for row in stranger.rows("polar_statement"))
