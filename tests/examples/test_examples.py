"""Every example runs as a user runs it, from another folder, and prints what it promises, its bill at the end."""

from __future__ import annotations

import re
import subprocess
import sys
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest

from tests.examples.conftest import EXAMPLES

if TYPE_CHECKING:
    from pathlib import Path

EXPECTED = {
    "quickstart.py": ["Paris", "layer 15 has 2 visits", "outcome cancelled: "],
    "langchain_chain.py": [
        "['Red', 'Blue', 'Green']",
        "batch: rows decode together",
        "app=example: 4 requests",
    ],
    "langchain_rag.py": ["7 paragraphs in the store", "up to twelve items", "from: Borrowing", "from: Computers"],
    "langchain_agent.py": [
        "calls opening_hours with {'day': 'Thursday'}",
        "10:00 to 21:00",
        "Printing 12 pages costs 120 cents",
        "The capital of France is Paris.",
    ],
    "langchain_extraction.py": ["Booking(name='Anna Weber', guests=4, day='Friday')", "all 10 answers are bookings"],
    "llama_index_rag.py": ["7 paragraphs indexed", "from: Borrowing", "from: Computers", "A conversation", "one week"],
    "billing_report.py": ["The bill, USD", "globex  total", "the book 'next-year'", "report.html"],
}
BILLS = {
    "langchain_chain.py": {"acme", "globex", "default"},
    "langchain_rag.py": {"acme", "globex"},
    "langchain_agent.py": {"acme", "globex"},
    "langchain_extraction.py": {"acme"},
    "llama_index_rag.py": {"acme", "globex"},
}
"""The tenants on the bill at the end."""
ELSEWHERE = {"fastapi_app.py"}
"""Programs that have a test of their own."""
SHARED = {"bill.py", "minilm.py"}
"""Modules that the programs import."""


def test_every_example_is_expected() -> None:
    assert {file.name for file in EXAMPLES.glob("*.py")} == set(EXPECTED) | ELSEWHERE | SHARED


def test_every_example_is_in_the_list() -> None:
    listed = re.findall(r"^\| `([\w.]+)` \|", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(listed) == set(EXPECTED) | ELSEWHERE | {file.name for file in EXAMPLES.glob("*.ipynb")}


@pytest.mark.model
@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", str(EXAMPLES / name)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr.count("Traceback")
    for expected in EXPECTED[name]:
        assert expected in done.stdout
    if name in BILLS:
        assert bill_of(done.stdout) == BILLS[name]
    assert list(tmp_path.iterdir()) == [], "the user's ledger was touched"


def bill_of(printed: str) -> set[str]:
    """The tenants on the bill that ends what was printed; its lines add up to its total."""
    bill = printed.partition("The bill, from the ledger\n")[2]
    lines = re.findall(r"^  (\w+) .* CU  ([\d.]+) USD", bill, re.MULTILINE)
    [total] = re.findall(r"^  total: ([\d.]+) USD$", bill, re.MULTILINE)
    assert sum(Decimal(cost) for _, cost in lines) == Decimal(total) > 0
    return {tenant for tenant, _ in lines}
