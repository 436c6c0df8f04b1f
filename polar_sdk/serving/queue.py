"""Who is served next: a bounded queue that is fair between tenants. Knows jobs by tenant and order of arrival only."""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

from polar_sdk.errors import QueueFullError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from polar_sdk.serving.job import Job

__all__ = ["FairQueue"]


class FairQueue:
    """Jobs that wait, in order of arrival per tenant. Not safe in several threads: its owner locks."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Job]] = {}

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
            self._waiting.setdefault(job.request.tenant, deque()).append(job)

    def first(self, running: Iterable[Job]) -> Job | None:
        """The job to serve next: the oldest of the tenant that has the fewest running; None where nobody waits.

        Of several such tenants, the one that has waited longest.
        """
        busy = Counter(job.request.tenant for job in running)
        heads = [jobs[0] for jobs in self._waiting.values()]
        return min(heads, key=lambda job: (busy[job.request.tenant], job.request.created_ns), default=None)

    def remove(self, job: Job) -> None:
        """Take a job out."""
        jobs = self._waiting[job.request.tenant]
        jobs.remove(job)
        if not jobs:
            del self._waiting[job.request.tenant]
