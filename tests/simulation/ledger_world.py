"""The way of a usage record under faults: meter, spool, budgets and ledger, in several processes that are killed.

Processes share one ledger file and its spool. Their threads check, reserve, compute, and emit or release; some repeat
what a killed process may not have finished, some use an id a second time with other content, some recover, recheck or
change budgets. Meanwhile the disk fills up, the store fails, answers get lost, clocks jump, processes are killed
between any two writes and in the middle of one, and the power is cut. Then all faults end, one more process recovers,
and every invariant is checked, the money and the counts by SQL of our own.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sqlite3
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import create_engine

from polar_billing.budgets.budget import Budget, OverBudget
from polar_billing.budgets.enforcement import HOLD_LIFETIME, Budgets
from polar_billing.errors import ConflictError, StoreError
from polar_billing.ledger import pending_writers
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.metering.meter import Meter
from polar_billing.metering.spool import Spool, spool_folder
from polar_billing.proof.verify import verify_ledger
from polar_billing.reports.query import usage_rows
from polar_billing.testing import usage_record
from polar_billing.values.canonical import record_json
from polar_billing.values.periods import Period
from polar_sdk.errors import BudgetExceededError
from polar_sdk.usage import Offer, Outcome, TokenUsage, UsageBound
from tests.simulation import database, disk, seams
from tests.simulation.database import Database
from tests.simulation.disk import Disk
from tests.simulation.seams import exit_process
from tests.simulation.world import Broken, Process, World

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime
    from pathlib import Path

    from polar_sdk.usage import UsageRecord


TENANTS: Final = ("acme", "globex")
PATHS: Final = ((0, 1, 2, 3, 4, 5), (0, 1, 4, 5), (0, 5))
EVERYTHING: Final = Selection(ALL_TENANTS, Period())
_REUSED: Final = "reused-"
_INTERRUPTED: Final = "interrupted-"
_ENDS: Final = (100, 250, 800)
"""Faults strike before one of these steps; a schedule has some hundred."""


@dataclass
class Use:
    """A request, what its caller does, and what became of it."""

    request_id: str
    tenant: str
    path: tuple[int, ...]
    output: int
    outcome: Outcome = Outcome.COMPLETED
    reserves: bool = True
    begins: bool = True
    """False if it is released instead of being served."""
    repeats: bool = True
    """Whether the caller tries again after a kill."""
    compute_s: float = 0.1
    prompt: int = 10
    id_is_new: bool = True
    """Whether the engine made the id; the caller's own is looked up before compute."""
    marks: int = 0
    """How often it is marked; a request that is keeps no caller who tries again with what only its process knew."""
    cached: int = 0
    """Prompt tokens that another request had computed."""
    emitted: UsageRecord | None = None
    receipt: Any = None
    """Set once `emit` has answered."""
    answered_in: tuple[str, int] = ("", 0)
    """The durability of the meter that answered, and how often the power had been cut by then."""
    marked: list[UsageRecord] = field(default_factory=list)
    """Marked while it ran, or about to be."""
    mark_kept: tuple[int, int] | None = None
    """Index of the last mark that was written, and how often the power had been cut by then."""
    conflicted: bool = False
    over: bool = False


@dataclass
class Plan:
    """The events of a schedule, apart from who moves when. Its elements can be left out, to shrink it."""

    seed: int
    processes: list[tuple[str, list[list[Use]]]] = field(default_factory=list)
    """Durability and callers of each process."""
    faults: list[tuple[int, str, int]] = field(default_factory=list)
    """Step, kind, and a number that the kind reads."""
    budget: Budget | None = None
    elements: int = 0
    """How many there are, left out or not."""

    @classmethod
    def of(cls, seed: int, left_out: frozenset[int] = frozenset()) -> Plan:
        """The plan of a seed, without some of its elements, which are counted as they are drawn."""
        draw = Random(f"{seed}:ledger:plan")
        plan = cls(seed)
        count = iter(range(10_000))
        earlier: list[Use] = []
        for _ in range(draw.choice([1, 2, 2, 3])):
            durability = draw.choice(["commit", "spool"])
            callers = []
            for _ in range(draw.choice([1, 1, 2])):
                uses = [_use(draw, earlier, f"r{next(count)}") for _ in range(draw.choice([1, 1, 2, 3]))]
                callers.append([use for use in uses if int(use[0][1:]) not in left_out])
            plan.processes.append((durability, [[use for _, use in uses] for uses in callers]))
        kinds = draw.choice(_PROFILES)
        for _ in range(draw.choice([1, 1, 2, 3, 4])):
            fault = (draw.randrange(1, draw.choice(_ENDS)), draw.choice(kinds), draw.randrange(2**30))
            if next(count) not in left_out:
                plan.faults.append(fault)
        if draw.random() < 0.75:
            limit = Decimal(draw.randrange(1, 12)) * Decimal("0.0005")
            over = draw.choice([OverBudget.REFUSE, OverBudget.SHALLOWER])
            plan.budget = Budget("acme", limit, over_budget=over)
        plan.elements = next(count)
        return plan


_PROFILES: Final[Sequence[Sequence[str]]] = (
    ("kill",),
    ("kill", "kill", "power"),
    ("full", "kill"),
    ("fail", "lock", "kill"),
    ("lost", "kill"),
    ("fail", "power"),
    ("lock", "fail", "power"),
    ("slow", "jump"),
    ("jump", "kill"),
    ("kill", "power", "full", "fail", "lock", "lost", "slow", "jump"),
)


def _use(draw: Random, earlier: list[Use], name: str) -> tuple[str, Use]:
    chance = draw.random()
    use = Use(
        name,
        draw.choice(TENANTS),
        draw.choice(PATHS),
        draw.randrange(5),
        draw.choices(list(Outcome), [6, 1, 1, 1])[0],
        reserves=draw.random() < 0.9,
        begins=draw.random() < 0.85,
        repeats=draw.random() < 0.7,
        cached=draw.choice([0, 0, 4]),
        compute_s=draw.choice([0.0, 0.01, 2.0, 2.0, 600.0, 1200.0]),
    )
    if earlier and chance < 0.15:  # an id of another request
        other = draw.choice(earlier)
        use.request_id, use.tenant, use.reserves = other.request_id, other.tenant, other.reserves
        use.id_is_new = other.id_is_new = False
    use.marks = draw.choice([0, 0, 1, 3])
    earlier.append(use)
    return name, use


class LedgerWorld:
    """One schedule of a plan.

    Args:
        plan: What happens.
        folder: A folder in memory, emptied first.
        template: A ledger file with its tables, and the one that the plan's budget is set in.
    """

    def __init__(self, plan: Plan, folder: Path, template: bytes) -> None:
        self.plan = plan
        self.world = World(f"{plan.seed}:ledger:schedule")
        self.disk = Disk(self.world, folder)
        self.file = folder / "ledger.sqlite3"
        self.file.write_bytes(template)
        self.database = Database(self.file)
        self.cuts = 0
        """How often the power was cut."""
        self.stored: list[tuple[str, Use, UsageRecord]] = []
        """Tenant, use and content of each record in the ledger at the end."""
        self.living: dict[int, Process] = {}
        """By the index of their plan."""
        self.starts = 0

    def run(self) -> None:
        """Run the schedule and check what it leaves.

        Raises:
            Broken: An invariant does not hold.
            Exception: Something of the product failed in a way that it does not promise.
        """
        World.now_in, Disk.now_in, Database.now_in = self.world, self.disk, self.database
        pending_writers._pending.clear()  # of earlier schedules
        try:
            host = self.world.start_process(slot=9)
            main = self.world.spawn(host, self._supervise, "host")
            self.world.run(lambda: main.done)
        finally:
            self.world.end()
            self.database.close()
            World.now_in = Disk.now_in = Database.now_in = None

    # -- processes --------------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        world = self.world
        self._in_process(8, self._set_up)
        for step, kind, number in self.plan.faults:
            world.faults[world.steps + step] = partial(self._strike, kind, number)
        while not self._served():
            for index in range(len(self.plan.processes)):
                if index not in self.living and not self._is_through(index):
                    self._start(index)
            world.wait(lambda: self._served() or bool(self._dead()), None, "host")
            for index in self._dead():
                del self.living[index]
            if world.random.random() < 0.5:
                world.sleep(world.random.choice([0.001, 1.5, 2000.0]))
        world.faults.clear()
        self._heal()
        self._in_process(7, self._audit)

    def _dead(self) -> list[int]:
        return [index for index, process in self.living.items() if process.dead]

    def _served(self) -> bool:
        return all(self._is_through(index) for index in range(len(self.plan.processes))) and not self.living

    def _is_through(self, index: int) -> bool:
        return all(use.over for uses in self.plan.processes[index][1] for use in uses)

    def _process(self, slot: int) -> Process:
        process = self.world.start_process(slot)
        process.on_death.append(lambda: self.disk.close_those_of(process))
        process.on_death.append(lambda: self.database.close_those_of(process))
        return process

    def _in_process(self, slot: int, call: Callable[[], None]) -> None:
        """Do something in a process of its own, and wait."""
        process = self._process(slot)
        ended = [False]

        def run() -> None:
            call()
            ended[0] = True
            exit_process(process)

        self.world.spawn(process, run, call.__name__.strip("_"))
        self.world.wait(lambda: process.dead, None, "process")
        if not ended[0]:
            raise Broken(f"{call.__name__} did not end")

    def _start(self, index: int) -> None:
        durability, callers = self.plan.processes[index]
        process = self._process(index)
        self.living[index] = process
        self.starts += 1

        def main() -> None:
            meter = Meter(Ledger(str(self.file)), durability=durability)  # type: ignore[arg-type]
            threads = [
                seams.Thread(target=self._call, args=(meter, uses, durability), name="caller") for uses in callers
            ]
            for thread in threads:
                thread.start()
            if self.world.random.random() < 0.2:
                self._look(meter)
            for thread in threads:
                thread.join()
            if self.world.random.random() < 0.7:
                meter.close()
            exit_process(process)

        self.world.spawn(process, main, "main")

    # -- what callers do --------------------------------------------------------------------------------------------

    def _call(self, meter: Meter, uses: Sequence[Use], durability: str) -> None:
        for use in uses:
            if use.over:
                continue
            if use.marked or (use.emitted is not None and not use.repeats):
                use.over = True
                continue
            self._serve(meter, use, durability)
            use.over = True

    def _serve(self, meter: Meter, use: Use, durability: str) -> None:
        path, started_at = use.path, self.world.wall
        if use.emitted is None:
            try:
                meter.check()
                if use.reserves:
                    path = (use.path, PATHS[-1])[meter.reserve(self._bound(use, started_at))]
            except (StoreError, BudgetExceededError, ConflictError):
                use.conflicted = True
                return
            if not use.begins:
                with contextlib.suppress(StoreError):
                    meter.release(use.tenant, use.request_id)
                return
            for number in range(use.marks):
                self.world.sleep(use.compute_s / use.marks)
                self._mark(meter, use, self._record(use, path, number, Outcome.CANCELLED, started_at))
            self.world.sleep(use.compute_s)
            use.emitted = self._record(use, path, use.marks + use.output, use.outcome, started_at)
        assert use.emitted is not None
        for _ in range(2):
            cuts = self.cuts
            try:
                receipt = meter.emit(use.emitted)
            except ConflictError:
                use.conflicted = True
                return
            except StoreError:
                continue  # the recorder tries once more
            use.receipt, use.answered_in = receipt, (durability, cuts)
            return

    def _record(self, use: Use, path: tuple[int, ...], output: int, outcome: Outcome, at: datetime) -> UsageRecord:
        return usage_record(
            use.request_id,
            tenant=use.tenant,
            path=path,
            output=output,
            prompt=use.prompt,
            outcome=outcome,
            tokens=TokenUsage(input=use.prompt, cached=use.cached, output=output),
            error="Problem" if outcome is Outcome.ERROR else None,
            started_at=at,
        )

    def _mark(self, meter: Meter, use: Use, record: UsageRecord) -> None:
        if not meter.wants_marks:
            return
        use.marked.append(record)
        with contextlib.suppress(StoreError):
            meter.mark(record)
            use.mark_kept = len(use.marked) - 1, self.cuts

    def _bound(self, use: Use, at: datetime) -> UsageBound:
        def most(path: tuple[int, ...]) -> int:
            return usage_record("x", path=path, output=7, prompt=use.prompt).flops.total

        paths = [use.path] if use.path == PATHS[-1] else [use.path, PATHS[-1]]
        return UsageBound(
            request_id=use.request_id,
            tenant=use.tenant,
            tokens_input=use.prompt,
            tokens_output_max=7,
            offers=tuple(
                Offer(tier="standard", program=" ".join(map(str, path)), flops_bound=most(path)) for path in paths
            ),
            at=at,
            id_is_new=use.id_is_new,
        )

    def _look(self, meter: Meter) -> None:
        """Do as an operator does meanwhile."""
        with contextlib.suppress(StoreError):
            what = self.world.random.choice(["usage", "recover", "expire", "recheck", "verify"])
            if what == "usage":
                usage_rows(meter.ledger, EVERYTHING)
            elif what == "recover":
                meter.recover()
            elif what == "expire":
                Budgets(meter.ledger).expire()
            elif what == "recheck":
                self._hold_to(not Budgets(meter.ledger).recheck(ALL_TENANTS), "counters differ from usage")
            else:
                self._hold_to(verify_ledger(meter.ledger).sound, "the ledger is not sound")

    # -- faults -----------------------------------------------------------------------------------------------------

    def _strike(self, kind: str, number: int) -> None:
        world, draw = self.world, Random(number)
        living = [process for process in self.living.values() if not process.dead]
        if kind == "kill" and living:
            mine = world.process
            world.kill(mine if mine in living and draw.random() < 0.7 else draw.choice(living))
        elif kind == "power":
            self._cut_power(living)
        elif kind == "jump":
            world.jumped += timedelta(seconds=draw.choice([-3600, -30, 5, 960, 86_400]))
        elif kind in {"full", "fail", "lock", "lost", "slow"}:
            self._break(kind, draw)
            world.faults[world.steps + draw.choice([30, 100, 300, 1000])] = self._heal

    def _break(self, kind: str, draw: Random) -> None:
        if kind == "full":
            self.disk.full = True
            self.database.fails = database.FULL if draw.random() < 0.7 else None
        elif kind in {"fail", "lock"}:
            self.database.fails = database.BROKEN if kind == "fail" else database.LOCKED
        elif kind == "lost":
            self.database.loses_answers = True
        else:
            self.database.slow_s = draw.choice([0.01, 2.0])

    def _heal(self) -> None:
        self.disk.full, self.database.fails, self.database.loses_answers = False, None, False
        self.database.slow_s = 0.0

    def _cut_power(self, living: Sequence[Process]) -> None:
        self.cuts += 1
        self.database.cut_power()
        for process in living:
            self.world.kill(process)
        self.disk.cut_power()

    # -- invariants -------------------------------------------------------------------------------------------------

    def _set_up(self) -> None:
        if self.plan.budget is not None:
            Budgets(str(self.file)).set(self.plan.budget)

    def _hold_to(self, holds: bool, what: str) -> None:
        if not holds:
            raise Broken(what)

    def _audit(self) -> None:
        ledger = Ledger(str(self.file))
        meter = Meter(ledger)
        meter.recover()
        self._check_spool(ledger)
        budgets = Budgets(ledger)
        self.world.now += HOLD_LIFETIME.total_seconds()
        budgets.expire()
        self._hold_to(not budgets.holds(ALL_TENANTS), "a hold is left open for ever")
        self._hold_to(not (wrong := budgets.recheck(ALL_TENANTS)), f"counters: {wrong}")
        self._hold_to(not (held := budgets.recheck_holds(ALL_TENANTS)), f"holds: {held}")
        self._hold_to((found := verify_ledger(ledger)).sound, f"verify: {found.findings}")
        totals = usage_rows(ledger, EVERYTHING)
        meter.close()
        with contextlib.closing(sqlite3.connect(self.file)) as connection:
            self._check_records(connection)
            self._check_money(connection, totals)
            self._check_budget(connection)

    def _uses(self) -> list[Use]:
        return [use for _, callers in self.plan.processes for uses in callers for use in uses]

    def _check_spool(self, ledger: Ledger) -> None:
        folder = spool_folder(ledger.url)
        status = None if folder is None else Spool(folder).status()
        self._hold_to(status is None or not status.waiting, f"records wait for ever: {status}")
        self._hold_to(status is None or self.cuts > 0 or not status.damaged, f"the spool is damaged: {status}")

    def _check_records(self, connection: sqlite3.Connection) -> None:
        """Exactly one record per request; nothing that was acknowledged is lost, nothing is invented."""
        rows = connection.execute("SELECT tenant, request_id, content_hash FROM polar_usage").fetchall()
        self._hold_to(len({row[:2] for row in rows}) == len(rows), "a request has two records")
        emitted = {key: (use, record) for use in self._uses() for key, record in _keys(use).items()}
        for tenant, request_id, digest in rows:
            key = (tenant, request_id, "" if request_id.startswith((_REUSED, _INTERRUPTED)) else digest)
            self._hold_to(key in emitted, f"{key}: nobody emitted what is stored")
            self.stored.append((tenant, *emitted[key]))
        for use in self._uses():
            durability, cuts = use.answered_in
            records = [record for _, other, record in self.stored if other is use]
            times = len(records)
            self._hold_to(times <= 1, f"{use.request_id}: is stored {times} times")
            self._check_mark(use, records)
            if use.receipt is not None and not times and (durability != "spool" or cuts == self.cuts):
                raise Broken(f"{use.request_id}: acknowledged by {durability} and lost")

    def _check_mark(self, use: Use, records: Sequence[UsageRecord]) -> None:
        """A process that was killed leaves what it had marked last; one that went on leaves no mark."""
        marked = [use.marked.index(record) for record in records if record in use.marked]
        if use.mark_kept is None or use.mark_kept[1] != self.cuts:
            return  # nothing was marked, or the power was cut since
        if use.emitted is None:
            self._hold_to(len(records) == 1, f"{use.request_id}: was marked, killed and lost")
            self._hold_to(marked[0] >= use.mark_kept[0], f"{use.request_id}: an early mark is stored, not the last one")
        elif use.receipt is not None:
            self._hold_to(not marked, f"{use.request_id}: a mark is stored, not its record")

    def _check_money(self, connection: sqlite3.Connection, totals: Any) -> None:
        """Reports say what was emitted, added up here, and as its cost the sum of the receipts."""
        costs = "SELECT tenant, sum(cost) FROM polar_usage JOIN polar_receipt ON usage_seq = seq GROUP BY tenant"
        for tenant, cost in connection.execute(costs).fetchall():
            used = [record for whose, _, record in self.stored if whose == tenant]
            own = [len(used), sum(r.flops.total for r in used), cost or 0]
            own += [sum(getattr(r.tokens, part) for r in used) for part in ("input", "cached", "output")]
            rows = [row for row in totals if row.group["tenant"] == tenant]
            theirs = [sum(r.requests for r in rows), sum(r.flops for r in rows)]
            theirs += [int(sum(r.cost or 0 for r in rows) * 10**12)]
            theirs += [sum(getattr(r, f"tokens_{part}") for r in rows) for part in ("input", "cached", "output")]
            self._hold_to(own == theirs, f"sums of {tenant}: {own} by hand, {theirs} reported")
        for use in self._uses():
            if use.receipt is not None and use.receipt["cost"] is not None:
                lines = sum(Decimal(line["amount"]) for line in use.receipt["lines"])
                self._hold_to(lines == Decimal(use.receipt["cost"]), f"{use.request_id}: lines do not add up")

    def _check_budget(self, connection: sqlite3.Connection) -> None:
        """Held and settled never exceed the limit; each hold is resolved once, and settled only with its record."""
        if self.plan.budget is None:
            return
        states = connection.execute("SELECT tenant, request_id, state, flops FROM polar_hold").fetchall()
        settled = [(tenant, request_id) for tenant, request_id, state, _ in states if state == "settled"]
        self._hold_to(len(settled) == len(set(settled)), "a request is settled twice")
        spent = sum(flops for tenant, _, state, flops in states if state == "settled" and tenant == "acme")
        limit = int(self.plan.budget.limit * 10**12)
        self._hold_to(spent <= limit, f"{spent} FLOPs are spent under holds, of {limit}")
        stored = set(connection.execute("SELECT tenant, request_id FROM polar_usage").fetchall())
        self._hold_to(set(settled) <= stored, "a hold is settled without a record")


def _keys(use: Use) -> dict[tuple[str, str, str], UsageRecord]:
    """Under which ids a use may be stored, with what content: under its own, or one made of its content."""
    keys = {(use.tenant, f"{_INTERRUPTED}{_digest(mark)[:32]}", ""): mark for mark in use.marked}
    if use.emitted is not None:
        digest = _digest(use.emitted)
        keys |= {(use.tenant, use.request_id, digest): use.emitted}
        keys |= {(use.tenant, f"{_REUSED}{digest[:32]}", ""): use.emitted}
    return keys


class Ledgers:
    """Ledger worlds, one after the other.

    Args:
        folder: A folder in memory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._template = _make_template(folder)
        _install()

    def elements(self, seed: int) -> int:
        """How many elements the plan of a seed has."""
        return Plan.of(seed).elements

    def run(self, seed: int, left_out: frozenset[int], trace: list[str] | None) -> None:
        """Run one schedule; raises if an invariant is broken."""
        schedule = LedgerWorld(Plan.of(seed, left_out), self._folder, self._template)
        schedule.world.trace = trace
        schedule.run()


def _make_template(folder: Path) -> bytes:
    """A ledger with its tables and nothing in it, made by the product before anything is simulated."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file = folder / "template.sqlite3"
    with Ledger(str(file)) as ledger, ledger.transaction():
        pass
    content = file.read_bytes()
    shutil.rmtree(folder)
    return content


def _install() -> None:
    """Simulate what the product's billing does; once per process."""
    from polar_billing.budgets import enforcement
    from polar_billing.prices import in_force

    pairs = [*seams.replacements(), *disk.replacements(), (create_engine, database.make_engine)]
    seams.install([*pairs, *((module._changes, seams.ChangesOfProcess()) for module in (enforcement, in_force))])


def _digest(record: UsageRecord) -> str:
    return hashlib.sha256(record_json(record)).hexdigest()
