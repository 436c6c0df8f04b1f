"""Price books: read, checked within limits, and chosen from by the time of use."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING

import pytest

from polar_billing.errors import AmountError, PriceBookError
from polar_billing.ledger.books import add_book
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import EXAMPLE_PLANS, PRICE_BOOK_VARIABLE, PriceBook
from polar_billing.prices.quote import quote
from polar_billing.prices.revisions import changes, check_revision, past_changes
from polar_billing.testing import usage_record
from polar_billing.values.money import to_scaled, to_units

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HEAD = 'id = "b"\ncurrency = "USD"\n'
ENTRY = "[[prices]]\neffective_from = 2026-01-01\nper_compute_unit = 0.5\ntiers = {standard = 1}\n"


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_the_example_prices_the_usual_tiers() -> None:
    book = PriceBook.example()
    assert set(book.prices[0].tiers) == {"economy", "standard", "premium", "exact"}
    assert book.statement_decimals == 6


def test_the_entry_of_the_time_of_use_is_in_force() -> None:
    later = ENTRY.replace("2026-01-01", "2026-07-01T00:00:00+02:00").replace("0.5", "0.75")
    book = PriceBook.from_toml(HEAD + later + ENTRY)  # the order in the file does not matter
    assert book.entry_at(moment("2025-12-31T23:59:59")) is None
    for when, price in {
        "2026-01-01": "0.5",
        "2026-06-30T21:59:59.999999": "0.5",
        "2026-06-30T22:00": "0.75",
    }.items():
        entry = book.entry_at(moment(when))
        assert entry is not None
        assert entry.per_compute_unit == Decimal(price)


def test_a_gap_between_entries_has_no_price() -> None:
    ended = ENTRY.replace("tiers", "effective_until = 2026-02-01\ntiers")
    book = PriceBook.from_toml(HEAD + ended + ENTRY.replace("2026-01-01", "2026-03-01"))
    assert book.entry_at(moment("2026-01-31T23:59")) is not None
    assert book.entry_at(moment("2026-02-01")) is None
    assert book.entry_at(moment("2026-03-01")) is not None


def test_the_hash_covers_content_and_nothing_else() -> None:
    book = PriceBook.from_toml(HEAD + ENTRY)
    same = PriceBook.from_toml("# a comment\n" + HEAD + ENTRY.replace("0.5", "0.500"))
    other = PriceBook.from_toml(HEAD + ENTRY.replace("0.5", "0.51"))
    assert book.content_hash == same.content_hash != other.content_hash
    assert PriceBook.from_document(book.document) == book
    assert PriceBook.from_document(book.document).content_hash == book.content_hash


def test_prices_keep_their_digits_under_any_decimal_context() -> None:
    with localcontext(prec=2):
        book = PriceBook.from_toml(HEAD + ENTRY.replace("0.5", "1234.567890123456"))
    assert book.prices[0].per_compute_unit == Decimal("1234.567890123456")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ENTRY, "id: field required; currency: "),
        (HEAD, "prices: "),
        (HEAD + ENTRY.replace("0.5", "-0.5"), "prices[0].per_compute_unit = '-0.5'"),
        (HEAD + ENTRY.replace("0.5", "nan"), "prices[0].per_compute_unit = 'NaN'"),
        (HEAD + ENTRY.replace("0.5", "true"), "prices[0].per_compute_unit = 'True'"),
        (HEAD + ENTRY.replace("0.5", '"half"'), "prices[0].per_compute_unit = 'half'"),
        (HEAD + ENTRY.replace("0.5", "0.0000000000001"), "prices[0].per_compute_unit = '1E-13'"),
        (HEAD + ENTRY.replace("standard = 1", "standard = -1"), "prices[0].tiers.standard = '-1'"),
        (HEAD + ENTRY.replace("per_compute_unit", "per_cu"), "prices[0].per_cu = '0.5'"),
        (HEAD + ENTRY.replace("per_compute_unit = 0.5\n", ""), "prices[0]: "),
        (HEAD + ENTRY.replace("standard = 1", ""), "prices[0]: "),
        (HEAD + ENTRY.replace("2026-01-01", "2026-01-01T00:00:00"), "needs an offset from UTC"),
        (HEAD + ENTRY + ENTRY, "2026-01-01T00:00:00+00:00"),
        (
            HEAD + ENTRY.replace("tiers", "effective_until = 2026-03-01\ntiers") + ENTRY.replace("-01-01", "-02-01"),
            "prices: the entry until 2026-03-01T00:00:00+00:00 overlaps the one from 2026-02-01T00:00:00+00:00",
        ),
        (HEAD + ENTRY.replace("tiers", "effective_until = 2025-01-01\ntiers"), "is not after"),
        (HEAD.replace("USD", "dollar") + ENTRY, "currency = 'dollar'"),
        (HEAD + "decimals = 13\n" + ENTRY, "decimals = '13'"),
        ("id = ", "is not valid TOML"),
    ],
)
def test_a_wrong_book_is_refused_with_file_key_and_value(text: str, said: str) -> None:
    with pytest.raises(PriceBookError) as caught:
        PriceBook.from_toml(text, name="mine.toml")
    message = str(caught.value)
    assert message.startswith("price book 'mine.toml'")
    assert said in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_the_variable_names_the_book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(HEAD + ENTRY)
    monkeypatch.setenv(PRICE_BOOK_VARIABLE, str(file))
    assert PriceBook.load().id == "b"
    monkeypatch.setenv(PRICE_BOOK_VARIABLE, str(tmp_path / "none.toml"))
    with pytest.raises(PriceBookError, match=r"none\.toml"):
        PriceBook.load()


TOP = 'id = "x"\ncurrency = "USD"\n[[prices]]\neffective_from = 2020-01-01\n'
BOOK = TOP + "per_compute_unit = 1\ntiers = { standard = 1 }\n"


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Nothing here may cost seconds of CPU."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a." * 50_000 + "a = 1", "a dotted key has more than 16 parts"),
        ("a = " + "[" * 100_000, "nested more than 64 levels deep"),
        ("a = " + "1" * 4_301, "4300 digits"),
        ("a = 0x" + "f" * 4_301, "more than 100 digits"),
        ("#" * 3_000_000, "larger than the 2,097,152 bytes"),
        (BOOK.replace("= 1\n", "= 0e-999999999\n"), "exponent from -100 to 100"),
        (BOOK.replace("2020-01-01", "9999-12-31T23:59:59-12:00"), "outside the years 1 to 9999"),
        (BOOK.replace("2020-01-01", "2026"), "effective_from = '2026': is not a date"),
        (BOOK.replace("2020-01-01", "1.5"), "is not a date"),
        (BOOK.replace("USD", "ZZZ"), "currency = 'ZZZ' is not in use"),
        (BOOK.replace("{ standard", '{ " standard "'), "tier ' standard ' can never match"),
        (
            BOOK.replace("per_compute_unit = 1", "per_request = 1000000").replace("standard = 1", "standard = 10"),
            "per_request = 1000000 × 10 (tier 'standard') is more than a receipt holds, 9223372.036854775807 USD",
        ),
        (BOOK.replace("= 1\n", "= 1000000\nuntiered = 1000\n"), "per_compute_unit = 1000000 × 1000 (untiered)"),
    ],
)
def test_a_book_beyond_a_limit_is_refused_at_once(text: str, said: str) -> None:
    with pytest.raises(PriceBookError) as caught:
        PriceBook.from_toml(text, name="mine.toml")
    assert "price book 'mine.toml'" in str(caught.value)
    assert said in str(caught.value)


def test_rates_of_a_plan_are_checked_as_well() -> None:
    plan = "[[plans.big.prices]]\neffective_from = 2020-01-01\nper_request = 1000000\ntiers = { standard = 10 }\n"
    with pytest.raises(PriceBookError, match=r"plans\.big\.prices from 2020.*per_request"):
        PriceBook.from_toml(BOOK + plan)


def absurd() -> PriceBook:
    """A book whose every request costs more than a receipt holds, made without the check."""
    text = PriceBook.from_toml(BOOK.replace("per_compute_unit = 1", "per_request = 1000000")).document
    return PriceBook.from_document(text.replace('"standard":"1"', '"standard":"10"'))


def test_a_cost_beyond_the_ledger_is_stored_unrated_with_the_reason(ledger_url: str) -> None:
    record = usage_record("r", tier="standard", started_at=datetime(2026, 1, 1, tzinfo=UTC))
    with Meter(ledger_url, prices=absurd()) as meter:
        receipt = meter.emit(record)
        (many,) = meter.emit_many([record.model_copy(update={"request_id": "s"})])
    assert receipt["cost"] is None
    assert "cost 10000000 USD, and a receipt holds at most 9223372.036854775807" in receipt["unrated"]
    with Ledger(ledger_url) as ledger:
        stored = list(ledger.read(Selection(ALL_TENANTS)))
    assert [entry.unrated for entry in stored] == [receipt["unrated"]] * 2
    assert many == stored[1]
    quoted = quote(absurd(), "acme", "standard", 1, 1, 1, record.started_at)
    assert (quoted.amount, quoted.unrated) == (None, receipt["unrated"])


def test_a_book_that_cannot_charge_is_not_put_in_force_but_one_in_force_stays_readable(ledger_url: str) -> None:
    with Ledger(ledger_url) as ledger, pytest.raises(PriceBookError):
        add_book(ledger, absurd())
    assert absurd().prices[0].per_request == 1_000_000


def test_zero_is_zero_whatever_its_exponent_and_what_is_too_large_is_not_counted() -> None:
    for count in (to_scaled, to_units):
        for exponent in ("999999999", "-999999999"):
            assert count(Decimal(f"0e{exponent}"), 12) == 0
            with pytest.raises(AmountError):
                count(Decimal(f"1e{exponent}"), 12)
    with pytest.raises(AmountError):
        to_scaled(Decimal("0.001"), 2)
    assert to_scaled(Decimal("0.010"), 2) == 1


BASE = """
id = "b"
currency = "USD"
[[prices]]
effective_from = 2026-01-01
per_compute_unit = 0.5
tiers = {standard = 1}
"""
PLAN = "[[plans.p.terms]]\neffective_from = 2026-01-01\n"
BANDS = PLAN + '[[plans.p.terms.items]]\nper = "requests"\nmodel = "graduated"\nbands = '
PROMISE = PLAN + "[plans.p.terms.promises.standard]\ncredit_percent = 10\n"
CREDIT = '[[credits]]\nid = "c"\ntenant = "acme"\namount = 5\neffective_from = 2026-01-01\n'
CUSTOMER = '[[customers]]\ntenant = "acme"\neffective_from = 2026-01-01\n'
NOW = datetime(2026, 6, 1, tzinfo=UTC)


def book(*parts: str) -> PriceBook:
    return PriceBook.from_toml("\n".join([BASE, *parts]), name="b.toml")


def test_the_example_has_three_customers_on_three_plans() -> None:
    example = PriceBook.example(EXAMPLE_PLANS)
    at = datetime(2026, 11, 1, tzinfo=UTC)
    assert {one.tenant: one.plan for one in example.customers} == {
        "acme": "starter",
        "globex": "growth",
        "initech": "reserved",
    }
    growth = example.plan_at(at, "globex")
    assert growth is not None
    terms = growth.terms_at(at)
    assert terms is not None
    assert terms.minimum == 50
    later = growth.terms_at(datetime(2027, 1, 1, tzinfo=UTC))
    assert later is not None
    assert later.minimum == 60
    assert example.plan_at(datetime(2025, 12, 31, tzinfo=UTC), "globex") is None
    entry = example.entry_at(at, "initech")
    assert entry is not None
    assert entry.per_compute_unit == Decimal("0.00036")
    assert PriceBook.from_document(example.document) == example


def test_books_without_plans_keep_the_hash_of_their_first_release() -> None:
    assert PriceBook.example().content_hash == "39995a82914903549fbbf4f94bff57335dc467d887ea11c02c211af1913cb1af"


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (BANDS + "[{up_to = 5, unit_price = 1}]", "the last band has an end"),
        (BANDS + "[{unit_price = 1}, {unit_price = 2}]", "a band before the last has no up_to"),
        (
            BANDS + "[{up_to = 5, unit_price = 1}, {up_to = 5, unit_price = 2}, {unit_price = 3}]",
            "bands must rise",
        ),
        (BANDS + "[{up_to = 0.5, unit_price = 1}, {unit_price = 3}]", "more than the 0 decimals of requests"),
        (BANDS + "[{unit_price = -1}]", "unit_price = '-1'"),
        (BANDS + "[]", "at least 1 item"),
        (
            BANDS
            + '[{unit_price = 1}]\n[[plans.p.terms.items]]\nper = "requests"\nmodel = "package"\nsize = 1\nprice = 1',
            "requests is priced twice",
        ),
        (PLAN + "flat_fee = nan", "flat_fee = 'NaN'"),
        (PLAN + "minimum = true", "minimum = 'True'"),
        (PLAN + PLAN, "two terms are 2026-01-01"),
        (PROMISE, "promises nothing"),
        (PROMISE + "agreement_min = 1.5", "agreement_min = '1.5'"),
        (CUSTOMER + 'plan = "gold"', "customer 'acme' is on plan 'gold', which the book does not have"),
        (CUSTOMER + 'zone = "Mars/Olympus"', "time zone 'Mars/Olympus' is unknown"),
        (CUSTOMER + CUSTOMER, "two customers are acme from 2026-01-01"),
        (CREDIT + CREDIT, "two credits are c"),
        (CREDIT + "expires_at = 2025-01-01", "is not after"),
        (CREDIT.replace("= 5", "= 0.001"), "credit 'c' (0.001) has more than the 2 decimals of a statement"),
    ],
)
def test_a_wrong_plan_is_refused(part: str, said: str) -> None:
    with pytest.raises(PriceBookError) as caught:
        book(part)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


NEXT = "[[prices]]\neffective_from = 2026-07-01\nper_compute_unit = 0.7\ntiers = {standard = 1}\n"


@pytest.mark.parametrize(
    "revised",
    [
        [NEXT],
        [CREDIT],  # new money changes no rate
        [CUSTOMER.replace("2026-01-01", "2026-07-01")],
        [PLAN],  # nobody is on it
    ],
)
def test_a_revision_may_add_what_begins_later(revised: list[str]) -> None:
    old = book()
    new = book(*revised)
    assert changes(old, new)
    check_revision(old, new, now=NOW, last_use=None)


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        (BASE, BASE.replace("0.5", "0.6"), "prices[2026-01-01T00:00:00+00:00].per_compute_unit: 0.5 → 0.6"),
        (BASE, BASE.replace("standard = 1", "standard = 1, exact = 2"), ".tiers.exact: nothing → 2"),
        (BASE, BASE.replace('"USD"', '"EUR"'), "currency: USD → EUR"),
        (BASE, BASE.replace('id = "b"', 'id = "b"\nfree_outcomes = ["error"]'), "free_outcomes: none → error"),
        (BASE, BASE + NEXT.replace("2026-07-01", "2026-05-01"), "prices[2026-05-01T00:00:00+00:00]: nothing → added"),
        (BASE + NEXT.replace("2026-07-01", "2026-05-01"), BASE, "prices[2026-05-01T00:00:00+00:00]: present → nothing"),
        (BASE, BASE.replace("tiers", "effective_until = 2026-05-01\ntiers"), "effective_until: nothing → 2026-05-01"),
        (BASE + CUSTOMER, BASE, "customers.acme[2026-01-01T00:00:00+00:00]: present → nothing"),
        (
            BASE + PLAN,
            BASE + PLAN + PLAN.replace("01-01", "02-01"),
            "plans.p.terms[2026-02-01T00:00:00+00:00]: nothing",
        ),
        (BASE + CREDIT, BASE + CREDIT.replace("= 5", "= 6"), "credits.c.amount: 5 → 6"),
        (
            BASE + PLAN + "flat_fee = 5",
            BASE + PLAN + "flat_fee = 4",
            "plans.p.terms[2026-01-01T00:00:00+00:00].flat_fee",
        ),
    ],
)
def test_a_revision_never_changes_the_past(old: str, new: str, path: str) -> None:
    with pytest.raises(PriceBookError, match="2026-06-01") as caught:
        check_revision(PriceBook.from_toml(old), PriceBook.from_toml(new), now=NOW, last_use=None)
    assert path in str(caught.value)


def test_an_end_that_has_not_come_may_be_moved() -> None:
    open_ended = BASE
    ended = BASE.replace("tiers", "effective_until = 2026-09-01\ntiers")
    assert past_changes(PriceBook.from_toml(open_ended), PriceBook.from_toml(ended), NOW) == []
    assert changes(PriceBook.from_toml(open_ended), PriceBook.from_toml(ended))


def test_what_rated_a_use_is_past_even_if_the_clock_says_otherwise() -> None:
    old, new = book(NEXT), book(NEXT.replace("0.7", "0.8"))
    check_revision(old, new, now=NOW, last_use=None)
    with pytest.raises(PriceBookError, match=r"per_compute_unit: 0\.7 → 0\.8"):
        check_revision(old, new, now=NOW, last_use=datetime(2026, 7, 2, tzinfo=UTC))
