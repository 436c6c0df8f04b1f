"""Plans, customers and credits of a price book, and what a revision may change."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from polar_billing.errors import PriceBookError
from polar_billing.prices.book import EXAMPLE_PLANS, PriceBook
from polar_billing.prices.revisions import changes, check_revision, past_changes

HEAD = """
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
    return PriceBook.from_toml("\n".join([HEAD, *parts]), name="b.toml")


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
        (BANDS + "[{unit_price = -1}]", "unit_price = '-1': input should be greater"),
        (BANDS + "[]", "at least 1 item"),
        (
            BANDS
            + '[{unit_price = 1}]\n[[plans.p.terms.items]]\nper = "requests"\nmodel = "package"\nsize = 1\nprice = 1',
            "requests is priced twice",
        ),
        (PLAN + "flat_fee = nan", "flat_fee = 'NaN'"),
        (PLAN + "minimum = true", "must be a decimal number"),
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
        (HEAD, HEAD.replace("0.5", "0.6"), "prices[2026-01-01T00:00:00+00:00].per_compute_unit: 0.5 → 0.6"),
        (HEAD, HEAD.replace("standard = 1", "standard = 1, exact = 2"), ".tiers.exact: nothing → 2"),
        (HEAD, HEAD.replace('"USD"', '"EUR"'), "currency: USD → EUR"),
        (HEAD, HEAD.replace('id = "b"', 'id = "b"\nfree_outcomes = ["error"]'), "free_outcomes: none → error"),
        (HEAD, HEAD + NEXT.replace("2026-07-01", "2026-05-01"), "prices[2026-05-01T00:00:00+00:00]: nothing → added"),
        (HEAD + NEXT.replace("2026-07-01", "2026-05-01"), HEAD, "prices[2026-05-01T00:00:00+00:00]: present → nothing"),
        (HEAD, HEAD.replace("tiers", "effective_until = 2026-05-01\ntiers"), "effective_until: nothing → 2026-05-01"),
        (HEAD + CUSTOMER, HEAD, "customers.acme[2026-01-01T00:00:00+00:00]: present → nothing"),
        (
            HEAD + PLAN,
            HEAD + PLAN + PLAN.replace("01-01", "02-01"),
            "plans.p.terms[2026-02-01T00:00:00+00:00]: nothing",
        ),
        (HEAD + CREDIT, HEAD + CREDIT.replace("= 5", "= 6"), "credits.c.amount: 5 → 6"),
        (
            HEAD + PLAN + "flat_fee = 5",
            HEAD + PLAN + "flat_fee = 4",
            "plans.p.terms[2026-01-01T00:00:00+00:00].flat_fee",
        ),
    ],
)
def test_a_revision_never_changes_the_past(old: str, new: str, path: str) -> None:
    with pytest.raises(PriceBookError, match="changes what was in force by 2026-06-01") as caught:
        check_revision(PriceBook.from_toml(old), PriceBook.from_toml(new), now=NOW, last_use=None)
    assert path in str(caught.value)


def test_an_end_that_has_not_come_may_be_moved() -> None:
    open_ended = HEAD
    ended = HEAD.replace("tiers", "effective_until = 2026-09-01\ntiers")
    assert past_changes(PriceBook.from_toml(open_ended), PriceBook.from_toml(ended), NOW) == []
    assert changes(PriceBook.from_toml(open_ended), PriceBook.from_toml(ended))


def test_what_rated_a_use_is_past_even_if_the_clock_says_otherwise() -> None:
    old, new = book(NEXT), book(NEXT.replace("0.7", "0.8"))
    check_revision(old, new, now=NOW, last_use=None)
    with pytest.raises(PriceBookError, match=r"per_compute_unit: 0\.7 → 0\.8"):
        check_revision(old, new, now=NOW, last_use=datetime(2026, 7, 2, tzinfo=UTC))
