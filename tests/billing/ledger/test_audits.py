"""Audits: stored once, chained, and the standing of their promise, which follows from them, on every replica."""

from __future__ import annotations

import random
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import delete, func, literal, select, update

from polar_billing.errors import ConflictError, StoreError
from polar_billing.ledger.audits import Audits, Watched, watch
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.schema import audit_table, head_table, link_table, monitor_table, standing_table
from polar_billing.metering.meter import Meter
from polar_billing.proof.verify import verify_in, verify_ledger
from polar_billing.testing import audit
from polar_sdk.promises.monitor import Monitor, State
from tests.billing.storing import unguarded

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROMISE, OTHER = "ab" * 32, "cd" * 32


def stored(ledger: Ledger) -> list[Any]:
    with ledger.snapshot() as connection:
        return list(connection.execute(select(audit_table).order_by(audit_table.c.seq)))


def history(ledger: Ledger) -> list[tuple[str, str, int, int]]:
    standing = standing_table.c
    query = select(standing.promise, standing.state, standing.audits, standing.losses).order_by(standing.seq)
    with ledger.snapshot() as connection:
        return [tuple(row) for row in connection.execute(query)]


def test_an_audit_is_stored_once_whoever_offers_it_again(
    store: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLAR_SPOOL", str(tmp_path / "spool"))
    one = audit("r1", weight=1 / 3)
    with Meter(store) as meter, Meter(Ledger(store.url.render_as_string(hide_password=False))) as replica:
        for sink in (meter, replica, meter):
            sink.audited(one)
        meter.audited(audit("r1", lost=True))  # the same answer, audited again by a process that did not know
        meter.audited(audit("r1", promise=OTHER, loss="strict"))  # judged under another promise too
        assert [(row.audit_id == one.audit_id, row.promise, row.lost) for row in stored(store)] == [
            (True, PROMISE, 0),
            (False, OTHER, 0),
        ]
        figures: list[dict[str, Any]] = [{"alpha": 0.1}, {"delta": 0.05}, {"tier": "economy"}]
        refused = [one.model_copy(update={"lost": True}), *(audit("r2", **changes) for changes in figures)]
        answers = Audits(store, meter.source).store(refused)
        assert [isinstance(answer, ConflictError) for answer in answers] == [True] * 4
        for wrong in refused:
            meter.audited(wrong)  # as a sink, it is not to be offered again
        assert meter.spool is not None
        assert meter.spool.rejected == 4
        assert {name: (one.audits, one.losses) for name, one in replica.standings().items()} == {
            PROMISE: (1, 0),
            OTHER: (1, 0),
        }
    assert verify_ledger(store).sound


def test_standings_are_those_of_a_monitor_that_reads_the_audits_in_order(store: Ledger) -> None:
    chance = random.Random(7)
    start = datetime(2026, 11, 15, tzinfo=UTC)
    with Meter(store) as meter:
        assert meter.standings() == {}
        for n in range(240):
            promise, broken = (PROMISE, 0.3) if n % 2 else (OTHER, 0.0)
            jump = timedelta(days=chance.choice((0, 0, 400, -400)))  # a clock that jumps changes no order
            fields: dict[str, Any] = {
                "promise": promise,
                "tenant": chance.choice(("acme", "globex")),
                "at": start + jump,
            }
            meter.audited(audit(lost=chance.random() < broken, weight=chance.choice((1.0, 0.25)), **fields))
        found = meter.standings()
    rows = [row for row in stored(store) if row.promise == PROMISE]
    monitor = Monitor(0.05, 0.1)
    for row in rows:
        before, monitor = monitor, monitor.observe(bool(row.lost))
        if before.state is State.IN_FORCE and monitor.state is State.AT_RISK:
            turned = monitor
    assert (found[PROMISE].state, found[OTHER].state) == (State.AT_RISK, State.IN_FORCE)
    assert (found[PROMISE].audits, found[PROMISE].losses) == (monitor.audits, monitor.losses) == (120, monitor.losses)
    assert [row for row in history(store) if row[0] == PROMISE] == [
        (PROMISE, "in force", 1, rows[0].lost),
        (PROMISE, "at risk", turned.audits, turned.losses),
    ]
    assert verify_ledger(store).sound


def test_replicas_that_audit_at_once_agree_on_the_order(store: Ledger) -> None:
    url = store.url.render_as_string(hide_password=False)

    def work(n: int) -> None:
        with Ledger(url) as ledger:
            audits = Audits(ledger, "polar")
            for k in range(15):
                audits.store([audit(f"{n}-{k}", lost=k % 3 == 0, tenant=f"t{n % 2}")])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stored(store)) == 60
    assert [row[1] for row in history(store)] == ["in force", "at risk"]
    assert verify_ledger(store).sound


def test_what_was_rolled_back_is_not_remembered(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    audits = Audits(ledger, "polar")
    audits.store([audit(lost=True)])
    with monkeypatch.context() as broken:
        broken.setattr("polar_billing.ledger.audits.chain.link_many", lambda *_: 1 / 0)
        for _ in range(30):
            with pytest.raises(ZeroDivisionError):
                audits.store([audit(lost=True)])
    audits.store([audit()])
    assert audits.standings()[PROMISE].audits == 2
    assert history(ledger) == [(PROMISE, "in force", 1, 1)]
    assert verify_ledger(ledger).sound


def test_who_starts_reads_the_stored_monitor_and_only_later_audits(ledger: Ledger) -> None:
    writer = Audits(ledger, "polar")
    writer.store([audit(lost=n % 9 == 0, promise=(PROMISE, OTHER)[n % 2]) for n in range(60)])
    whole: dict[str, Watched] = {}
    found: dict[str, Watched] = {}
    with ledger.snapshot() as connection:
        watch(connection, whole)
    with ledger.transaction() as connection, unguarded(connection):
        connection.execute(delete(audit_table).where(audit_table.c.seq < 40))  # whoever reads them would miss them
    assert Audits(ledger, "polar").standings() == writer.standings()
    with ledger.snapshot() as connection:
        watch(connection, found)
    assert found == whole
    again = Audits(ledger, "polar")
    again.store([audit(lost=True)])
    assert again.standings()[PROMISE].audits == whole[PROMISE].monitor.audits + 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda: delete(monitor_table),
        lambda: update(monitor_table).values(monitor="1 2 three"),
        lambda: update(monitor_table).values(audit_seq=10_000),
        lambda: update(monitor_table).values(monitor=Monitor(0.05, 0.1).text),  # as if it were in force
    ],
)
def test_a_stored_monitor_that_cannot_be_right_is_not_used(ledger: Ledger, damage: Callable[[], Any]) -> None:
    writer = Audits(ledger, "polar")
    writer.store([audit(lost=True) for _ in range(12)])
    with ledger.transaction() as connection:
        connection.execute(damage())
    found = Audits(ledger, "polar").standings()
    assert found == writer.standings()
    assert found[PROMISE].state is State.AT_RISK


def test_a_ledger_that_cannot_be_read_is_said(tmp_path: Any) -> None:
    (tmp_path / "no.sqlite3").write_bytes(b"not a database" * 100)
    meter = Meter(str(tmp_path / "no.sqlite3"))
    for act in (meter.standings, lambda: meter.audited(audit())):
        with pytest.raises(StoreError):
            act()


def remove_last(connection: Any) -> None:
    """Take the last audit and its link, as if it had never been."""
    seq = connection.execute(select(func.max(audit_table.c.seq))).scalar_one()
    connection.execute(delete(audit_table).where(audit_table.c.seq == seq))
    connection.execute(delete(link_table).where(link_table.c.subject == "audit", link_table.c.key == str(seq)))


TAMPERING: list[Callable[[Any], Any]] = [
    lambda connection: connection.execute(update(audit_table).where(audit_table.c.seq == 3).values(lost=0, kept=20)),
    lambda connection: connection.execute(update(audit_table).where(audit_table.c.seq == 3).values(weight=1)),
    lambda connection: connection.execute(update(audit_table).where(audit_table.c.seq == 3).values(tenant="globex")),
    lambda connection: connection.execute(delete(audit_table).where(audit_table.c.seq == 5)),
    remove_last,
    lambda connection: connection.execute(
        audit_table.insert().from_select(
            [column.name for column in audit_table.c],
            select(
                *(
                    {"seq": audit_table.c.seq + 1_000, "audit_id": literal("x"), "request_id": literal("y")}.get(
                        name, column
                    )
                    for name, column in audit_table.c.items()
                )
            ).where(audit_table.c.seq == 4),
        )
    ),
    lambda connection: connection.execute(update(standing_table).values(state="in force")),
    lambda connection: connection.execute(delete(standing_table).where(standing_table.c.state == "at risk")),
    lambda connection: connection.execute(update(monitor_table).values(monitor=Monitor(0.05, 0.1).text)),
    lambda connection: connection.execute(update(monitor_table).values(audit_seq=3)),
    lambda connection: connection.execute(update(monitor_table).values(promise="x")),
]


@pytest.mark.parametrize("tamper", TAMPERING)
def test_a_changed_removed_or_invented_audit_is_noticed(store: Ledger, tamper: Callable[[Any], Any]) -> None:
    Audits(store, "polar").store([audit(lost=True) for _ in range(12)])
    assert [row[1] for row in history(store)] == ["in force", "at risk"]
    with store.transaction() as connection:
        assert verify_in(connection).sound
        with unguarded(connection):
            tamper(connection)
            assert not verify_in(connection).sound


def test_standings_that_do_not_follow_are_noticed_even_where_every_hash_is_right(ledger: Ledger) -> None:
    audits = Audits(ledger, "polar")
    audits.store([audit(lost=True) for _ in range(12)])
    with ledger.transaction() as connection, unguarded(connection):
        # The change to `at risk` and its link were the last of their chain: cut off, the chain is whole.
        last = connection.execute(
            select(link_table).where(link_table.c.tenant == "").order_by(link_table.c.number.desc()).limit(1)
        ).one()
        connection.execute(delete(link_table).where(link_table.c.tenant == "", link_table.c.number == last.number))
        connection.execute(delete(standing_table).where(standing_table.c.seq == int(last.key)))
        head = {"number": last.number - 1, "hash": last.previous}
        connection.execute(update(head_table).where(head_table.c.tenant == "").values(head))
        findings = verify_in(connection).findings
        assert [finding.number for finding in findings] == [None]
