"""The book that a meter charges by: a named one, those in force in the ledger, the example; by the time of use."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from polar_billing.budgets.budget import Budget
from polar_billing.budgets.enforcement import Budgets
from polar_billing.errors import PriceBookError
from polar_billing.ledger.books import add_book
from polar_billing.ledger.ledger import Ledger
from polar_billing.metering.meter import Meter
from polar_billing.prices import in_force as prices
from polar_billing.prices.book import PRICE_BOOK_VARIABLE, PriceBook
from polar_billing.prices.in_force import Choice, InForce, Prices
from polar_billing.proof.verify import verify_ledger
from polar_billing.testing import usage_record
from polar_sdk.usage import Offer, UsageBound

NOW = datetime(2026, 11, 15, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


def book_of(name: str, price: str, *customers: str, later: str | None = None, currency: str = "USD") -> PriceBook:
    """So much for a request, and from an hour after noon on `later`."""
    entries = [{"effective_from": NOW - 1000 * HOUR, "per_request": price, "tiers": {"standard": 1}}]
    if later is not None:
        entries.append({"effective_from": NOW + HOUR, "per_request": later, "tiers": {"standard": 1}})
    people = [{"tenant": one, "effective_from": NOW - 100 * HOUR} for one in customers]
    content: dict[str, Any] = {"id": name, "currency": currency, "prices": entries, "customers": people}
    return PriceBook.model_validate(content)


def cost(meter: Meter, tenant: str = "acme", at: datetime = NOW) -> Decimal:
    return Decimal(meter.emit(usage_record(tenant=tenant, started_at=at))["cost"])


def test_a_book_put_in_force_is_charged_by_at_once(store: Ledger) -> None:
    meter = Meter(store)
    assert meter.emit(usage_record(started_at=NOW))["price_book"] == "polar-example"
    assert add_book(store, book_of("mine", "1"), now=NOW)
    assert cost(meter, at=NOW + HOUR) == 1
    assert not add_book(store, book_of("mine", "1"), now=NOW)
    assert verify_ledger(store).findings == []


def test_another_process_sees_it_a_second_later(
    ledger_url: str, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prices, "_SEEN_WITHIN_S", 10**9)
    with Meter(ledger_url) as meter:
        assert cost(meter) != 7
        monkeypatch.setattr("polar_billing.ledger.books.say_changed", lambda: None)  # as if in another process
        add_book(ledger, book_of("mine", "7"), now=NOW)
        assert cost(meter) != 7
        monkeypatch.setattr(prices, "_SEEN_WITHIN_S", 0.0)
        assert cost(meter) == 7


def test_what_is_named_goes_before_the_ledger(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_book(ledger, book_of("mine", "1"), now=NOW)
    assert cost(Meter(ledger, prices=book_of("given", "2"))) == 2
    file = tmp_path / "named.toml"
    file.write_text(
        """id = "named"
currency = "USD"
[[prices]]
effective_from = 2024-01-01
per_request = 3
tiers = {standard = 1}
"""
    )
    monkeypatch.setenv(PRICE_BOOK_VARIABLE, str(file))
    assert cost(Meter(ledger)) == 3
    monkeypatch.delenv(PRICE_BOOK_VARIABLE)
    assert cost(Meter(ledger)) == 1


def test_the_time_of_use_decides_which_book(ledger: Ledger) -> None:
    """A record that comes late, or again, is charged by what was in force when it was served."""
    add_book(ledger, book_of("first", "1"), now=NOW)
    add_book(ledger, book_of("second", "2"), for_all=True, now=NOW + HOUR)
    meter = Meter(ledger)
    assert cost(meter, at=NOW + HOUR) == 2
    assert cost(meter, at=NOW + HOUR - timedelta(microseconds=1)) == 1
    assert cost(meter, at=NOW - HOUR) == 1  # the first book holds for the time before it, when there was none
    record = usage_record("same", started_at=NOW)
    receipt = meter.emit(record)
    add_book(ledger, book_of("third", "3"), for_all=True, now=NOW + 2 * HOUR)
    assert meter.emit(record) == receipt


def test_a_revision_changes_no_rate_of_the_past(store: Ledger) -> None:
    add_book(store, book_of("mine", "1"), now=NOW)
    with pytest.raises(PriceBookError):
        add_book(store, book_of("mine", "2"), now=NOW)
    revision = book_of("mine", "1", later="5")
    assert add_book(store, revision, now=NOW)
    assert add_book(store, book_of("mine", "1"), now=NOW + HOUR / 2)  # taken back before it begins
    meter = Meter(store)
    assert [cost(meter, at=at) for at in (NOW, NOW + HOUR)] == [1, 1]
    with pytest.raises(PriceBookError):  # that hour has been charged for by now
        add_book(store, revision, now=NOW + HOUR / 2)


def test_a_book_that_names_the_tenant_goes_before_the_one_for_all(ledger: Ledger) -> None:
    add_book(ledger, book_of("main", "1"), now=NOW)
    add_book(ledger, book_of("deal", "9", "globex"), now=NOW)
    meter = Meter(ledger)
    assert [cost(meter, tenant) for tenant in ("acme", "globex")] == [1, 9]
    assert add_book(ledger, book_of("deal", "9", "globex", later="8"), now=NOW)  # a revision displaces no other book
    assert [cost(meter, tenant) for tenant in ("acme", "globex")] == [1, 9]
    assert add_book(ledger, book_of("deal", "9", "globex", later="8"), for_all=True, now=NOW)
    assert [cost(meter, tenant) for tenant in ("acme", "globex")] == [9, 9]


def test_a_clock_that_goes_back_keeps_the_order(store: Ledger) -> None:
    add_book(store, book_of("first", "1"), now=NOW)
    add_book(store, book_of("second", "2"), for_all=True, now=NOW - HOUR)
    assert [choice.put_at for choice in store.price_choices()] == [NOW, NOW]
    assert cost(Meter(store)) == 2


def test_budgets_reserve_by_the_book_in_force(ledger: Ledger) -> None:
    add_book(ledger, book_of("mine", "4"), now=NOW)
    Budgets(ledger).set(Budget("acme", Decimal(100), "USD"))
    offer = Offer(tier="standard", program="0-5", flops_bound=1)
    bound = UsageBound(request_id="r", tenant="acme", tokens_input=1, tokens_output_max=1, offers=(offer,), at=NOW)
    assert Meter(ledger).reserve(bound) == 0
    (hold,) = Budgets(ledger).holds("acme")
    assert hold.cost_bound == 4


def test_looking_makes_no_ledger(ledger_url: str) -> None:
    ledger = Ledger(ledger_url)
    assert Prices(ledger.price_choices).of("acme").id == "polar-example"
    assert not ledger.price_choices()
    assert not Path(ledger_url.removeprefix("sqlite:///")).exists()


def test_nothing_in_force_is_nothing() -> None:
    assert InForce([]).book("acme", NOW) is None
    only = book_of("only", "1")
    assert InForce([Choice(only, True, NOW)]).book(None, datetime.min.replace(tzinfo=UTC)) is only
