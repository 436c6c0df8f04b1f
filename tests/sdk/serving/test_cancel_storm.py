"""Cancellation at any await, token and moment: whatever ends a request, its record is stored when control returns.

    python tests/sdk/serving/test_cancel_storm.py 2000

Tries cancellations of every kind in turn and prints one line: how many, how many records were exact, how many were lost
and doubled. The tests do the same with few tries.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import pytest

from polar_sdk.errors import RequestTimeoutError
from polar_sdk.request import recorder
from polar_sdk.serving.places import Limits
from polar_sdk.testing import tiny_model
from polar_sdk.usage import ListSink, UsageRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from torch import Tensor

    from polar_sdk.serving.job import Job
    from polar_sdk.serving.scheduler import Scheduler

TRIES: Final = pytest.mark.parametrize("tries", [18, pytest.param(300, marks=pytest.mark.long)])
TOKENS: Final = 24
"""Length of an answer that nothing ends."""
PATIENCE_S: Final = 5.0
"""How late a record may be after several signals: one may stop any step of who waits for the thread that stores."""
SIGNALLED: Final = 3
"""One try in so many is a process that gets signals."""


@dataclass
class Score:
    """Counts of what became of the records."""

    tries: int
    exact: int
    inexact: int
    late: int
    lost: int
    doubled: int

    def __str__(self) -> str:
        return (
            f"{self.tries} tries: {self.exact} records exact, {self.late} of them late, {self.inexact} not exact, "
            f"{self.lost} lost, {self.doubled} doubled"
        )


class Storm:
    """A model whose requests are cancelled, and the judge of their records."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.sink = ListSink()
        self.model = tiny_model(sink=self.sink)
        self.model.scheduler.limits = Limits(prefix_share=0)
        self._ran: Counter[str] = Counter()
        """FLOPs that passes executed, by request."""
        self._verdicts: dict[int, str] = {}
        self._late = 0
        _watch(self.model.scheduler, self._ran)

    def options(self, number: int) -> dict[str, Any]:
        """Options of a request that does not end by itself soon."""
        return {
            "prompt": "never " * self.random.randint(1, 8),
            "max_tokens": TOKENS,
            "program": "0-5",
            "request_id": f"try-{number}",
            "temperature": 1.0,
            "seed": number,
        }

    def judge(self, number: int) -> None:
        """Control has returned from this request: is its record there, once, and true?"""
        if number in self._verdicts:
            return
        name = f"try-{number}"
        records = self._records(name)
        late = not records and self._ran[name] > 0
        if late:  # what is left of it waits for the garbage collector, or a thread is storing it
            gc.collect()
            recorder.flush()
            records = self._awaited(name)
        if len(records) > 1:
            verdict = "doubled"
        elif records:
            verdict = "exact" if self._is_true(records[0]) else "inexact"
        else:
            verdict = "lost" if self._ran[name] else "exact"  # it had not begun
        self._verdicts[number] = verdict
        self._late += late and verdict == "exact"

    def _records(self, name: str) -> list[UsageRecord]:
        return [record for record in self.sink.records[-32:] if record.request_id == name]

    def _awaited(self, name: str) -> list[UsageRecord]:
        deadline = time.monotonic() + PATIENCE_S
        while not (records := self._records(name)) and time.monotonic() < deadline:
            time.sleep(0.001)
        return records

    def _is_true(self, record: UsageRecord) -> bool:
        if record.flops.total != self._ran[record.request_id]:
            return False
        if not record.tokens.output:
            return record.flops.total == 0 or record.flops.layers_decode == 0
        return record.flops == self.model.cost("0-5", prompt=record.tokens.input, output=record.tokens.output)

    def settle(self) -> None:
        """At the end no record may have come late, and no page may be missing."""
        self.model.scheduler.close()
        for name, times in Counter(record.request_id for record in self.sink.records).items():
            if times > 1:
                self._verdicts[int(name.removeprefix("try-"))] = "doubled"
        pool = self.model.decoder.pool
        assert pool.free == pool.size

    def score(self) -> Score:
        """The verdicts, counted."""
        counts = Counter(self._verdicts.values())
        return Score(
            len(self._verdicts), counts["exact"], counts["inexact"], self._late, counts["lost"], counts["doubled"]
        )


def _watch(scheduler: Scheduler, ran: Counter[str]) -> None:
    charge = scheduler._charge

    def noted(jobs: Sequence[Job]) -> None:
        for job in jobs:
            ran[job.request.request_id] += job.row.executed - job.standing.charged
        charge(jobs)

    scheduler._charge = noted  # type: ignore[method-assign]


# -- in one process --------------------------------------------------------------------------------------------------


def by_token(storm: Storm, number: int) -> None:
    """The caller's own cancel is set at a token, or before the first."""
    cancel, at = threading.Event(), storm.random.randint(0, TOKENS)

    def hook(tokens: Sequence[int], logits: Tensor) -> Tensor:
        if len(tokens) >= at:
            cancel.set()
        return logits

    storm.model.generate(**storm.options(number), cancel=cancel, logits_hook=hook)


def by_time(storm: Storm, number: int) -> None:
    """A timeout at a random moment."""
    with suppress(RequestTimeoutError):
        storm.model.generate(**storm.options(number), timeout=storm.random.uniform(0.0001, 0.05))


def by_thread(storm: Storm, number: int) -> None:
    """Another thread cancels at a random moment."""
    cancel = threading.Event()
    timer = threading.Timer(storm.random.uniform(0, 0.04), cancel.set)
    timer.start()
    storm.model.generate(**storm.options(number), cancel=cancel)
    timer.join()


def by_closing(storm: Storm, number: int) -> None:
    """A stream is closed, dropped, dropped in a cycle or thrown into after some of its tokens."""
    stream: Any = storm.model.stream(**storm.options(number))
    for _ in range(storm.random.randint(0, TOKENS)):
        if next(stream, None) is None:
            break
    way = storm.random.choice(("close", "drop", "cycle", "throw"))
    if way == "close":
        stream.close()
    elif way == "throw":
        with suppress(KeyError, StopIteration):
            stream.throw(KeyError("thrown"))
    elif way == "cycle":
        cycle: list[Any] = [stream]
        cycle.append(cycle)
        del cycle, stream
        gc.collect()
        recorder.flush()
    else:
        del stream


def by_task(storm: Storm, number: int) -> None:
    """asyncio cancels the task one to three times, after a number of turns of the loop."""

    async def main() -> None:
        task = asyncio.ensure_future(_call(storm, number))
        for _ in range(storm.random.randint(1, 3)):
            for _ in range(storm.random.randint(0, 12)):
                await asyncio.sleep(storm.random.choice((0, 0, 0.001)))
            task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(main())


def by_scope(storm: Storm, number: int) -> None:
    """anyio cancels at every await."""

    async def main() -> None:
        with anyio.move_on_after(storm.random.uniform(0, 0.04)):
            await _call(storm, number)

    asyncio.run(main())


def _call(storm: Storm, number: int) -> Coroutine[Any, Any, object]:
    """An awaited call or a stream that is read to some token."""
    options, model = storm.options(number), storm.model
    if storm.random.random() < 0.5:
        return model.agenerate(**options)
    tokens = storm.random.randint(1, TOKENS)

    async def read() -> None:
        stream: Any = model.astream(**options)
        try:
            for _ in range(tokens):
                await anext(stream, None)
        finally:
            await stream.aclose()

    return read()


WAYS: Final[tuple[Callable[[Storm, int], None], ...]] = (by_token, by_time, by_thread, by_closing, by_task, by_scope)


def run_here(tries: int, seed: int = 0) -> Score:
    """Cancel in this process, in every way in turn."""
    storm = Storm(seed)
    for number in range(tries):
        WAYS[number % len(WAYS)](storm, number)
        storm.judge(number)
    storm.settle()
    return storm.score()


# -- signals ---------------------------------------------------------------------------------------------------------


def run_signalled(tries: int, seed: int = 0) -> Score:
    """Cancel by one to three signals, Ctrl-C and SIGTERM, in a process of its own."""
    command = [sys.executable, str(Path(__file__)), "worker", str(tries), str(seed)]
    rng = random.Random(seed)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        hung = threading.Timer(60 + tries, worker.kill)  # a worker that hangs has failed, and says so here
        hung.start()
        last = ""
        for line in worker.stdout:
            last = line
            if line.startswith("begin"):
                time.sleep(rng.uniform(0, 0.03))
                for _ in range(rng.randint(1, 3)):
                    worker.send_signal(rng.choice((signal.SIGINT, signal.SIGTERM)))
                    time.sleep(rng.choice((0, 0.0005, 0.004)))
    hung.cancel()
    assert worker.returncode == 0, f"the worker hung or failed ({worker.returncode}) after: {last}"
    return Score(*map(int, last.split()))


class Interrupted(BaseException):
    """Raised by SIGTERM in the worker, as SystemExit in the command `polar`."""


def _worker(tries: int, seed: int) -> None:
    def terminated(*_: object) -> None:
        raise Interrupted

    storm = Storm(seed)
    storm.model.generate("warm", max_tokens=2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminated)
    begun: set[int] = set()

    def loop() -> None:
        """Signals may hit anything here; whatever was begun when it starts again has returned control."""
        for number in range(tries):
            if number not in begun:
                begun.add(number)
                os.write(1, b"begin\n")
                options = storm.options(number)
                if number % 2:
                    storm.model.generate(**options)
                else:
                    for _ in storm.model.stream(**options):
                        pass
            storm.judge(number)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # here, since those of the last try may still come
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    for _ in range(3):
        loop = partial(_insist, loop)
    loop()
    storm.settle()
    os.write(1, " ".join(map(str, vars(storm.score()).values())).encode() + b"\n")


def _insist(call: Callable[[], None]) -> None:
    while True:
        try:
            call()
            return
        except (KeyboardInterrupt, Interrupted):
            pass


# -- tests -----------------------------------------------------------------------------------------------------------


@TRIES
def test_every_cancelled_request_is_recorded_once_and_exactly(tries: int) -> None:
    score = run_here(tries)
    assert (score.tries, score.exact, score.late) == (tries, tries, 0), str(score)


@TRIES
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_every_signalled_request_is_recorded_once_and_exactly(tries: int) -> None:
    """A further signal may hit the clean-up after the first so that the record is stored moments after."""
    score = run_signalled(tries // SIGNALLED)
    assert score.exact == score.tries, str(score)


def _main() -> None:
    if sys.argv[1] == "worker":
        _worker(int(sys.argv[2]), int(sys.argv[3]))
        return
    tries = int(sys.argv[1])
    here, signalled = run_here(tries - tries // SIGNALLED), run_signalled(tries // SIGNALLED)
    total = Score(*(a + b for a, b in zip(vars(here).values(), vars(signalled).values(), strict=True)))
    print(total)
    sys.exit(total.exact != total.tries)


if __name__ == "__main__":
    _main()
