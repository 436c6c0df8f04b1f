"""Tampering with a ledger past this package, cell by cell and row by row, on both stores.

Everything is found, and the first bad number of the chain is named. What is tampered with comes from the tables that
the database has, not from a list here. Every column of every chained table is changed in the first two and the last two
rows; POLAR_TEST_TAMPER=all takes every row, as for `docs/results.md`. On SQLite, cells of every table are also set to
values of another type: by default two per column of the first row, with `all` every one.
"""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import count, pairwise, product
from math import inf
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import and_, column, delete, insert, inspect, select, table
from sqlalchemy.exc import IntegrityError

from polar_billing.budgets.budget import Budget
from polar_billing.budgets.keeper import Budgets
from polar_billing.ledger.books import add_book
from polar_billing.ledger.migrate import migrate
from polar_billing.ledger.postings import Account, Line, post
from polar_billing.ledger.retention import prune
from polar_billing.ledger.schema import CHAINED, metadata
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.proof.verify import verify_in
from polar_billing.statements.credit_notes import credit_note
from polar_billing.statements.issue import issue_statement
from polar_billing.testing import usage_record
from polar_billing.values.periods import Period
from polar_sdk.usage import Offer, UsageBound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from sqlalchemy import Connection, TableClause

    from polar_billing.ledger.ledger import Ledger

    Row = dict[str, Any]
    Place = tuple[str, int]
    Named = set[Place]

ALL_ROWS = os.environ.get("POLAR_TEST_TAMPER") == "all"
NOON = datetime(2027, 4, 20, 12, tzinfo=UTC)
PRUNED = datetime(2026, 10, 20, 12, tzinfo=UTC)
"""The first use of the old ledger, which pruned what was served in the four days after it."""
TENANTS = ("acme", "globex")
LINK, HEAD = "polar_chain_link", "polar_chain_head"
PARTS = {str(part.name): chained for chained in CHAINED.values() for part in chained.parts}
CHAINED_TABLES = sorted({str(one.table.name) for one in CHAINED.values()} | set(PARTS) | {LINK, HEAD})
NOT_CHAINED = {
    "polar_schema",  # which versions there were
    "polar_probe",  # always empty
    "polar_hold",  # renewed, then resolved; `verify` compares what it settled to with the chained usage
    "polar_clock",  # says when open holds expire
    "polar_budget_counter",  # a projection, `verify` makes it again
    "polar_usage_hour",  # a projection, `verify` makes it again
}


def hold_and_use(meter: Meter, tenant: str, at: datetime) -> None:
    """A settled hold, and one that is open."""
    tags = {"user": "ann"}
    offers = (Offer(tier="standard", program="0-5", flops_bound=1),)
    for request_id in (f"settled-{at}", f"open-{at}"):
        names = {"request_id": request_id, "tenant": tenant}
        meter.reserve(UsageBound(**names, at=at, tags=tags, tokens_input=1, tokens_output_max=1, offers=offers))
    meter.emit(usage_record(f"settled-{at}", tenant=tenant, tags=tags, started_at=at))


def fill(ledger: Ledger, noon: datetime) -> None:
    """Two rows or more in every chained table, of both tenants wherever that can be."""
    book, mark = PriceBook.example(), f"{noon:%Y-%m}"
    for name in (f"other-{mark}", f"further-{mark}"):
        add_book(ledger, PriceBook.model_validate({**book.model_dump(), "id": name}), for_all=True)
    meter = Meter(ledger, prices=book, sync=True)
    meter.emit_many(
        usage_record(
            f"{mark}-{n}", tenant=TENANTS[n % 2], started_at=noon + timedelta(days=n), output=n, tags={"n": str(n)}
        )
        for n in range(16)
    )
    meter.emit(usage_record(f"{mark}-unrated", tier="gold", started_at=noon + timedelta(days=17)))
    for tenant in TENANTS:
        for money in (5, 6):
            Budgets(ledger).set(Budget(tenant, Decimal(money), "USD"))
        hold_and_use(meter, tenant, noon + timedelta(days=18))
    with ledger.transaction() as connection:
        for tenant in TENANTS:
            for n in (1, 2):
                lines = [Line(Account.CASH, Decimal(n), "USD"), Line(Account.RECEIVABLE, Decimal(-n), "USD")]
                first = post(connection, tenant, "payment", f"{mark}-{n}", lines, noon, note="paid")
            post(connection, tenant, "correction", mark, lines[::-1], noon, corrects=first)
    for tenant in TENANTS:
        for month in (mark, f"{noon + timedelta(days=30):%Y-%m}"):
            one = issue_statement(ledger, tenant, Period.month(month), now=noon + timedelta(days=90)).statement
            credit_note(ledger, tenant, one.id, one.total, reason="sorry", reference=month)
    with ledger.transaction() as connection:
        for days in (7, 8):
            for tenant in TENANTS:
                prune(connection, tenant, PRUNED + timedelta(days=days))


class Stranger:
    """Changes a ledger past this package: without triggers and foreign keys. Every change can be taken back."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.links = {(row["subject"], row["key"]): (row["tenant"], row["number"]) for row in self.rows(LINK)}

    def table(self, name: str) -> TableClause:
        """A table as the database knows it, without the column types of the package."""
        return table(name, *(column(one["name"]) for one in inspect(self.connection).get_columns(name)))

    def key(self, name: str) -> list[str]:
        return [str(one) for one in inspect(self.connection).get_pk_constraint(name)["constrained_columns"]]

    def rows(self, name: str) -> list[Row]:
        one = self.table(name)
        found = self.connection.execute(select(one).order_by(*(one.c[key] for key in self.key(name)))).mappings()
        return [{key: bytes(v) if isinstance(v, memoryview) else v for key, v in row.items()} for row in found]

    def chosen(self, name: str) -> list[Row]:
        """The rows that are tampered with."""
        rows = self.rows(name)
        return rows if ALL_ROWS or len(rows) < 5 else [*rows[:2], *rows[-2:]]

    def place(self, name: str, row: Row) -> Place | None:
        """The tenant and number of the link that stands for a row, as it was before it was touched."""
        if name in {LINK, HEAD}:
            return row["tenant"], row["number"]
        if name in PARTS:
            chained = PARTS[name]
            key = row[next(column for part, column in chained.parts.items() if part.name == name)]
        else:
            chained = next(one for one in CHAINED.values() if one.table.name == name)
            key = row[chained.key]
        return self.links.get((str(chained.table.name).removeprefix("polar_"), str(key)))

    def named(self, name: str, gone: Sequence[Row] = (), come: Sequence[Row] = ()) -> Named:
        """Delete and insert rows, verify, take it back: what was named, tenant and least number, 0 for none.

        Raises:
            IntegrityError: The database itself would not have it so.
        """
        one, key = self.table(name), self.key(name)
        taken_back = self.connection.begin_nested()
        try:
            for row in gone:
                where = and_(*(one.c[part] == row[part] for part in key))
                assert self.connection.execute(delete(one).where(where)).rowcount == 1
            for row in come:
                self.connection.execute(insert(one).values(row))
            found: defaultdict[str, list[int]] = defaultdict(list)
            for finding in verify_in(self.connection).findings:
                found[finding.tenant] += [] if finding.number is None else [finding.number]
        finally:
            taken_back.rollback()
        return {(tenant, min(numbers, default=0)) for tenant, numbers in found.items()}

    def told(self, name: str, row: Row, column_name: str, value: Any) -> tuple[str | None, list[str]]:
        """Set one cell, verify, take it back: how the database holds it, and the findings.

        None for a cell that is as it was, or that the database refuses to set.
        """
        old = [row[part] for part in (column_name, *self.key(name))]
        where = " AND ".join(f"{part} = ?" for part in self.key(name))
        new, given = (value, ()) if value == NOT_UTF_8 else ("?", (value,))
        cell = f'"{column_name}"'
        update = f"UPDATE {name} SET {cell} = {new} WHERE {where} RETURNING typeof({cell}), {cell} IS ?"
        taken_back = self.connection.begin_nested()
        try:
            holds, same = self.connection.exec_driver_sql(update, (*given, *old[1:], old[0])).one()
            return (None, []) if same else (holds, [str(one) for one in verify_in(self.connection).findings])
        except IntegrityError:
            return None, []
        finally:
            taken_back.rollback()


@pytest.fixture
def stranger(old_ledger: Ledger, unguarded: Callable[[Connection], AbstractContextManager[None]]) -> Iterator[Stranger]:
    """A ledger with a bit of everything from before its migration and from after it, in the hands of a stranger."""
    migrate(old_ledger)
    fill(old_ledger, NOON)
    with old_ledger.transaction() as connection:
        assert verify_in(connection).findings == []
        with unguarded(connection):
            taken_back = connection.begin_nested()
            yield Stranger(connection)
            taken_back.rollback()


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


def of_another_type(value: Any) -> list[Any]:
    """Values that SQLite keeps in a column whatever its type; some of them look like the stored one to a hash."""
    alike: list[Any] = []
    with suppress(ValueError, TypeError):
        alike = [value.hex()] if isinstance(value, bytes) else [bytes.fromhex(value)]
    rest = [-7, 3_000_000_000, 2**63 - 1, 1.5, inf, "x", "[" * 5_000, "9" * 30, b"", b"\xbe\xef", None, NOT_UTF_8]
    return [*alike, *rest]


NOT_UTF_8 = "CAST(x'C328' AS TEXT)"
STORAGE = {"INTEGER": "integer", "BIGINT": "integer", "TEXT": "text", "BLOB": "blob"}
OUTSIDE: dict[str, tuple[set[str], str]] = {
    "polar_schema": ({"version", "applied_at"}, "which versions there were; a ledger of another version is refused"),
    "polar_hold": (
        {"seq", "attempt", "fingerprint", "offer", "cost_bound", "flops_bound", "held_at", "expires_at", "resolved_at"},
        "what was held before a request ran is recorded nowhere else, and what it used counts instead",
    ),
    "polar_hold held": (set(metadata.tables["polar_hold"].c.keys()), "an open hold stands for nothing stored yet"),
    "polar_clock": ({"id", "boot", "ahead"}, "says when open holds expire, and they stand for nothing stored yet"),
    "polar_budget_counter": (
        {"seq", "tenant", "level", "name", "unit", "time_window"},
        "a counter of no budget counts for nothing, and one that is missing is computed again",
    ),
}
"""Table → columns whose values of the declared type nothing proves, and why."""


def test_every_value_of_another_type_is_found(stranger: Stranger) -> None:
    """No traceback, and each change is named or outside the proof."""
    if stranger.connection.dialect.name != "sqlite":
        pytest.skip("keeps values of a column's own type only")
    turn = count()
    for name, known in metadata.tables.items():
        rows = stranger.rows(name) if ALL_ROWS else stranger.rows(name)[:1]
        for row, column_ in product(rows, known.c.keys()):
            declared = known.c[column_].type.compile(dialect=stranger.connection.dialect).partition("(")[0]
            values = of_another_type(row[column_])
            if not (ALL_ROWS and row is rows[0]):  # two, each column others
                values = [values[next(turn) % len(values)] for _ in range(2)]
            for value in values:
                holds, findings = stranger.told(name, row, column_, value)
                if holds is None:
                    continue
                where = (name, row, column_, value, findings)
                if holds not in {STORAGE.get(declared, "text"), "null" if known.c[column_].nullable else ""}:
                    assert any(f"column {column_} of row" in one and name in one for one in findings), where
                open_hold = row.get("state") == "held" and "polar_hold held"
                assert findings or column_ in OUTSIDE.get(open_hold or name, ((), ""))[0], where


def acceptable(stranger: Stranger, name: str, row: Row) -> set[Place]:
    """What may be named for a row that was touched: its link, or what first misses it."""
    place = stranger.place(name, row)
    assert place is not None, (name, row)
    tenant, number = place
    if name == HEAD:  # whether the chain or its end is wrong cannot be told; a chain with a false name begins at 1
        return {place, (tenant, number + 1), (tenant, 1)}
    if name == "polar_pruned":  # the request that it is the proof of is missing without it
        return {place, stranger.links["usage", str(row["seq"])]}
    return {place}


def test_every_table_is_chained_or_need_not_be(stranger: Stranger) -> None:
    tables = {name for name in inspect(stranger.connection).get_table_names() if name.startswith("polar_")}
    assert tables == set(CHAINED_TABLES) | NOT_CHAINED | {"polar_alembic"}
    for name in CHAINED_TABLES:
        stored = {one["name"] for one in inspect(stranger.connection).get_columns(name)}
        assert stored == set(metadata.tables[name].c.keys()), name  # which is what digests cover
        rows = stranger.rows(name)
        assert len(rows) >= 2, name
        assert "tenant" not in stored or {*TENANTS} <= {row["tenant"] for row in rows}, name


def test_every_changed_value_is_found(stranger: Stranger) -> None:
    for name in CHAINED_TABLES:
        for row in stranger.chosen(name):
            for key, value in row.items():
                changed = {**row, key: other(value, is_text(name, key))}
                named = stranger.named(name, [row], [changed])
                assert named & acceptable(stranger, name, row), (name, key, row, named)


def test_every_deleted_row_is_found(stranger: Stranger) -> None:
    for name in CHAINED_TABLES:
        for row in stranger.chosen(name):
            named = stranger.named(name, [row])
            assert named & acceptable(stranger, name, row), (name, row, named)


def test_every_added_row_is_found(stranger: Stranger) -> None:
    for name in CHAINED_TABLES:
        found = inspect(stranger.connection)
        once = {str(key) for one in found.get_unique_constraints(name) for key in one["column_names"]}
        once |= {str(key) for one in found.get_indexes(name) if one["unique"] for key in one["column_names"]}
        new = {*stranger.key(name), *once} - ({"tenant"} if name != HEAD else set())
        for row in stranger.chosen(name):  # its like slips in among the rows of its tenant
            added = {**row, **{key: other(row[key], is_text(name, key)) for key in new}}
            named = stranger.named(name, [], [added])
            assert {tenant for tenant, _ in named} & {added.get("tenant", ""), ""}, (name, added, named)


def test_everything_that_traded_places_is_found(stranger: Stranger) -> None:
    """Two rows of every table, in every pair of neighbours: each value apart, and the whole rows."""
    for name in CHAINED_TABLES:
        found, key = 0, stranger.key(name)
        for one, two in pairwise(stranger.chosen(name)):
            wanted = acceptable(stranger, name, one) | acceptable(stranger, name, two)
            single = [[part] for part in one if one[part] != two[part] and part not in key]
            for traded in (*single, key):
                come = [{**row, **{part: of[part] for part in traded}} for row, of in ((one, two), (two, one))]
                if come == [two, one]:  # they say the same
                    continue
                with suppress(IntegrityError):
                    named = stranger.named(name, [one, two], come)
                    assert named & wanted, (name, traded, one, two, named)
                    found += 1
        assert found, name
