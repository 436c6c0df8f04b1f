"""What other threads need is free again, wherever a signal stopped the main thread."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from polar_sdk.locks import Changes, Latch, Together

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

STORM_S = 0.5

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="signals of POSIX")


class StoppedError(Exception):
    """What the signal handler raises."""


@contextmanager
def storm() -> Iterator[Callable[[], None]]:
    """Signals that raise in the main thread at any moment, each armed by a call."""
    dice, armed = random.Random(5), [False]

    def stop(signum: int, frame: FrameType | None) -> None:
        if armed[0]:
            armed[0] = False
            raise StoppedError

    def arm() -> None:
        armed[0] = True
        # Again and again: one that comes just before the thread blocks does not wake it.
        signal.setitimer(signal.ITIMER_REAL, dice.uniform(2e-6, 6e-5), 0.005)

    before = signal.signal(signal.SIGALRM, stop)
    try:
        yield arm
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def stopped_often(act: Callable[[], object]) -> int:
    """Stop an action at random moments for a while; returns how often."""
    times, end = 0, time.monotonic() + STORM_S
    with storm() as arm:
        while time.monotonic() < end:
            try:
                arm()
                while True:
                    act()
            except StoppedError:
                times += 1
    return times


def test_changes_are_never_left_locked() -> None:
    changes = Changes()

    def act() -> None:
        with changes.lock:
            changes.notify()
        changes.wait_for(lambda: True)
        changes.wait_for(lambda: False, 1e-5)

    assert stopped_often(act) > 50
    assert changes.lock.acquire(timeout=5)


def test_who_waits_for_a_change_hears_of_it_whoever_was_stopped_meanwhile() -> None:
    changes = Changes()
    heard, done = [0], [False]

    def wait() -> None:
        while not done[0]:
            changes.wait_for(lambda: True)
            with changes.lock:
                gate = changes.gate()
            gate.acquire()
            heard[0] += 1

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    assert stopped_often(changes.notify) > 50
    done[0] = True
    while waiter.is_alive():
        changes.notify()
        waiter.join(0.01)
    assert heard[0]


def test_a_latch_opens_for_everybody_though_a_waiter_was_stopped() -> None:
    latch = Latch()
    assert stopped_often(latch.wait) > 50
    assert not latch.is_open
    others = [threading.Thread(target=latch.wait) for _ in range(3)]
    for other in others:
        other.start()
    latch.open()
    for other in others:
        other.join(5)
        assert not other.is_alive()
    assert latch.is_open


def test_waiting_ends_when_its_time_is_up() -> None:
    changes = Changes()
    assert not changes.wait_for(lambda: False, 0.001)
    assert changes.wait_for(lambda: True, 0.0)


# -- calls that share a run -------------------------------------------------------------------------------------------


class Doubling:
    """Doubles numbers; what it does first is told before."""

    def __init__(self) -> None:
        self.runs: list[int] = []
        """How many calls each served."""
        self.ready: Callable[[], object] = lambda: None
        """What the next run does before it takes calls."""
        self.first: Callable[[], object] = lambda: None
        """What the next run does when it has taken them."""
        self.together = Together(self.run, shared=ZeroDivisionError)

    def run(self, take: Callable[[], Sequence[int]]) -> list[int]:
        ready, self.ready = self.ready, lambda: None
        ready()
        numbers = take()
        first, self.first = self.first, lambda: None
        first()
        self.runs.append(len(numbers))
        return [2 * number for number in numbers]


def beside(doubling: Doubling, count: int, first: Callable[[], object], *, late: bool = False) -> list[object]:
    """What calls get that come while the run of another one does something first; that of the other one last.

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
            got[number] = doubling.together(number)
        except Exception as error:
            got[number] = error

    callers = [threading.Thread(target=call, args=[number]) for number in (count, *range(count))]
    callers[0].start()
    assert begun.wait(10)
    for caller in callers[1:]:
        caller.start()
    while len(doubling.together._calls) <= count:
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
    assert doubling.together(4) == 8


def test_a_run_serves_no_more_than_it_may() -> None:
    doubling = Doubling()
    doubling.together = Together(doubling.run, shared=ZeroDivisionError, most=8)
    assert beside(doubling, 20, lambda: None) == [2 * number for number in range(21)]
    assert doubling.runs == [1, 8, 8, 4]


def test_a_shared_error_is_that_of_every_call_of_its_run() -> None:
    doubling = Doubling()

    def fail() -> None:
        doubling.first = lambda: 1 // 0

    *others, one = beside(doubling, 5, fail)
    assert ([type(other) for other in others], one) == ([ZeroDivisionError] * 5, 10)
    assert doubling.together(4) == 8


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
    assert doubling.together._calls == []


def test_calls_are_answered_whoever_was_stopped_meanwhile() -> None:
    doubling, done = Doubling(), [False]
    wrong: list[int] = []

    def call(number: int) -> None:
        while not done[0]:
            if doubling.together(number) != 2 * number:
                wrong.append(number)

    callers = [threading.Thread(target=call, args=[number], daemon=True) for number in range(3)]
    for caller in callers:
        caller.start()
    times = stopped_often(lambda: doubling.together(9))
    done[0] = True
    for caller in callers:
        caller.join(10)
        assert not caller.is_alive()
    assert times > 50
    assert doubling.together(1) == 2
    assert not wrong
    assert not doubling.together._calls


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_none_of_the_calls() -> None:
    doubling = Doubling()

    def fork() -> None:
        child = os.fork()
        if child == 0:
            os._exit(0 if doubling.together(3) == 6 and doubling.runs == [1] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    assert beside(doubling, 3, fork) == [0, 2, 4, 6]
