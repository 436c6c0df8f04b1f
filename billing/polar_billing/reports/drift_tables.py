"""Promises, their history and savings as tables of a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from polar_billing.reports import text
from polar_sdk.show.tables import add_labels, add_numbers, add_row, new_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType
    from rich.table import Table

    from polar_billing.reports.drift import PromiseDrift, Saved


def promises_view(promises: Sequence[PromiseDrift], *, history: bool = True) -> RenderableType:
    """Promises one line each, and then each change of their states."""
    table = new_table("Promises and their audits", ["tier", "promise", "state", "since (UTC)"])
    add_numbers(table, "audits", "lost", "share lost", "promised", "evidence")
    for one in promises:
        interval = f"{text.share_of_float(one.low)} to {text.share_of_float(one.high)}"
        figures = (text.count(one.audits), text.count(one.losses), interval, f"≤ {text.share_of_float(one.alpha)}")
        style = "bold red" if one.state != "in force" else ""
        since = f"{one.since:%Y-%m-%d %H:%M}"
        add_row(table, one.tier, one.promise[:12], one.state, since, *figures, f"{one.evidence:.2f}", style=style)
    return Group(table, Text(), _history(promises)) if history else table


def _history(promises: Sequence[PromiseDrift]) -> Table:
    table = new_table("How they came to stand there", ["tier", "promise", "since (UTC)", "state"])
    add_labels(table, "by these audits")
    changes = [(change, one) for one in promises for change in one.history]
    for change, one in sorted(changes, key=lambda pair: (pair[0].since, pair[1].tier)):
        add_row(table, one.tier, one.promise[:12], f"{change.since:%Y-%m-%d %H:%M}", change.state, change.reason)
    return table


def saved_view(saved: Sequence[Saved], tag: str, period: str) -> Table:
    """Savings by tier, kind and length."""
    table = new_table(
        f"Saved against full depth by {tag} and length of prompts, {period}", ["tier", tag, "prompt tokens"]
    )
    add_numbers(table, "requests", "saved", "next tier", "would save")
    for one in saved:
        kind = text.DASH if one.kind is None else one.kind
        figures = (text.count(one.requests), text.share(one.saved, signed=True))
        add_row(table, one.tier, kind, length(one), *figures, one.next_tier or text.DASH, text.share(one.next_saved))
    return table


def length(saved: Saved) -> str:
    """The length of prompts in words."""
    return "longer" if saved.tokens_max is None else f"up to {saved.tokens_max:,}"
