"""The commands about usage, reports and keys; ledgers that were changed past this package: one line, no traceback."""

from __future__ import annotations

import csv
import io
import json
import re
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from polar_billing.budgets.budget import Budget
from polar_billing.budgets.enforcement import Budgets
from polar_billing.errors import (
    AccessError,
    CurrencyMixError,
    LedgerUnsoundError,
    LedgerUrlError,
    OutputError,
    PeriodError,
    QueryError,
    StoreError,
)
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.metering.meter import Meter
from polar_billing.reports.report import Report, build_report
from polar_billing.reports.text import Amounts
from polar_billing.reports.usage_tables import report_view
from polar_billing.testing import usage_record
from polar_sdk.cli.main import app
from polar_sdk.errors import PolarError
from polar_sdk.show.tables import show
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from polar_billing.ledger.ledger import Ledger


@pytest.fixture
def filled(ledger: Ledger) -> Ledger:
    """Three requests of two tenants."""
    meter = Meter(ledger)
    meter.emit(usage_record("first", tier="economy", path=(0, 1, 4, 5), tags={"team": "search"}))
    meter.emit(usage_record("second", tenant="globex", tier=None, started_at=datetime(2026, 12, 1, tzinfo=UTC)))
    meter.emit(usage_record("third", outcome=Outcome.CANCELLED, started_at=datetime(2026, 12, 2, tzinfo=UTC)))
    return ledger


def test_an_empty_ledger_is_said_in_words(tmp_path: Path, polar: Callable[..., Result]) -> None:
    for command in ("usage", "report", "usage --requests"):
        result = polar(*command.split())
        assert result.exit_code == 0
        assert result.output.startswith(f"No usage yet in the ledger {tmp_path / 'ledger.sqlite3'}")
        assert "polar run" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_ledger_is_not_made_by_looking_into_it(tmp_path: Path, polar: Callable[..., Result]) -> None:
    for command in (
        *(
            "price show",
            "budget show",
            "budget holds",
            "budget recheck",
            "verify",
            "receipt r1",
            "explain r",
        ),
        *("statement --tenant acme", "statement --tenant acme --month 2026-10", "prune --before 2026-01-01 --yes"),
        *("prune --before 2026-01-01 --yes --tenant acme", "credit-note st-1 1 --tenant a --reason b --reference c"),
    ):
        result = polar(*command.split())
        assert result.output if result.exception is None else isinstance(result.exception, PolarError), command
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("filled")
def test_usage_shows_every_tenant_unless_one_is_named(polar: Callable[..., Result]) -> None:
    everyone = polar("usage").output
    assert "acme" in everyone
    assert "globex" in everyone
    assert "by hand" in everyone
    acme = polar("usage", "--tenant", "acme").output
    assert "acme" in acme
    assert "globex" not in acme


@pytest.mark.usefixtures("filled")
def test_json_stands_alone_on_standard_output(polar: Callable[..., Result]) -> None:
    rows = json.loads(polar("usage", "--json", "--by", "tenant").stdout)
    assert [(row["group"]["tenant"], row["requests"]) for row in rows] == [("acme", 2), ("globex", 1)]
    assert isinstance(rows[0]["cost"], str)
    report = json.loads(polar("report", "--json", "--month", "2026-12").stdout)
    assert report["figures"]["requests"] == 2
    assert json.loads(polar("usage", "--json", "--tenant", "nobody").stdout) == []


@pytest.mark.usefixtures("filled")
def test_single_requests_are_listed_latest_first(polar: Callable[..., Result]) -> None:
    text = polar("usage", "--requests", "--last", "2").output
    assert text.index("third") < text.index("second")
    assert "first" not in text
    assert "cancelled" in text
    listed = json.loads(polar("usage", "--requests", "--json", "--tag", "team=search").stdout)
    assert [request["request_id"] for request in listed] == ["first"]
    assert listed[0]["program"] == "0 1 4 5"
    assert listed[0]["flops"]["total"] > 0
    assert listed[0]["currency"] == "USD"
    for option in (["--csv", "-"], ["--by", "day"], ["--currency", "USD"]):
        assert isinstance(polar("usage", "--requests", *option).exception, QueryError)


def test_a_report_in_the_terminal_holds_the_figures_of_the_json(filled: Ledger, polar: Callable[..., Result]) -> None:
    report = json.loads(polar("report", "--json").stdout)
    text = polar("report").output
    unit = Amounts.of(Report.model_validate(report)).charges
    assert unit.name == "µUSD"
    for expected in (
        unit.show(Decimal(report["total"])),
        filled.location,
        "polar-example",
        "rounding",
        "Charges of acme",
        "Charges of globex",
    ):
        assert expected in text
    for tenant in report["tenants"]:
        assert unit.show(Decimal(tenant["total"])) in text
        for line in tenant["lines"]:
            assert re.search(rf" {re.escape(unit.show(Decimal(line['amount'])))}$", text, re.MULTILINE)


@pytest.mark.usefixtures("filled")
def test_files_are_written_and_named_on_standard_error(tmp_path: Path, polar: Callable[..., Result]) -> None:
    result = polar("report", "--csv", str(tmp_path / "r.csv"), "--html", str(tmp_path / "r.html"), "--json")
    json.loads(result.stdout)
    assert "r.csv" in result.stderr
    assert (tmp_path / "r.csv").read_text().startswith("since,until,tenant,kind,tier")
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")
    rows = list(csv.DictReader(io.StringIO(polar("usage", "--csv", "-").stdout)))
    assert [row["tenant"] for row in rows] == ["acme", "acme", "globex"]


@pytest.mark.usefixtures("filled")
def test_other_prices_rate_the_same_usage_again(tmp_path: Path, polar: Callable[..., Result]) -> None:
    prices = tmp_path / "expensive.toml"
    prices.write_text(
        'id = "expensive"\ncurrency = "JPY"\n[[prices]]\neffective_from = 2026-01-01\nper_request = 7\n'
        "untiered = 1\ntiers = {economy = 1, standard = 2}\n"
    )
    report = json.loads(polar("report", "--prices", str(prices), "--json").stdout)
    assert (report["total"], report["currency"], report["rerated"]) == ("28", "JPY", True)
    assert json.loads(polar("report", "--json").stdout)["currency"] == "USD"


def test_currencies_are_chosen_by_the_reader(filled: Ledger, polar: Callable[..., Result]) -> None:
    book = Meter(filled).price_book
    euros = type(book).from_document(book.document.replace('"USD"', '"EUR"'))
    Meter(filled, prices=euros).emit(usage_record("euros"))
    assert isinstance(polar("report").exception, CurrencyMixError)
    assert json.loads(polar("report", "--currency", "EUR", "--json").stdout)["figures"]["requests"] == 1


def test_a_narrow_terminal_costs_no_digit(filled: Ledger) -> None:
    report = build_report(filled)
    out = io.StringIO()
    show(report_view(report), Console(file=out, width=40))
    assert "…" not in out.getvalue()
    amounts = [line.amount for tenant in report.tenants for line in tenant.lines]
    for amount in (*amounts, report.total, report.figures.charge_full_depth):
        assert f" {Amounts.of(report).charges.show(amount)}" in out.getvalue()


@pytest.mark.usefixtures("filled")
def test_what_if_says_what_it_assumes(tmp_path: Path, polar: Callable[..., Result]) -> None:
    book, evaluation = tmp_path / "other.toml", tmp_path / "evaluation.json"
    book.write_text(OTHER, encoding="utf-8")
    systems = [{"role": "router", "name": "router (economy)", "flops_saved": {"total": 0.4}}]
    evaluation.write_text(json.dumps({"sets": [{"prompts": 99, "systems": systems}]}), encoding="utf-8")
    mixed = ("--mix", "exact=60,economy=40", "--mix-from", str(evaluation))
    result = polar("report", "--what-if", str(book), *mixed, "--device-hour", "0.80", "--tokens-per-second", "40")
    assert result.exit_code == 0, result.output
    assert "40 % economy, 60 % exact" in result.output
    assert "economy saves 40 % of full depth: 99 prompts of evaluation.json." in result.output
    assert "serves 40 tokens/s, prompt and answer together, as stated" in result.output
    whole = json.loads(polar("report", "--what-if", str(book), "--json").output)
    assert [scenario["price_book"] for scenario in whole["what_if"]["scenarios"]] == ["other"]
    assert whole["hardware"] is None
    assert json.loads(polar("report", "--json").output)["what_if"] is None


OTHER = """
id = "other"
currency = "USD"
[[prices]]
effective_from = 2026-01-01
per_request = 1
untiered = 1
tiers = { economy = 1, standard = 1, premium = 1, exact = 1 }
"""


def test_a_key_is_shown_once(ok: Callable[..., str]) -> None:
    shown = ok("key", "create", "acme", "search", "--tier", "economy", "--rpm", "60", "--expires", "90d")
    (text,) = re.findall(r"^pk_\w{8}_[\w-]{43}$", shown, re.MULTILINE)
    listed = ok("key", "list")
    assert text not in listed
    assert "search" in listed
    (row,) = json.loads(ok("key", "list", "--tenant", "acme", "--json"))
    assert (row["id"], row["tiers"], row["rpm"], row["state"]) == (text.split("_")[1], ["economy"], 60, "active")
    assert json.loads(ok("key", "list", "--tenant", "globex", "--json")) == []


def test_rotate_and_revoke(ok: Callable[..., str]) -> None:
    made = json.loads(ok("key", "create", "acme", "search", "--tag", "team=a", "--json"))
    new = json.loads(ok("key", "rotate", made["id"], "--overlap", "0s", "--json"))
    assert new["key"] != made["key"]
    assert (new["rotated_from"], new["tags"]) == (made["id"], {"team": "a"})
    ok("key", "revoke", new["id"])
    states = {row["id"]: row["state"] for row in json.loads(ok("key", "list", "--json"))}
    assert states == {made["id"]: "expired", new["id"]: "revoked"}


@pytest.mark.parametrize(
    ("table", "change", "command"),
    [
        ("polar_usage", "started_at = 9223372036854775807", "usage --requests"),
        ("polar_usage", "visits_prefill = '01'", "explain r"),
        ("polar_receipt", "cost = 'NaN of money'", "report"),
        ("polar_receipt", "price_book_hash = x'00'", "usage --requests"),
        ("polar_usage_hour", "tier = x'eda080'", "usage"),
        ("polar_budget", "time_window = 'decade'", "budget show"),
    ],
)
def test_a_value_that_means_nothing_is_an_error_of_one_line(
    ledger_url: str, tmp_path: Path, table: str, change: str, command: str
) -> None:
    with Meter(ledger_url) as meter:
        Budgets(meter.ledger).set(Budget("acme", Decimal(1)))
        meter.emit(usage_record("r", tenant="acme"))
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite3", isolation_level=None)) as stranger:
        for (name,) in stranger.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            stranger.execute(f"DROP TRIGGER {name}")
        stranger.execute(f"UPDATE {table} SET {change}")
    result = CliRunner().invoke(app, [*command.split(), "--ledger", ledger_url])
    assert isinstance(result.exception, SystemExit), result.output
    assert result.exit_code != 0
    assert len(result.stderr.splitlines()) == 1
    assert "polar verify" in result.stderr


def test_an_argument_that_is_no_text_is_an_error_of_one_line(ledger_url: str) -> None:
    with Meter(ledger_url) as meter:
        meter.emit(usage_record("r"))
    result = CliRunner().invoke(app, ["usage", "--tenant", "acme\udce8", "--ledger", ledger_url])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "is not valid utf-8" in result.stderr


@pytest.mark.parametrize("name", ["/tmp/\udce8", "sqlite:////tmp/\udce8", "/tmp/a\0b"])
def test_a_ledger_whose_name_is_no_text_is_refused(name: str) -> None:
    with pytest.raises(LedgerUrlError, match="UTF-8"):
        Ledger(name)


def test_a_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / ("a" * 3_000)))
    with pytest.raises(StoreError):
        ledger.check()
    assert ledger.price_books() == {}  # as of one that does not exist yet


OLD, NEW = datetime(2025, 12, 31, 23, 59, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def served(ledger: Ledger) -> Ledger:
    with Meter(ledger) as meter:
        for name, tenant, at in (("a", "acme", OLD), ("b", "acme", NEW), ("c", "globex", NEW)):
            meter.emit(usage_record(name, tenant=tenant, started_at=at))
    return ledger


def change(ledger: Ledger, statement: str) -> None:
    with closing(sqlite3.connect(str(ledger.url.database), isolation_level=None)) as stranger:
        stranger.execute("DROP TRIGGER polar_usage_no_update")
        stranger.execute(statement)


def test_a_sound_ledger_prints_its_heads(served: Ledger, polar: Callable[..., Result]) -> None:
    result = polar("verify")
    assert result.exit_code == 0
    assert result.output.startswith(f"The ledger {served.location} is sound: 4 links of 3 chains.")
    assert "acme: number 2, hash " in result.output
    verified = json.loads(polar("verify", "--tenant", "acme", "--json").output)
    assert (verified["sound"], verified["findings"], verified["heads"]["acme"]["number"]) == (True, [], 2)


def test_a_changed_ledger_names_the_first_bad_number(served: Ledger, polar: Callable[..., Result]) -> None:
    change(served, "UPDATE polar_usage SET tokens_output = tokens_output + 1 WHERE request_id = 'b'")
    result = polar("verify")
    assert isinstance(result.exception, LedgerUnsoundError)
    assert "was changed after it was written" in str(result.exception)
    verified = polar("verify", "--json")
    assert isinstance(verified.exception, LedgerUnsoundError)
    findings = json.loads(verified.output)["findings"]
    assert (findings[0]["tenant"], findings[0]["number"]) == ("acme", 2)


def test_a_receipt_is_checked_against_the_chain(served: Ledger, tmp_path: Path, polar: Callable[..., Result]) -> None:
    printed = polar("receipt", "b", "--tenant", "acme")
    assert printed.exit_code == 0
    file = tmp_path / "receipt.json"
    file.write_text(printed.output, encoding="utf-8")
    result = polar("verify", "--receipt", str(file))
    assert result.output == f"The receipt {file} agrees with the ledger {served.location}.\n"
    file.write_text(json.dumps({**json.loads(printed.output), "cost": "0.000000000001"}), encoding="utf-8")
    assert isinstance(polar("verify", "--receipt", str(file)).exception, LedgerUnsoundError)


@pytest.mark.usefixtures("served")
def test_a_receipt_that_is_none_is_refused(tmp_path: Path, polar: Callable[..., Result]) -> None:
    file = tmp_path / "receipt.json"
    assert isinstance(polar("verify", "--receipt", str(file)).exception, OutputError)
    for content in (
        "{",
        "[]",
        "[" * 100_000,
        '{"format":' + "1" * 5000 + "}",
        '{"format": "polar-receipt-1", "tenant": "\\ud800"}',
    ):
        file.write_text(content, encoding="utf-8")
        assert isinstance(polar("verify", "--receipt", str(file)).exception, QueryError)
    for arguments in (["nothing", "--tenant", "acme"], ["b", "--tenant", "globex"], ["nothing"]):
        assert isinstance(polar("receipt", *arguments).exception, QueryError)


def test_pruning_asks_and_keeps_the_proof(served: Ledger, tmp_path: Path, polar: Callable[..., Result]) -> None:
    receipt = polar("receipt", "a", "--tenant", "acme").output
    assert polar("prune", "--before", "2026-01-01", answer="n\n").exit_code == 1
    assert receipt == polar("receipt", "a", "--tenant", "acme").output
    assert "acme: 1 requests pruned." in polar("prune", "--before", "2026-01-01", answer="y\n").output
    assert polar("prune", "--before", "2026-01-01", "--yes").output.startswith("Nothing was served before")
    assert polar("verify").output.startswith(f"The ledger {served.location} is sound: 5 links of 3 chains.")
    file = tmp_path / "receipt.json"
    file.write_text(receipt, encoding="utf-8")
    checked = polar("verify", "--receipt", str(file))
    assert checked.exit_code == 0
    assert checked.output.endswith(", but compute_units cannot be checked: the facts of the request were pruned.\n")
    assert isinstance(polar("prune", "--before", "yesterday", "--yes").exception, PeriodError)


def test_a_receipt_is_found_whoever_it_is_of(filled: Ledger, polar: Callable[..., Result]) -> None:
    (tenant,) = (one.record.tenant for one in filled.read(Selection(ALL_TENANTS)) if one.record.request_id == "first")
    assert json.loads(polar("receipt", "second").output)["tenant"] == "globex"
    assert json.loads(polar("receipt", "first").output)["tenant"] == tenant
    Meter(filled).emit(usage_record("first", tenant="globex"))
    assert isinstance(polar("receipt", "first").exception, QueryError)
    assert json.loads(polar("receipt", "first", "--tenant", "globex").output)["tenant"] == "globex"


def test_statements_of_a_month_are_those_of_every_tenant(filled: Ledger, polar: Callable[..., Result]) -> None:
    tenants = sorted({one.record.tenant for one in filled.read(Selection(ALL_TENANTS))})
    found = json.loads(polar("statement", "--month", "2026-12", "--json").output)
    assert [one["tenant"] for one in found] == tenants
    shown = polar("statement", "--month", "2026-12").output
    assert all(tenant in shown for tenant in tenants)
    assert isinstance(polar("statement", "--month", "2026-12", "--trace", "1").exception, QueryError)


def test_a_key_of_a_tier_that_there_is_not(filled: Ledger, polar: Callable[..., Result]) -> None:
    refused = polar("key", "create", "acme", "search", "--tier", "econmy")
    assert isinstance(refused.exception, AccessError)
    assert "'economy'" in str(refused.exception)
    made = json.loads(polar("key", "create", "acme", "search", "--tier", "economy", "--tag", "a=b", "--json").output)
    (listed,) = json.loads(polar("key", "list", "--json").output)
    assert (made["tiers"], listed["tiers"], listed["scopes"], listed["tags"]) == (
        ["economy"],
        ["economy"],
        ["infer"],
        {"a": "b"},
    )
