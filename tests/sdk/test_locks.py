"""What other threads need is free again, wherever a signal stopped the main thread."""

from __future__ import annotations

import random
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from polar_sdk.locks import Changes, Latch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
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
