"""Every example runs as a user runs it, from another folder, and prints what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
EXPECTED = {
    "quickstart.py": ["Paris", "layer 15 has 2 visits", "outcome cancelled: "],
    "langchain_chain.py": [
        "batch: rows decode together",
        "usage_metadata {'input_tokens'",
        "tenant globex",
        "app=example",
    ],
    "llama_index_rag.py": ["7 paragraphs indexed", "from: Borrowing", "from: Computers", "tenant globex"],
    "billing_report.py": ["The bill, USD", "globex  total", "the book 'next-year'", "report.html"],
}


def test_every_example_is_expected() -> None:
    assert {file.name for file in EXAMPLES.glob("*.py")} == set(EXPECTED)


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
