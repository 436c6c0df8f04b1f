"""Budgets and holds as facts for JSON and CSV, and as tables in the terminal. Computes nothing."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from polar_billing.values.money import plain
from polar_billing.values.periods import load_zone

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_billing.budgets.choose import Standing
    from polar_billing.budgets.holds import Hold


_NUMBERS = frozenset({"limit", "spent", "held", "left", "cost_bound", "compute_units_bound"})


def standing_facts(standing: Standing) -> dict[str, Any]:
    """One budget in one window; amounts are exact decimals as text, in `unit`."""
    budget = standing.budget
    until = standing.period.until
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
        "resets_at": None if until is None else until.astimezone(load_zone(budget.zone)).isoformat(),
    }


def hold_facts(hold: Hold) -> dict[str, Any]:
    """One open hold."""
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


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as CSV, with a heading; None is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Rows of equal keys as a table; names are texts, not markup."""
    table = Table(box=box.SIMPLE_HEAD, title=Text(title), title_justify="left", title_style="bold")
    table.show_edge = False
    for name in rows[0]:
        label = name.replace("_", " ")
        if name in _NUMBERS:
            table.add_column(label, justify="right", no_wrap=True)
        else:
            table.add_column(label, overflow="fold")
    for row in rows:
        table.add_row(*(Text("–" if value is None else _printable(str(value))) for value in row.values()))
    return table


def _printable(text: str) -> str:
    """A name must not steer the terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
