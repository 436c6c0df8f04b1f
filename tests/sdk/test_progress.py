"""Long commands: what they say in a pipe, and what is said when they are ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from polar_sdk.show import progress
from polar_sdk.show.progress import ProgressBars, interruptible, stage, through

if TYPE_CHECKING:
    from pathlib import Path


class Clock:
    """A clock that stands still unless it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_lines_say_how_long_it_takes(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBars() as show:
        for done in range(401):  # a step a second
            clock.now = done
            show("prompts", done, 400)
    lines = capsys.readouterr().err.splitlines()
    assert "0 of 400" in lines[0]
    left = [(int(found[1]), found[2]) for line in lines[1:] if (found := re.search(r"(\d+) of 400, (.+) left", line))]
    assert left[0] == (5, "about 7 min")
    assert [done for done, _ in left[1:]] == list(range(35, 401, 30))
    assert left[-1] == (395, "about 10 s")


def test_steps_that_were_done_before_do_not_count(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """What a cache answers at once says nothing of the rest."""
    with ProgressBars() as show:
        for now, done in ((0.0, 0), (0.1, 300), (5.0, 301), (35.0, 304)):
            clock.now = now
            show("prompts", done, 400)
    assert "304 of 400, about 16 min left" in capsys.readouterr().err.splitlines()[-1]


def test_a_stage_that_begins_again_counts_from_zero(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """A fit answers the prompts of one split, then those of another."""
    with ProgressBars() as show:
        for now, done, total in ((0, 10, 200), (10, 200, 200), (20, 10, 150), (30, 30, 150)):
            clock.now = now
            show("answers", done, total)
    lines = capsys.readouterr().err.splitlines()
    assert "10 of 150" in lines[-2]
    assert "30 of 150, about 60 s left" in lines[-1]
    with ProgressBars(at_once=False) as show:
        for done in (0, 3, 0, 3):  # twice what is done at once
            show("requests", done, 3)
    assert capsys.readouterr().err == ""


def test_each_stage_has_lines_and_quiet_ones_have_none(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBars() as show:
        assert list(through(show, "rows", "abc", 3)) == ["a", "b", "c"]
        show("links", 0, 10)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["rows:", "links:"]
    with ProgressBars(at_once=False) as show:
        for now in range(7):  # what is done in seconds says nothing
            clock.now = now
            show("links", now, 100)
    (line,) = capsys.readouterr().err.splitlines()
    assert "5 of 100, about 2 min left" in line
    with ProgressBars(quiet=True) as show:
        show("links", 0, 10)
    assert capsys.readouterr().err == ""


def test_many_steps_are_shown_now_and_then() -> None:
    shown: list[tuple[str, int, int]] = []
    taken = through(lambda *step: shown.append(step), "rows", range(123_456), 123_000)  # more have come meanwhile
    assert list(taken) == list(range(123_456))
    assert 500 < len(shown) < 2000
    assert shown == sorted(shown)
    assert (shown[0], shown[-1]) == (("rows", 0, 123_000), ("rows", 123_000, 123_000))


@pytest.mark.parametrize(("at_once", "seconds", "drawn"), [(True, 0, True), (False, 0, False), (False, 3, True)])
def test_a_bar_is_drawn_of_what_lasts(
    at_once: bool,
    seconds: float,
    drawn: bool,
    clock: Clock,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with ProgressBars(at_once=at_once) as show:
        for done in range(4):
            clock.now = seconds * done / 3
            show("rows", done, 3)
    assert ("3/3" in capsys.readouterr().err) == drawn


def test_bytes_have_lines_as_well(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with stage("fetching a model", 400_000_000) as show:
        for done in range(0, 400_000_001, 10_000_000):
            clock.now = done / 2_000_000
            show(done)
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first.endswith("fetching a model")
    assert second.endswith("10 MB of 400 MB, about 3 min left")


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(143)])
def test_who_is_interrupted_says_how_to_go_on(end: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(end)), interruptible("it is kept"):
        raise end
    assert capsys.readouterr().err == "note: it is kept.\n"
    with pytest.raises(ValueError, match="other"), interruptible():
        raise ValueError("other")
    assert capsys.readouterr().err == ""


@pytest.mark.model
def test_a_command_that_is_ended_keeps_its_work_and_says_so(tmp_path: Path) -> None:
    begin = "from polar_sdk.cli.main import main; main()"
    command = [sys.executable, "-c", begin, "evaluate", "--limit", "60", "--timed", "0"]
    environment = {**os.environ, "POLAR_LEDGER": f"sqlite:///{tmp_path}/ledger.sqlite3"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    ) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if re.search(r"\d+ of \d+", line):
                break
        running.send_signal(signal.SIGTERM)
        rest = running.stderr.read()
    assert running.returncode == 128 + signal.SIGTERM
    assert re.search("^note: .*resumes", rest, re.MULTILINE)
