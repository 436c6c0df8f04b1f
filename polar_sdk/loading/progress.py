"""What a person sees while a model is prepared: a bar on a terminal, else one line a stage.

All of it goes to standard error. It does not know what is being done.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["say", "stage"]


def say(line: str) -> None:
    """Print one line about what is going on."""
    print(f"polar: {line}", file=sys.stderr, flush=True)


@contextmanager
def stage(label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show one stage while the block runs.

    Args:
        label: What is being done.
        total: Bytes to expect; None for a stage that cannot tell how far it is.

    Yields:
        A function that takes the number of bytes done so far.
    """
    if not sys.stderr.isatty():
        say(label)
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    sized = (BarColumn(), DownloadColumn()) if total is not None else (SpinnerColumn(),)
    console = Console(file=sys.stderr)
    with Progress(TextColumn("polar: {task.description}"), *sized, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)
        if total is not None:
            bar.update(task, completed=total)
