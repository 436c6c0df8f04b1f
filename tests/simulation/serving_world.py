"""The way of a request under faults: scheduler, jobs and recorders over the real decoder of a very small model.

Callers in several threads, and tasks of one event loop, ask for answers and streams of several tenants; they read on,
pause, leave, drop what they have, cancel, are cancelled at any await and once more while they leave, run out of time,
or meet an error in mid-layer or a sink that fails. The engine's thread is one more thread of the schedule. When a call
returns, its record is stored. Afterwards: one record for each request that ran, each answer the one that it gives alone
or a beginning of it, FLOPs to the FLOP, and every page given back.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import patch

import torch

from polar_sdk.engine.forward import next_logits
from polar_sdk.errors import QueueFullError, RequestTimeoutError, SinkError
from polar_sdk.programs.policy import Policy
from polar_sdk.request import record, recorder
from polar_sdk.request.generation import answer, stream
from polar_sdk.serving import passes
from polar_sdk.serving import threads as product_threads
from polar_sdk.serving.places import Limits
from polar_sdk.serving.scheduler import Scheduler
from polar_sdk.serving.threads import Inbox, iterate_in_thread, run_in_thread
from polar_sdk.testing import tiny_llama, tiny_tokenizer
from polar_sdk.usage import Outcome, UsageSink
from tests.simulation import seams
from tests.simulation.world import Broken, World

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Sequence
    from pathlib import Path

    from polar_sdk.model import PolarModel
    from polar_sdk.serving.request import Request
    from polar_sdk.usage import UsageRecord


DEPTH: Final = 4
PROMPTS: Final = ("a", "hello there", "x" * 70, "x" * 70 + "y", "to be or not to be")
PROGRAMS: Final = ("0-3", "0 2-3", "0 1x2 2-3")
AWAITED: Final = ("await", "await", "iterate", "iterate", "abandon")
MANNERS: Final = ("answer", "answer", "batch", "read", "read", "pause", "leave", "drop", "cancel", "late")
PAGES: Final = 24
"""Pages of keys and values: enough for a few rows."""


@dataclass
class Ask:
    """One call of a caller, and what came of it."""

    name: str
    tenant: str
    prompt: str
    program: str
    max_tokens: int
    manner: str
    number: int
    """Read by the manner: after how many pieces, or how long."""
    answers: dict[str, tuple[tuple[int, ...], UsageRecord]] = field(default_factory=dict)
    """Request id → whole answers."""
    begun: list[str] = field(default_factory=list)
    """Request ids that were handed to the engine."""


@dataclass
class Plan:
    """The events of a schedule, apart from who moves when."""

    callers: list[list[Ask]]
    tasks: list[Ask]
    """Asked in an event loop."""
    limits: Limits
    layer_fails: frozenset[int]
    """Passes that end in an error."""
    sink_fails: frozenset[int]
    """Calls of `emit` that fail, once for each request."""
    collects: frozenset[int]
    """Steps at which the garbage collector runs, in whatever thread moves."""
    mark_tokens: int
    """After how many tokens an answer is marked."""
    elements: int

    @classmethod
    def of(cls, seed: int, left_out: frozenset[int] = frozenset()) -> Plan:
        """The plan of a seed, without some of its elements."""
        draw = Random(f"{seed}:serving:plan")
        count = 0
        callers: list[list[Ask]] = []
        for _ in range(draw.choice([1, 2, 3, 4])):
            asks = []
            for _ in range(draw.choice([1, 1, 2])):
                ask = Ask(
                    f"r{count}",
                    draw.choice(["a", "a", "b"]),
                    draw.choice(PROMPTS),
                    draw.choice(PROGRAMS),
                    draw.choice([1, 2, 4, 6]),
                    draw.choice(MANNERS),
                    draw.randrange(6),
                )
                asks += [] if count in left_out else [ask]
                count += 1
            callers.append(asks)
        tasks = []
        for _ in range(draw.choice([0, 0, 1, 3])):
            program, tokens = draw.choice(PROGRAMS), draw.choice([1, 4, 6])
            ask = Ask(f"r{count}", "b", draw.choice(PROMPTS), program, tokens, draw.choice(AWAITED), draw.randrange(60))
            tasks += [] if count in left_out else [ask]
            count += 1
        limits = Limits(
            max_rows=draw.choice([1, 2, 8]), max_waiting=draw.choice([2, 64]), prefix_share=draw.choice([0, 0.25, 0.5])
        )
        faults = {
            name: frozenset(draw.randrange(end) for _ in range(draw.choice([0, 0, 1, 2])))
            for name, end in (("layer", 12), ("sink", 4), ("gc", 150))
        }
        marks = draw.choice([1, 2, 3])
        return cls(callers, tasks, limits, faults["layer"], faults["sink"], faults["gc"], marks, count)


class _Sink(UsageSink):
    """Keeps marks and records; slow, and failing when the plan says so."""

    wants_marks = True

    def __init__(self, world: World, fails: frozenset[int]) -> None:
        self._world, self._fails = world, fails
        self._calls = 0
        self.failed: set[str] = set()
        """Requests for which it failed: of an answer that was broken off, nobody tries again."""
        self.records: list[UsageRecord] = []
        self.offered: set[str] = set()
        """Requests whose record has come."""
        self.marks: list[UsageRecord] = []
        self.late_marks: list[str] = []
        """Requests that were marked after their record had come."""

    def mark(self, record: UsageRecord) -> None:
        self._world.sleep(self._world.random.choice([0.0, 0.01]))
        self.marks.append(record)
        self.late_marks += [record.request_id] if record.request_id in self.offered else []

    def emit(self, record: UsageRecord) -> None:
        self._calls += 1
        self.offered.add(record.request_id)
        self._world.sleep(self._world.random.choice([0.0, 0.01]))
        if self._calls - 1 in self._fails and record.request_id not in self.failed:
            self.failed.add(record.request_id)
            raise SinkError("the sink fails once.")
        self.records.append(record)


class _Loop(asyncio.BaseEventLoop):
    """An event loop whose clock and waiting are the world's."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world, self._selector, self._woken = world, self, False

    def time(self) -> float:
        return self._world.now

    def select(self, timeout: float | None) -> list[object]:
        """Wait until there is something to do."""
        self._world.wait(lambda: self._woken, timeout, "event loop")
        self._woken = False
        return []

    def _process_events(self, events: object) -> None:
        """There are none but timers and calls of other threads."""

    def _write_to_self(self) -> None:
        self._woken = True


class ServingWorld:
    """One schedule of a plan, on a model that all schedules share."""

    def __init__(self, plan: Plan, seed: int, model: PolarModel, alone: dict[Any, tuple[int, ...]]) -> None:
        self.plan = plan
        self.world = World(f"{seed}:serving:schedule")
        self._model, self._alone = model, alone
        self.sink = _Sink(self.world, plan.sink_fails)
        self.passes = 0
        self.started: set[str] = set()
        """Requests that were handed over."""

    def run(self) -> None:
        """Run the schedule and check what it leaves.

        Raises:
            Broken: An invariant does not hold.
        """
        World.now_in = self.world
        self.world.faults = dict.fromkeys(self.plan.collects, gc.collect)
        late, recorder.LATE = recorder.LATE, Inbox("polar-record")  # type: ignore[misc]
        marks, record.MARKS = record.MARKS, Inbox("polar-mark")  # type: ignore[misc]
        self.scheduler = Scheduler(self._model.decoder, self.plan.limits)
        self.loaded = replace(self._model.loaded, scheduler=self.scheduler)
        process = self.world.start_process(0)
        run_pass = next_logits

        def run_or_fail(*arguments: Any) -> Any:
            self.world.step("pass")
            self.passes += 1
            if self.passes - 1 in self.plan.layer_fails:
                raise RuntimeError("a layer fails")
            return run_pass(*arguments)

        try:
            with (
                torch.inference_mode(),
                patch.object(passes, "next_logits", run_or_fail),
                patch.object(record, "MARK_TOKENS", self.plan.mark_tokens),
            ):
                main = self.world.spawn(process, self._main, "main")
                self.world.run(lambda: main.done)
        finally:
            self.world.end()
            recorder.LATE, record.MARKS = late, marks  # type: ignore[misc]
            recorder._OPEN.clear()
            self._give_pages_back()
            World.now_in = None

    def _give_pages_back(self) -> None:
        """Whatever a broken schedule has left, for the next one."""
        pool = self._model.decoder.pool
        pool._users = [0] * pool.size
        pool._free = [list(range(start, start + pages)) for start, pages in zip(pool.starts, pool.sizes, strict=True)]

    def _main(self) -> None:
        threads = [seams.Thread(target=self._call, args=(asks,), name="caller") for asks in self.plan.callers]
        if self.plan.tasks:
            threads.append(seams.Thread(target=self._run_loop, name="loop"))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gc.collect()
        if not recorder.flush(1_000.0):
            raise Broken("records of dropped requests are not stored")
        self._check()

    # -- what callers do --------------------------------------------------------------------------------------------

    def _call(self, asks: Sequence[Ask]) -> None:
        for ask in asks:
            try:
                getattr(self, f"_{ask.manner}")(ask)
            except (RequestTimeoutError, QueueFullError, SinkError):
                pass
            except RuntimeError as error:
                if str(error) != "a layer fails":
                    raise
            if ask.manner != "drop":
                self._check_stored(ask)
            self.world.step("between calls")

    def _check_stored(self, ask: Ask) -> None:
        """A call has returned, so its records are stored."""
        stored = {record.request_id for record in self.sink.records}
        for request_id in ask.begun:
            if request_id not in stored and not self._may_lack_record(ask, request_id):
                raise Broken(f"{request_id}: the call ({ask.manner}) has returned, and its record is not stored")

    def _may_lack_record(self, ask: Ask, request_id: str) -> bool:
        never_begun = ask.manner in {"leave", "drop", "await", "iterate", "abandon"} and request_id not in self.started
        return never_begun or request_id in self.sink.failed

    # -- tasks of the event loop ------------------------------------------------------------------------------------

    def _run_loop(self) -> None:
        loop = _Loop(self.world)
        try:
            loop.run_until_complete(self._gather())
        finally:
            loop.close()

    async def _gather(self) -> None:
        await asyncio.gather(*(self._supervise(ask) for ask in self.plan.tasks))

    async def _supervise(self, ask: Ask) -> None:
        """Run a task that is cancelled after a while, and perhaps once more while it leaves."""
        task = asyncio.ensure_future(getattr(self, f"_{ask.manner}")(ask))
        if ask.number < 40:
            for again in range(1 + ask.number % 2):
                asyncio.get_running_loop().call_later(ask.number * 2e-4 + again * 1e-3, task.cancel)
        try:
            await task
        except (asyncio.CancelledError, RequestTimeoutError, QueueFullError, SinkError):
            pass
        except RuntimeError as error:
            if str(error) != "a layer fails":
                raise
        self._check_stored(ask)

    def _await(self, ask: Ask) -> Coroutine[Any, Any, None]:
        async def call() -> None:
            request = self._request(ask)
            self._keep(
                ask,
                await run_in_thread(
                    lambda cancel: answer(self.loaded, [self._begin(replace(request, cancel=cancel))], self.sink), None
                ),
            )

        return call()

    async def _iterate(self, ask: Ask, pieces: int = 100) -> None:
        request = self._request(ask)
        chunks = iterate_in_thread(
            lambda cancel: stream(self.loaded, self._begin(replace(request, cancel=cancel)), self.sink), None
        )
        try:
            async for chunk in chunks:
                if chunk.generation is not None:
                    self._keep(ask, [chunk.generation])
                pieces -= 1
                if not pieces:
                    break
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]

    async def _abandon(self, ask: Ask) -> None:
        await self._iterate(ask, 1 + ask.number % 3)

    def _request(self, ask: Ask, part: str = "", **changes: Any) -> Request:
        request = self._model._maker.make(
            ask.prompt,
            {"program": ask.program, "max_tokens": ask.max_tokens, "tenant": ask.tenant, "request_id": ask.name + part},
        )
        now = int(self.world.now * 1e9)
        ask.begun.append(request.request_id)
        return replace(request, created_ns=now, started_at=self.world.wall, **changes)

    def _begin(self, request: Request) -> Request:
        self.started.add(request.request_id)
        return request

    def _answer(self, ask: Ask) -> None:
        self._keep(ask, answer(self.loaded, [self._request(ask)], self.sink))

    def _batch(self, ask: Ask) -> None:
        self._keep(ask, answer(self.loaded, [self._request(ask, "-1"), self._request(ask, "-2")], self.sink))

    def _late(self, ask: Ask) -> None:
        request = self._request(ask, timeout=ask.number * 1e-4)
        self._keep(ask, answer(self.loaded, [request], self.sink))

    def _cancel(self, ask: Ask) -> None:
        stop = seams.Event()
        request = self._request(ask, cancel=stop)

        def cancel() -> None:
            self.world.sleep(ask.number * 1e-4)
            stop.set()

        seams.Thread(target=cancel, name="canceller").start()
        self._keep(ask, answer(self.loaded, [request], self.sink))

    def _read(self, ask: Ask, pause_s: float = 0.0) -> None:
        for chunk in stream(self.loaded, self._request(ask), self.sink):
            if chunk.generation is not None:
                self._keep(ask, [chunk.generation])
            if pause_s:
                self.world.sleep(pause_s)

    def _pause(self, ask: Ask) -> None:
        self._read(ask, 0.05 * ask.number)

    def _leave(self, ask: Ask) -> None:
        pieces = stream(self.loaded, self._request(ask), self.sink)
        self._take(ask, pieces)
        pieces.close()

    def _drop(self, ask: Ask) -> None:
        pieces = stream(self.loaded, self._request(ask), self.sink)
        self._take(ask, pieces)
        cycle: list[Any] = [pieces]
        cycle.append(cycle)  # only the collector finds it
        del pieces, cycle

    def _take(self, ask: Ask, pieces: Iterator[Any]) -> None:
        for _ in range(ask.number):
            self.started.update(ask.begun)
            if next(pieces, None) is None:
                return

    def _keep(self, ask: Ask, generations: Sequence[Any]) -> None:
        for generation in generations:
            ask.answers[generation.usage.request_id] = (generation.token_ids, generation.usage)

    # -- invariants -------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        pool, prefixes = self._model.decoder.pool, self.scheduler.prefixes
        prefixes.make_room(pool.sizes)
        if pool.free != pool.size:
            raise Broken(f"{pool.size - pool.free} pages are not given back")
        if len(self.scheduler):
            raise Broken(f"{len(self.scheduler)} jobs are left in the scheduler")
        records = {record.request_id: record for record in self.sink.records}
        if len(records) != len(self.sink.records):
            raise Broken("a request has two records")
        if self.sink.late_marks:
            raise Broken(f"{self.sink.late_marks} are marked after their records")
        for ask in [*self.plan.tasks, *(ask for asks in self.plan.callers for ask in asks)]:
            self._check_records(ask, records)

    def _check_records(self, ask: Ask, records: dict[str, UsageRecord]) -> None:
        alone = self._alone_of(ask)
        for request_id in ask.begun:
            if request_id not in records:
                if self._may_lack_record(ask, request_id):
                    continue
                raise Broken(f"{request_id} ({ask.manner}) has no record")
            record = records[request_id]
            if record.outcome is Outcome.COMPLETED and request_id in ask.answers:
                tokens, receipt = ask.answers[request_id]
                if tokens != alone or receipt != record:
                    raise Broken(f"{request_id}: {tokens} is not the answer {alone} that it gives alone")
            if record.outcome is not Outcome.ERROR and record.tokens.output:
                self._check_flops(ask, record)
            self._check_marks(ask, record)
        for request_id, (tokens, _) in ask.answers.items():
            if alone[: len(tokens)] != tokens:
                raise Broken(f"{request_id}: {tokens} is no beginning of {alone}")

    def _check_marks(self, ask: Ask, record: UsageRecord) -> None:
        """Each mark of a request says more than the one before, and no more than its record."""
        marks = [mark for mark in self.sink.marks if mark.request_id == record.request_id]
        for mark in marks:
            if mark.tokens.output:
                self._check_flops(ask, mark)
        said = [one.flops.total for one in (*marks, record)]
        if any(later < earlier for earlier, later in pairwise(said)) or len(set(said[:-1])) < len(marks):
            raise Broken(f"{record.request_id}: its marks and its record say {said} FLOPs, one after the other")

    def _check_flops(self, ask: Ask, record: UsageRecord) -> None:
        cost, program = self._model.decoder.cost, self._program(ask)
        tokens = record.tokens
        expected = cost.request(program, tokens.input, tokens.output, cached=tokens.cached).total
        if record.flops.total != expected:
            raise Broken(f"{record.request_id}: {record.flops.total} FLOPs are recorded, {expected} were executed")

    def _program(self, ask: Ask) -> Any:
        from polar_sdk.programs.program import Program

        return Program.of(ask.program)

    def _alone_of(self, ask: Ask) -> tuple[int, ...]:
        return self._alone[ask.prompt, ask.program, ask.max_tokens]


class Servings:
    """Serving worlds, one after the other, on one model."""

    def __init__(self, _: Path) -> None:
        from polar_sdk.model import PolarModel

        torch.set_num_threads(1)
        llama = tiny_llama(
            layers=DEPTH, hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1
        )
        self._model = PolarModel.from_hf(
            llama,
            tiny_tokenizer(),
            policy=Policy.permissive(),
            ledger=None,
            kv_memory=PAGES * 2 * 64 * 4 * 4,
        )
        self._alone = {
            (prompt, program, count): self._model.generate(prompt, program=program, max_tokens=count).token_ids
            for prompt in PROMPTS
            for program in PROGRAMS
            for count in (1, 2, 4, 6)
        }
        self._model.scheduler.close()
        self._model.scheduler.prefixes.make_room(self._model.decoder.pool.sizes)
        pairs = [*seams.replacements(), (product_threads.InternalThread, seams.InternalThread)]
        seams.install(pairs, [concurrent.futures._base])
        gc.collect()
        gc.freeze()  # or each collection would walk torch and transformers

    def elements(self, seed: int) -> int:
        """How many elements the plan of a seed has."""
        return Plan.of(seed).elements

    def run(self, seed: int, left_out: frozenset[int], trace: list[str] | None) -> None:
        """Run one schedule; raises if an invariant is broken."""
        schedule = ServingWorld(Plan.of(seed, left_out), seed, self._model, self._alone)
        schedule.world.trace = trace
        schedule.run()
