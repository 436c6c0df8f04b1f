"""Calls that come while another one runs share the next run; what stops one caller stops no other."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from polar_billing.budgets.group_commit import GroupCommit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class StoppedError(Exception):
    """Stops one caller."""


class Doubling:
    """Doubles numbers; what it does first is told before."""

    def __init__(self) -> None:
        self.runs: list[int] = []
        """How many calls each served."""
        self.ready: Callable[[], object] = lambda: None
        """Called by the next run before it takes calls."""
        self.first: Callable[[], object] = lambda: None
        """Called by the next run when it has taken them."""
        self.call = GroupCommit(self.run, shared=ZeroDivisionError)

    def run(self, take: Callable[[], Sequence[int]]) -> list[int]:
        ready, self.ready = self.ready, lambda: None
        ready()
        numbers = take()
        first, self.first = self.first, lambda: None
        first()
        self.runs.append(len(numbers))
        return [2 * number for number in numbers]


def beside(doubling: Doubling, count: int, first: Callable[[], object], *, late: bool = False) -> list[object]:
    """The answers to calls that come while the run of another one does something first; that of the other one last.

    Args:
        doubling: What they call.
        count: How many come.
        first: What that run does, in the thread of its caller.
        late: Whether it does so before it takes calls.
    """
    begun, go = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        go.wait(10)
        first()

    if late:
        doubling.ready = wait
    else:
        doubling.first = wait
    got: list[object] = [None] * (count + 1)

    def call(number: int) -> None:
        try:
            got[number] = doubling.call(number)
        except Exception as error:
            got[number] = error

    callers = [threading.Thread(target=call, args=[number]) for number in (count, *range(count))]
    callers[0].start()
    assert begun.wait(10)
    for caller in callers[1:]:
        caller.start()
    while len(doubling.call._calls) <= count:
        time.sleep(0.001)
    go.set()
    for caller in callers:
        caller.join(10)
    return got


def test_calls_that_come_meanwhile_share_a_run() -> None:
    doubling = Doubling()
    assert beside(doubling, 20, lambda: None) == [2 * number for number in range(21)]
    assert doubling.runs == [1, 20]


def test_calls_that_come_while_a_run_gets_ready_are_served_by_it() -> None:
    doubling = Doubling()
    assert beside(doubling, 20, lambda: None, late=True) == [2 * number for number in range(21)]
    assert doubling.runs == [21]


def test_an_error_before_calls_are_taken_is_that_of_all_who_wait() -> None:
    doubling = Doubling()
    got = beside(doubling, 5, lambda: 1 // 0, late=True)
    assert [type(each) for each in got] == [ZeroDivisionError] * 6
    assert doubling.call(4) == 8


def test_a_run_serves_no_more_than_it_may() -> None:
    doubling = Doubling()
    doubling.call = GroupCommit(doubling.run, shared=ZeroDivisionError, maximum=8)
    assert beside(doubling, 20, lambda: None) == [2 * number for number in range(21)]
    assert doubling.runs == [1, 8, 8, 4]


def test_a_shared_error_is_that_of_every_call_of_its_run() -> None:
    doubling = Doubling()

    def fail() -> None:
        doubling.first = lambda: 1 // 0

    *others, one = beside(doubling, 5, fail)
    assert ([type(other) for other in others], one) == ([ZeroDivisionError] * 5, 10)
    assert doubling.call(4) == 8


def test_what_stops_one_caller_stops_no_other() -> None:
    doubling = Doubling()

    def stop() -> None:
        def raising() -> None:
            raise StoppedError

        doubling.first = raising

    *others, one = beside(doubling, 5, stop)
    assert one == 10
    stopped = [place for place, other in enumerate(others) if isinstance(other, StoppedError)]
    assert len(stopped) == 1
    assert [other for place, other in enumerate(others) if place not in stopped] == [
        2 * place for place in range(5) if place not in stopped
    ]
    assert doubling.call._calls == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_none_of_the_calls() -> None:
    doubling = Doubling()

    def fork() -> None:
        child = os.fork()
        if child == 0:
            os._exit(0 if doubling.call(3) == 6 and doubling.runs == [1] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    assert beside(doubling, 3, fork) == [0, 2, 4, 6]
