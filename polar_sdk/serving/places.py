"""Places: which jobs run together, what is promised to them, and which gives way when another one waits.

A job with a place is promised the maximum number of pages it may need, so that no answer ends for lack of memory. If a
job waits and there is no room, others give way:

1. jobs whose reader has paused: for some rounds, or for any time if no job can continue;
2. of a tenant that holds a larger share of the places or pages than the waiting one would hold, the job that would have
   least to run again: tenants share evenly, by weight, and a tenant alone gets everything;
3. of a tenant with an equal share that has had more work, a job that has had its turn: tenants take turns if there are
   more of them than places.

A job that gives way keeps its pages until others need them. After that its tokens run again (`Row.drop_pages`), which
costs its tenant time but no money. Knows no threads.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from polar_sdk.engine.pages import PAGE
from polar_sdk.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.serving.job import Job
    from polar_sdk.serving.prefixes import PrefixCache
    from polar_sdk.serving.queue import Clocks


PATIENCE: Final = 8
"""Rounds in a row that a job may wait for its reader before it gives way to those who wait."""
TURN: Final = 64
"""Tokens that a job is given before it gives way to a tenant with an equal share."""
_ROUNDING: Final = 1e-9
"""Shares that differ by less are equal."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one engine takes on at a time, and how tenants share it.

    Attributes:
        max_rows: Maximum number of rows that run together.
        max_waiting: Maximum number of requests without a place: those that wait, and streams that gave theirs up. One
            more takes the place of one of the tenant that has most of them, or else is refused with `QueueFullError`.
        prefill_beside: Prompt tokens that run in one pass while other rows are decoding, to the next whole chunk; four
            times as many while these have just begun to answer and no other tenant was there lately.
        prefill_alone: The same while no row is decoding.
        prefix_share: Maximum share of the pages that keep starts of prompts for later requests; 0 turns that off.
        pace: How many times as long as alone a token may take, of the tenant that has least to decode, because of all
            others together. Every tenant may decode as much as that one at least. `math.inf` turns it off.
        weights: Of tenants that are due more or less than others, who count 1: twice the weight, twice the share.
    """

    max_rows: int = 32
    max_waiting: int = 1024
    prefill_beside: int = 128
    prefill_alone: int = 2048
    prefix_share: float = 0.25
    pace: float = 1.75
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for tenant, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise InvalidRequestError(f"the weight of {tenant!r} is {weight}; use a number above 0.")
        if not self.pace >= 1:
            raise InvalidRequestError(f"pace={self.pace} is out of range; use 1 or more, or math.inf.")
        if self.max_rows < 1:
            raise InvalidRequestError(f"max_rows={self.max_rows} is out of range; use 1 or more.")


class Places:
    """Jobs that run, and the pages promised to them. For the scheduler's thread alone."""

    def __init__(self, decoder: Decoder, prefixes: PrefixCache, clocks: Clocks) -> None:
        self._decoder, self._prefixes, self._clocks = decoder, prefixes, clocks
        self.jobs: list[Job] = []
        self._promised: dict[Job, list[int]] = {}
        """Maximum number of pages of each store that each job may need."""

    def __len__(self) -> int:
        return len(self.jobs)

    def pages_needed(self, job: Job) -> list[int]:
        """Maximum number of pages of each store that a job may need."""
        visits = Counter(self._decoder.stores(job.request.program))
        blocks = -(-job.max_length // PAGE)
        return [blocks * visits[store] for store in range(len(self._decoder.pool.sizes))]

    def begin_round(self) -> None:
        """Take out the jobs that are done, and note of the others whose reader has paused."""
        self.jobs = [job for job in self.jobs if not job.done]
        self._promised = {job: self._promised[job] for job in self.jobs}
        for job in self.jobs:
            job.standing.rounds_paused = job.standing.rounds_paused + 1 if job.delivery.paused else 0

    def remove(self, job: Job) -> None:
        """Take a job out; it keeps its pages."""
        job.standing.has_place = False
        self.jobs.remove(job)
        del self._promised[job]

    def shares(self, jobs: Iterable[Job], max_rows: int, weights: Mapping[str, float]) -> dict[str, float]:
        """The largest part of rows or pages that each tenant holds with these jobs, for its weight."""
        sizes = self._decoder.pool.sizes
        rows: Counter[str] = Counter()
        pages: dict[str, list[int]] = {}
        for job in jobs:
            tenant, promised = job.request.tenant, self._promised[job]
            rows[tenant] += 1
            pages[tenant] = [sum(store) for store in zip(pages.get(tenant, [0] * len(sizes)), promised, strict=True)]
        return {
            tenant: _share(count, pages[tenant], max_rows, sizes) / weights.get(tenant, 1.0)
            for tenant, count in rows.items()
        }

    def giving_way(self, job: Job, max_rows: int, weights: Mapping[str, float]) -> list[Job] | None:
        """Jobs that have to give way so that this one may run; None if it must wait."""
        pool, needed = self._decoder.pool, self.pages_needed(job)
        staying = list(self.jobs)
        gone: list[Job] = []
        while len(staying) >= max_rows or any(
            pages > size for pages, size in zip(self._promises(staying, needed), pool.sizes, strict=True)
        ):
            leaving = self._next_to_leave(job, needed, staying, max_rows, weights)
            if leaving is None:
                return None
            staying.remove(leaving)
            gone.append(leaving)
        return gone

    def _promises(self, jobs: Iterable[Job], more: Sequence[int]) -> list[int]:
        return [sum(store) for store in zip(*(self._promised[job] for job in jobs), more, strict=True)]

    def _next_to_leave(
        self, job: Job, needed: Sequence[int], staying: Sequence[Job], max_rows: int, weights: Mapping[str, float]
    ) -> Job | None:
        patience = 1 if all(other.delivery.paused for other in staying) else PATIENCE
        paused = [other for other in staying if other.standing.rounds_paused >= patience]
        if paused:
            return max(paused, key=lambda other: other.standing.rounds_paused)
        tenant, clocks = job.request.tenant, self._clocks
        own = [other for other in staying if other.request.tenant == tenant]
        with_it = _share(len(own) + 1, self._promises(own, needed), max_rows, self._decoder.pool.sizes)
        with_it /= weights.get(tenant, 1.0)
        others = [other for other in staying if other.request.tenant != tenant]
        shares = self.shares(others, max_rows, weights)
        largest = max(shares, key=lambda name: (shares[name], clocks[name]), default=None)
        if largest is not None and shares[largest] > with_it + _ROUNDING:
            return min((other for other in others if other.request.tenant == largest), key=_loss)
        had_turn = [
            other
            for other in others
            if other.row.length - other.standing.placed_at >= TURN
            and shares[other.request.tenant] >= with_it - _ROUNDING
            and clocks[other.request.tenant] > clocks[tenant]
        ]
        return max(had_turn, key=lambda other: clocks[other.request.tenant], default=None)

    def has_room(self, job: Job, idle: Iterable[Job] = ()) -> bool:
        """Whether a job fits beside those that run, these idle ones, and all kept starts of prompts."""
        held = (other.row.page_table.counts for other in idle if other is not job and other.row.page_table.blocks)
        promised = self._promises(self.jobs, self.pages_needed(job))
        total = [sum(store) for store in zip(promised, self._prefixes.kept_pages, *held, strict=True)]
        return all(pages <= size for pages, size in zip(total, self._decoder.pool.sizes, strict=True))

    def add(self, job: Job, resting: Iterable[Job]) -> None:
        """Give a job its place, and take pages back from those that rest as far as there are too few.

        Args:
            job: It fits.
            resting: Jobs without a place that may hold pages, the first to lose them first; without `job`.
        """
        needed, sizes = self.pages_needed(job), self._decoder.pool.sizes
        held = {other: other.row.page_table.counts for other in resting if other.row.page_table.blocks}
        total = [sum(store) for store in zip(self._promises(self.jobs, needed), *held.values(), strict=True)]
        for other, pages in held.items():
            if all(count <= size for count, size in zip(total, sizes, strict=True)):
                break
            other.drop_pages()
            total = [count - freed for count, freed in zip(total, pages, strict=True)]
        self._prefixes.make_room(total)
        job.standing.placed_at, job.standing.rounds_paused = max(job.row.length, job.row.ran), 0
        job.standing.has_place = True
        self.jobs.append(job)
        self._promised[job] = needed

    def lend(self, job: Job) -> None:
        """Give a job that is about to run its prompt the start that others have run, if it has no pages yet."""
        if job.row.page_table.blocks or job.row.loops_stopped:  # after a stop, its states are not those that were kept
            return
        cached = self._prefixes.lend(job.request, job.row)
        if job.row.replaying:
            job.row.note_replay()
        else:
            job.cached = job.standing.placed_at = cached


def _share(rows: int, pages: Sequence[int], max_rows: int, sizes: Sequence[int]) -> float:
    """The largest part of anything: rows, or pages of a store."""
    return max(rows / max_rows, *(held / size for held, size in zip(pages, sizes, strict=True)))


def _loss(job: Job) -> tuple[bool, int]:
    """Cost of this job giving way: nothing if its reader waits for no token, else tokens to run again."""
    return (not job.delivery.paused, job.row.length)
