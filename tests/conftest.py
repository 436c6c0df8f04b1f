"""Shared fixtures. Every test gets a ledger of its own, so that none writes to the user's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def ledger_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh SQLite ledger, and the default one for the test."""
    url = f"sqlite:///{tmp_path / 'ledger.sqlite3'}"
    monkeypatch.setenv("POLAR_LEDGER", url)
    monkeypatch.delenv("POLAR_PRICE_BOOK", raising=False)
    return url
