"""Ways to break the product on purpose, to see that the simulator finds each within `WITHIN` schedules.

A mutation puts another function in the place of one of the product's, wherever that is imported, while it is applied.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import patch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


WITHIN: Final = 1_500
"""Schedules."""


@dataclass(frozen=True)
class Mutation:
    """One way to break the product in a world; `broken` makes the function to put in place from the one that is."""

    world: str
    names: tuple[str, ...]
    """The function, in every module that has it."""
    broken: Callable[[Any], object]

    @contextmanager
    def apply(self) -> Iterator[None]:
        """Break the product within the block."""
        with ExitStack() as stack:
            for name in self.names:
                stack.enter_context(patch(name, self.broken(resolve_name(name))))
            yield


def _twice(settle: Any) -> object:
    def twice(connection: Any, entries: Any) -> None:
        settle(connection, entries)
        settle(connection, entries)

    return twice


def _without_the_tail(read: Any) -> object:
    def lines(file: Any) -> Any:
        found = read(file)
        del found.entries[-1:]
        return found

    return lines


def _cached_twice(add: Any) -> object:
    def add_sum(sums: Any, usage: Any, unrated: str | None) -> None:
        add(sums, usage, unrated)
        sums.tokens_input += usage.quantities[2]

    return add_sum


def _resolved_only(_: Any) -> object:
    from polar_billing.budgets import holds as resolved

    def free(connection: Any, holds: Any, state: Any, now: Any, *, due: Any = None) -> int:
        return len(resolved.resolve(connection, [hold.seq for hold in holds], state, now, due=due))

    return free


def _unflushed(prepare: Any) -> object:
    def prepared(opened: Any, record: object) -> None:
        prepare(opened, record)
        opened.execute("PRAGMA synchronous = OFF")

    return prepared


def _deleted_first(_: Any) -> object:
    from polar_billing.budgets.settlement import settle

    def stored(ledger: Any, spool: Any, file: Any) -> None:
        entries = file.entries(ledger.find_books)
        file.remove()
        ledger.store(entries, settle)

    return stored


def _not_awaited(_: Any) -> object:
    async def ended(worker: Any) -> None:
        """Wait for nothing."""

    return ended


def _ledger(broken: Callable[[Any], object], *names: str) -> Mutation:
    return Mutation("ledger", tuple(f"polar_billing.{name}" for name in names), broken)


def _serving(broken: Callable[[Any], object], name: str) -> Mutation:
    return Mutation("serving", (f"polar_sdk.{name}",), broken)


MUTATIONS: Final[dict[str, Mutation]] = {
    "settle-twice": _ledger(_twice, "metering.writer.settle", "metering.spool.settle"),
    "forget-to-flush": _ledger(lambda _: lambda self: None, "metering.spool_file.Segment.sync"),
    "drop-the-tail": _ledger(_without_the_tail, "metering.spool_file.Unfinished.lines"),
    "count-cached-twice": _ledger(_cached_twice, "reports.totals.UsageSums.add_sum"),
    "answer-before-writing": _ledger(lambda _: lambda self, entries: True, "metering.writer.Writer._spool_entries"),
    "forget-to-free": _ledger(_resolved_only, "budgets.enforcement.free"),
    "hold-nothing": _ledger(lambda _: lambda connection, amounts: True, "budgets.counters.raise_held"),
    "commit-without-flushing": _ledger(_unflushed, "ledger.connection._prepare_sqlite"),
    "delete-before-storing": _ledger(_deleted_first, "metering.writer.store_file", "metering.spool.store_file"),
    "store-marks-beside-records": _ledger(lambda _: lambda self, entry: False, "ledger.ledger.Ledger.is_recorded"),
    "forget-marks": _ledger(lambda _: lambda entries: [], "metering.spool.last_marks"),
    "leave-before-the-end": _serving(_not_awaited, "serving.threads._ended"),
    "record-twice": _serving(lambda _: lambda self: list(self._jobs), "request.recorder.Recorder._unrecorded"),
    "forget-the-dropped": _serving(
        lambda _: lambda self, failure, stored: stored and stored.put([]), "request.recorder.Recorder._leave"
    ),
    "mark-after-the-record": _serving(lambda _: lambda self: None, "request.record.Marker.end"),
    "mix-rows": _serving(
        lambda choose: lambda self, jobs, logits, *rest: choose(self, jobs, logits.flip(0), *rest),
        "serving.passes.Passes._choose",
    ),
    "forget-what-was-cached": _serving(
        lambda lend: lambda self, request, row: lend(self, request, row) * 0, "serving.prefixes.PrefixCache.lend"
    ),
    "miss-the-end": _serving(lambda wait: lambda self: wait(type(self)(None)), "serving.delivery.Delivery.wait"),
}
