"""Tables in the terminal, the same for every command: names are plain text, figures keep every digit.

Knows no figures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from polar_sdk.show.lines import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import RenderableType
    from rich.table import Column


LABEL_WIDTH: Final = 8
"""Minimum width of a column of texts. Unit: characters."""
_PLAIN_WIDTH: Final = 200
_MAX_WIDTH: Final = 1_000


def show(view: RenderableType, console: Console | None = None) -> None:
    """Print a view to a console: by default the terminal, or wide plain text where there is none.

    On a narrow console texts fold; where it is too narrow for the digits, lines run over.
    """
    if console is None:
        console = Console()
        if not console.is_terminal or console.is_dumb_terminal:
            console = Console(width=_PLAIN_WIDTH, no_color=True, force_terminal=False)
    console.width = max([console.width, *(_fold(table, console) for table in _tables(view))])
    console.print(view)


def _tables(view: RenderableType) -> Iterator[Table]:
    if isinstance(view, Table):
        yield view
    for part in view.renderables if isinstance(view, Group) else ():
        yield from _tables(part)


def _fold(table: Table, console: Console) -> int:
    """Give the columns of text the width that the figures leave, the first column first.

    rich would take from the widest first, even below what a column needs.

    Returns:
        The minimum width of the table. Unit: characters.
    """
    wide = console.options.update(width=_MAX_WIDTH)
    if (natural := console.measure(table, options=wide).maximum) <= console.width:
        return natural
    texts = [(column, _longest(column, console)) for column in table.columns if not column.no_wrap]
    minimums = [min(column.min_width or 1, longest) for column, longest in texts]
    for (column, _), width in zip(texts, minimums, strict=True):
        column.min_width = column.max_width = width
    needed = console.measure(table, options=wide).maximum  # not .minimum, at which figures break before their unit
    spare = max(console.width - needed, 0)
    for (column, longest), width in zip(texts, minimums, strict=True):
        column.max_width = width + min(longest - width, spare)
        spare -= column.max_width - width
    return needed


def _longest(column: Column, console: Console) -> int:
    return max(console.measure(cell).maximum for cell in (column.header, *column.cells))


def new_table(title: str | None, labels: Iterable[str]) -> Table:
    """A table with a title, whose first columns are these, of texts."""
    heading = None if title is None else as_text(title)
    table = Table(box=box.SIMPLE_HEAD, title=heading, title_justify="left", title_style="bold")
    table.show_edge = False
    table.pad_edge = False
    table.padding = (0, 1, 0, 0)
    add_labels(table, *labels)
    return table


def add_labels(table: Table, *names: str, width: int = LABEL_WIDTH) -> None:
    """Add columns of texts, which fold where the console is narrow, down to a minimum width."""
    for name in names:
        table.add_column(_heading(name), overflow="fold", min_width=width)


def add_numbers(table: Table, *names: str) -> None:
    """Add columns of figures, which never lose a digit."""
    for name in names:
        table.add_column(_heading(name), justify="right", no_wrap=True)


def add_row(table: Table, *cells: str, style: str | None = None) -> None:
    """Add a row of plain texts: a tenant called `[red]` is a name, not markup."""
    table.add_row(*(Text(printable(cell)) for cell in cells), style=style)


def as_text(text: str, style: str = "") -> Text:
    """A line of plain text between tables."""
    return Text(printable(text), style)


def _heading(name: str) -> Text:
    """The head of a column, in one line or several."""
    return Text("\n".join(map(printable, name.split("\n"))))
