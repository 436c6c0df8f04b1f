"""Progress: how long-running work reports how far it is, and what a person sees of it on standard error.

Knows nothing of the work.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol

from polar_sdk.show.lines import print_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import Progress as Bar
    from rich.progress import ProgressColumn, TaskID


class Progress(Protocol):
    """Callback of long-running work, with (stage, steps done, steps in total)."""

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """Report how far a stage is."""


def silent(stage: str, done: int, total: int, /) -> None:
    """Show nothing."""


def say(line: str) -> None:
    """Print one line about what is happening."""
    print_line(f"polar: {line}", err=True)


@contextmanager
def stage(label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show one stage while the block runs: a bar on a terminal, else one line.

    Args:
        label: What is being done.
        total: Bytes to expect; None for a stage that cannot say how far it is.

    Yields:
        A function that takes the number of bytes done so far.
    """
    if not sys.stderr.isatty():
        say(label)
        yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, SpinnerColumn, TimeElapsedColumn

    sized = (BarColumn(), DownloadColumn()) if total is not None else (SpinnerColumn(),)
    with _bar("polar: ", *sized, TimeElapsedColumn()) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)
        if total is not None:
            bar.update(task, completed=total)


_EVERY: Final = 30.0
"""Time between lines about one stage, where no bar can be drawn. Unit: seconds."""


class ProgressBars:
    """One bar per stage, or a line now and then where standard error is not a terminal; a `Progress`."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

        self._in_lines = not quiet and not sys.stderr.isatty()
        self._bar = _bar("", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), quiet=quiet or self._in_lines)
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}

    def __enter__(self) -> ProgressBars:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """Show how far a stage is."""
        if self._in_lines and monotonic() >= self._said.get(stage, -_EVERY) + _EVERY:
            self._said[stage] = monotonic()
            say(f"{stage}: {done:,} of {total:,}")
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total)
        self._bar.update(self._tasks[stage], completed=done, total=total)


def _bar(prefix: str, *columns: ProgressColumn, quiet: bool = False) -> Bar:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TextColumn

    return Bar(TextColumn(prefix + "{task.description}"), *columns, console=Console(stderr=True), disable=quiet)
