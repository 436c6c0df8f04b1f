"""From holds and counters back to the usage that they represent: every settled hold and every counter is rechecked.

Holds and counters are not links of the hash chain; usage and receipts are. So a settled hold must agree with the stored
usage of its request, and a counter with the sum of holds and usage. What cannot be rechecked: open holds, what was held
for a request that turned out to have no price, and the compute and tags of requests that retention deleted.
`polar verify` and `polar budget recheck` run this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import BigInteger, func, select, type_coerce

from polar_billing.budgets.budget import Level
from polar_billing.budgets.counters import computed, read_counters, same_request
from polar_billing.budgets.holds import in_force
from polar_billing.ledger.books import read_books
from polar_billing.ledger.schema import hold_table, prune_table, pruned_table, receipt_table, usage_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Row, Select

    from polar_billing.budgets.offers import Standing


_ROWS_BATCH: Final = 1_000


@dataclass(frozen=True)
class Difference:
    """A counter that differs from what holds and usage add up to."""

    counted: Standing
    computed: Standing
    misfiled: bool = False
    """The counter counts in another window, or with other decimals, than its budget."""

    def __str__(self) -> str:
        counted, expected, budget = self.counted, self.computed, self.counted.budget
        misfiled = " Its window or its decimals are not those of the budget." if self.misfiled else ""
        return (
            f"{budget.who}, {counted.period.label}: "
            f"spent {budget.say(counted.spent)}, should be {budget.say(expected.spent)}; "
            f"held {budget.say(counted.held)}, should be {budget.say(expected.held)}.{misfiled}"
        )


@dataclass(frozen=True)
class WrongHold:
    """A settled hold that differs from the stored usage of its request."""

    seq: int
    tenant: str
    request_id: str
    what: str

    def __str__(self) -> str:
        return f"hold {self.seq} of request {self.request_id!r} {self.what}"


def wrong_counters(connection: Connection, tenant: str) -> Iterator[Difference]:
    """The counters of a tenant's budgets that differ from what holds and usage add up to.

    Where retention deleted usage of the window that had no hold, a counter may say more than is left to add up.
    """
    counted = list(read_counters(connection, in_force(connection, tenant)))
    everything = computed(connection, [(standing.budget, standing.period) for standing, _ in counted])
    for (standing, filed), expected in zip(counted, everything, strict=True):
        differs = standing != expected
        if differs and standing.held == expected.held and standing.spent > expected.spent:
            since, pruned = standing.period.since, prune_table.c
            query = select(pruned.id).where(
                pruned.tenant == tenant, *([] if since is None else [pruned.before > since])
            )
            differs = connection.execute(query.limit(1)).first() is None
        if differs or not filed:
            yield Difference(standing, expected, misfiled=not filed)


def wrong_holds(connection: Connection, tenant: str | None) -> Iterator[WrongHold]:
    """The settled holds, of a tenant or of all, that differ from the usage and the receipt of their request."""
    hold = hold_table.c
    of_tenant = [hold.state == "settled", *([] if tenant is None else [hold.tenant == tenant])]
    currencies = {digest: book.currency for digest, book in read_books(connection).items()}
    query = _HOLDS_WITH_USAGE.where(*of_tenant)
    with connection.execute(query, execution_options={"yield_per": _ROWS_BATCH}) as rows:
        for row in rows:
            for what in _differences(row, currencies):
                yield WrongHold(row.seq, row.tenant, row.request_id, what)
    identity = (hold.tenant, hold.source, hold.request_id)
    again = select(func.max(hold.seq), hold.tenant, hold.request_id).where(*of_tenant)
    for seq, name, request_id in connection.execute(again.group_by(*identity).having(func.count() > 1)):
        yield WrongHold(seq, name, request_id, "is settled, and so is an earlier hold of the same request.")


def _holds_with_usage() -> Select[Any]:
    """Holds with what is stored of their requests, numbers as the database holds them."""
    hold, usage, receipt, pruned = hold_table.c, usage_table.c, receipt_table.c, pruned_table.c
    names = (hold.project, hold.user_name, hold.key_name)
    numbers = {
        "at": hold.at,
        "cost": hold.cost,
        "cost_bound": hold.cost_bound,
        "started_at": usage.started_at,
        "charged": receipt.cost,
        "charged_once": pruned.cost,
    }
    return (
        select(hold.seq, hold.tenant, hold.request_id, *names, hold.currency, hold.flops)
        .add_columns(*(type_coerce(column, BigInteger).label(name) for name, column in numbers.items()))
        .add_columns(usage.tags, usage.flops_total)
        .add_columns(receipt.price_book_hash.label("book"), pruned.price_book_hash.label("book_once"))
        .select_from(hold_table)
        .outerjoin(usage_table, same_request(usage))
        .outerjoin(receipt_table, receipt.usage_seq == usage.seq)
        .outerjoin(pruned_table, same_request(pruned))
    )


_HOLDS_WITH_USAGE: Final = _holds_with_usage()


def _differences(row: Row[Any], currencies: dict[str, str]) -> Iterator[str]:
    """The differences between a settled hold and the usage of its request, in words."""
    book = row.book or row.book_once
    if book is None:
        yield "is settled, but the ledger holds no such request."
        return
    if row.currency != currencies.get(book):
        yield f"is in {row.currency}, and its receipt in {currencies.get(book)}."
    charged = row.charged if row.book is not None else row.charged_once
    if row.cost != (cost := row.cost_bound if charged is None else charged):
        yield f"says a cost of {row.cost}, and its receipt makes it {cost} (10^-12 {row.currency})."
    if row.book is None:
        return  # pruned: the facts are gone
    if row.flops != row.flops_total:
        yield f"says {row.flops} FLOPs, and its usage {row.flops_total}."
    if row.at != row.started_at:
        yield "counts at another time than that of its usage."
    named = {Level.PROJECT: row.project, Level.USER: row.user_name, Level.KEY: row.key_name}
    for level, name in named.items():
        if name != row.tags.get(level):
            yield f"counts for the {level} {name!r}, and its usage for {row.tags.get(level)!r}."
