"""Names that steer terminals, run formulas or forge lines: no command prints them as they are.

Requests refuse such names; older ledgers, records of other programs and price books may hold them.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

import polar_billing
from polar_billing.budgets.budget import Budget, Level
from polar_billing.budgets.enforcement import Budgets
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.testing import usage_record
from polar_billing.values.periods import Period
from polar_sdk.cli.main import app
from polar_sdk.usage import AS_STORED, Offer, UsageBound, UsageRecord

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result

    from polar_billing.ledger.ledger import Ledger

OCTOBER = datetime(2026, 10, 15, tzinfo=UTC)
FORGED = "The ledger is sound: all of it"
NAMES = [
    "\x1b]0;pwn\x07\x1b[2J",
    f"acme: 3\n{FORGED}",
    f"acme\r\n{FORGED}\x85x\u2028x\u2029{FORGED}",
    "a\u202eb\u2066c\u200bd\ufeffe",
    "\x9b31mred\x7f",
    '=HYPERLINK("http://example.org")',
    "@SUM(1)",
    "+1",
    "-1",
    "\t=1+1",
    "＝1+1",
    "[bold]big[/bold] [link=x]",
    "<script>alert(1)</script>",
    "$\\frac{a}{b}$",
]
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


def run(*words: str) -> Result:
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)
    return result


def checked(*words: str) -> str:
    """Run a command; nothing that it prints steers a terminal or forges a line."""
    result = run(*words)
    for output in (result.stdout, result.stderr):
        assert CONTROL.search(output) is None, (words, output)
        assert not any(line.lstrip(" \"'").startswith(FORGED) for line in output.split("\n")), (words, output)
    if "--json" in words and result.exit_code == 0:
        json.loads(result.stdout)
    if "--csv" in words:
        for row in csv.reader(io.StringIO(result.stdout)):
            for cell in row:
                assert not re.match(r"\s*[=+@＝]|\s*-(?![\d.]+$)", cell), (words, cell)
    return result.stdout


def toml(text: str) -> str:
    """A string in TOML; control characters escaped."""
    return json.dumps(text).replace("\x7f", "\\u007f")


@pytest.fixture
def books(tmp_path: Path) -> list[Path]:
    """Two versions of a price book in which everything that has a name has a hostile one."""
    paths = []
    for version, fee in enumerate(("1", "2")):
        plans = "".join(
            f'[plans.{toml(name)}]\n[[plans.{toml(name)}.terms]]\neffective_from = 2020-01-01\nflat_fee = "{fee}"\n'
            for name in NAMES
        )
        customers = "".join(
            f"[[customers]]\ntenant = {toml(name)}\nplan = {toml(name)}\neffective_from = 2020-01-01\n"
            f"[[credits]]\nid = {toml(name)}\ntenant = {toml(name)}\namount = 1\neffective_from = 2020-01-01\n"
            for name in NAMES
        )
        path = tmp_path / f"prices{version}.toml"
        path.write_text(
            f'id = {toml(NAMES[0] + NAMES[1])}\ncurrency = "USD"\n[[prices]]\neffective_from = 2020-01-01\n'
            f"per_compute_unit = 1\n[prices.tiers]\nstandard = 1\n{plans}{customers}",
            encoding="utf-8",
        )
        paths.append(path)
    return paths


@pytest.fixture
def hostile(ledger: Ledger, books: list[Path], monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """A ledger with hostile tenants, requests, tags, tiers, models, budgets, holds, statements and credit notes."""
    monkeypatch.setattr(Budget, "check_names", lambda _: None)
    book = PriceBook.load(books[0])
    meter, budgets = Meter(ledger, prices=book), Budgets(ledger)
    month = Period.month("2026-10", "UTC")
    for name in NAMES:
        tags = {name: name, "user": name, "team": name}
        whose = {"tenant": name.strip(), "tags": tags}
        meter.emit(stored_record({**whose, "request_id": f"r{name}".strip(), "model": name}))
        meter.emit(stored_record({**whose, "request_id": f"u{name}".strip(), "tier": name}))  # unrated
        for level, who in ((Level.TENANT, None), (Level.USER, name)):
            budgets.set(Budget(name, Decimal("0.5"), level=level, name=who))
        offers = (Offer(program="0", flops_bound=1),)
        now = datetime.now(UTC)
        bound = {**whose, "request_id": f"h{name}".strip(), "tokens_input": 1, "tokens_output_max": 1}
        bound |= {"offers": offers, "at": now}
        budgets.reserve(UsageBound.model_validate(bound, context=AS_STORED), book, source="polar")
    meter.close()
    for name in NAMES[::3]:
        issued = polar_billing.issue_statement(ledger, name.strip(), month, book=book).statement
        polar_billing.credit_note(ledger, name.strip(), issued.id, Decimal("0.1"), reason=name, reference=name)
    return ledger


def stored_record(changes: dict[str, Any]) -> UsageRecord:
    """A record as earlier versions accepted it."""
    facts = usage_record(started_at=OCTOBER).model_dump()
    return UsageRecord.model_validate({**facts, **changes}, context=AS_STORED)


def test_no_command_prints_names_as_they_are(hostile: Ledger, books: list[Path], tmp_path: Path) -> None:
    stored = [name.strip() for name in NAMES]
    month = ("--month", "2026-10")
    old, new = map(str, books)
    for shown in ((), ("--json",), ("--csv", "-")):
        checked("usage", *shown)
        checked("usage", "--by", "tenant", "--by", f"tag:{NAMES[0]}", "--by", "tag:team", "--by", "model", *shown)
        checked("report", *shown)
        checked("report", "--what-if", new, *shown)
        checked("reprice", "--book", new, *month, *shown)
        checked("budget", "show", *shown)
        checked("budget", "holds", *shown)
        for name in (stored[1], stored[3], stored[5]):
            checked("usage", "--tenant", name, *shown)
            checked("statement", "--tenant", name, *month, "--book", old, *shown)
            checked("budget", "show", "--tenant", name, *shown)
    for shown in ((), ("--json",)):
        checked("usage", "--requests", "--last", "100", *shown)
        checked("verify", *shown)
        checked("budget", "recheck", *shown)
        checked("price", "show", old, *shown)
        checked("price", "diff", new, old, *shown)
        checked("price", "diff", new, *shown)
        checked("price", "quote", "--flops", "1", "--tier", "standard", "--book", old, *shown)
        checked("price", "quote", "--flops", "1", "--tier", NAMES[0], "--book", old, *shown)
    for name in [stored[0], stored[2], f"nobody\x1b[2J\u202e\n{FORGED}"]:
        tag, tenant = ("--tag", f"team={name}"), ("--tenant", name)
        checked("usage", *tag)
        checked("usage", "--tag", f"team={name}x", *tenant, "--tier", name, "--model", name)
        checked("usage", "--tag", f"={name}")
        checked("verify", *tenant)
        checked("receipt", f"r{name}", *tenant)
        checked("receipt", name, *tenant)
        checked("explain", f"r{name}", *tenant)
        checked("explain", f"r{name}", "--json")
        checked("explain", name, "--source", name, *tenant)
        checked("statement", *tenant)
        checked("statement", *tenant, "--json")
        checked("statement", *tenant, *month, "--trace", "1")
        checked("statement", *tenant, *month, "--zone", name)
        checked("credit-note", name, "1", *tenant, "--reason", name, "--reference", name)
        checked("report", *tenant)
        checked("budget", "set", name, "1", "CU")
        checked("budget", "set", name, "1", name, "--user", name, "--window", name)
        checked("budget", "close", name, "CU", "--user", name)
        checked("budget", "close", name, "CU", "--user", name)
        checked("price", "quote", "--flops", "1", "--at", name)
        checked("prune", "--before", "2026-11-01", "--yes", *tenant)
        checked("usage", "--ledger", str(tmp_path / f"{name.replace('/', '')}.sqlite3"))
        checked("price", "show", str(tmp_path / f"{name.replace('/', '')}.toml"))
    for path in (old, old, new):
        checked("price", "add", path)
    checked("price", "show")
    checked("verify")
    checked("prune", "--before", "2026-11-01", "--yes")
    checked("prune", "--before", "2026-11-01", "--yes")


def test_json_says_the_names_as_they_are(hostile: Ledger) -> None:
    rows = json.loads(checked("usage", "--by", "tenant", "--json"))
    assert {row["group"]["tenant"] for row in rows} == {name.strip() for name in NAMES}


def test_a_page_shows_no_control_characters_and_runs_no_script(hostile: Ledger) -> None:
    page = checked("report", "--html", "-")
    assert page.count("<script") == 1  # the page's own, after the last name
    assert page.index("<script") > page.rindex("</section>")
    assert "&lt;script&gt;" in page
    assert "$\\frac{a}{b}$" in page


def test_an_overdrawn_budget_is_a_number_in_csv(hostile: Ledger) -> None:
    Budgets(hostile).set(Budget("acme", Decimal(1)))
    meter = Meter(hostile)
    meter.emit(usage_record(tenant="acme", prompt=100_000, started_at=datetime.now(UTC)))
    meter.close()
    (row,) = csv.DictReader(io.StringIO(checked("budget", "show", "--tenant", "acme", "--csv", "-")))
    assert Decimal(row["left"]) < 0


def test_an_unbroken_table_of_ordinary_names(ledger: Ledger) -> None:
    meter = Meter(ledger)
    meter.emit(usage_record(tenant="Société\u00a0Générale 検索 [red] :smile:"))
    meter.close()
    shown: dict[str, Any] = {way: checked("usage", *way.split()) for way in ("", "--csv -", "--json")}
    assert all("Société\u00a0Générale 検索 [red] :smile:" in output for output in shown.values())


@pytest.mark.parametrize("command", ["report", "usage --requests", "usage --csv -"])
def test_an_encoding_that_lacks_a_letter(ledger: Ledger, command: str) -> None:
    meter = Meter(ledger)
    meter.emit(usage_record("检索", tenant="Société", tier="ökonomisch"))
    meter.close()
    result = subprocess.run(
        [sys.executable, "-c", "from polar_sdk.cli.main import main; main()", *command.split()],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert "Société" in result.stdout.decode().replace("\\xe9", "é")  # escaped, or as UTF-8 all the same
