"""A simulated machine: one clock, processes with threads, and a seeded choice of who moves next.

Threads are greenlets, of which one moves at a time, and they change places only at *seams*: where the product takes a
lock, waits, writes a file, runs a statement or starts a thread (`seams`, `disk` and `database` put them there). So a
schedule is a sequence of choices by one random generator, and a seed repeats it exactly. A process is killed by never
letting it move again: its greenlets end at their next seam, and what it held open is closed as a kernel would.

Knows nothing of the product.
"""

from __future__ import annotations

import random
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from greenlet import getcurrent, greenlet

if TYPE_CHECKING:
    from collections.abc import Callable


BEGINS: Final = datetime(2026, 11, 15, 12, tzinfo=UTC)
STEP_S: Final = 1e-5
"""How long a step takes, if nothing is slow. Unit: seconds."""
MAX_STEPS: Final = 60_000
_SWITCHING: Final = (0.02, 0.1, 0.3, 0.7)
"""How often another thread goes on at a seam; a schedule has one of them."""


class Killed(BaseException):
    """The simulated process has been killed."""


class Broken(AssertionError):  # noqa: N818  (it reads as what it says)
    """An invariant does not hold."""


class Process:
    """A process of the simulated machine.

    Args:
        world: The machine.
        pid: Its number.
        slot: Its place among those that live at the same time; an engine of SQLAlchemy is kept per slot.
    """

    def __init__(self, world: World, pid: int, slot: int) -> None:
        self.world, self.pid, self.slot = world, pid, slot
        self.dead = False
        self.fds: set[int] = set()
        self.at_exit: list[Callable[[], object]] = []
        self.on_death: list[Callable[[], object]] = []
        """Closes what a kernel would close."""
        self.changes: dict[int, int] = {}
        """Values of the product's modules that each process has for itself."""


class Task:
    """A thread of the simulated machine."""

    def __init__(self, process: Process, call: Callable[[], object], name: str, ident: int) -> None:
        self.process, self.name, self.ident = process, name, ident
        self.until: Callable[[], bool] | None = None
        """The end of its wait, where it waits for something."""
        self.deadline: float | None = None
        self.done = False
        self.thread: Any = None
        """The object that stands for it in the product: `threading.current_thread()`."""
        self.greenlet: greenlet = greenlet(lambda: self._run(call), process.world.hub)

    def _run(self, call: Callable[[], object]) -> None:
        problem: BaseException | None = None
        try:
            call()
        except Killed:
            pass
        except BaseException as error:  # whatever it is, the schedule has failed
            problem = error
        self.done = True
        if problem is not None and not self.process.dead:
            self.process.world.fail(problem)

    def is_ready(self, now: float) -> bool:
        """Whether it can go on."""
        if self.until is None:
            return True
        return (self.deadline is not None and self.deadline <= now) or self.until()


class World:
    """One schedule."""

    now_in: World | None = None
    """The world whose schedule runs."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        """The monotonic clock. Unit: seconds."""
        self.jumped = timedelta()
        """By how much the wall clock has jumped."""
        self.steps = 0
        self.switching = self.random.choice(_SWITCHING)
        self.current: Task | None = None
        self.tasks: list[Task] = []
        self.failure: BaseException | None = None
        self.faults: dict[int, Callable[[], object]] = {}
        """Struck before a step, by its number."""
        self.trace: list[str] | None = None
        """Every step of every thread, where that is wanted."""
        self._numbers = 0
        self.hub = getcurrent()
        """The greenlet that lets the others move."""
        self._killed = False

    @property
    def wall(self) -> datetime:
        """The wall clock, UTC."""
        return BEGINS + timedelta(seconds=self.now) + self.jumped

    @property
    def process(self) -> Process:
        """The process that moves."""
        assert self.current is not None
        return self.current.process

    def start_process(self, slot: int) -> Process:
        """A process without threads."""
        return Process(self, self._number(), slot)

    def spawn(self, process: Process, call: Callable[[], object], name: str) -> Task:
        """Start a thread; it moves when it is chosen."""
        task = Task(process, call, name, self._number())
        self.tasks.append(task)
        return task

    def _number(self) -> int:
        self._numbers += 1
        return 1000 + self._numbers

    # -- what threads do at seams -----------------------------------------------------------------------------------

    def step(self, what: str) -> None:
        """A seam: a fault may strike, and another thread may go on.

        Raises:
            Killed: The process of the calling thread is dead.
        """
        task = self.current
        if task is None:
            return
        if task.process.dead:
            raise Killed
        self.steps += 1
        self.now += STEP_S
        if self.trace is not None:
            self.trace.append(f"{self.steps:6} {self.now:12.5f} {task.process.pid}/{task.name}: {what}")
        if self.steps > MAX_STEPS:
            self.fail(Broken(f"no end after {MAX_STEPS} steps; {self._who_waits()}"))
        if self.steps in self.faults:
            self.faults.pop(self.steps)()
        if task.process.dead:
            raise Killed
        if self.random.random() < self.switching:
            self._leave()

    def wait(self, until: Callable[[], bool], timeout: float | None, what: str) -> bool:
        """Wait for something, or for the clock; whether it has happened.

        Raises:
            Killed: The process of the calling thread is dead.
        """
        task = self.current
        if task is None:
            if not until():
                raise Broken(f"{what}: nobody is left who could end this wait")
            return True
        self.step(what)
        if until():
            return True
        task.until, task.deadline = until, None if timeout is None else self.now + max(timeout, 0.0)
        try:
            self._leave()
        finally:
            task.until = task.deadline = None
        return until()

    def sleep(self, seconds: float) -> None:
        """Wait for the clock."""
        self.wait(lambda: False, max(seconds, STEP_S), f"sleep {seconds:.4g}")

    def fail(self, error: BaseException) -> None:
        """The schedule has failed, whatever the calling thread makes of it."""
        self.failure = self.failure or error
        if self.current is not None and not self.current.done and self.current.greenlet is getcurrent():
            self.kill(self.current.process)
            raise Killed

    def _leave(self) -> None:
        task = self.current
        assert task is not None
        self.hub.switch()
        if task.process.dead:
            raise Killed

    # -- the machine ------------------------------------------------------------------------------------------------

    def run(self, done: Callable[[], bool]) -> None:
        """Let threads move until something is done.

        Raises:
            BaseException: What failed.
        """
        while self.failure is None and not done():
            task = self._next()
            if task is None:
                break
            self.current = task
            task.greenlet.switch()
            self.current = None
            if task.done:
                self.tasks.remove(task)
            if self._killed:
                self._bury()
        if self.failure is not None:
            raise self.failure

    def _next(self) -> Task | None:
        while True:
            ready = [task for task in self.tasks if task.is_ready(self.now)]
            if ready:
                return ready[0] if len(ready) == 1 else self.random.choice(ready)
            deadlines = [task.deadline for task in self.tasks if task.deadline is not None]
            if not deadlines:
                self.failure = Broken(f"nobody can move: {self._who_waits()}")
                return None
            self.now = max(self.now, min(deadlines))

    def _who_waits(self) -> str:
        return ", ".join(f"{task.process.pid}/{task.name}" for task in self.tasks) or "no thread is left"

    def kill(self, process: Process) -> None:
        """SIGKILL: its threads move no more, and what it held open is closed."""
        if process.dead:
            return
        process.dead = self._killed = True
        for close in process.on_death:
            close()

    def _bury(self) -> None:
        """End the threads of dead processes, between two moves."""
        self._killed = False
        for task in [task for task in self.tasks if task.process.dead]:
            self.current = task
            while not task.greenlet.dead:
                with suppress(Killed):  # of one that has not begun
                    task.greenlet.throw(Killed)
            self.current = None
            task.done = True
            self.tasks.remove(task)

    def end(self) -> None:
        """End every thread."""
        for task in self.tasks:
            self.kill(task.process)
        self._bury()
