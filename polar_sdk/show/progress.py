"""Progress: how long-running work reports its progress, and what a person sees of it on standard error.

Knows nothing of the work.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from polar_sdk.show.lines import print_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.progress import Progress as Bar
    from rich.progress import ProgressColumn, TaskID

T = TypeVar("T")


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
    """Show one stage while the block runs: a bar on a terminal, else a line, and one now and then if it has a size.

    Args:
        label: What is being done.
        total: Bytes to expect; None for a stage that cannot say how far it is.

    Yields:
        A function that takes the number of bytes done so far.
    """
    if not sys.stderr.isatty():
        say(label)
        lines = _Lines(label, lambda size: f"{size / 1e6:,.0f} MB", said=True)
        yield lambda done: None if total is None else lines.show(done, total)
        return
    from rich.progress import BarColumn, DownloadColumn, SpinnerColumn, TimeElapsedColumn

    sized = (BarColumn(), DownloadColumn()) if total is not None else (SpinnerColumn(),)
    with _bar("polar: ", *sized, TimeElapsedColumn()) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)
        if total is not None:
            bar.update(task, completed=total)


_SOON: Final = 5.0
"""Time after which a stage can say how long it takes. Unit: seconds."""
_EVERY: Final = 30.0
"""Time between lines about one stage after that, where no bar can be drawn. Unit: seconds."""
_MOMENT: Final = 1.0
"""Time after which a bar is drawn of what may have ended by then. Unit: seconds."""
_UPDATES: Final = 1000
"""Number of times that a stage of many short steps is shown anew."""


class _Lines:
    """Lines about one stage, where no bar can be drawn: what there is to do, then how far it is and for how long more.

    Args:
        label: The stage.
        written: A number of steps, as text.
        said: Whether the first line was printed, or is not to be.
    """

    def __init__(self, label: str, written: Callable[[int], str] = "{:,}".format, *, said: bool) -> None:
        self._label, self._written = label, written
        self._silent_at_first = said
        self._begin()

    def _begin(self) -> None:
        self._done = 0
        self._said: tuple[float, int] | None = (monotonic(), 0) if self._silent_at_first else None
        self._wait = _SOON

    def show(self, done: int, total: int) -> None:
        """Print a line where it is time; if fewer steps are done than before, the stage has begun again."""
        if done < self._done:
            self._begin()
        self._done = done
        now, of = monotonic(), f"{self._written(done)} of {self._written(total)}"
        if self._said is None:
            self._said = now, done
            if done < total:  # how long steps take is not known before some are done
                say(f"{self._label}: {of}; how long it takes shows in a moment")
            else:
                say(f"{self._label}: {of}")
            return
        before, earlier = self._said
        if now < before + self._wait:
            return
        self._said, self._wait = (now, done), _EVERY
        left = "" if done <= earlier else f", {_duration((now - before) / (done - earlier) * (total - done))} left"
        say(f"{self._label}: {of}{left}")


def _duration(seconds: float) -> str:
    """A time that was estimated, in words."""
    if seconds < 90:
        return f"about {max(1, round(seconds / 10)) * 10} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


class ProgressBars:
    """One bar per stage, or a line now and then where standard error is not a terminal; a `Progress`.

    Args:
        quiet: Show nothing.
        at_once: Whether there is a bar or a line when a stage begins; else once it has lasted for a moment.
    """

    def __init__(self, *, quiet: bool = False, at_once: bool = True) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

        self._at_once = at_once
        self._in_lines = not quiet and not sys.stderr.isatty()
        self._bar = _bar("", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), quiet=quiet or self._in_lines)
        self._tasks: dict[str, TaskID] = {}
        self._lines: dict[str, _Lines] = {}
        self._begun = monotonic()
        self._drawn = False

    def __enter__(self) -> ProgressBars:
        if self._at_once:
            self._draw()
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            self._bar.stop()

    def _draw(self) -> None:
        self._bar.start()
        self._drawn = True

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """Show how far a stage is."""
        if self._in_lines:
            if stage not in self._lines:
                self._lines[stage] = _Lines(stage, said=not self._at_once)
            self._lines[stage].show(done, total)
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total)
        self._bar.update(self._tasks[stage], completed=done, total=total)
        if not self._drawn and monotonic() > self._begun + _MOMENT:
            self._draw()


def through(progress: Progress, stage: str, steps: Iterable[T], total: int) -> Iterator[T]:
    """The steps, shown as they are taken."""
    progress(stage, 0, total)
    several, left = max(1, total // _UPDATES), iter(steps)
    done = 0
    while taken := list(islice(left, several)):
        yield from taken
        done += len(taken)
        progress(stage, min(done, total), total)


@contextmanager
def interruptible(kept: str = "the same command resumes where it stopped") -> Iterator[None]:
    """Say after Ctrl-C or SIGTERM what is not lost, and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print_line(f"note: {kept}.", err=True)
        raise


def _bar(prefix: str, *columns: ProgressColumn, quiet: bool = False) -> Bar:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TextColumn

    return Bar(TextColumn(prefix + "{task.description}"), *columns, console=Console(stderr=True), disable=quiet)
