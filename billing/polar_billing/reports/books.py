"""A price book as tables in the terminal. Nothing is computed here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from polar_billing.prices.plans import Banded
from polar_billing.reports import text
from polar_billing.values.money import plain
from polar_sdk.show.tables import add_numbers, add_row, new_table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from decimal import Decimal

    from rich.console import RenderableType
    from rich.table import Table

    from polar_billing.prices.book import PriceBook
    from polar_billing.prices.entries import PriceEntry
    from polar_billing.prices.plans import PeriodPrice, Terms


def book_view(book: PriceBook) -> RenderableType:
    """Rates, then plans, customers and credits where there are any."""
    free = f" · free: {', '.join(sorted(book.free_outcomes))}" if book.free_outcomes else ""
    facts = f"{book.currency}, lines rounded to {book.statement_decimals} decimals{free} · {book.content_hash[:12]}"
    parts: list[RenderableType] = [_rates(f"Price book {book.id}", book.prices), Text(facts, style="dim")]
    for name, plan in book.plans.items():
        parts += [Text(), *([_rates(f"Plan {name}, rates of its own", plan.prices)] if plan.prices else [])]
        parts += [Text(told) for terms in plan.terms for told in _terms(name, terms)]
    parts += [Text(), _customers(book)] if book.customers else []
    parts += [Text(), _credits(book)] if book.credits else []
    return Group(*parts)


def _rates(title: str, entries: tuple[PriceEntry, ...]) -> Table:
    table = new_table(title, ["from", "until"])
    add_numbers(table, "per CU", "per million\ninput", "per million\noutput", "per request")
    table.add_column("tiers", overflow="fold", min_width=15)
    for entry in entries:
        tiers = [f"{tier} × {plain(multiplier)}" for tier, multiplier in entry.tiers.items()]
        tiers += [] if entry.untiered is None else [f"{text.NO_TIER} × {plain(entry.untiered)}"]
        prices = (_price(price) for price in entry.components.values())
        add_row(table, _moment(entry.effective_from), _moment(entry.effective_until), *prices, ", ".join(tiers))
    return table


def _terms(name: str, terms: Terms) -> Iterator[str]:
    fixed = {"flat fee": terms.flat_fee, "minimum": terms.minimum, "discount %": terms.discount_percent}
    told = [f"{what} {plain(amount)}" for what, amount in fixed.items() if amount is not None]
    yield f"Plan {name} from {_moment(terms.effective_from)}: {', '.join(told) or 'no fee, minimum or discount'}"
    for item in terms.items:
        yield f"  {item.per}{', pooled' if item.pool else ''}: {_item(item)}"
    for tier, promise in terms.promises.items():
        latency = [] if promise.latency_ms_p95_max is None else [f"p95 ≤ {promise.latency_ms_p95_max} ms"]
        agreement = [] if promise.agreement_min is None else [f"agreement ≥ {plain(promise.agreement_min)}"]
        yield f"  {tier} promises {', '.join(latency + agreement)}, or {plain(promise.credit_percent)} % back"


def _item(item: PeriodPrice) -> str:
    if not isinstance(item, Banded):
        return f"{plain(item.price)} per started {plain(item.size)}"
    bands = (f"{_price(band.unit_price)} {_upto(band.up_to)}" for band in item.bands)
    return f"{item.model}: {', '.join(bands)}"


def _upto(bound: Decimal | None) -> str:
    return "beyond" if bound is None else f"up to {plain(bound)}"


def _customers(book: PriceBook) -> Table:
    table = new_table("Customers", ["tenant", "plan", "from", "zone"])
    for one in book.customers:
        add_row(table, one.tenant, one.plan or text.DASH, _moment(one.effective_from), one.zone)
    return table


def _credits(book: PriceBook) -> Table:
    table = new_table("Prepaid credits, first used first", ["credit", "tenant", "from", "until"])
    add_numbers(table, "priority", f"amount {book.currency}")
    for one in sorted(book.credits, key=lambda credit: (credit.tenant, credit.order)):
        moments = (_moment(one.effective_from), _moment(one.expires_at))
        add_row(table, one.id, one.tenant, *moments, str(one.priority), plain(one.amount))
    return table


def _moment(moment: datetime | None) -> str:
    if moment is None:
        return text.DASH
    return f"{moment:%Y-%m-%d}" if moment.hour == moment.minute == moment.second == 0 else moment.isoformat()


def _price(price: Decimal | None) -> str:
    return text.DASH if price is None else plain(price)
