"""Audits and one ledger: several objects heed what was found, frameworks say so, and every figure is proven."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from langchain_polar import PolarLLM
from polar_billing import Ledger, Meter, verify_ledger
from polar_sdk.errors import AuditError
from polar_sdk.promises.monitor import State
from polar_sdk.testing import tiny_model
from tests.sdk.promises.test_audits import until
from tests.sdk.promises.test_fallback import LIMIT_SECONDS, put_at_risk, served, until_fallback
from tests.sdk.router import conftest as router_conftest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polar_sdk.router.menu import MenuRouter

model, router, certified = router_conftest.model, router_conftest.router, router_conftest.certified


@pytest.fixture
def meters(ledger_url: str) -> Iterator[list[Meter]]:
    """Four, as of four processes."""
    made = [Meter(ledger_url) for _ in range(4)]
    yield made
    for meter in made:
        meter.close()


def test_four_objects_of_one_ledger_fall_back(certified: MenuRouter, meters: list[Meter]) -> None:
    engines = [tiny_model(router=certified, sink=meter) for meter in meters]
    for engine in engines:
        assert served(engine, compute="economy") == ("economy", "0-1 4-5", None)
    put_at_risk(meters[3], certified, "economy", times=20)
    assert until_fallback(engines, compute="economy") <= LIMIT_SECONDS
    assert {served(engine, compute="economy") for engine in engines} == {("standard", "0-1 3-5", "economy")}


def test_audits_of_real_answers_are_stored_and_proven(certified: MenuRouter, ledger_url: str) -> None:
    meter = Meter(ledger_url)
    engine = tiny_model(router=certified, sink=meter, audit_share=1.0)
    for number in range(6):
        engine.generate(f"question {number}", compute="economy", max_tokens=5, tenant="acme")
    assert certified.certificate is not None
    (promise,) = certified.certificate.audited["economy"]
    until(lambda: promise.digest in meter.standings() and meter.standings()[promise.digest].audits == 6)
    meter.close()
    with Ledger(ledger_url) as ledger:
        verification = verify_ledger(ledger)
        assert verification.sound, verification.findings


def test_langchain_says_that_another_tier_served(certified: MenuRouter, meters: list[Meter]) -> None:
    engine = tiny_model(router=certified, sink=meters[0])
    llm = PolarLLM(engine=engine, compute="economy", max_tokens=2)
    put_at_risk(meters[1], certified, "economy", times=20)
    until_fallback([engine], compute="economy")
    (answer,) = llm.generate(["some text"]).generations[0]
    assert answer.generation_info is not None
    assert answer.generation_info["polar"]["fallback_from"] == "economy"
    assert answer.generation_info["polar"]["tier"] == "standard"


def test_a_killed_process_leaves_the_state_whole(certified: MenuRouter, ledger_url: str, meters: list[Meter]) -> None:
    """A process that stores losing audits is killed in the middle; the others fall back by what it has stored."""
    assert certified.certificate is not None
    (promise,) = certified.certificate.audited["economy"]
    script = f"""
import sys
from polar_billing import Meter
from polar_billing.testing import audit
meter = Meter({ledger_url!r})
while True:
    meter.audited(audit(lost=True, tier="economy", promise={promise.digest!r}, alpha={promise.alpha}, delta=0.1))
    print("stored", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(15):
            process.stdout.readline()
        process.kill()
    engines = [tiny_model(router=certified, sink=meter) for meter in meters]
    assert until_fallback(engines, compute="economy") <= LIMIT_SECONDS
    assert meters[0].standings()[promise.digest].state is State.AT_RISK
    with Ledger(ledger_url) as ledger:
        verification = verify_ledger(ledger)
        assert verification.sound, verification.findings


def test_audits_are_on_by_default_with_a_ledger(certified: MenuRouter, ledger_url: str) -> None:
    engine = tiny_model(router=certified, ledger=ledger_url)
    assert engine.auditor is not None
    with pytest.raises(AuditError):
        tiny_model(router=certified, ledger=None, audit_share=0.5)
