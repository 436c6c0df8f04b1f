"""The comparison of suites reads pytest's result lines right, and knows where our suite is."""

from __future__ import annotations

import pytest

from benchmarks.compare_suites import counts


@pytest.mark.parametrize(
    ("line", "passed", "failed", "skipped"),
    [
        ("52 passed, 8 skipped in 65.10s (0:01:05)", 52, 0, 8),
        ("31 failed, 15 passed, 14 skipped, 3 warnings in 65.10s", 15, 31, 14),
        ("1 failed, 2 passed, 1 error in 0.10s", 2, 2, 0),
        ("3 errors in 0.10s", 0, 3, 0),
        ("no tests ran in 0.01s", 0, 0, 0),
    ],
)
def test_a_result_line_is_counted(line: str, passed: int, failed: int, skipped: int) -> None:
    assert counts(line) == {"passed": passed, "failed": failed, "skipped": skipped}
