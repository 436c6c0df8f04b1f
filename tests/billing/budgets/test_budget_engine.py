"""Budgets through the engine: a request is stopped, or served cheaper, before it computes."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest

from langchain_polar import ChatPolar, PolarLLM
from polar_billing.budgets.budget import Budget, Level, OverBudget
from polar_billing.budgets.enforcement import Budgets
from polar_billing.ledger.records import Selection
from polar_sdk.errors import BudgetExceededError
from polar_sdk.request.admission import DOWNGRADED_TAG
from polar_sdk.testing import tiny_model
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import StoredUsage
    from polar_sdk.model import PolarModel

MOST = 6
PREMIUM, STANDARD, ECONOMY = "0-5", "0 2-5", "0 3-5"


@pytest.fixture
def model(ledger_url: str) -> PolarModel:
    return tiny_model(ledger=ledger_url, tenant="acme")


@pytest.fixture
def budgets(ledger: Ledger) -> Budgets:
    return Budgets(ledger)


def bound(model: PolarModel, program: str, prompt: str = "hello") -> Decimal:
    """The maximum that a request can use. Unit: CU."""
    return Decimal(model.cost(program, prompt=model.count_tokens(prompt), output=MOST).total).scaleb(-12)


def usage(ledger: Ledger, tenant: str = "acme") -> list[StoredUsage]:
    return list(ledger.read(Selection(tenant)))


def test_a_request_over_budget_is_stopped_before_it_computes(
    model: PolarModel, ledger: Ledger, budgets: Budgets, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets.set(Budget("acme", bound(model, PREMIUM) - Decimal("1E-12"), zone="Europe/Berlin"))

    def never(*_: object) -> None:
        raise AssertionError("a layer ran")

    monkeypatch.setattr("polar_sdk.serving.passes.next_logits", never)
    with pytest.raises(BudgetExceededError, match="acme") as caught:
        model.generate("hello", compute="premium", max_tokens=MOST)
    error = caught.value
    assert (error.level, error.name, error.unit, error.exit_code) == ("tenant", "acme", "CU", 3)
    assert error.remaining == error.limit
    assert Decimal(error.needed or 0) == bound(model, PREMIUM)
    assert error.resets_at is not None
    assert error.resets_at > datetime.now(UTC)
    assert (error.resets_at.day, error.resets_at.hour) == (1, 0)
    assert str(error.resets_at.tzinfo) == "Europe/Berlin"
    assert error.resets_at.isoformat() in str(error)
    with pytest.raises(BudgetExceededError):
        next(model.stream("hello", compute="premium", max_tokens=MOST))
    assert usage(ledger) == []
    assert budgets.holds("acme") == []


def test_an_exact_fit_is_served_and_what_was_not_used_comes_back(
    model: PolarModel, ledger: Ledger, budgets: Budgets
) -> None:
    budgets.set(Budget("acme", bound(model, PREMIUM)))
    done = model.generate("hello", compute="premium", max_tokens=MOST)
    (standing,) = budgets.standings("acme")
    assert (standing.spent, standing.held) == (done.usage.flops.total, 0)
    assert [stored.record for stored in usage(ledger)] == [done.usage]
    with pytest.raises(BudgetExceededError):
        model.generate("hello", compute="premium", max_tokens=MOST)
    model.generate("hello", tenant="globex", max_tokens=MOST)  # not theirs


def test_where_the_budget_says_so_a_cheaper_program_is_served(
    model: PolarModel, ledger: Ledger, budgets: Budgets
) -> None:
    budgets.set(Budget("acme", bound(model, STANDARD), over_budget=OverBudget.SHALLOWER))
    done = model.generate("hello", compute="exact", max_tokens=MOST)
    assert (done.usage.tier, done.usage.program) == ("standard", STANDARD)
    assert done.usage.tags == {DOWNGRADED_TAG: "exact"}
    assert done.usage.visits.prefill[1] == 0
    (stored,) = usage(ledger)
    assert stored.record == done.usage
    (standing,) = budgets.standings("acme")
    assert (standing.spent, standing.held) == (done.usage.flops.total, 0)
    with pytest.raises(BudgetExceededError) as caught:  # not even the cheapest fits now
        model.generate("hello", compute="exact", max_tokens=MOST)
    assert Decimal(caught.value.needed or 0) == bound(model, ECONOMY)


def test_a_money_budget_counts_what_the_receipts_say(model: PolarModel, ledger: Ledger, budgets: Budgets) -> None:
    price = Decimal("0.0004") * Decimal("1.25")  # per CU, for premium
    budgets.set(Budget("acme", (bound(model, PREMIUM) * price * 2).quantize(Decimal("1E-12")), "USD"))
    first = model.generate("hello", compute="premium", max_tokens=MOST)
    (standing,) = budgets.standings("acme")
    assert standing.budget.amount(standing.spent) == Decimal((first.receipt or {})["cost"]) == usage(ledger)[0].cost
    model.generate("hello", compute="premium", max_tokens=MOST)
    with pytest.raises(BudgetExceededError) as caught:
        for _ in range(10):  # answers that end early leave room for one more
            model.generate("hello", compute="premium", max_tokens=MOST)
    assert caught.value.unit == "USD"


def test_an_unpriced_request_cannot_be_held_to_a_money_budget(model: PolarModel, budgets: Budgets) -> None:
    from polar_billing.metering.meter import Meter
    from polar_billing.prices.book import PriceBook

    book = PriceBook.example().model_dump()
    for entry in book["prices"]:
        entry["tiers"] = {"economy": 1}
    model.sink = Meter(budgets.ledger, prices=PriceBook.model_validate(book))
    budgets.set(Budget("acme", Decimal(1), "USD"))
    with pytest.raises(BudgetExceededError, match="premium"):
        model.generate("hello", compute="premium", max_tokens=MOST)
    budgets.set(Budget("acme", Decimal(1), "USD", over_budget=OverBudget.SHALLOWER))
    assert model.generate("hello", compute="premium", max_tokens=MOST).usage.tier == "economy"


def test_a_refused_row_of_a_batch_stops_the_batch_and_gives_the_others_holds_back(
    model: PolarModel, ledger: Ledger, budgets: Budgets
) -> None:
    budgets.set(Budget("acme", Decimal(1)))
    budgets.set(Budget("acme", Decimal(0), level=Level.USER, name="bob"))
    each = [{"tags": {"user": name}, "request_id": f"of {name}"} for name in ("ann", "bob", "cat")]
    with pytest.raises(BudgetExceededError, match="bob"):
        model.generate_batch(["a", "b", "c"], each=each, max_tokens=MOST)  # type: ignore[arg-type]
    assert usage(ledger) == []
    assert budgets.holds("acme") == []
    assert [standing.held for standing in budgets.standings("acme")] == [0, 0]
    done = model.generate_batch(["a", "c"], each=[each[0], each[2]], max_tokens=MOST)  # type: ignore[list-item]
    assert [one.record for one in usage(ledger)] == [one.usage for one in done]
    assert budgets.standings("acme")[0].spent == sum(one.usage.flops.total for one in done)


def test_a_stream_that_is_closed_settles_what_ran(model: PolarModel, ledger: Ledger, budgets: Budgets) -> None:
    budgets.set(Budget("acme", Decimal(1)))
    chunks = model.stream("hello", compute="premium", max_tokens=MOST)
    next(chunks)
    (hold,) = budgets.holds("acme")
    assert hold.flops_bound == bound(model, PREMIUM).scaleb(12)
    chunks.close()
    (stored,) = usage(ledger)
    assert stored.record.outcome is Outcome.CANCELLED
    (standing,) = budgets.standings("acme")
    assert (standing.spent, standing.held) == (stored.record.flops.total, 0)
    assert 0 < standing.spent < hold.flops_bound


def test_an_error_in_mid_layer_settles_what_ran(
    model: PolarModel, ledger: Ledger, budgets: Budgets, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets.set(Budget("acme", Decimal(1)))

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("polar_sdk.serving.passes.next_logits", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.generate("hello", max_tokens=MOST)
    (stored,) = usage(ledger)
    assert stored.record.outcome is Outcome.ERROR
    assert [(standing.spent, standing.held) for standing in budgets.standings("acme")] == [
        (stored.record.flops.total, 0)
    ]


def test_langchain_is_stopped_or_served_cheaper_too(model: PolarModel, ledger: Ledger, budgets: Budgets) -> None:
    llm = PolarLLM(engine=model, tenant="globex", usage_tags={"project": "search"}, max_tokens=MOST)
    budgets.set(
        Budget("globex", bound(model, ECONOMY), level=Level.PROJECT, name="search", over_budget=OverBudget.SHALLOWER)
    )
    answer = llm.generate(["hello"], compute="premium")
    assert (answer.generations[0][0].generation_info or {})["polar"]["tier"] == "economy"
    (stored,) = usage(ledger, "globex")
    assert (stored.record.tier, stored.record.tags[DOWNGRADED_TAG]) == ("economy", "premium")
    with pytest.raises(BudgetExceededError, match="search"):
        llm.invoke("hello again")
    with pytest.raises(BudgetExceededError):
        ChatPolar(engine=model, tenant="globex", usage_tags={"project": "search"}).invoke("hello")
    llm.invoke("hello", tenant="initech")
    PolarLLM(engine=model, tenant="globex", max_tokens=MOST).invoke("hello")  # another project
    assert len(usage(ledger, "globex")) == 2
