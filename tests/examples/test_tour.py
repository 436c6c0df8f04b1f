"""The notebook runs from top to bottom, shows what it promises, and is kept in git without outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.examples.conftest import EXAMPLES

if TYPE_CHECKING:
    from pathlib import Path

TOUR = EXAMPLES / "tour.ipynb"


def _read() -> Any:
    return nbformat.read(TOUR, as_version=4)  # type: ignore[no-untyped-call]


def test_it_is_kept_without_outputs() -> None:
    for cell in _read().cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    assert TOUR.stat().st_size < 10_000


@pytest.mark.model
@pytest.mark.filterwarnings("default")  # those of Jupyter are not ours; the cells run in a process of their own
def test_it_runs_and_shows_tiers_bill_and_report(tmp_path: Path) -> None:
    tour = _read()
    for cell in tour.cells:  # an audit, of requests drawn by chance, would add links
        cell.source = cell.source.replace("sink=Meter(ledger)", "sink=Meter(ledger), audit_share=0")
    done = NotebookClient(tour, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    errors = [output.text for output in outputs if output.get("name") == "stderr"]
    assert [text for text in errors if "TqdmWarning" not in text] == [], "only tqdm may ask for ipywidgets"
    everything = "\n".join(map(_text, outputs))
    for expected in (
        "30 layers",
        "| exact | 0-29 |",
        "| economy | ",
        "The capital of France is Paris.",
        "Tokyo",
        "'cancelled': 1",
        "9 links of 3 chains are sound",
        "<iframe srcdoc=",
        "globex",
    ):
        assert expected in everything
    assert list(tmp_path.iterdir()) == [], "the user's ledger was touched"


def _text(output: Any) -> str:
    """The text of one output."""
    if output.output_type == "stream":
        return str(output.text)
    return "\n".join(str(text) for text in output.data.values())
