"""Answers that belong to the server, not to the HTTP call that asked for them.

A web framework cancels the task of a call whose client has left, before the record is stored. So an answer runs in its
own tasks: the call only reads from it, and reports when its reader has left. Stopping the server waits for answers, not
for connections. Knows neither HTTP nor JSON.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from contextlib import closing
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from polar_sdk.serving.threads import run_in_thread
from polar_server.errors import shutting_down

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator, Sequence
    from contextvars import Context

    from polar_sdk import Chunk
    from polar_sdk.request.options import Prompt, RequestOptions
    from polar_sdk.serving.request import Cancel
    from polar_sdk.usage import Offer, Receipt, UsageBound, UsageRecord
    from polar_server.watched_sink import WatchedSink

Ask = tuple["Prompt", "RequestOptions"]
"""One choice: the prompt and its options, without cancel."""


class Computes(Protocol):
    """Answers prompts: a `PolarModel`, or a stand-in before it."""

    def stream(self, prompt: Prompt, **options: Any) -> Generator[Chunk, None, None]:
        """As `PolarModel.stream`."""


class Choice:
    """One of the answers to a call, and what the ledger knows of it.

    Attributes:
        request_id: Its id in the ledger, once it is admitted.
        bound: What was asked, from then on.
        offer: What it runs; another than the first of the bound where a budget allowed only less.
        record: What was executed, once that is stored or held back.
        receipt: What the sink said to it.
        holds_back: Whether the record of a completed answer waits for `Answer.store_records`.
    """

    def __init__(self, together: threading.Barrier, *, holds_back: bool) -> None:
        self.request_id: str | None = None
        self.bound: UsageBound | None = None
        self.offer: Offer | None = None
        self.record: UsageRecord | None = None
        self.receipt: Receipt | None = None
        self.holds_back = holds_back
        self._together = together

    def admitted(self, bound: UsageBound, offer: Offer) -> None:
        """Wait until the other choices are admitted too: all of them run, or none."""
        # Before the others go on: each may say of all what was asked.
        self.request_id, self.bound, self.offer = bound.request_id, bound, offer
        try:
            self._together.wait()
        except threading.BrokenBarrierError:
            self.request_id = self.bound = self.offer = None
            raise

    def recorded(self, record: UsageRecord, receipt: Receipt | None) -> None:
        """Keep what was stored."""
        self.record, self.receipt = record, receipt


class Answer:
    """All choices of one call, each computed in a thread; read by at most one task.

    Args:
        engine: What computes it.
        sink: Where its records go.
        asks: One entry per choice.
        streamed: Whether pieces are read as they come, or only the end of each choice.
        holds_back: Whether the records of completed choices wait for `store_records`.

    Attributes:
        choices: In the order asked.
        error: What ended the answer early, or None.
        stopped: Whether the server stopped it, rather than its reader.
    """

    def __init__(
        self, engine: Computes, sink: WatchedSink, asks: Sequence[Ask], *, streamed: bool, holds_back: bool
    ) -> None:
        self._engine, self._sink, self._streamed = engine, sink, streamed
        self._asks = tuple(asks)
        self._together = threading.Barrier(len(self._asks))
        self.choices = [Choice(self._together, holds_back=holds_back) for _ in self._asks]
        self.error: BaseException | None = None
        self.stopped = False
        self._cancel = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._pieces: deque[tuple[int, Chunk]] = deque()
        self._news = asyncio.Event()
        self._waking = False
        self._failing = threading.Lock()
        self.done = False
        self.task = asyncio.ensure_future(self._run())

    @property
    def tokens(self) -> int:
        """Tokens of prompts and answers that are on record."""
        records = [choice.record for choice in self.choices if choice.record is not None]
        return sum(record.tokens.input + record.tokens.output for record in records)

    def leave(self) -> None:
        """The reader has left: stop computing, within one pass or one piece of a prompt."""
        self._cancel.set()

    def stop(self) -> None:
        """The server ends: stop computing likewise."""
        self.stopped = self.stopped or not self.done
        self._cancel.set()

    async def begun(self, patience: float | None = None) -> bool:
        """Wait for the first piece or the end; False if neither came within `patience` seconds."""
        while not self._pieces and not self.done:
            self._news.clear()  # a piece that arrives here calls the loop, which sets it again
            try:
                async with asyncio.timeout(patience):
                    await self._news.wait()
            except TimeoutError:
                return False
        return True

    async def pieces(self, patience: float | None = None) -> list[tuple[int, Chunk]]:
        """Pieces that have arrived since the last call, with the index of their choice; waits for at least one.

        Nothing is ever held up by a slow reader: what it has not read yet is kept, which is at most the answer.

        Returns:
            Pieces in order; empty at the end of the answer, or after `patience` seconds without any.

        Raises:
            BaseException: What ended the answer early, when every choice has ended and is recorded.
        """
        if not await self.begun(patience):
            return []
        arrived = [self._pieces.popleft() for _ in range(len(self._pieces))]
        if not arrived and self.error is not None:
            raise self.error
        return arrived

    async def store_records(self) -> None:
        """Wait for the end, and store the records that were held back."""
        await asyncio.wait([self.task])
        held = [choice.request_id for choice in self.choices if choice.request_id is not None]
        await run_in_thread(lambda _: self._sink.store_held(held), None)

    async def _run(self) -> None:
        try:
            calls = (partial(self._compute_in, copy_context(), place) for place in range(len(self._asks)))
            await asyncio.gather(*(run_in_thread(call, self._cancel) for call in calls), return_exceptions=True)
        finally:
            self.done = True
            self._news.set()

    def _compute_in(self, context: Context, place: int, cancel: Cancel) -> None:
        """One choice, in a thread of its own, with the trace of its call."""
        context.run(self._compute, place, cancel)

    def _compute(self, place: int, cancel: Cancel) -> None:
        prompt, options = self._asks[place]
        asked: RequestOptions = {**options, "cancel": cancel}
        try:
            with self._sink.watched_by(self.choices[place]), closing(self._engine.stream(prompt, **asked)) as chunks:
                for chunk in chunks:
                    if self._streamed or chunk.generation is not None:
                        self._put(place, chunk)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Keep the first error, which ends the other choices."""
        with self._failing:
            if self.error is None and not isinstance(error, threading.BrokenBarrierError):
                self.error = error
        self._together.abort()
        self._cancel.set()

    def _put(self, place: int, chunk: Chunk) -> None:
        self._pieces.append((place, chunk))
        if not self._waking:  # one call for all pieces that arrive before the loop comes round
            self._waking = True
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._waking = False
        self._news.set()


class Answers:
    """The answers that a server owes, and how it ends.

    Attributes:
        draining: Whether new ones are refused.
    """

    def __init__(self, engine: Computes, sink: WatchedSink) -> None:
        self._engine, self._sink = engine, sink
        self._open: set[Answer] = set()
        self._work: set[asyncio.Task[None]] = set()
        self.draining = False

    def __len__(self) -> int:
        return len(self._open)

    def request_ids(self) -> frozenset[str]:
        """Ids of the requests that are being answered."""
        choices = [choice for answer in list(self._open) for choice in answer.choices]
        return frozenset(choice.request_id for choice in choices if choice.request_id is not None)

    def start(self, asks: Sequence[Ask], *, streamed: bool, holds_back: bool = False) -> Answer:
        """Begin an answer, in the running event loop.

        Args:
            asks: As for `Answer`.
            streamed: As for `Answer`.
            holds_back: As for `Answer`; whoever says so calls `store_records`.

        Raises:
            ApiError: The server is about to end.
        """
        if self.draining:
            raise shutting_down()
        answer = Answer(self._engine, self._sink, asks, streamed=streamed, holds_back=holds_back)
        self._open.add(answer)
        answer.task.add_done_callback(lambda _: self._open.discard(answer))
        return answer

    def keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do what goes with an answer in a task of its own, which draining waits for as well."""
        task = asyncio.ensure_future(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task

    async def drain(self, seconds: float) -> None:
        """Take no more, let those that run finish for so long, stop the others; all are recorded on return."""
        self.draining = True
        if tasks := [answer.task for answer in self._open]:
            await asyncio.wait(tasks, timeout=seconds)
        self.stop()
        while tasks := [*(answer.task for answer in self._open), *self._work]:
            await asyncio.wait(tasks)

    def stop(self) -> None:
        """Take no more, and stop what runs."""
        self.draining = True
        for answer in self._open:
            answer.stop()
