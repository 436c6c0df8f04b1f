"""Tables in the terminal, as every command sets them: plain names, every digit. Knows no figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import Console, RenderableType
    from rich.table import Column


LABEL_WIDTH: Final = 8
_WIDEST: Final = 1_000


def show(view: RenderableType, console: Console) -> None:
    """Print a view. Where the console is narrow, texts fold; where it is too narrow for the digits, lines run over."""
    console.width = max([console.width, *(_fold(table, console) for table in _tables(view))])
    console.print(view)


def _tables(view: RenderableType) -> Iterator[Table]:
    if isinstance(view, Table):
        yield view
    for part in view.renderables if isinstance(view, Group) else ():
        yield from _tables(part)


def _fold(table: Table, console: Console) -> int:
    """Give the columns of text what the figures leave of a console's width, the first one first.

    rich would take from the widest first, past what a column needs at least.

    Returns:
        The least width of the table. Unit: characters.
    """
    wide = console.options.update(width=_WIDEST)
    if (natural := console.measure(table, options=wide).maximum) <= console.width:
        return natural
    texts = [(column, _longest(column, console)) for column in table.columns if not column.no_wrap]
    least = [min(column.min_width or 1, longest) for column, longest in texts]
    for (column, _), width in zip(texts, least, strict=True):
        column.min_width = column.max_width = width
    needed = console.measure(table, options=wide).maximum  # not the minimum, for which figures break at their unit
    spare = max(console.width - needed, 0)
    for (column, longest), width in zip(texts, least, strict=True):
        column.max_width = width + min(longest - width, spare)
        spare -= column.max_width - width
    return needed


def _longest(column: Column, console: Console) -> int:
    return max(console.measure(cell).maximum for cell in (column.header, *column.cells))


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
