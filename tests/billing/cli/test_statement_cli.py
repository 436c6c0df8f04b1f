"""The commands price, statement, credit-note and reprice: arguments in, the figures of the library out."""

from __future__ import annotations

import csv
import io
import json
from decimal import Decimal
from importlib import resources
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import Result

from polar_billing.errors import PriceBookError, QueryError
from polar_billing.prices.book import EXAMPLE_PLANS, PriceBook
from polar_billing.testing import usage_record
from polar_sdk.lab.evaluation.results import Evaluation, Saved, SetResult, SystemResult
from polar_sdk.router.exact_tests import wilson
from polar_sdk.usage import FlopUsage
from tests.billing.storing import store_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from polar_billing.ledger.ledger import Ledger

PLANS = PriceBook.example(EXAMPLE_PLANS)
TOML = resources.files("polar_billing").joinpath(EXAMPLE_PLANS).read_text(encoding="utf-8")
MONTH = ("--month", "2026-10")


@pytest.fixture
def plans(tmp_path: Path) -> Path:
    file = tmp_path / "plans.toml"
    file.write_text(TOML, encoding="utf-8")
    return file


@pytest.fixture
def filled(ledger: Ledger) -> Ledger:
    """A month of globex and initech, long over."""
    for number, tenant in enumerate(["globex", "globex", "initech"]):
        record = usage_record(
            f"r{number}",
            tenant=tenant,
            tier="premium",
            flops=FlopUsage(head=9 * 10**16, total=9 * 10**16),
            started_at="2026-10-15T12:00:00Z",
        )
        store_record(ledger, record, PLANS, "test")
    return ledger


def test_price_add_puts_a_book_in_force_once_and_refuses_to_change_the_past(
    plans: Path, polar: Callable[..., Result], ok: Callable[..., str]
) -> None:
    assert "is in force now" in ok("price", "add", str(plans))
    assert "was in force already" in ok("price", "add", str(plans))
    assert "The two price books say the same." in ok("price", "diff", str(plans))
    plans.write_text(TOML.replace("flat_fee = 19 ", "flat_fee = 29 "), encoding="utf-8")
    shown = ok("price", "diff", str(plans))
    assert "plans.starter.terms[2024-01-01T00:00:00+00:00].flat_fee: 19 → 29   (past: refused)" in shown
    assert json.loads(ok("price", "diff", str(plans), "--json"))[0]["past"] is True
    refused = polar("price", "add", str(plans))
    assert isinstance(refused.exception, PriceBookError)
    assert "Keep past entries as they are" in str(refused.exception)
    assert json.loads(ok("price", "show", "--json"))[0]["content_hash"] == PLANS.content_hash


def test_price_show_tells_everything_the_book_says(plans: Path, ok: Callable[..., str]) -> None:
    shown = ok("price", "show", str(plans))
    for text in ("0.0004", "premium × 1.25", "starter", "flat fee 19", "0.25 per started 1000", "initech-welcome"):
        assert text in shown
    for text in ("up to 100000", "graduated", "p95 ≤ 2000 ms", "America/New_York", "Plan reserved, its own rates"):
        assert text in shown
    assert "No price book" in ok("price", "show")


def test_price_quote(plans: Path, ok: Callable[..., str]) -> None:
    request = ("--flops", str(10**12), "--input", "1000", "--output", "100", "--book", str(plans))
    asked = ("price", "quote", *request, "--tier", "standard", "--tenant")
    assert "At most 0.000410000000 USD" in ok(*asked, "acme")
    assert json.loads(ok(*asked, "initech", "--json"))["amount"] == "0.000372000000"
    assert "Unrated: price book" in ok("price", "quote", *request, "--tier", "gold")
    ok("price", "add", str(plans))
    assert "polar-example-plans" in ok("price", "quote", "--flops", "1", "--tier", "standard", "--tenant", "acme")


@pytest.mark.usefixtures("filled")
def test_a_statement_is_drafted_issued_listed_and_traced(ok: Callable[..., str]) -> None:
    shown = ok("statement", "--tenant", "globex", *MONTH)
    assert "draft" in shown
    assert "America/New_York" in shown  # the customer's zone, since the book names one
    drafted = json.loads(ok("statement", "--tenant", "globex", *MONTH, "--json"))
    assert drafted["issued_at"] is None
    assert "No statement of globex" in ok("statement", "--tenant", "globex")
    issued = json.loads(ok("statement", "--tenant", "globex", *MONTH, "--issue", "--json"))
    assert {**issued, "issued_at": None} == drafted
    assert json.loads(ok("statement", "--tenant", "globex", *MONTH, "--json")) == issued
    assert issued["id"] in ok("statement", "--tenant", "globex")
    assert ok("statement", "--tenant", "globex", *MONTH, "--trace", "1").split() == ["1", "2"]
    for line in issued["lines"]:
        assert f" {Decimal(line['amount']):,f}" in shown
    assert f" {Decimal(issued['total']):,f}" in shown


@pytest.mark.usefixtures("filled")
def test_csv_rows_sum_to_what_is_due(ok: Callable[..., str]) -> None:
    statement = json.loads(ok("statement", "--tenant", "initech", *MONTH, "--json"))
    rows = list(csv.DictReader(io.StringIO(ok("statement", "--tenant", "initech", *MONTH, "--csv", "-"))))
    assert sum(Decimal(row["amount"]) for row in rows) == Decimal(statement["due"]) == 0
    assert Decimal(statement["total"]) > 0
    assert {row["tenant"] for row in rows} == {"initech"}


def evaluation(agreed: int, compared: int) -> str:
    """An evaluation of a router in two tiers, as `polar evaluate --json` writes it."""
    saved = Saved(prefill=0.1, decode=0.1, total=0.1)
    shared: dict[str, Any] = {
        "answer_share": 1.0,
        "non_identity_rate": 0.5,
        "programs": {"0-29": 1.0},
        "flops_saved": saved,
    }
    systems = [
        SystemResult(name="identity", role="identity", agreement=wilson(compared, compared), **shared),
        SystemResult(name="router (premium)", role="router", agreement=wilson(agreed, compared), **shared),
        SystemResult(name="router (0.05)", role="router", agreement=wilson(1, compared), **shared),
        SystemResult(name="shuffled router", role="control", agreement=wilson(2, compared), **shared),
    ]
    whole = SetResult(
        name="all",
        prompts=compared,
        labelled=0,
        data="",
        systems=tuple(systems),
        comparisons=(),
        frontier=(),
        generation={},
    )
    names = ("model", "fingerprint", "dtype", "device", "router", "point")
    same: dict[str, Any] = dict.fromkeys(names, "x")
    evaluated = Evaluation(
        **same,
        sets=(whole,),
        verdict=(),
        certificate=None,
        certificate_holds=False,
        training={},
    )
    return json.dumps(evaluated.plain())


@pytest.mark.usefixtures("filled")
def test_agreement_is_measured_by_an_evaluation(
    tmp_path: Path, polar: Callable[..., Result], ok: Callable[..., str]
) -> None:
    file = tmp_path / "evaluation.json"
    for agreed, credit in ((1_177, False), (1_170, True)):  # of 1,194: 98.6 and 98.0 %
        file.write_text(evaluation(agreed, 1_194), encoding="utf-8")
        statement = json.loads(ok("statement", "--tenant", "globex", *MONTH, "--agreement-from", str(file), "--json"))
        assert statement["agreement"]["premium"] == [agreed, 1_194]
        assert ("answers agreed" in json.dumps(statement)) == credit
    shown = ok("statement", "--tenant", "globex", *MONTH, "--agreement-from", str(file), "--agreement", "premium=9/9")
    assert "answers agreed" not in shown  # what is stated by hand takes precedence
    file.write_text("{}", encoding="utf-8")
    refused = polar("statement", "--tenant", "globex", *MONTH, "--agreement-from", str(file))
    assert isinstance(refused.exception, QueryError)


@pytest.mark.usefixtures("filled")
def test_credit_note_and_reprice(plans: Path, ok: Callable[..., str]) -> None:
    issued = json.loads(ok("statement", "--tenant", "globex", *MONTH, "--issue", "--json"))
    note = ("credit-note", issued["id"], "1.5", "--tenant", "globex", "--reason", "outage", "--reference", "7")
    assert f"1.5 off statement {issued['id']}" in ok(*note)
    plans.write_text(TOML.replace("0.0004", "0.0008"), encoding="utf-8")
    rows = json.loads(ok("reprice", "--book", str(plans), *MONTH, "--json"))
    assert [row["tenant"] for row in rows] == ["globex", "initech"]
    for row in rows:
        assert Decimal(row["charged"]) + Decimal(row["difference"]) == Decimal(row["other"])
    assert rows[0]["difference"] in ok("reprice", "--book", str(plans), *MONTH)
    listed = list(csv.DictReader(io.StringIO(ok("reprice", "--book", str(plans), *MONTH, "--csv", "-"))))
    assert [row["difference"] for row in listed] == [row["difference"] for row in rows]
    assert "No usage in" in ok("reprice", "--book", str(plans), "--month", "2020-01")


def test_a_further_book_says_whom_it_charges(
    plans: Path, monkeypatch: pytest.MonkeyPatch, ledger_url: str, ok: Callable[..., str]
) -> None:
    other = plans.with_name("other.toml")
    plain = resources.files("polar_billing").joinpath("example_prices.toml").read_text(encoding="utf-8")
    other.write_text(plain, encoding="utf-8")
    assert "charges" not in ok("price", "add", str(plans))
    assert "It charges nobody, as it names no tenant; polar-example-plans charges all others" in ok(
        "price", "add", str(other)
    )
    assert "by price book polar-example-plans" in ok("price", "quote", "--flops", "1", "--tier", "standard")
    assert "charges" not in ok("price", "add", str(other), "--for-all")
    assert "by price book polar-example." in ok("price", "quote", "--flops", "1", "--tier", "standard")
    monkeypatch.setenv("POLAR_PRICE_BOOK", str(plans))
    assert f"Meters here charge by {plans} all the same" in ok("price", "add", str(other))
    assert ledger_url.removeprefix("sqlite:///") in ok("price", "add", str(other))
