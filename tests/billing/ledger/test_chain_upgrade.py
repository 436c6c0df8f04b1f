"""Chains of older schemas: proved by their own rule before they are anchored, and together with what follows after."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import inspect, text

from polar_billing.errors import LedgerUnsoundError, SchemaVersionError
from polar_billing.ledger.chain import ANCHOR, Head
from polar_billing.ledger.digests import CURRENT, FIRST
from polar_billing.ledger.migrate import migrate
from polar_billing.ledger.retention import prune
from polar_billing.ledger.schema import SCHEMA_VERSION
from polar_billing.metering.meter import Meter
from polar_billing.proof.receipts import check_receipt, make_receipt
from polar_billing.proof.verify import check_head, verify_in, verify_ledger
from polar_billing.testing import usage_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from sqlalchemy import Connection

    from polar_billing.ledger.ledger import Ledger

    Unguarded = Callable[[Connection], AbstractContextManager[None]]

HEADS = {"": 5, "acme": 25, "beef": 2, "globex": 24}
"""How many links each of its chains has."""


@pytest.fixture
def tampered(unguarded: Unguarded) -> Callable[[Ledger, str], None]:
    """Changes a ledger for good, past this package."""

    def change(ledger: Ledger, statement: str) -> None:
        if ledger.url.get_backend_name() == "sqlite":  # by a connection that heeds no foreign keys
            with closing(sqlite3.connect(str(ledger.url.database))) as file, file:
                triggers = file.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
                for name, _ in triggers:
                    file.execute(f"DROP TRIGGER {name}")
                assert file.execute(statement).rowcount
                for _, trigger in triggers:
                    file.execute(trigger)
            return
        with ledger.unprepared() as connection, unguarded(connection):
            assert connection.exec_driver_sql(statement).rowcount

    return change


def links(connection: Connection, tenant: str) -> list[Any]:
    query = text("SELECT * FROM polar_chain_link WHERE tenant = :tenant ORDER BY number")
    return list(connection.execute(query, {"tenant": tenant}))


def test_old_links_stay_and_are_anchored(old_ledger: Ledger) -> None:
    with old_ledger.unprepared() as connection:
        before = {tenant: links(connection, tenant) for tenant in HEADS}
    assert migrate(old_ledger) == (3, SCHEMA_VERSION)
    Meter(old_ledger, sync=True).emit_many(usage_record(f"new{n}", tenant="acme") for n in range(3))
    Meter(old_ledger, sync=True).emit(usage_record("new", tenant="later"))
    with old_ledger.snapshot() as connection:
        verified = verify_in(connection)
        after = {tenant: links(connection, tenant) for tenant in [*HEADS, "later"]}
    assert verified.findings == []
    assert verified.links == sum(HEADS.values()) + len(HEADS) + 4
    for tenant, count in HEADS.items():
        assert after[tenant][:count] == before[tenant]
        anchor = after[tenant][count]
        assert (anchor.subject, anchor.number) == (ANCHOR, count + 1)
        for link in after[tenant]:
            hashed = [
                version.hash_of(link.tenant, link.number, link.subject, link.key, bytes(link.digest), previous)
                for previous in [bytes(link.previous)]
                for version in (FIRST, CURRENT)
            ]
            assert hashed.index(bytes(link.hash)) == (0 if link.number <= count else 1)
    assert [link.subject for link in after["later"]] == ["usage"]  # a new chain needs no anchor


def test_what_is_not_as_it_was_written_is_not_anchored(old_ledger: Ledger, unguarded: Unguarded) -> None:
    kept = "backup from before that change, or undo the change"
    cases = [
        ("UPDATE polar_usage SET device = 'tpu' WHERE request_id = 'deadbeef00'", "'beef', number 1 of the chain: row"),
        ("DELETE FROM polar_chain_link WHERE tenant = 'acme' AND number = 7", "'acme', number 7 of the chain: is miss"),
        ("UPDATE polar_chain_head SET number = 30 WHERE tenant = 'globex'", "'globex', number 25 of the chain: is mis"),
        ("DELETE FROM polar_entry WHERE transaction_id = 1 AND line = 1", "'acme', number 13 of the chain: row"),
        (f"UPDATE polar_usage SET started_at = {2**62} WHERE request_id = '1007'", "a moment that no calendar has"),
        (
            "INSERT INTO polar_price_in_force SELECT seq + 9, price_book_hash, for_all, 0 FROM polar_price_in_force",
            "rows of no tenant, number 6 of the chain: row 10 of polar_price_in_force was added",
        ),
    ]
    for statement, said in cases:
        with old_ledger.unprepared() as connection, unguarded(connection):
            attempt = connection.begin_nested()
            assert connection.exec_driver_sql(statement).rowcount
            with pytest.raises(LedgerUnsoundError) as caught:
                from polar_billing.ledger.migrations.versions.v0004 import _proved

                _proved(connection)
            assert said in str(caught.value), str(caught.value)
            assert kept in str(caught.value.hint)
            assert "\n" not in str(caught.value)
            attempt.rollback()


def test_a_broken_ledger_stays_what_it_was(old_ledger: Ledger, tampered: Callable[[Ledger, str], None]) -> None:
    tampered(old_ledger, "UPDATE polar_usage SET flops_total = flops_total + 1 WHERE request_id = '1007'")
    with pytest.raises(LedgerUnsoundError, match=r"tenant 'beef', number 2 of the chain: row .* of polar_usage"):
        migrate(old_ledger)
    with old_ledger.unprepared() as connection:
        assert old_ledger.stored_version(connection) == 3
        assert not inspect(connection).has_table("polar_chain_anchor")
    tampered(old_ledger, "UPDATE polar_usage SET flops_total = flops_total - 1 WHERE request_id = '1007'")
    migrate(old_ledger)
    assert verify_ledger(old_ledger).sound


@pytest.mark.parametrize("old_ledger", ["sqlite-file"], indirect=True)
@pytest.mark.parametrize(
    ("change", "back"),
    [
        (
            "polar_usage SET request_id = x'deadbeef00' WHERE request_id = 'deadbeef00'",
            "polar_usage SET request_id = 'deadbeef00' WHERE request_id = x'deadbeef00'",
        ),
        (
            "polar_usage SET tenant = x'beef' WHERE tenant = 'beef'",
            "polar_usage SET tenant = 'beef' WHERE tenant = x'beef'",
        ),
        (
            "polar_transaction SET corrects = 9e999 WHERE id = 1",
            "polar_transaction SET corrects = NULL WHERE id = 1",
        ),
        ("polar_budget SET name = x'' WHERE seq = 1", "polar_budget SET name = '' WHERE seq = 1"),
    ],
)
def test_what_the_old_rule_hashed_alike_is_found_by_its_type(
    old_ledger: Ledger, tampered: Callable[[Ledger, str], None], change: str, back: str
) -> None:
    """Before the migration, which refuses, and in the old stretch of a migrated ledger."""
    tampered(old_ledger, f"UPDATE {change}")
    with pytest.raises(LedgerUnsoundError, match="the row is not read"):
        migrate(old_ledger)
    tampered(old_ledger, f"UPDATE {back}")
    migrate(old_ledger)
    tampered(old_ledger, f"UPDATE {change}")
    assert "the row is not read" in str(verify_ledger(old_ledger).findings[0])


def test_both_stretches_and_the_anchor_are_proved(old_ledger: Ledger, unguarded: Unguarded) -> None:
    migrate(old_ledger)
    Meter(old_ledger, sync=True).emit_many(usage_record(f"new{n}", tenant="beef") for n in range(2))
    anchor = "polar_chain_anchor SET {} WHERE tenant = 'beef'"
    cases = [
        ("UPDATE polar_usage SET device = 'tpu' WHERE request_id = 'deadbeef00'", 1),
        ("UPDATE polar_usage SET device = 'tpu' WHERE request_id = 'new1'", 5),
        *((f"UPDATE {anchor.format(change)}", 3) for change in ("links = 1", "links = 3", "version = 2", "id = 99")),
        (f"UPDATE {anchor.format('head = (SELECT hash FROM polar_chain_head WHERE number = 5)')}", 3),
        ("DELETE FROM polar_chain_anchor WHERE tenant = 'beef'", 3),
        ("DELETE FROM polar_chain_link WHERE tenant = 'beef' AND subject = 'chain_anchor'", 3),
        ("UPDATE polar_chain_link SET subject = 'chain_anchor' WHERE tenant = 'beef' AND number = 4", 4),
    ]
    for statement, number in cases:
        with old_ledger.transaction() as connection:
            attempt = connection.begin_nested()
            with unguarded(connection):
                assert connection.exec_driver_sql(statement).rowcount == 1
                found = {(finding.tenant, finding.number) for finding in verify_in(connection).findings}
                assert ("beef", number) in found, (statement, found)
            attempt.rollback()


def rewritten(connection: Connection, tenant: str, number: int) -> None:
    """Hash the last links of a chain anew by the rule of version 1, from a number on, rows and head included."""
    from polar_billing.ledger.chain import raw_rows
    from polar_billing.ledger.schema import CHAINED

    previous = None
    for link in links(connection, tenant):
        if link.number >= number:
            chained = CHAINED[link.subject]
            rows = raw_rows(connection, chained, [chained.key_of(link.key) or 0])[link.key]
            digest, before = FIRST.digest_of(link.subject, rows), previous or bytes(32)
            previous = FIRST.hash_of(tenant, link.number, link.subject, link.key, digest, before)
            change = "digest = :digest, previous = :before, hash = :hash WHERE tenant = :tenant AND number = :number"
            values = {"digest": digest, "before": before, "hash": previous, "tenant": tenant, "number": link.number}
            connection.execute(text(f"UPDATE polar_chain_link SET {change}"), values)
        else:
            previous = bytes(link.hash)
    head = text("UPDATE polar_chain_head SET hash = :hash WHERE tenant = :tenant")
    connection.execute(head, {"hash": previous, "tenant": tenant})


def test_no_link_can_be_declared_old(old_ledger: Ledger, unguarded: Unguarded) -> None:
    """Even with the tail of the chain hashed anew, the weak rule does not hold beyond the anchor, nor without one."""
    migrate(old_ledger)
    meter = Meter(old_ledger, sync=True)
    for tenant in ("beef", "later"):
        meter.emit_many(usage_record(f"new{n}", tenant=tenant) for n in range(2))
    for tenant, number in (("beef", 3), ("beef", 5), ("later", 1), ("later", 2)):
        with old_ledger.transaction() as connection:
            attempt = connection.begin_nested()
            with unguarded(connection):
                rewritten(connection, tenant, number)
                (finding,) = verify_in(connection).findings
                assert (finding.tenant, finding.number) == (tenant, number)
                assert finding.what.startswith("is hashed by version 1, as before the migration")
            attempt.rollback()
    # An anchor of one's own over a new chain makes the links before it old, which they are not.
    with old_ledger.transaction() as connection:
        attempt = connection.begin_nested()
        with unguarded(connection):
            columns = "INSERT INTO polar_chain_anchor (tenant, version, links, head, anchored_at)"
            source = "SELECT tenant, 1, number, hash, 0 FROM polar_chain_head WHERE tenant = 'later'"
            connection.exec_driver_sql(f"{columns} {source}")
            found = {(finding.tenant, finding.number) for finding in verify_in(connection).findings}
            assert ("later", 1) in found
        attempt.rollback()


def test_receipts_and_heads_from_before_stay_good(old_ledger: Ledger) -> None:
    with old_ledger.unprepared() as connection:
        kept = {
            tenant: Head(len(found), bytes(found[-1].hash)) for tenant in HEADS if (found := links(connection, tenant))
        }
        added = ("visits_prefill_filled", "tokens_drafted", "tokens_accepted", "flops_drafts")
        for column in added:  # read by today's code
            connection.execute(text(f"ALTER TABLE polar_usage ADD COLUMN {column} TEXT"))
        receipt = make_receipt(connection, "beef", "deadbeef00")
        for column in added:
            connection.execute(text(f"ALTER TABLE polar_usage DROP COLUMN {column}"))
    migrate(old_ledger)
    Meter(old_ledger, sync=True).emit(usage_record("new", tenant="beef"))
    with old_ledger.snapshot() as connection:
        assert [check_head(connection, tenant, head) for tenant, head in kept.items()] == [None] * len(kept)
        assert check_receipt(connection, receipt).wrong is None
        new = make_receipt(connection, "beef", "new")
        assert check_receipt(connection, new).wrong is None
        assert (receipt["chain"]["number"], new["chain"]["number"]) == (1, 4)
    with old_ledger.transaction() as connection:
        assert prune(connection, "beef", datetime(2030, 1, 1, tzinfo=UTC)).requests == 3
    with old_ledger.snapshot() as connection:
        assert check_receipt(connection, receipt).wrong is None
        assert check_receipt(connection, new).wrong is None
        assert verify_in(connection).sound


def test_down_and_up_again(old_ledger: Ledger) -> None:
    with old_ledger.unprepared() as connection:
        before = {tenant: links(connection, tenant) for tenant in HEADS}
    migrate(old_ledger)
    assert migrate(old_ledger, 3) == (SCHEMA_VERSION, 3)
    with old_ledger.unprepared() as connection:
        assert {tenant: links(connection, tenant) for tenant in HEADS} == before
        assert dict(connection.execute(text("SELECT tenant, number FROM polar_chain_head")).all()) == HEADS
    migrate(old_ledger)
    assert verify_ledger(old_ledger).sound
    Meter(old_ledger, sync=True).emit(usage_record("new", tenant="later"))
    with pytest.raises(SchemaVersionError, match="tenant 'later' holds links of version 2, which schema version 3 has"):
        migrate(old_ledger, 3)
    assert verify_ledger(old_ledger).sound
