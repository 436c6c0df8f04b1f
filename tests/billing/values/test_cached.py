"""A value that is read rarely: several threads, changes, failures."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from polar_billing.values.cached import CachedValue, Changes

if TYPE_CHECKING:
    from collections.abc import Iterator


def test_a_second_thread_reads_too_rather_than_take_what_is_not_read_yet() -> None:
    both_read = threading.Barrier(2, timeout=20)

    def read() -> str:
        both_read.wait()
        return "value"

    remembered = CachedValue(read, Changes())

    def use() -> str:
        remembered.refresh(60)
        return remembered.known()

    with ThreadPoolExecutor(2) as threads:
        assert [future.result() for future in [threads.submit(use), threads.submit(use)]] == ["value", "value"]


def test_it_is_read_again_after_a_change_and_not_before() -> None:
    values, changes = iter([1, 2, 3]), Changes()
    remembered = CachedValue(lambda: next(values), changes)
    for _ in range(3):
        remembered.refresh(60)
    assert remembered.known() == 1
    changes.announce()
    remembered.refresh(60)
    assert remembered.known() == 2
    remembered.forget()
    remembered.refresh(60)
    assert remembered.known() == 3


def test_a_failure_is_good_for_a_period_and_keeps_the_former_value() -> None:
    answers: Iterator[OSError | int] = iter([OSError("away"), 1, OSError("away again")])

    def read() -> int:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    remembered = CachedValue(read, changes := Changes())
    with pytest.raises(OSError, match="away"):
        remembered.refresh(60)
    remembered.refresh(60)  # not due: the ledger is not asked for every request
    with pytest.raises(OSError, match="away"):
        remembered.known()
    changes.announce()
    remembered.refresh(60)
    changes.announce()
    with pytest.raises(OSError, match="again"):
        remembered.refresh(60)
    assert remembered.known() == 1
