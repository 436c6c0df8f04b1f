"""What a person sees while a model is prepared: a bar on a terminal, else one line a stage.

All of it goes to standard error. It does not know what is being done.

Progress bars on standard error for commands that take a while.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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


class ProgressBars:
    """One bar per stage; called with (stage, steps done, steps in all)."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=quiet,
        )
        self._tasks: dict[str, int] = {}

    def __enter__(self) -> ProgressBars:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total)
        self._bar.update(self._tasks[stage], completed=done, total=total)  # type: ignore[arg-type]
