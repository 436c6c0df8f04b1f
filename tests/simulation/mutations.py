"""Ways to break the product on purpose, to see that the simulator finds each.

A mutation replaces one function of the product while it is applied. Each must be found within `WITHIN` schedules.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import patch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager


WITHIN: Final = 1_500
"""Schedules."""


@dataclass(frozen=True)
class Mutation:
    """One way to break the product."""

    world: str
    apply: Callable[[], AbstractContextManager[object]]


def _settle_twice() -> AbstractContextManager[object]:
    from polar_billing.budgets.settlement import settle
    from polar_billing.metering import spool, writer

    def twice(connection: Any, entries: Any) -> None:
        settle(connection, entries)
        settle(connection, entries)

    @contextmanager
    def applied() -> Iterator[None]:
        with patch.object(writer, "settle", twice), patch.object(spool, "settle", twice):
            yield

    return applied()


def _forget_to_flush() -> AbstractContextManager[object]:
    from polar_billing.metering.spool_file import Segment

    return patch.object(Segment, "sync", lambda self: None)


def _drop_the_tail() -> AbstractContextManager[object]:
    from polar_billing.metering.spool_file import Unfinished

    read = Unfinished.lines

    def lines(self: Unfinished) -> Any:
        found = read(self)
        del found.entries[-1:]
        return found

    return patch.object(Unfinished, "lines", lines)


def _count_cached_twice() -> AbstractContextManager[object]:
    from polar_billing.reports.totals import UsageSums

    add = UsageSums.add_sum

    def add_sum(self: UsageSums, usage: Any, unrated: str | None) -> None:
        add(self, usage, unrated)
        self.tokens_input += usage.quantities[2]

    return patch.object(UsageSums, "add_sum", add_sum)


def _answer_before_writing() -> AbstractContextManager[object]:
    from polar_billing.metering.writer import Writer

    return patch.object(Writer, "_spool_entries", lambda self, entries: True)


def _forget_to_free() -> AbstractContextManager[object]:
    from polar_billing.budgets import enforcement
    from polar_billing.budgets import holds as resolved

    def free(connection: Any, holds: Any, state: Any, now: Any) -> None:
        resolved.resolve(connection, [hold.seq for hold in holds], state, now)

    return patch.object(enforcement, "free", free)


def _hold_nothing() -> AbstractContextManager[object]:
    from polar_billing.budgets import counters

    return patch.object(counters, "raise_held", lambda connection, amounts: True)


def _commit_without_flushing() -> AbstractContextManager[object]:
    from polar_billing.ledger import connection

    prepare = connection._prepare_sqlite

    def prepared(opened: Any, record: object) -> None:
        prepare(opened, record)
        opened.execute("PRAGMA synchronous = OFF")

    return patch.object(connection, "_prepare_sqlite", prepared)


def _delete_before_storing() -> AbstractContextManager[object]:
    from polar_billing.budgets.settlement import settle
    from polar_billing.metering import spool, writer

    def stored(ledger: Any, own: Any, file: Any) -> None:
        entries = file.entries(ledger.find_books)
        file.remove()
        ledger.store(entries, settle)

    @contextmanager
    def applied() -> Iterator[None]:
        with patch.object(writer, "store_file", stored), patch.object(spool, "store_file", stored):
            yield

    return applied()


def _store_marks_beside_records() -> AbstractContextManager[object]:
    from polar_billing.ledger.ledger import Ledger

    return patch.object(Ledger, "is_recorded", lambda self, entry: False)


def _forget_marks() -> AbstractContextManager[object]:
    from polar_billing.metering import spool

    return patch.object(spool, "last_marks", lambda entries: [])


def _leave_before_the_end() -> AbstractContextManager[object]:
    from polar_sdk.serving import threads

    async def ended(worker: Any) -> None:
        """Wait for nothing."""

    return patch.object(threads, "_ended", ended)


def _record_twice() -> AbstractContextManager[object]:
    from polar_sdk.request.recorder import Recorder

    return patch.object(Recorder, "_unrecorded", lambda self: list(self._jobs))


def _forget_the_dropped() -> AbstractContextManager[object]:
    from polar_sdk.request.recorder import Recorder

    return patch.object(Recorder, "_leave", lambda self, failure, stored: stored and stored.put([]))


def _mark_after_the_record() -> AbstractContextManager[object]:
    from polar_sdk.request.record import Marker

    return patch.object(Marker, "end", lambda self: None)


def _mix_rows() -> AbstractContextManager[object]:
    from polar_sdk.serving.passes import Passes

    choose = Passes._choose
    return patch.object(Passes, "_choose", lambda self, jobs, logits, *rest: choose(self, jobs, logits.flip(0), *rest))


def _forget_what_was_cached() -> AbstractContextManager[object]:
    from polar_sdk.serving.prefixes import PrefixCache

    lend = PrefixCache.lend
    return patch.object(PrefixCache, "lend", lambda self, request, row: lend(self, request, row) * 0)


def _miss_the_end() -> AbstractContextManager[object]:
    from polar_sdk.serving.delivery import Delivery

    return patch.object(Delivery, "wait", lambda self: Delivery(None).wait())


MUTATIONS: Final[dict[str, Mutation]] = {
    "settle-twice": Mutation("ledger", _settle_twice),
    "forget-to-flush": Mutation("ledger", _forget_to_flush),
    "drop-the-tail": Mutation("ledger", _drop_the_tail),
    "count-cached-twice": Mutation("ledger", _count_cached_twice),
    "answer-before-writing": Mutation("ledger", _answer_before_writing),
    "forget-to-free": Mutation("ledger", _forget_to_free),
    "hold-nothing": Mutation("ledger", _hold_nothing),
    "commit-without-flushing": Mutation("ledger", _commit_without_flushing),
    "delete-before-storing": Mutation("ledger", _delete_before_storing),
    "store-marks-beside-records": Mutation("ledger", _store_marks_beside_records),
    "forget-marks": Mutation("ledger", _forget_marks),
    "leave-before-the-end": Mutation("serving", _leave_before_the_end),
    "record-twice": Mutation("serving", _record_twice),
    "forget-the-dropped": Mutation("serving", _forget_the_dropped),
    "mark-after-the-record": Mutation("serving", _mark_after_the_record),
    "mix-rows": Mutation("serving", _mix_rows),
    "forget-what-was-cached": Mutation("serving", _forget_what_was_cached),
    "miss-the-end": Mutation("serving", _miss_the_end),
}
