"""The latency of requests beside audits: phases that audit and others that do not, and the ratio of both."""

from __future__ import annotations

import random
from statistics import fmean
from typing import TYPE_CHECKING

import pytest

from benchmarks.beside_audits import Facts, Pair, drain, p95, phase, ratio, report
from benchmarks.drift import elsewhere
from benchmarks.results import Recorder
from polar_sdk.testing import tiny_model
from tests.sdk.router import conftest as router_conftest

if TYPE_CHECKING:
    from pathlib import Path

    from polar_sdk.router.menu import MenuRouter

model, router, certified = router_conftest.model, router_conftest.router, router_conftest.certified


def test_a_slower_engine_shows_and_a_slow_moment_does_not() -> None:
    dice, pairs = random.Random(1), list[Pair]()
    for place in range(120):
        moment = 4.0 if place % 10 == 0 else 1.0  # of the machine: both phases of a pair have it
        alone = [moment * dice.uniform(0.05, 0.15) for _ in range(16)]
        pairs.append(Pair(alone, [1.1 * moment * dice.uniform(0.05, 0.15) for _ in range(16)]))
    for figure, width in ((fmean, 0.2), (p95, 0.5)):
        value, low, high = ratio(pairs, figure, 1)
        assert low <= value <= high
        assert low < 1.1 < high
        assert high - low < width
    assert ratio(pairs, fmean, 1)[1] > 1
    often, rarely = (ratio(pairs, fmean, rarer)[0] - 1 for rarer in (1, 20))
    assert rarely == pytest.approx(often / 20)


def test_phases_audit_or_not_and_leave_nothing_to_the_next_one(certified: MenuRouter, tmp_path: Path) -> None:
    sink = Facts()
    engine = tiny_model(router=certified, sink=sink, audit_share={"economy": 1.0})
    assert engine.auditor is not None
    pairs = [Pair() for _ in range(2)]
    for place, pair in enumerate(pairs):
        for audits in (False, True):
            engine.auditor.shares["economy"] = float(audits)
            before = len(sink.audits)
            found = phase(engine, "economy", ["one text", "another text"], [0.0, 0.1], f"{place} {audits}")
            drain(engine)
            assert len(sink.audits) - before == 2 * audits
            assert all(latency > 0 for latency in found)
            (pair.on if audits else pair.off).extend(found)
    report(Recorder("drift", tmp_path), "economy", 1.0, pairs, sink)
    assert elsewhere(tmp_path)["p95_ratio"] is not None
