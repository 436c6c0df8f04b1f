"""Price books, budgets, statements and repricings as tables in the terminal. Computes nothing."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from rich.console import Group
from rich.text import Text

from polar_billing.prices.plans import Banded
from polar_billing.reports import text
from polar_billing.reports.usage_tables import unrated_notes
from polar_billing.statements.issue import due_after
from polar_billing.statements.lines import USAGE_KINDS
from polar_billing.values.money import exact_sum, plain
from polar_sdk.show.tables import add_labels, add_numbers, add_row, as_text, new_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime

    from rich.console import RenderableType
    from rich.table import Table

    from polar_billing.budgets.holds import Hold
    from polar_billing.budgets.offers import Standing
    from polar_billing.prices.book import PriceBook
    from polar_billing.prices.entries import PriceEntry
    from polar_billing.prices.plans import PeriodPrice, Terms
    from polar_billing.statements.issue import CreditNote
    from polar_billing.statements.issued import IssuedStatement
    from polar_billing.statements.period import Repriced
    from polar_billing.statements.statement import Statement, TierAgreement


_AMOUNTS: Final = frozenset({"limit", "spent", "held", "left", "cost_bound", "compute_units_bound"})
"""The columns of budgets and holds that are figures."""


def book_view(book: PriceBook) -> RenderableType:
    """Rates, then plans, customers and credits where there are any."""
    free = f" · free: {', '.join(sorted(book.free_outcomes))}" if book.free_outcomes else ""
    facts = f"{book.currency}, lines rounded to {book.statement_decimals} decimals{free} · {book.content_hash[:12]}"
    parts: list[RenderableType] = [_rates(f"Price book {book.id}", book.prices), as_text(facts, style="dim")]
    for name, plan in book.plans.items():
        parts += [Text(), *([_rates(f"Plan {name}, its own rates", plan.prices)] if plan.prices else [])]
        parts += [as_text(line) for terms in plan.terms for line in _terms(name, terms)]
    if book.customers:
        table = new_table("Customers", ["tenant", "plan", "from", "zone"])
        for customer in book.customers:
            since = _moment(customer.effective_from)
            add_row(table, customer.tenant, customer.plan or text.DASH, since, customer.zone)
        parts += [Text(), table]
    if book.credits:
        table = new_table("Prepaid credits, in order of use", ["credit", "tenant", "from", "until"])
        add_numbers(table, "priority", f"amount {book.currency}")
        for credit in sorted(book.credits, key=lambda credit: (credit.tenant, credit.order)):
            moments = (_moment(credit.effective_from), _moment(credit.expires_at))
            add_row(table, credit.id, credit.tenant, *moments, str(credit.priority), plain(credit.amount))
        parts += [Text(), table]
    return Group(*parts)


def _rates(title: str, entries: tuple[PriceEntry, ...]) -> Table:
    table = new_table(title, ["from", "until"])
    add_numbers(table, "per CU", "per million\ninput", "per million\noutput", "per request")
    table.add_column("tiers", overflow="fold", min_width=15)
    for entry, following in zip(entries, (*entries[1:], None), strict=True):
        until = entry.effective_until or (None if following is None else following.effective_from)
        tiers = [f"{tier} × {plain(multiplier)}" for tier, multiplier in entry.tiers.items()]
        tiers += [] if entry.untiered is None else [f"{text.NO_TIER} × {plain(entry.untiered)}"]
        prices = (text.DASH if price is None else plain(price) for price in entry.components.values())
        add_row(table, _moment(entry.effective_from), _moment(until), *prices, ", ".join(tiers))
    return table


def _terms(name: str, terms: Terms) -> Iterator[str]:
    fixed = {"flat fee": terms.flat_fee, "minimum": terms.minimum}
    amounts = [f"{what} {plain(amount)}" for what, amount in fixed.items() if amount is not None]
    amounts += [] if terms.discount_percent is None else [f"discount {plain(terms.discount_percent)} %"]
    yield f"Plan {name} from {_moment(terms.effective_from)}: {', '.join(amounts) or 'no fee, minimum or discount'}"
    for item in terms.items:
        yield f"  {item.per}{', pooled' if item.pool else ''}: {_period_price(item)}"
    for tier, promise in terms.promises.items():
        latency = [] if promise.latency_ms_p95_max is None else [f"p95 ≤ {promise.latency_ms_p95_max} ms"]
        agreement = []
        if promise.agreement_min is not None:
            how = f"{promise.agreement_loss}, {promise.audits_min} audits or more"
            agreement = [f"agreement ≥ {plain(promise.agreement_min)} ({how})"]
        yield f"  {tier} promises {', '.join(latency + agreement)}; {plain(promise.credit_percent)} % back if missed"


def _period_price(item: PeriodPrice) -> str:
    if not isinstance(item, Banded):
        return f"{plain(item.price)} per started {plain(item.size)}"
    upto = ("beyond" if band.up_to is None else f"up to {plain(band.up_to)}" for band in item.bands)
    bands = (f"{plain(band.unit_price)} {end}" for band, end in zip(item.bands, upto, strict=True))
    return f"{item.model}: {', '.join(bands)}"


def _moment(moment: datetime | None) -> str:
    if moment is None:
        return text.DASH
    return f"{moment:%Y-%m-%d}" if moment.hour == moment.minute == moment.second == 0 else moment.isoformat()


def standing_row(standing: Standing) -> dict[str, Any]:
    """One budget in one window, as a row for JSON, CSV and tables; amounts are exact decimals as text, in `unit`."""
    budget = standing.budget
    return {
        "tenant": budget.tenant,
        "level": str(budget.level),
        "name": budget.name,
        "window": str(budget.window),
        "unit": budget.unit,
        "limit": plain(budget.amount(budget.limit_count)),
        "spent": plain(budget.amount(standing.spent)),
        "held": plain(budget.amount(standing.held)),
        "left": plain(budget.amount(standing.left)),
        "over_budget": str(budget.over_budget),
        "zone": budget.zone,
        "resets_at": None if standing.resets_at is None else standing.resets_at.isoformat(),
    }


def hold_row(hold: Hold) -> dict[str, Any]:
    """One open hold, as a row for JSON, CSV and tables."""
    scope = hold.scope
    return {
        "tenant": scope.tenant,
        "source": hold.source,
        "request_id": hold.request_id,
        "project": scope.project,
        "user": scope.user,
        "key": scope.key,
        "currency": scope.currency,
        "cost_bound": plain(hold.cost_bound),
        "compute_units_bound": plain(hold.compute_units_bound),
        "held_at": hold.held_at.isoformat(),
        "expires_at": hold.expires_at.isoformat(),
    }


def with_figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of budgets or holds with amounts as numbers: in CSV, an overdrawn budget is not taken for a formula."""
    return {name: Decimal(value) if name in _AMOUNTS and value is not None else value for name, value in row.items()}


def rows_view(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Budgets or holds, one line each, a column per field."""
    table = new_table(title, [])
    for name in rows[0]:
        add_column = add_numbers if name in _AMOUNTS else add_labels
        add_column(table, name.replace("_", " "))
    for row in rows:
        add_row(table, *(text.DASH if value is None else str(value) for value in row.values()))
    return table


def statement_view(
    statement: Statement, issued: IssuedStatement | None, notes: Sequence[CreditNote] = ()
) -> RenderableType:
    """A statement, line by line, and its credit notes; `issued` None for a draft."""
    state = "draft" if issued is None else f"issued {issued.issued_at:%Y-%m-%d %H:%M} UTC"
    heading = f"Statement of {statement.tenant}, {statement.period.label} · {state}"
    table = new_table(heading, ["line", "tier", "item"])
    add_numbers(table, "quantity", "unit price", f"amount {statement.currency}")
    for line in statement.lines:
        has_tier = line.kind == "usage" or line.tier is not None
        late = "" if line.corrects is None else f", late on {line.corrects}"
        why = "" if line.kind in USAGE_KINDS or line.note is None else f": {line.note}"
        figures = ("", "")
        if line.quantity is not None and line.unit_price is not None:
            figures = (f"{plain(line.quantity)} {line.unit}", f"{plain(line.unit_price)} / {line.unit}")
        tier, item = text.tier_name(line.tier) if has_tier else text.DASH, f"{line.item}{late}{why}"
        add_row(table, str(line.number), tier, item, *figures, text.money(line.amount))
    add_row(table, "", "", "rounding", "", "", text.money(statement.rounding))
    table.add_section()
    add_row(table, "", "", "total", "", "", text.money(statement.total), style="bold")
    for use in statement.credits:
        left = f"{text.money(use.after)} left" + (f", {text.money(use.expired)} expired" if use.expired else "")
        add_row(table, "", "", f"prepaid {use.id} ({left})", "", "", text.money(use.used.copy_negate() or use.used))
    for note in notes:
        what = f"credit note {note.reference}: {note.reason}"
        add_row(table, "", "", what, "", "", text.money(note.amount.copy_negate()))
    if statement.credits or notes:
        add_row(table, "", "", "due", "", "", text.money(due_after(statement, notes)), style="bold")
    facts = f"{statement.id} · price book {statement.price_book} {statement.price_book_hash[:12]}"
    remarks = [as_text(line, style="dim") for line in (facts, *map(_agreement, statement.agreement.items()))]
    remarks += [as_text(f"Not settled: {one}.", style="yellow") for one in statement.unsettled]
    return Group(table, *remarks, *unrated_notes(statement.unrated.items()))


def _agreement(of_tier: tuple[str, TierAgreement]) -> str:
    tier, one = of_tier
    share = "" if one.share is None else f", {plain(one.share)} by weight"
    return f"{tier}: {one.agreed:,} of {one.compared:,} audited answers agreed with full depth{share}"


def issued_view(issued: Sequence[tuple[IssuedStatement, Sequence[CreditNote]]], tenant: str) -> Table:
    """A tenant's issued statements, one line each; credit notes are off what is due, which below 0 is the tenant's."""
    table = new_table(f"Statements of {tenant}", ["statement", "period", "issued (UTC)"])
    add_numbers(table, "total", "credit notes", "due")
    for entry, notes in issued:
        statement = entry.statement
        credited = exact_sum((note.amount for note in notes), statement.decimals)
        due = due_after(statement, notes)
        amounts = (f"{text.money(amount)} {statement.currency}" for amount in (statement.total, credited, due))
        add_row(table, statement.id, statement.period.label, f"{entry.issued_at:%Y-%m-%d %H:%M}", *amounts)
    return table


def repriced_view(rows: Sequence[Repriced], period: str) -> RenderableType:
    """The same usage under two price books, one line per tenant."""
    table = new_table(f"The same usage under {rows[0].other_price_book}, {period}", ["tenant", "charged by"])
    add_numbers(table, "requests", f"charged {rows[0].currency}", "repriced", "difference")
    for row in rows:
        amounts = (text.money(row.charged), text.money(row.other), text.signed_money(row.difference))
        add_row(table, row.tenant, row.price_book, text.count(row.requests), *amounts)
    notes = [
        as_text(f"{row.tenant}: {requests:,} unrated when repriced: {reason}.", style="yellow")
        for row in rows
        for reason, requests in row.other_unrated.items()
    ]
    return Group(table, *notes)
