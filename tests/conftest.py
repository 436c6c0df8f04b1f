"""Shared fixtures. Every test gets a ledger of its own, so that none writes to the user's."""

from __future__ import annotations

import os
import signal
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Ctrl-C interrupts tests and the processes that they start, also in a run that was started with SIGINT ignored, as
# `make test &` in a script, nohup and some CI do: only a signal that is ignored stays so in a new process.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Where records of a PostgreSQL ledger wait: not beside the user's own.
_DATA = TemporaryDirectory(prefix="polar-tests-", ignore_cleanup_errors=True)
os.environ["XDG_DATA_HOME"] = _DATA.name
# A busy machine must not fail a test. A gate repeats itself, so that a change fails by what it changed; whoever runs
# the tests by hand draws new examples every time.
settings.register_profile(
    "polar", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("polar")


@pytest.fixture(autouse=True)
def ledger_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh SQLite ledger, and the default one for the test."""
    url = f"sqlite:///{tmp_path / 'ledger.sqlite3'}"
    monkeypatch.setenv("POLAR_LEDGER", url)
    monkeypatch.delenv("POLAR_PRICE_BOOK", raising=False)
    monkeypatch.delenv("POLAR_MODEL", raising=False)
    return url


@pytest.fixture(autouse=True)
def no_chance_audits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Audits by default choose no request, so that no test sees one by chance; who wants some asks for a share."""
    monkeypatch.setattr("polar_sdk.request.selection.DEFAULT_SHARE", 1e-12)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One torch thread for tiny models: their matrices are so small that a second one only waits."""
    before = torch.get_num_threads()
    if request.node.get_closest_marker("model") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
