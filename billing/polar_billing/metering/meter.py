"""The meter: the sink that stores every usage record in a ledger and returns its cost.

The engine finds it through the entry point `polar_sdk.sinks`, so no import is needed to be metered.

`durability` determines what has happened when `emit` returns:

* `commit`: the record is committed to the ledger and flushed to its disk, together with whatever other threads
  emitted meanwhile. A power cut loses nothing that was answered. One emit waits as long as a commit takes.
* `spool`: the record is in a file of the spool, in the operating system's hands, and a thread commits it within
  milliseconds. The end of the process, SIGKILL included, loses nothing; a power cut or a crash of the operating
  system may lose the last moments. The engine uses this by default, because it costs a request next to nothing.

A running request is marked in the spool repeatedly (`marks`), so that what it has used is stored even if the process is
killed.

If the ledger does not answer, or is locked, records wait in the spool, flushed to the disk, with either setting, and
are stored exactly once when it is back.

Using a request id again does not make an answer free: `reserve` refuses it before compute. If `reserve` cannot know
(two processes at once; a ledger that does not answer), or `emit` cannot raise (`spool`), the second use is stored and
charged under a new id, and its tag `polar.reused_id` names the first. Knows neither the database nor how prices are
chosen and applied.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from polar_billing.budgets.enforcement import Budgets
from polar_billing.budgets.settlement import settle
from polar_billing.errors import StoreError, id_in_use
from polar_billing.ledger.audits import Audits
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.location import resolve
from polar_billing.ledger.records import Entry, source_named
from polar_billing.metering.writer import Writer
from polar_billing.prices.book import PRICE_BOOK_VARIABLE, PriceBook
from polar_billing.prices.in_force import Prices
from polar_billing.prices.quote import quote_offers
from polar_billing.prices.rating import COMPUTE, Rating, cost_of, rate
from polar_billing.values.money import from_scaled, plain
from polar_sdk.errors import InvalidRequestError
from polar_sdk.usage import UsageSink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from polar_billing.errors import ConflictError
    from polar_billing.ledger.records import StoredUsage
    from polar_billing.metering.spool import SpoolStatus
    from polar_sdk.promises.audit import Audit, PromiseStanding
    from polar_sdk.usage import UsageBound, UsageRecord


SPOOL_LIMIT: Final = 100_000
"""Number of records that may wait in the spool before `check` refuses requests."""
GATHER_S: Final = 0.005
"""How long a commit that nobody waits for waits for more records, and for the answer to be sent. Unit: seconds."""
_CHECK_EVERY_S: Final = 1.0
"""A ledger that took records within this time is not tried again before a request. Unit: seconds."""

_REMEMBERED_IDS: Final = 10_000
"""Ids that were served; older ones are in the ledger by then, as a rule."""

Durability = Literal["commit", "spool"]


class Meter(UsageSink):
    """Stores usage records durably, exactly once each, and answers with a receipt. Safe in several threads.

    Constructing one opens nothing: the ledger is created at the first `check` or `emit`.

    Args:
        ledger: A ledger, a URL or the path of a SQLite file; None for `POLAR_LEDGER` or the default file.
        prices: A price book or its file, read once, at first use; None for the file of `POLAR_PRICE_BOOK`, otherwise
            the books in force in the ledger, otherwise the example book (see `polar_billing.prices.in_force`).
        source: Name of the service, the same for all its replicas; request ids are unique per (tenant, source). None
            for the name in `POLAR_SOURCE`, otherwise `polar`.
        durability: What has happened when `emit` returns; see the top of this module.
        spool_limit: Records that may wait in the spool, while the ledger does not answer, before `check` refuses
            requests; 0 to refuse them at once.
        marks: Whether running answers are marked in the spool; False to lose those of a killed process.
    """

    def __init__(
        self,
        ledger: Ledger | str | None = None,
        *,
        prices: PriceBook | str | Path | None = None,
        source: str | None = None,
        durability: Durability = "commit",
        spool_limit: int = SPOOL_LIMIT,
        marks: bool = True,
    ) -> None:
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
        self.source = source_named(source)
        self._budgets = Budgets(self.ledger)
        self._audits = Audits(self.ledger, self.source)
        self._ids = _RequestIds()
        self._waits = durability != "spool"
        self._writer = Writer(self.ledger, gather_s=0.0 if self._waits else GATHER_S)
        self._spool_limit = spool_limit
        self._marks = marks
        self._checked_at = float("-inf")
        self._prices = Prices(self.ledger.price_choices, prices)

    @property
    def price_book(self) -> PriceBook:
        """The price book in force now, for tenants that no book names.

        Raises:
            PriceBookError: Its file is missing or wrong.
            StoreError: The ledger cannot be read, and never was.
        """
        return self._prices.of(None)

    def check(self) -> None:
        """Raise if a record could not be priced and stored now.

        A ledger that took a record within the last second is not tried again. One that does not answer or is locked
        does not refuse requests while the spool has room.

        Raises:
            PriceBookError: The price book's file is missing or wrong.
            StoreError: The ledger is missing, read-only, full or damaged, or does not answer and the spool is full.
        """
        writer, now = self._writer, time.monotonic()
        if writer.failure is None and now - max(self._checked_at, writer.succeeded_at) < _CHECK_EVERY_S:
            return
        with suppress(StoreError):  # the check of the ledger below raises, or tolerates it
            _ = self.price_book
        if writer.failure is not None and now - writer.failed_at < _CHECK_EVERY_S:
            self._tolerate(writer.failure)
            return
        try:
            self.ledger.check()
        except StoreError as error:
            writer.failed(error)
            self._tolerate(error)
        else:
            self._checked_at = now

    def _tolerate(self, error: StoreError) -> None:
        """Raise an error of the ledger, unless records can wait in the spool until it passes."""
        writer = self._writer
        if not error.retryable or not writer.has_spool or writer.kept_records >= self._spool_limit:
            raise error

    def reserve(self, bound: UsageBound) -> int:
        """Hold the maximum that a request may use, in every budget that covers it; see `Budgets.reserve`.

        An id that the caller chose is looked up first, among the requests of this meter and in the ledger.

        Returns:
            Index of the offer to serve.

        Raises:
            BudgetExceededError: No offer fits what is left.
            ConflictError: The request id is in use, or has been used.
            StoreError: The ledger cannot be read or written.
        """
        if bound.id_is_new:
            return self._reserve(bound)
        self._ids.claim(bound.tenant, bound.request_id)
        try:
            self._look_up(bound)
            return self._reserve(bound)
        except BaseException:
            self._ids.give_up(bound.tenant, bound.request_id)
            raise

    def _reserve(self, bound: UsageBound) -> int:
        return self._budgets.reserve(bound, self._prices.of(bound.tenant, bound.at), source=self.source)

    def _look_up(self, bound: UsageBound) -> None:
        try:
            stored = self.ledger.is_stored((bound.tenant, self.source, bound.request_id))
        except StoreError as error:
            self._tolerate(error)  # its record waits in the spool, and is never lost
            return
        if stored:
            raise id_in_use(bound.tenant, bound.request_id, "was served before")

    def quote(self, bound: UsageBound) -> tuple[dict[str, Any], ...]:
        """The maximum price of each offer by the prices in force; see `polar_billing.prices.quote`.

        Raises:
            PriceBookError: The price book's file is missing or wrong.
            StoreError: The ledger cannot be read, and never was.
        """
        book = self._prices.of(bound.tenant, bound.at)
        return tuple(
            {
                "cost": None if quoted.amount is None else f"{quoted.amount:f}",
                "currency": quoted.currency,
                "price_book": book.id,
                "unrated": quoted.unrated,
            }
            for quoted in quote_offers(book, bound)
        )

    def release(self, tenant: str, request_id: str) -> None:
        """Release what is held for a request that never started, its id included."""
        self._ids.give_up(tenant, request_id)
        self._budgets.release(tenant, request_id, source=self.source)

    def watch(self, tenant: str, request_id: str, end: Callable[[Exception], None]) -> None:
        """Call `end` if what is held for a request is lost while it runs; see `Budgets`."""
        self._budgets.watch((tenant, self.source, request_id), end)

    @property
    def wants_marks(self) -> bool:
        """Whether there is a spool to mark requests in that run."""
        return self._marks and self._writer.has_spool

    def mark(self, record: UsageRecord) -> None:
        """Note what a running request has used, in a line of the spool; see `spool_file.InterimUsage`.

        Raises:
            StoreError: The spool cannot be written; the previous mark stays valid.
        """
        if self.wants_marks:
            try:
                self._writer.mark(self.entry(record))
            except StoreError:
                raise
            except OSError as error:
                raise StoreError(f"the usage of a request cannot be marked in the spool ({error.strerror}).") from error

    def receipt(self, record: UsageRecord) -> dict[str, Any]:
        """The receipt that `emit` would give a record now; nothing is stored.

        Raises:
            PriceBookError: The price book's file is missing or wrong.
            StoreError: The prices in force cannot be read, and there is no spool.
        """
        book, rating = self._rated(record)
        return receipt_of(record, book, rating)

    def emit(self, record: UsageRecord) -> dict[str, Any]:
        """Store one record and its receipt, as durably as `durability` says.

        A record emitted again with the same content stores nothing and gets the receipt of the first time (where
        `durability` is `spool`: the receipt by the prices in force, which the ledger may then disagree with).

        A use that has no price, or one beyond what the ledger holds, is stored unrated with the reason.

        Returns:
            The receipt: cost as exact decimal text (None where unrated), currency, compute units, charge
            lines.

        Raises:
            ConflictError: The ledger holds this request id of this tenant with other content, and the id was not
                reserved before. Never with `durability="spool"`; see the top of this module.
            StoreError: The record could not be stored. Where there is a spool it is kept there all the same.
        """
        book, rating = self._rated(record)
        receipt = receipt_of(record, book, rating)  # before the thread that stores wants the interpreter as well
        entry = Entry(record, self.source, book, rating.cost, rating.unrated)
        self._budgets.forget(entry.identity)
        # What was reserved has computed already: it is charged, under another id if need be.
        reserved = self._ids.served(record.tenant, record.request_id)
        ticket = self._writer.submit(entry, told=self._waits and not reserved)
        stored = ticket.result() if self._waits or not ticket.spooled else None
        self._writer.end_marks(entry.identity)
        if stored is not None and (digest := stored.price_book_hash) != book.content_hash:
            book = self.ledger.find_books([digest])[digest]  # a replay, first rated under another book
            return receipt_of(record, book, rate(record, book, counterfactuals=False))
        return receipt

    @property
    def keeps_audits(self) -> bool:
        """Whether audits outlive this process: always."""
        return True

    @property
    def settled_tiers(self) -> frozenset[str]:
        """Tiers of which a plan of a price book in force promises agreement, now or later.

        Raises:
            PriceBookError: The price book's file is missing or wrong.
            StoreError: The ledger cannot be read, and never was.
        """
        plans = (plan for book in self._prices.books() for plan in book.plans.values())
        promises = (promise for plan in plans for terms in plan.terms for promise in terms.promises.items())
        return frozenset(tier for tier, promise in promises if promise.agreement_min is not None)

    def audited(self, audit: Audit) -> None:
        """Store one audit, committed when this returns; a replay stores nothing. See `polar_billing.ledger.audits`.

        If the ledger does not answer, or is locked, it waits in the spool, flushed to the disk, as records do. One that
        is refused, since its id has other content or its promise other figures, is logged and kept in the spool's
        `rejected.jsonl`: passing it again would not help.

        Raises:
            StoreError: It could not be stored; pass it again.
        """
        try:
            answers = self._audits.store([audit])
        except StoreError as error:
            self._tolerate(error)
            self._writer.failed(error)
            try:
                self._writer.keep_audit(audit, self.source)
            except OSError as full:
                raise error from full
        else:
            self._writer.reject_audits([audit], self.source, answers)

    def standings(self) -> dict[str, PromiseStanding]:
        """The state of the ledger's promises, by digest: as stored when this is called, whoever audited.

        Raises:
            StoreError: The ledger cannot be read now.
        """
        return self._audits.standings()

    def emit_many(self, records: Iterable[UsageRecord]) -> list[StoredUsage | ConflictError]:
        """Store many records and their receipts in one transaction, committed when this returns.

        For imports and for hosts that gather records themselves; some 1,000 at a time.

        Returns:
            For each record what is stored, or the conflict that kept it out.

        Raises:
            StoreError: The ledger could not take them; then none is stored, and none is in the spool.
        """
        return self.ledger.append_many([self.entry(record) for record in records], settle)

    def entry(self, record: UsageRecord) -> Entry:
        """A record with what its receipt says, as the ledger takes it."""
        book, unknown = self._book_of(record)
        cost, unrated = cost_of(record, book) if unknown is None else (None, unknown)
        return Entry(record, self.source, book, cost, unrated)

    def _rated(self, record: UsageRecord) -> tuple[PriceBook, Rating]:
        book, unknown = self._book_of(record)
        if unknown is not None:
            return book, Rating(book.currency, unrated=unknown)
        return book, rate(record, book, counterfactuals=False)

    def _book_of(self, record: UsageRecord) -> tuple[PriceBook, str | None]:
        """The book a record is charged by; if the ledger was never readable, any, and why there is no price."""
        try:
            return self._prices.of(record.tenant, record.started_at), None
        except StoreError as error:
            if not error.retryable or not self._writer.has_spool:
                raise
            return PriceBook.example(), f"the price books in force could not be read ({type(error).__name__})"

    def flush(self) -> None:
        """Return when every record emitted so far is in the ledger, or kept in the spool."""
        self._writer.drain()

    def recover(self) -> None:
        """Store now what waits in the spool, including that of processes that have ended.

        Raises:
            StoreError: The ledger cannot take it; nothing is lost.
        """
        self._writer.recover()

    @property
    def spool(self) -> SpoolStatus | None:
        """The state of this ledger's spool; None if it has none."""
        return self._writer.status()

    def close(self) -> None:
        """Store what is pending and release the ledger's connections; using the meter again opens new ones."""
        self._writer.close()
        self._budgets.stop()
        self.ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _RequestIds:
    """Ids of callers that this process serves or served last. Safe in several threads and after a fork.

    The ledger knows what this has forgotten, and what other processes serve.
    """

    def __init__(self) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._serving: set[tuple[str, str]] = set()
        self._served: OrderedDict[tuple[str, str], None] = OrderedDict()

    def claim(self, tenant: str, request_id: str) -> None:
        """Claim an id for a request that is about to run.

        Raises:
            ConflictError: Another request has it, or had it.
        """
        if self._process != os.getpid():
            self._start_anew()  # the parent's requests are its own
        request = (tenant, request_id)
        with self._lock:
            if request in self._serving:
                raise id_in_use(tenant, request_id, "is being served")
            if request in self._served:
                raise id_in_use(tenant, request_id, "was served before")
            self._serving.add(request)

    def give_up(self, tenant: str, request_id: str) -> None:
        """Drop the claim of a request that never started."""
        with self._lock:
            self._serving.discard((tenant, request_id))

    def served(self, tenant: str, request_id: str) -> bool:
        """Note that a request has its record; False if it had claimed nothing."""
        request = (tenant, request_id)
        if request not in self._serving:  # as most requests, whose ids are new; the set is safe to ask without the lock
            return request in self._served
        with self._lock:
            self._serving.discard(request)
            self._served[request] = None
            if len(self._served) > _REMEMBERED_IDS:
                self._served.popitem(last=False)
        return True


def receipt_of(record: UsageRecord, book: PriceBook, rating: Rating) -> dict[str, Any]:
    """The receipt of a request, JSON-like; the lines sum to the cost to the last of its 12 decimals."""
    rounded = rating.rounded
    lines: list[dict[str, Any]] = [
        {
            "name": line.item.name,
            "quantity": f"{line.quantity:f}",
            "unit": line.item.unit,
            "unit_price": plain(line.unit_price),
            "amount": f"{amount:f}",
        }
        for line, amount in zip(rating.lines, rounded.amounts, strict=True)
    ]
    if rounded.residue:
        without = dict.fromkeys(("quantity", "unit", "unit_price"))
        lines.append({"name": "rounding", **without, "amount": f"{rounded.residue:f}"})
    return {
        "cost": None if rating.unrated is not None else f"{rounded.total:f}",
        "currency": rating.currency,
        "compute_units": f"{from_scaled(record.flops.total, COMPUTE.decimals):f}",
        "price_book": book.id,
        "price_book_hash": book.content_hash,
        "tier": record.tier,
        "lines": lines,
        "unrated": rating.unrated,
    }


MARKS_VARIABLE: Final = "POLAR_MARKS"
_open: dict[tuple[str, str | None, bool, str], Meter] = {}
_opening = threading.Lock()


def open_meter(url: str | None = None) -> UsageSink:
    """The meter of a ledger; one per ledger, price book and source in a process, shared by all callers.

    Its `durability` is `spool`; see the top of this module for what that promises. `POLAR_MARKS=off` turns marks off.

    Args:
        url: See `Meter`.

    Raises:
        LedgerUrlError: The URL names no supported store.
        InvalidRequestError: `POLAR_MARKS` is neither `on` nor `off`, or `POLAR_SOURCE` is not a valid name.
    """
    location, source = resolve(url).render_as_string(hide_password=False), source_named()
    marks = os.environ.get(MARKS_VARIABLE) or "on"
    if marks not in {"on", "off"}:
        raise InvalidRequestError(f"{MARKS_VARIABLE} is {marks!r}; set it to on or off.")
    key = (location, os.environ.get(PRICE_BOOK_VARIABLE), marks == "on", source)
    with _opening:
        if key not in _open:
            _open[key] = Meter(location, durability="spool", marks=marks == "on", source=source)
        return _open[key]


@atexit.register
def _close_all() -> None:
    for meter in _open.values():
        meter.close()
