"""`polar simulate` as users run it: tables, JSON, ledgers for the other commands, Ctrl-C, a soak, mistakes."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from polar_billing import Ledger, verify_ledger
from polar_billing import cli as billing
from polar_sdk.errors import DataError, InvalidRequestError, PolarError
from polar_sdk.testing import tiny_model, tiny_policy
from polar_simulate import cli

QUICK = ("--requests", "20", "--factor", "1e8")
_COMMAND = """
from polar_sdk.cli import main as polar
from polar_simulate import cli
if "simulate" not in polar.typer.main.get_command(polar.app).commands:  # installed before there was one
    cli.register(polar.app)
"""
_TINY = """
from polar_sdk.testing import tiny_model
cli._model = lambda *_, **__: tiny_model(context_window=1024)
"""


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """A `polar` with the commands of billing and `simulate`, over the tiny engine."""
    monkeypatch.setattr(cli, "_model", lambda *_, **__: tiny_model(context_window=1024))
    app = typer.Typer()
    billing.register(app)
    cli.register(app)
    return app


def figures(app: typer.Typer, folder: Path, *arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["simulate", "--json", "--output", str(folder), *arguments])
    assert done.exit_code == 0, done.output
    shown: dict[str, Any] = json.loads(done.stdout)
    assert shown == json.loads((folder / cli.FIGURES).read_text(encoding="utf-8"))
    return shown


class TestOutput:
    def test_one_table_has_both_ways(self, app: typer.Typer, tmp_path: Path) -> None:
        done = CliRunner().invoke(app, ["simulate", "--output", str(tmp_path), "--seeds", "2", *QUICK])
        assert done.exit_code == 0, done.output
        for said in ("full depth", "routed", "latency p99, s", "per 1,000 requests", "FLOPs saved against full depth"):
            assert said in done.output
        for assumed in ("inhomogeneous Poisson process", "100,000,000.0 times as fast", "as asked for", "price book"):
            assert assumed in done.output
        assert done.output.count(": sound, ") == 4

    def test_its_ledgers_serve_the_other_commands(self, app: typer.Typer, tmp_path: Path) -> None:
        shown = figures(app, tmp_path, *QUICK)
        (routed,) = shown["routed"]
        asked = CliRunner().invoke(app, ["usage", "--json", "--by", "tier", "--ledger", routed["ledger"]])
        rows = {row["group"]["tier"]: row for row in json.loads(asked.stdout)}
        assert {tier: row["flops"] for tier, row in rows.items()} == {
            tier: share["flops"] for tier, share in routed["by_tier"].items()
        }
        for command in (["verify"], ["report"], ["budget", "show"]):
            assert CliRunner().invoke(app, [*command, "--ledger", routed["ledger"]]).exit_code == 0

    def test_capacity_is_measured_where_no_factor_is_given(self, app: typer.Typer, tmp_path: Path) -> None:
        shown = figures(app, tmp_path, "--requests", "5", "--load", "0.9")
        assert shown["peak_requests_per_second"] == pytest.approx(0.9 * shown["capacity_requests_per_second"])
        assert any("90% of the" in line for line in shown["assumptions"])

    def test_prompts_of_a_file(self, app: typer.Typer, tmp_path: Path) -> None:
        path = tmp_path / "mine.jsonl"
        path.write_text('{"prompt": "Hello there", "tenant": "acme", "tier": "premium", "max_tokens": 3}\n')
        shown = figures(app, tmp_path, *QUICK, "--prompts", str(path))
        assert list(shown["routed"][0]["by_tier"]) == ["premium"]
        assert shown["routed"][0]["tokens_output"] <= 3 * 20
        assert any(line.startswith("Prompts: 1 of a file") for line in shown["assumptions"])

    def test_a_soak_watches_memory_and_ledger(self, app: typer.Typer, tmp_path: Path) -> None:
        shown = figures(app, tmp_path, "--soak", "0.03", "--requests", "20", "--factor", "2e5")
        assert shown["sent"] > 20, "one day was not followed by the next"
        assert shown["faults"] == []
        assert shown["records_stored"] == shown["sent"] - shown["ends"].get("refused", 0)
        assert len(shown["memory"]) > 10
        assert shown["memory_drift"] is not None
        with Ledger(f"sqlite:///{shown['ledger']}") as ledger:
            assert verify_ledger(ledger).sound


class TestCtrlC:
    def test_it_gives_what_there_is_and_a_ledger_that_verifies(self, tmp_path: Path) -> None:
        """A day of an hour, interrupted when some answers are stored."""
        run = f"{_COMMAND}{_TINY}polar.main()"
        command = [sys.executable, "-c", run, "simulate", "--json", "--output", str(tmp_path)]
        process = subprocess.Popen(
            [*command, "--requests", "20000", "--factor", "24"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            self.wait_for_records(tmp_path / "full-depth-seed-0.sqlite3", 3, process)
            process.send_signal(signal.SIGINT)
            out, errors = process.communicate(timeout=120)
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == 130, errors
        assert "Traceback" not in errors
        shown = json.loads(out)
        assert shown["interrupted"] is True
        (trial,) = shown["full_depth"]
        assert 3 <= trial["sent"] < trial["arrivals"] == 20_000
        assert trial["faults"] == []
        assert shown["routed"] == []
        with Ledger(f"sqlite:///{trial['ledger']}") as ledger:
            assert verify_ledger(ledger).sound

    @staticmethod
    def wait_for_records(path: Path, count: int, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if path.exists():
                with closing(sqlite3.connect(path)) as database:
                    try:
                        if database.execute("SELECT count(*) FROM polar_usage").fetchone()[0] >= count:
                            return
                    except sqlite3.OperationalError:  # no tables yet, or locked
                        pass
            time.sleep(0.05)
        raise AssertionError(f"no {count} records; exit code {process.poll()}")


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "kind", "said"),
        [
            (["--load", "0"], InvalidRequestError, "the load 0.0 is out of range"),
            (["--load", "nan"], InvalidRequestError, "the load nan is out of range"),
            (["--factor", "-2"], InvalidRequestError, "the factor -2.0 is out of range"),
            (["--load", "0.5", "--factor", "2"], InvalidRequestError, "give one of them"),
            (["--soak", "0"], InvalidRequestError, "--soak 0.0 is out of range"),
            (["--soak", "1", "--seeds", "2"], InvalidRequestError, "do not go together"),
            (["--prompts", "missing.jsonl"], DataError, "cannot be read"),
        ],
    )
    def test_one_line_each(self, app: typer.Typer, tmp_path: Path, arguments: list[str], kind: Any, said: str) -> None:
        done = CliRunner().invoke(app, ["simulate", "--output", str(tmp_path / "out"), *arguments])
        assert isinstance(done.exception, kind)
        assert said in str(done.exception)
        assert "\n" not in str(done.exception)
        assert not list(tmp_path.glob("out/*.sqlite3")), "something ran"

    @pytest.mark.parametrize("arguments", [["--requests", "0"], ["--seeds", "0"], ["--requests", "many"]])
    def test_numbers_that_are_none(self, app: typer.Typer, arguments: list[str]) -> None:
        assert CliRunner().invoke(app, ["simulate", *arguments]).exit_code == 2

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ({"prompt": "Hello", "tier": "gold"}, "'Hello' cannot run: tier 'gold' is unknown"),
            ({"prompt": "word " * 500}, "cannot run: "),
            ({"prompt": "Hello", "tenant": " acme"}, "cannot run: "),
        ],
    )
    def test_a_prompt_that_cannot_run(self, app: typer.Typer, tmp_path: Path, line: dict[str, Any], said: str) -> None:
        path = tmp_path / "mine.jsonl"
        path.write_text(json.dumps(line))
        done = CliRunner().invoke(app, ["simulate", "--output", str(tmp_path), "--prompts", str(path), *QUICK])
        assert isinstance(done.exception, DataError)
        assert said in str(done.exception)

    def test_a_policy_without_the_tiers(
        self, app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy = tiny_policy(6)
        tiers = {name: tier for name, tier in policy.tiers.items() if name != "economy"}
        poorer = policy.model_copy(update={"tiers": tiers})
        monkeypatch.setattr(cli, "_model", lambda *_, **__: tiny_model(policy=poorer, context_window=1024))
        done = CliRunner().invoke(app, ["simulate", "--output", str(tmp_path), *QUICK])
        assert isinstance(done.exception, PolarError)
        assert "economy" in str(done.exception)

    def test_a_folder_that_is_a_file(self, app: typer.Typer, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        done = CliRunner().invoke(app, ["simulate", "--output", str(tmp_path / "file"), *QUICK])
        assert isinstance(done.exception, OSError)


@pytest.mark.model
def test_polar_simulate_on_the_real_model(tmp_path: Path) -> None:
    arguments = ["simulate", "--requests", "6", "--factor", "40000", "--output", str(tmp_path), "--json"]
    command = [sys.executable, "-c", f"{_COMMAND}polar.main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert [trial["faults"] for way in ("full_depth", "routed") for trial in shown[way]] == [[], []]
    assert shown["full_depth"][0]["saved"] == 0
    assert Path(shown["routed"][0]["ledger"]).exists()
