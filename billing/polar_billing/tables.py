"""Tables in the terminal, as every command sets them: plain names, every digit. Knows no figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console, RenderableType

__all__ = ["LABEL_WIDTH", "add_numbers", "add_row", "new_table", "printable", "show"]

LABEL_WIDTH: Final = 8
_WIDEST: Final = 1_000


def show(view: RenderableType, console: Console) -> None:
    """Print a view; where the console is too narrow for the digits, lines run over rather than lose any."""
    needed = console.measure(view, options=console.options.update(width=_WIDEST)).minimum
    console.width = max(console.width, needed)
    console.print(view)


def new_table(title: str | None, labels: Iterable[str]) -> Table:
    """A table with a title and these first columns of text."""
    heading = None if title is None else Text(printable(title))
    table = Table(box=box.SIMPLE_HEAD, title=heading, title_justify="left", title_style="bold")
    table.show_edge = False
    table.pad_edge = False
    table.padding = (0, 1, 0, 0)
    for label in labels:
        table.add_column(label, overflow="fold", min_width=LABEL_WIDTH)
    return table


def add_row(table: Table, *cells: str, style: str | None = None) -> None:
    """Add a row of plain texts: a tenant called `[red]` is a name, not markup."""
    table.add_row(*(Text(printable(cell)) for cell in cells), style=style)


def printable(text: str) -> str:
    """A name must not steer the terminal either."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def add_numbers(table: Table, *names: str) -> None:
    """Add columns of figures, which never lose a digit."""
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
