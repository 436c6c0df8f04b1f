"""A gate that holds the engine, answers that do not end by themselves, and pages that are back."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from polar_sdk.testing import tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from polar_sdk.model import PolarModel

T = TypeVar("T")
LONG = 200
"""Tokens of an answer that no test waits for."""


class Gate:
    """A logits hook that lets the engine take so many tokens, then holds it at the next until it is opened."""

    def __init__(self, tokens: int) -> None:
        self._free = tokens
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, tokens: Sequence[int], logits: Tensor) -> Tensor:
        if len(tokens) >= self._free:
            self.reached.set()
            assert self.opened.wait(60), "the gate was never opened"
        return logits


@cache
def never_ending() -> str:
    """A prompt whose greedy answer does not end by itself within LONG tokens."""
    model = tiny_model()
    return next(letter for letter in "abcdefghij" if model.generate(letter, max_tokens=LONG).finish_reason == "length")


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def run_together(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Call all from threads of their own, begun together."""
    begin = threading.Barrier(len(calls))

    def run(call: Callable[[], T]) -> T:
        begin.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(run, calls))


def all_pages_are_back(model: PolarModel) -> bool:
    pool = model.decoder.pool
    model.scheduler.prefixes.make_room(pool.sizes)
    return pool.free == pool.size
