"""Statements and repricings as tables in the terminal and as CSV. Nothing is computed here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich.console import Group
from rich.text import Text

from polar_billing.reports import text
from polar_billing.reports.csv import write_rows
from polar_billing.statements.lines import USAGE_KINDS
from polar_billing.values.money import plain
from polar_sdk.show.tables import add_numbers, add_row, new_table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from decimal import Decimal

    from rich.console import RenderableType
    from rich.table import Table

    from polar_billing.statements.repricing import Repriced
    from polar_billing.statements.statement import Statement, StatementLine
    from polar_billing.statements.store import IssuedStatement


_LINE: Final = (
    "number", "kind", "tier", "item", "quantity", "unit", "unit_price", "amount", "since", "until", "outcome", "note",
    "corrects",
)  # fmt: skip
_REPRICED: Final = (
    "tenant",
    "requests",
    "currency",
    "price_book",
    "charged",
    "other_price_book",
    "other",
    "difference",
)


def statement_view(statement: Statement, issued: IssuedStatement | None) -> RenderableType:
    """A statement, line by line; `issued` None for a draft."""
    state = "draft" if issued is None else f"issued {issued.issued_at:%Y-%m-%d %H:%M} UTC"
    heading = f"Statement of {statement.tenant}, {statement.period.label} · {state}"
    table = new_table(heading, ["line", "tier", "item"])
    add_numbers(table, "quantity", "unit price", f"amount {statement.currency}")
    for line in statement.lines:
        add_row(table, str(line.number), _tier(line), _item(line), *_figures(line), text.money(line.amount))
    add_row(table, "", "", "rounding", "", "", text.money(statement.rounding))
    table.add_section()
    add_row(table, "", "", "total", "", "", text.money(statement.total), style="bold")
    _credits(table, statement)
    facts = f"{statement.id} · price book {statement.price_book} {statement.price_book_hash[:12]}"
    return Group(table, Text(facts, style="dim"), *_unrated(statement))


def issued_view(issued: Sequence[IssuedStatement], tenant: str) -> Table:
    """A tenant's statements, one line each."""
    table = new_table(f"Statements of {tenant}", ["statement", "period", "issued (UTC)"])
    add_numbers(table, "total", "due")
    for one in issued:
        statement = one.statement
        amounts = (f"{text.money(amount)} {statement.currency}" for amount in (statement.total, statement.due))
        add_row(table, statement.id, statement.period.label, f"{one.issued_at:%Y-%m-%d %H:%M}", *amounts)
    return table


def repriced_view(rows: Sequence[Repriced], period: str) -> RenderableType:
    """The same usage under two books, one line per tenant."""
    table = new_table(f"The same usage under {rows[0].other_price_book}, {period}", ["tenant", "charged by"])
    add_numbers(table, "requests", f"charged {rows[0].currency}", "instead", "difference")
    for row in rows:
        amounts = (text.money(row.charged), text.money(row.other), _signed(row.difference))
        add_row(table, row.tenant, row.price_book, text.count(row.requests), *amounts)
    missing = [(row, reason, number) for row in rows for reason, number in row.other_unrated.items()]
    told = [
        Text(f"{row.tenant}: {number:,} unrated instead: {reason}.", style="yellow") for row, reason, number in missing
    ]
    return Group(table, *told)


def statement_csv(statement: Statement) -> str:
    """One row per line; the rows with an amount sum to what is due."""
    rows = [{name: getattr(line, name) for name in _LINE} for line in statement.lines]
    rows.append({"kind": "rounding", "amount": statement.rounding})
    rows += [
        {"kind": "prepaid", "item": use.id, "amount": use.used.copy_negate()} for use in statement.credits if use.used
    ]
    common = {"statement": statement.id, "tenant": statement.tenant, "currency": statement.currency}
    return write_rows([*common, *_LINE], ({**common, **row} for row in rows))


def repriced_csv(rows: Sequence[Repriced]) -> str:
    """One row per tenant."""
    return write_rows(list(_REPRICED), ({name: getattr(row, name) for name in _REPRICED} for row in rows))


def _tier(line: StatementLine) -> str:
    if line.kind == "usage" or line.tier is not None:
        return text.tier_name(line.tier)
    return text.DASH


def _item(line: StatementLine) -> str:
    late = "" if line.corrects is None else f", late on {line.corrects}"
    return f"{line.item}{late}" if line.kind in USAGE_KINDS or line.note is None else f"{line.item}{late}: {line.note}"


def _figures(line: StatementLine) -> tuple[str, str]:
    if line.quantity is None or line.unit_price is None:
        return "", ""
    return f"{plain(line.quantity)} {line.unit}", f"{plain(line.unit_price)} / {line.unit}"


def _credits(table: Table, statement: Statement) -> None:
    if not statement.credits:
        return
    for use in statement.credits:
        left = f"{text.money(use.after)} left" + (f", {text.money(use.expired)} expired" if use.expired else "")
        add_row(table, "", "", f"prepaid {use.id} ({left})", "", "", text.money(use.used.copy_negate()))
    add_row(table, "", "", "due", "", "", text.money(statement.due), style="bold")


def _unrated(statement: Statement) -> list[Text]:
    return [
        Text(f"{number:,} unrated, in no amount above: {reason}.", style="yellow")
        for reason, number in statement.unrated.items()
    ]


def _signed(amount: Decimal) -> str:
    return f"{amount:+,f}" if amount else text.money(abs(amount))
