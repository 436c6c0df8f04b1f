"""The simulation of drift: streams change where they say, and only audits and the detector end a promise."""

from __future__ import annotations

import math
import random
from statistics import median
from typing import TYPE_CHECKING

import pytest

from benchmarks.drift import AFTER, Promised, Row, Stream, cost_of_audit, draw, elsewhere, follow, limit, watch
from benchmarks.drift_losses import read
from benchmarks.results import Recorder
from polar_sdk.promises.novelty import Usual, Usualness
from polar_sdk.request.selection import DEFAULT_SHARE

if TYPE_CHECKING:
    from pathlib import Path

PROMISED = Promised("economy", "strict", 0.3, 0.1)


def rows(count: int, lost: float, centres: tuple[int, ...], seed: int) -> list[Row]:
    dice = random.Random(seed)
    return [
        {
            "tokens": dice.randint(50, 90),
            "distance": dice.random(),
            "centre": dice.choice(centres),
            "kept": {"economy": 0.5 if dice.random() < lost else 1.0},
            "exact": 100,
            "flops": {"economy": 60},
            "again": {"economy": 10},
        }
        for _ in range(count)
    ]


USUAL = rows(200, 0.1, tuple(range(8)), 1)
COUNTED = Usual.of([read(row) for row in rows(200, 0.1, tuple(range(8)), 2)], 10)


def streams(other: list[Row], count: int = 12) -> list[Stream]:
    made = [draw(USUAL, other, random.Random(seed), 3500) for seed in range(count)]
    for stream in made:
        watch(stream, COUNTED)
    return made


def test_nothing_ends_a_promise_where_nothing_changes() -> None:
    found = [follow(stream, PROMISED, [PROMISED]) for stream in streams([])]
    assert sum(each.both is not None for each in found) <= 2
    assert all(5 <= each.audited <= 100 for each in found)
    assert all(100 * each.audited <= each.spent <= 110 * each.audited for each in found)
    assert cost_of_audit({**USUAL[0], "flops": {"economy": 100}}, "economy") == 0


def test_audits_in_doubt_are_soon_enough_to_settle_it() -> None:
    made = streams(rows(200, 0.6, tuple(range(8)), 6))  # twice what is promised, and nothing to be seen of it
    delays = [
        math.inf if each.audits is None else each.audits - stream.begins
        for stream, each in zip(made, [follow(stream, PROMISED, [PROMISED]) for stream in made], strict=True)
    ]
    assert median(delays) < limit(0.3, 0.6, 0.1), "sooner than any method with the usual share of audits"


def test_a_flood_is_seen_by_the_detector_long_before_audits() -> None:
    made = streams(rows(50, 1.0, (9,), 3))
    for stream, found in zip(made, [follow(stream, PROMISED, [PROMISED]) for stream in made], strict=True):
        assert found.detector is not None
        assert found.both is not None
        assert stream.begins <= found.both <= found.detector < stream.begins + AFTER


def test_prompts_that_look_as_usual_are_left_to_audits() -> None:
    made = streams(rows(200, 1.0, tuple(range(8)), 4))
    found = [follow(stream, PROMISED, [PROMISED]) for stream in made]
    assert sum(each.detector is not None for each in found) <= 2
    assert sum(each.audits is not None for each in found) > len(found) / 2
    assert all(each.audits is None or each.audits > stream.begins for stream, each in zip(made, found, strict=True))


def test_a_slow_mix_grows() -> None:
    stream = draw(USUAL, [{"other": True}], random.Random(5), 3500, slow=1000)
    shares = [sum("other" in row for row in stream.rows[start : start + 250]) for start in range(0, 3500, 250)]
    assert shares[0] == 0
    assert shares[-1] == 250 or stream.begins > 2250
    assert stream.chances == sorted(stream.chances)


def test_the_limit_is_what_information_allows() -> None:
    assert limit(0.05, 0.10, 0.05) == pytest.approx(2.9957 / 0.02062 / DEFAULT_SHARE, rel=0.01)
    assert limit(0.5, 1.0, 0.05) == pytest.approx(4.32 / DEFAULT_SHARE, rel=0.01)


def test_figures_of_other_commands_are_null_until_they_are_measured(tmp_path: Path) -> None:

    assert elsewhere(tmp_path) == {"p95_ratio": None, "redteam_fewer": None, "refusal_drop": None}
    recorder = Recorder("trust", tmp_path)
    recorder.add("economy: fewer", 95.0, "%", topic="redteam")
    recorder.add("standard: fewer", 91.0, "%", topic="redteam")
    recorder.add("refusals, standard: drop", -0.5, "points", topic="instructions")
    assert elsewhere(tmp_path) == {"p95_ratio": None, "redteam_fewer": 91.0, "refusal_drop": -0.5}


def test_the_detector_keeps_to_what_it_found() -> None:
    (stream,) = streams(rows(50, 1.0, (9,), 3), 1)
    first = stream.said.index(Usualness.UNUSUAL)
    assert len(stream.said) < len(stream.rows)
    assert set(stream.said[first:]) == {Usualness.UNUSUAL}
