"""`polar statement`, `credit-note`, `reprice` and `explain`."""

from __future__ import annotations

import csv
import io
import json
import re
from decimal import Decimal
from importlib import resources
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, event
from typer.testing import Result

from polar_billing.errors import PriceBookError, QueryError, StoreFullError
from polar_billing.ledger.books import add_book
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import EXAMPLE_PLANS, PriceBook
from polar_billing.statements.issue import issue_statement
from polar_billing.statements.tracing import usage_of_line
from polar_billing.testing import usage_record
from polar_billing.values.periods import Period
from polar_sdk.errors import ModelNotFoundError
from polar_sdk.model import PolarModel
from polar_sdk.testing import tiny_llama, tiny_policy, tiny_tokenizer
from polar_sdk.usage import FlopUsage, Outcome
from tests.billing.storing import DOLLARS, store_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.statements.issued import IssuedStatement

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
    assert "The two price books are the same." in ok("price", "diff", str(plans))
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
    later = "\n[[prices]]\neffective_from = 2027-05-01\nper_request = 1\ntiers = { exact = 1 }\n"
    plans.write_text(TOML + later, encoding="utf-8")
    assert re.search(r"2024-01-01 +2027-05-01 +0\.0004 ", ok("price", "show", str(plans)))


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
def test_tenants_of_a_plan_are_billed_without_usage(plans: Path, ok: Callable[..., str]) -> None:
    plans.write_text(f'{TOML}\n[[customers]]\ntenant = "later"\neffective_from = 2027-01-01\n', encoding="utf-8")
    ok("price", "add", str(plans))
    issued = json.loads(ok("statement", *MONTH, "--issue", "--json"))
    assert [one["tenant"] for one in issued] == ["acme", "globex", "initech"]
    assert issued[0]["total"] == "19.0000"
    assert issued[0]["id"] in ok("statement")


def test_the_months_of_a_tenant_whose_zone_changes_leave_no_gap(
    ledger: Ledger, tmp_path: Path, ok: Callable[..., str]
) -> None:
    moved = {"tenant": "someone", "effective_from": "2026-11-15T00:00:00Z", "zone": "America/Los_Angeles"}
    book = PriceBook.model_validate({**PLANS.model_dump(), "customers": [moved]})
    add_book(ledger, book)
    store_record(ledger, usage_record(tenant="someone", started_at="2026-11-01T03:00:00Z"), book)
    months = [ok("statement", "--tenant", "someone", "--month", month, "--json") for month in ("2026-10", "2026-11")]
    october, november = map(json.loads, months)
    assert (october["requests"], november["requests"]) == (0, 1)
    assert october["until"] == november["since"]
    out = tmp_path / "focus.csv"
    ok("export-billing", "--format", "focus", "--tenant", "someone", "--month", "2026-11", "--out", str(out))
    row = next(csv.DictReader(io.StringIO(out.read_text(encoding="utf-8"))))
    assert row["BillingPeriodStart"] == "2026-11-01T00:00:00Z"
    assert row["BillingPeriodEnd"] == "2026-12-01T08:00:00Z"


def test_a_tenant_that_fails_keeps_no_other_statement_back(
    filled: Ledger, plans: Path, polar: Callable[..., Result], ok: Callable[..., str]
) -> None:
    for book in (PLANS, DOLLARS):
        store_record(filled, usage_record(f"by {book.id}", tenant="hooli", started_at=OCTOBER), book, "test")
    runs = [polar("statement", *MONTH, "--issue", "--json") for _ in range(2)]
    for run in runs:
        (line,) = [line for line in run.stderr.splitlines() if "error" in line]
        assert run.exit_code == 1
        assert "hooli" in line and "--book FILE" in line
    first, again = (json.loads(run.stdout) for run in runs)
    assert [one["tenant"] for one in first] == ["acme", "globex", "initech"]
    assert again == first
    mended = json.loads(ok("statement", "--tenant", "hooli", *MONTH, "--book", str(plans), "--issue", "--json"))
    issued = json.loads(ok("statement", *MONTH, "--issue", "--json"))
    assert issued == [*first[:2], mended, first[2]]
    assert len(json.loads(ok("statement", "--json"))) == 4


def test_a_ledger_that_fails_ends_the_run_at_once(
    filled: Ledger, monkeypatch: pytest.MonkeyPatch, polar: Callable[..., Result]
) -> None:
    tried: list[str] = []

    def full(_: Ledger, tenant: str, *__: object, **___: object) -> IssuedStatement:
        tried.append(tenant)
        raise StoreFullError("no space is left.")

    monkeypatch.setattr("polar_billing.issue_statement", full)
    assert isinstance(polar("statement", *MONTH, "--issue").exception, StoreFullError)
    assert tried == ["acme"]


@pytest.mark.usefixtures("filled")
def test_the_list_takes_as_many_queries_whatever_is_on_it(ok: Callable[..., str]) -> None:
    queries: list[str] = []

    def listed() -> tuple[int, Any]:
        queries.clear()
        found = json.loads(ok("statement", "--json"))
        return len(queries), found

    event.listen(Engine, "before_cursor_execute", note := lambda _c, _u, query, *_: queries.append(query))
    try:
        ok("statement", "--tenant", "globex", *MONTH, "--issue")
        few, (one,) = listed()
        for month in ("2026-09", "2026-08"):
            ok("statement", "--month", month, "--issue")
        ok("statement", *MONTH, "--issue")
        for issued in json.loads(ok("statement", "--json")):
            if Decimal(issued["total"]):
                options = ("--tenant", issued["tenant"], "--reason", "outage", "--reference", issued["id"])
                ok("credit-note", issued["id"], "0.0001", *options)
        many, statements = listed()
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert few == many
    assert [issued["tenant"] for issued in statements] == [*["acme"] * 3, *["globex"] * 3, *["initech"] * 3]
    for issued in statements:
        credited = [note["reference"] for note in issued["credit_notes"]]
        assert credited == ([issued["id"]] if Decimal(issued["total"]) else [])
    assert one in [{**issued, "credit_notes": []} for issued in statements]


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("options", [["--issue"], ["--trace", "1"], ["--csv", "-"], ["--book", "plans.toml"]])
def test_what_is_of_a_period_needs_one(options: list[str], polar: Callable[..., Result]) -> None:
    assert isinstance(polar("statement", "--tenant", "globex", *options).exception, QueryError)


@pytest.mark.usefixtures("filled")
def test_csv_rows_sum_to_what_is_due(ok: Callable[..., str]) -> None:
    statement = json.loads(ok("statement", "--tenant", "initech", *MONTH, "--json"))
    rows = list(csv.DictReader(io.StringIO(ok("statement", "--tenant", "initech", *MONTH, "--csv", "-"))))
    assert sum(Decimal(row["amount"]) for row in rows) == Decimal(statement["due"]) == 0
    assert Decimal(statement["total"]) > 0
    assert {row["tenant"] for row in rows} == {"initech"}


@pytest.mark.usefixtures("filled")
def test_credit_note_and_reprice(plans: Path, ok: Callable[..., str]) -> None:
    issued = json.loads(ok("statement", "--tenant", "globex", *MONTH, "--issue", "--json"))
    note = ("credit-note", issued["id"], "1.5", "--tenant", "globex", "--reason", "outage", "--reference", "7")
    assert f"1.5 off statement {issued['id']}" in ok(*note)
    (listed,) = json.loads(ok("statement", "--tenant", "globex", "--json"))
    assert [(one["reference"], one["amount"]) for one in listed["credit_notes"]] == [("7", "1.5")]
    due = Decimal(issued["due"]) - Decimal("1.5")
    assert f" {due:,f} USD" in ok("statement", "--tenant", "globex")
    of_month = ("statement", "--tenant", "globex", *MONTH)
    assert json.loads(ok(*of_month, "--json")) == listed
    assert re.search(rf" due +{re.escape(f'{due:,f}')}$", ok(*of_month), re.MULTILINE)
    rows = list(csv.DictReader(io.StringIO(ok(*of_month, "--csv", "-"))))
    assert sum(Decimal(row["amount"]) for row in rows) == due
    assert f"due {due:,f} USD" in ok("report", *MONTH, "--zone", "America/New_York")
    assert f"partly this one: statement {issued['id']}" in ok("report", *MONTH)
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
    assert f"Meters here still charge by {plans}" in ok("price", "add", str(other))
    assert ledger_url.removeprefix("sqlite:///") in ok("price", "add", str(other))


def test_usage_that_the_next_statement_is_to_charge_is_not_pruned(
    filled: Ledger, polar: Callable[..., Result], ok: Callable[..., str]
) -> None:
    prune = ("prune", "--before", "2026-11-01", "--yes")
    ok("statement", "--tenant", "globex", *MONTH, "--issue")
    store_record(filled, usage_record("late", tenant="globex", tier="premium", started_at=OCTOBER), PLANS, "test")
    refused = polar(*prune)
    assert refused.exit_code == 1
    assert "globex" in refused.stderr and "1 requests" in refused.stderr
    assert refused.stdout == "initech: 1 requests pruned.\n"
    assert json.loads(ok("statement", "--tenant", "globex", "--month", "2026-09", "--issue", "--json"))["requests_late"]
    assert ok(*prune) == "globex: 3 requests pruned.\n"


OCTOBER = "2026-10-15T12:00:00Z"


@pytest.fixture
def issued(ledger: Ledger) -> IssuedStatement:
    """A month of globex, on a plan with every kind of line."""
    for number in range(25):
        outcome = Outcome.ERROR if number == 7 else Outcome.COMPLETED
        tier = ("economy", "premium")[number % 2]
        record = usage_record(
            f"r{number}", tenant="globex", tier=tier, prompt=10 + number, outcome=outcome, started_at=OCTOBER
        )
        store_record(ledger, record, PLANS, "test")
    return issue_statement(ledger, "globex", Period.month("2026-10"))


def explained(ok: Callable[..., str], *arguments: str) -> Any:
    return json.loads(ok("explain", *arguments, "--json"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder that the engine has on this host."""
    made = tmp_path / "tiny"
    tiny_llama().save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


def test_a_request_of_a_model_on_this_host_is_explained_to_the_last_flop(
    folder: Path, ledger: Ledger, ok: Callable[..., str]
) -> None:
    model = PolarModel.from_pretrained(folder, policy=tiny_policy(6), ledger=ledger.location, tenant="acme")
    usage = model.generate("hello", compute="economy", max_tokens=4, request_id="mine").usage
    found = explained(ok, "mine")
    assert sum(term["flops"] for term in found["formula"]["terms"]) == usage.flops.total
    assert found["formula"]["difference"] == 0
    assert [layer["kind"] for layer in found["layers"]] == ["run", "skipped", "skipped", "run", "run", "run"]
    (step,) = found["prices"]
    assert Decimal(step["quantity"]) * Decimal(step["unit_price"]) == Decimal(step["exact"]) == Decimal(found["exact"])
    assert Decimal(step["quantity"]) == Decimal(usage.flops.total).scaleb(-12)
    assert round(Decimal(found["exact"]), 12) == Decimal(found["cost"])
    assert found["receipt"]["chain"]["number"] == 1
    text = ok("explain", "mine")
    assert "█··███" in text
    assert f"{usage.flops.total:,}" in text
    assert "to the last FLOP" in text
    assert "On no issued statement yet." in text


def test_a_model_elsewhere_leaves_the_parts_and_says_why(
    ledger: Ledger, folder: Path, polar: Callable[..., Result], ok: Callable[..., str]
) -> None:
    Meter(ledger).emit(usage_record("there", router_flops=77))
    text = ok("explain", "there")
    assert "FLOPs as recorded" in text
    assert "no model 'test-model' with the fingerprint 000000000000… is on this host" in text
    assert explained(ok, "there")["formula"] is None
    other = polar("explain", "there", "--model", str(folder))
    assert isinstance(other.exception, ModelNotFoundError)
    assert "with the fingerprint 000000000000…" in str(other.exception)


def test_every_outcome_is_explained(ledger: Ledger, ok: Callable[..., str]) -> None:
    for outcome in Outcome:
        program = "" if outcome is Outcome.CACHED else "0-5"
        Meter(ledger).emit(usage_record(f"one {outcome}", outcome=outcome, program=program))
        assert f"· {outcome} ·" in ok("explain", f"one {outcome}")


def test_a_use_without_a_price_says_so(ledger: Ledger, ok: Callable[..., str]) -> None:
    Meter(ledger).emit(usage_record("gold", tier="gold"))
    assert "has no price for tier 'gold'" in ok("explain", "gold")
    found = explained(ok, "gold")
    assert (found["cost"], found["prices"]) == (None, [])


def test_lines_are_explained_by_the_usage_that_they_charge(
    issued: IssuedStatement, ledger: Ledger, ok: Callable[..., str]
) -> None:
    counted = 0
    for line in issued.statement.lines:
        found = explained(ok, f"{issued.statement.id}/{line.number}", "--records", "100")
        assert [record["seq"] for record in found["records"]] == usage_of_line(ledger, issued, line)
        assert found["requests"] == len(found["records"])
        assert found["flops"] == sum(record["flops"] for record in found["records"])
        if found["exact"] is not None:
            assert abs(Decimal(found["exact"]) - line.amount) <= Decimal("0.5").scaleb(-issued.statement.decimals)
        if found["counted"] is not None:
            counted += 1
            assert Decimal(found["counted"]) == line.quantity
        text = ok("explain", f"{issued.statement.id}/{line.number}")
        assert f"{line.amount:f} USD" in text
    assert counted


def test_a_request_names_its_lines_and_a_line_its_requests(issued: IssuedStatement, ok: Callable[..., str]) -> None:
    lines = explained(ok, "r1")["lines"]
    assert lines
    for line in lines:
        assert "r1" in {record["request_id"] for record in explained(ok, line, "--records", "100")["records"]}
    text = ok("explain", lines[0], "--records", "3")
    assert "more: --records" in text


def test_an_id_of_two_tenants_needs_one_named(
    ledger: Ledger, polar: Callable[..., Result], ok: Callable[..., str]
) -> None:
    for tenant in ("acme", "globex"):
        Meter(ledger).emit(usage_record("twice", tenant=tenant))
    assert "--tenant: 'acme', 'globex'" in str(polar("explain", "twice").exception)
    assert explained(ok, "twice", "--tenant", "globex")["tenant"] == "globex"


def test_the_beginning_of_an_id_will_do(store: Ledger, polar: Callable[..., Result], ok: Callable[..., str]) -> None:
    ledger = ("--ledger", store.url.render_as_string(hide_password=False))
    for name in ("abcdef", "abcdefg-1", "abcdefg-2", "ABCDEF-9"):
        Meter(store).emit(usage_record(name))
    for words, whole in (("abcdef", "abcdef"), ("abcdefg-2", "abcdefg-2"), ("ABCDEF", "ABCDEF-9")):
        assert explained(ok, words, *ledger)["request_id"] == whole
        assert json.loads(ok("receipt", words, *ledger))["request_id"] == whole
    for command in ("explain", "receipt"):
        several = polar(command, "abcdefg", *ledger)
        assert isinstance(several.exception, QueryError)
        assert "Give more characters" in str(several.exception)
        assert "'abcdefg-1', 'abcdefg-2'" in str(several.exception)
        for words in ("ABCDE", "ABCDE%", "ABCDEF-9x", "BCDEF-9"):
            assert "no request" in str(polar(command, words, *ledger).exception)
    ok("prune", "--before", "2200-01-01", "--yes", *ledger)
    assert json.loads(ok("receipt", "abcdefg-1", *ledger))["request_id"] == "abcdefg-1"


def test_a_pruned_request_points_to_its_receipt(
    ledger: Ledger, polar: Callable[..., Result], ok: Callable[..., str]
) -> None:
    Meter(ledger).emit(usage_record("old", started_at=OCTOBER))
    ok("prune", "--before", "2026-11-01", "--yes")
    assert "polar receipt old --tenant acme" in str(polar("explain", "old").exception)


@pytest.mark.model
def test_the_default_model_with_its_router_is_explained_to_the_last_flop(
    ledger: Ledger, ok: Callable[..., str]
) -> None:
    model = PolarModel.from_pretrained(ledger=ledger.location, tenant="acme")
    prompt = "Which is larger? (A) the sun (B) the moon. Answer with a letter."
    usage = model.generate(prompt, compute="economy", max_tokens=6, request_id="routed").usage
    found = explained(ok, "routed")
    assert usage.flops.router > 0
    assert found["formula"]["total"] == usage.flops.total
    assert found["formula"]["difference"] == 0
