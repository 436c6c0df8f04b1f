"""Who is served next: a bounded queue that is fair between tenants. Knows jobs by tenant and order of arrival only.

Start-time fair queueing: every tenant has a clock that ticks when one of its jobs is served, and the tenant whose
clock is furthest behind is next. A tenant that comes anew starts at the clock of those who wait, so that neither a
flood nor a long absence earns a privilege.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from polar_sdk.errors import QueueFullError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polar_sdk.serving.job import Job


class FairQueue:
    """Jobs that wait, in order of arrival per tenant. Not safe in several threads: its owner locks."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Job]] = {}
        self._clocks: dict[str, int] = {}
        self._now = 0
        """Clock of the tenant served last."""

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Job]:
        return (job for jobs in self._waiting.values() for job in jobs)

    def put(self, jobs: Sequence[Job], limit: int) -> None:
        """Let jobs wait, all or none.

        Raises:
            QueueFullError: More than `limit` would wait.
        """
        if len(self) + len(jobs) > limit:
            raise QueueFullError(
                f"{len(self)} requests wait already and {len(jobs)} more do not fit the limit of {limit}.",
                hint="Try again when some are done, or raise max_waiting in the limits of the scheduler.",
            )
        for job in jobs:
            tenant = job.request.tenant
            if tenant not in self._waiting:
                self._waiting[tenant] = deque()
                self._clocks[tenant] = max(self._clocks.get(tenant, 0), self._now)
            self._waiting[tenant].append(job)

    def first(self) -> Job | None:
        """The job to serve next, of tenants that are level the one that has waited longest; None where nobody waits."""
        heads = [jobs[0] for jobs in self._waiting.values()]
        return min(heads, key=lambda job: (self._clocks[job.request.tenant], job.request.created_ns), default=None)

    def serve(self, job: Job) -> None:
        """Take a job out to be served, which its tenant's clock counts."""
        tenant = job.request.tenant
        self._now = self._clocks[tenant]
        self._clocks[tenant] += 1
        self.remove(job)

    def remove(self, job: Job) -> None:
        """Take a job out."""
        tenant = job.request.tenant
        self._waiting[tenant].remove(job)
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            if self._clocks[tenant] <= self._now:
                del self._clocks[tenant]  # it would start at the same clock again
