"""`polar demo`, over the tiny engine and, as users run it, on the real model."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import typer
from typer.testing import CliRunner

from langchain_polar import ChatPolar, demo
from polar_sdk import PolarModel, Policy
from polar_sdk.testing import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

billing: Any = pytest.importorskip("polar_billing.cli")


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """A `polar` with the commands that the demo needs, over the tiny engine."""

    def model(ledger: Path) -> ChatPolar:
        return ChatPolar(engine=tiny_model(ledger=f"sqlite:///{ledger}", context_window=8192), max_tokens=16)

    monkeypatch.setattr(demo, "_model", model)
    app = typer.Typer()
    billing.register(app)
    demo.register(app)
    return app


def test_it_shows_prompts_prices_ledger_and_report(app: typer.Typer, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    for question in demo.QUESTIONS:
        assert question.text in done.output
    assert done.output.count("GFLOP, ") == len(demo.QUESTIONS)
    assert "cancelled" in done.output
    assert str(tmp_path / "out" / demo.REPORT) in done.output
    page = (tmp_path / "out" / demo.REPORT).read_text(encoding="utf-8")
    assert "acme" in page
    assert "globex" in page


def test_it_has_a_fresh_ledger_of_its_own_and_shows_its_figures(app: typer.Typer, tmp_path: Path) -> None:
    arguments = ["demo", "--json", "--out", str(tmp_path / "out")]
    first, shown = (json.loads(CliRunner().invoke(app, arguments).stdout) for _ in range(2))
    asked = len(demo.QUESTIONS) + 2
    assert len(first["requests"]) == len(shown["requests"]) == asked
    assert not {one["request_id"] for one in first["requests"]} & {one["request_id"] for one in shown["requests"]}
    assert not (tmp_path / "ledger.sqlite3").exists(), "the user's ledger was touched"
    stored = {(one["program"], one["flops"]["total"], one["cost"]) for one in shown["requests"]}
    assert {(one["program"], one["flops"], one["cost"]) for one in shown["answers"]} <= stored
    assert {one["tenant"] for one in shown["answers"]} == {"acme", "globex"}
    assert {one["tier"] for one in shown["answers"]} == {"economy", "standard", "premium"}
    (left,) = [one for one in shown["requests"] if one["outcome"] == "cancelled"]
    assert left["tokens"]["output"] < demo.MAX_TOKENS  # the longest answer of the demo


def test_a_model_without_a_router_answers_at_full_depth(
    app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(ledger: Path) -> ChatPolar:
        engine = PolarModel(tiny_model(context_window=8192).loaded, policy=Policy(), ledger=f"sqlite:///{ledger}")
        return ChatPolar(engine=engine, max_tokens=4)

    monkeypatch.setattr(demo, "_model", model)
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "no certified router for economy, premium, standard" in " ".join(done.output.split())
    shown = json.loads(CliRunner().invoke(app, ["demo", "--json", "--out", str(tmp_path / "out")]).stdout)
    assert {one["tier"] for one in shown["answers"]} == {"exact"}
    assert {one["saved"] for one in shown["answers"]} == {0.0}


@pytest.mark.model
def test_polar_demo_as_a_user_types_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from polar_sdk.cli.main import main; main()", "demo", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "Traceback" not in done.stderr
    assert (tmp_path / demo.REPORT).exists()
