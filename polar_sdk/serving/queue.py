"""The queue: requests without a place among the running rows, in order per tenant, and the work of each tenant.

Next is the tenant that holds the smallest share of the places, and between equals the one that has had least work
(start-time fair queueing): every tenant has a clock that advances by the FLOPs executed for it, divided by its weight.
A tenant that returns starts at the clock of the active ones, so that neither a flood nor a long absence gives an
advantage. What runs again because a row gave way counts here, although no usage record contains it. Knows no rows and
no pages.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING, Final

from polar_sdk.errors import QueueFullError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from polar_sdk.serving.job import Job


_MAX_ABSENT: Final = 4096
"""Maximum number of absent tenants whose clocks are remembered; those that are furthest behind are forgotten first."""


class Clocks:
    """Executed work of each tenant. Unit: FLOPs / weight."""

    def __init__(self) -> None:
        self._clocks: dict[str, float] = {}

    def __getitem__(self, tenant: str) -> float:
        return self._clocks.get(tenant, 0.0)

    def arrive(self, tenant: str, present: Iterable[str]) -> None:
        """A tenant without requests has one again: it starts no further behind than those who are present."""
        now = min((self[other] for other in present), default=None)
        if now is None:
            self._clocks.clear()
        else:
            self._clocks[tenant] = max(self[tenant], now)
            self._forget(now)

    def advance(self, tenant: str, work: float) -> None:
        """Count what was executed for a tenant."""
        self._clocks[tenant] = self[tenant] + work

    def _forget(self, now: float) -> None:
        """Forget tenants that would start at the same clock again, where many are remembered."""
        if len(self._clocks) > _MAX_ABSENT:
            ahead = {tenant: clock for tenant, clock in self._clocks.items() if clock >= now}
            latest = sorted(ahead, key=lambda tenant: -ahead[tenant])[: _MAX_ABSENT // 2]
            self._clocks = {tenant: ahead[tenant] for tenant in latest}


def who_gives_room(
    waiting: Iterable[Job], arriving: Sequence[Job], limit: int, weights: Mapping[str, float]
) -> list[Job]:
    """The jobs that lose their place in a full queue, because their tenant has more in it than those who arrive.

    Args:
        waiting: Jobs without a place among those that run, the one that would lose most first.
        arriving: Who comes, all or none.
        limit: Maximum number of jobs that wait.
        weights: Of tenants that do not count 1.

    Raises:
        QueueFullError: More than `limit` would wait, and no tenant has more than those who arrive.
    """
    held: dict[str, list[Job]] = {}
    for job in waiting:
        held.setdefault(job.request.tenant, []).append(job)
    count = sum(map(len, held.values()))
    missing = count + len(arriving) - limit
    if missing <= 0:
        return []
    coming = Counter(job.request.tenant for job in arriving)
    most = max((len(held.get(tenant, ())) + jobs) / weights.get(tenant, 1.0) for tenant, jobs in coming.items())
    lost: list[Job] = []
    for _ in range(missing):
        tenant = max(held, key=lambda name: len(held[name]) / weights.get(name, 1.0), default="")
        if not held or len(held[tenant]) / weights.get(tenant, 1.0) <= most:
            raise QueueFullError(
                f"{count} requests are already waiting; {len(arriving)} more would exceed the limit of {limit}.",
                hint="Try again when some are done, or raise max_waiting in the limits of the scheduler.",
            )
        lost.append(held[tenant].pop())
    return lost


class FairQueue:
    """Jobs without a place. Not thread-safe: its owner locks.

    Most of them wait in their tenant's line. Those that *rest* have begun and given their place up; of them, the ones
    whose reader reads on stand at the head of the line, and the others in none.
    """

    def __init__(self) -> None:
        self.clocks = Clocks()
        self.resting: dict[Job, None] = {}
        """Jobs that have begun, the one that has rested longest first."""
        self._lines: dict[str, deque[Job]] = {}
        self._in_line: set[Job] = set()

    def __len__(self) -> int:
        return len(self._in_line) + sum(job not in self._in_line for job in self.resting)

    def __bool__(self) -> bool:
        return bool(self._in_line or self.resting)

    @property
    def tenants(self) -> Iterable[str]:
        """Those in whose line somebody waits."""
        return self._lines.keys()

    def __iter__(self) -> Iterator[Job]:
        return iter([*self.resting, *(job for line in self._lines.values() for job in line if job not in self.resting)])

    def put(self, jobs: Sequence[Job], running: Iterable[Job]) -> None:
        """Add jobs that arrive at the ends of their tenants' lines; tenants of those that run are present, too."""
        present = {job.request.tenant for job in running} | set(self._lines)
        for job in jobs:
            self._line_for(job, present).append(job)

    def _line_for(self, job: Job, present: set[str]) -> deque[Job]:
        """The line that a job is about to join; its tenant is one of those present from now on."""
        tenant = job.request.tenant
        if tenant not in present:
            self.clocks.arrive(tenant, present)
            present.add(tenant)
        self._in_line.add(job)
        return self._lines.setdefault(tenant, deque())

    def rest(self, job: Job) -> None:
        """Take in a job that gave its place up; it is in no line."""
        self.resting[job] = None

    def line_up(self, running: Iterable[Job]) -> None:
        """Put those that rest and whose reader keeps up at the head of their tenants' lines."""
        ready = [job for job in self.resting if job not in self._in_line and not job.delivery.paused]
        if not ready:
            return
        present = {job.request.tenant for job in running} | set(self._lines)
        for job in reversed(ready):
            self._line_for(job, present).appendleft(job)

    def first(self, shares: Mapping[str, float]) -> Job | None:
        """The job to serve next, or None; between equal tenants, the job that has waited longest.

        Args:
            shares: What tenants hold of the places; 0 for those that are not in it.
        """

        def turn(job: Job) -> tuple[float, float, int]:
            tenant = job.request.tenant
            return shares.get(tenant, 0.0), self.clocks[tenant], job.request.created_ns

        return min((line[0] for line in self._lines.values()), key=turn, default=None)

    def remove(self, job: Job) -> None:
        """Take a job out, to be served or because it is done."""
        self.resting.pop(job, None)
        if job in self._in_line:
            self._in_line.remove(job)
            tenant = job.request.tenant
            self._lines[tenant].remove(job)
            if not self._lines[tenant]:
                del self._lines[tenant]
