"""A promise that is at risk reaches every replica within two seconds, and a replica that is killed leaves it whole."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from polar_billing.ledger.audits import Audits
from polar_billing.ledger.ledger import Ledger
from polar_billing.proof.verify import verify_ledger
from polar_billing.testing import audit

if TYPE_CHECKING:
    from collections.abc import Iterator

REPLICA = """
import json, sys, time
from polar_billing.metering.meter import Meter
from polar_billing.testing import audit

url, name, audits = sys.argv[1:]
meter = Meter(url)
print(json.dumps({"ready": name}), flush=True)
number = 0
while True:
    standings = meter.standings()
    if any(one.state == "at risk" for one in standings.values()):
        print(json.dumps({"at_risk": time.time()}), flush=True)
        break
    for _ in range(int(audits)):
        meter.audited(audit(f"{name}-{number}"))
        number += 1
    time.sleep(0.25)
sys.stdin.read()
"""


@pytest.fixture
def replicas(url: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Four processes that look four times a second, as an engine does once; two of them audit as fast as they can."""
    started = []
    for n in range(4):
        command = [sys.executable, "-c", REPLICA, url, f"replica-{n}", "40" if n < 2 else "0"]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    yield started
    for process in started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdout is not None
    line: dict[str, float] = json.loads(process.stdout.readline())
    return line


def test_a_promise_at_risk_reaches_four_replicas_though_one_is_killed(
    replicas: list[subprocess.Popen[str]], url: str
) -> None:
    for process in replicas:
        assert "ready" in said(process)
    with Ledger(url) as ledger:
        audits = Audits(ledger, "polar")
        time.sleep(1)
        replicas[0].kill()  # while it audits
        changed = None
        for n in range(400):
            audits.store([audit(f"lost-{n}", lost=True)])
            if any(one.state == "at risk" for one in audits.standings().values()):
                changed = time.time()
                break
        assert changed is not None
        delays = [said(process)["at_risk"] - changed for process in replicas[1:]]
        print(f"fall-back reached {len(delays)} processes after {', '.join(f'{delay:.2f}' for delay in delays)} s")
        assert max(delays) <= 2
        assert verify_ledger(ledger).sound
        with ledger.snapshot() as connection:
            states = connection.exec_driver_sql("SELECT state FROM polar_standing ORDER BY seq").scalars().all()
        assert states == ["in force", "at risk"]
