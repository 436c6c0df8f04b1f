"""Double entry: transactions balance, are booked once, are corrected by others, and balances are their sums."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polar_billing.errors import AmountError, ConflictError, QueryError, UnbalancedError
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.postings import Account, Line, balances, post, reversal, transaction_lines
from polar_billing.proof.verify import verify_in
from polar_billing.values.money import exact_sum

if TYPE_CHECKING:
    from collections.abc import Sequence


AT = datetime(2026, 11, 30, tzinfo=UTC)
CHARGE = [Line(Account.RECEIVABLE, Decimal("12.5"), "USD"), Line(Account.REVENUE, Decimal("-12.5"), "USD")]


def book(store: Ledger, reference: str, lines: Sequence[Line], **more: Any) -> int:
    with store.transaction() as connection:
        return post(connection, more.pop("tenant", "acme"), "statement", reference, lines, more.pop("at", AT), **more)


def standing(store: Ledger, tenant: str = "acme", **more: Any) -> dict[tuple[Account, str], Decimal]:
    with store.snapshot() as connection:
        assert verify_in(connection).findings == []
        return balances(connection, tenant, **more)


def test_a_transaction_is_booked_once(store: Ledger) -> None:
    first = book(store, "2026-11", CHARGE, note="November")
    assert book(store, "2026-11", CHARGE, note="November") == first
    for changed in ({"note": "other"}, {"note": "November", "at": AT + timedelta(microseconds=1)}):
        with pytest.raises(ConflictError, match=str(first)):
            book(store, "2026-11", CHARGE, **changed)
    with pytest.raises(ConflictError):
        book(store, "2026-11", reversal(CHARGE), note="November")
    assert standing(store) == {(Account.RECEIVABLE, "USD"): Decimal("12.5"), (Account.REVENUE, "USD"): Decimal("-12.5")}
    assert standing(store, "globex") == {}


def test_a_correction_names_what_it_corrects(store: Ledger) -> None:
    first = book(store, "2026-11", CHARGE)
    book(store, "2026-11 taken back", reversal(CHARGE), corrects=first, at=AT + timedelta(days=1))
    assert set(standing(store).values()) == {Decimal(0)}
    assert standing(store, until=AT + timedelta(days=1))[Account.RECEIVABLE, "USD"] == Decimal("12.5")
    with pytest.raises(QueryError, match="999"):
        book(store, "nothing", CHARGE, corrects=999)
    with pytest.raises(QueryError, match="globex"):
        book(store, "another tenant's", CHARGE, corrects=first, tenant="globex")


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([], UnbalancedError),
        ([Line(Account.CASH, Decimal(0), "USD")], UnbalancedError),
        ([*CHARGE, Line(Account.CASH, Decimal("1E-12"), "USD")], UnbalancedError),
        ([CHARGE[0], Line(Account.REVENUE, Decimal("-12.5"), "EUR")], UnbalancedError),
        ([Line(Account.CASH, Decimal("NaN"), "USD"), Line(Account.CASH, Decimal(0), "USD")], AmountError),
        ([Line(Account.CASH, Decimal("Infinity"), "USD"), Line(Account.CASH, Decimal(0), "USD")], AmountError),
        ([Line(Account.CASH, Decimal("1E-13"), "USD"), Line(Account.CASH, Decimal("-1E-13"), "USD")], AmountError),
        ([Line(Account.CASH, Decimal(10**19), "USD"), Line(Account.CASH, Decimal(-(10**19)), "USD")], AmountError),
    ],
)
def test_what_does_not_balance_is_not_booked(ledger: Ledger, lines: list[Line], error: type[Exception]) -> None:
    with pytest.raises(error):
        book(ledger, "wrong", lines)
    assert standing(ledger) == {}


def test_what_happens_in_a_transaction_happens_together(ledger: Ledger) -> None:
    with pytest.raises(RuntimeError), ledger.transaction() as connection:
        post(connection, "acme", "statement", "half", CHARGE, AT)
        raise RuntimeError("the rest failed")
    assert standing(ledger) == {}


amounts = st.decimals(min_value=-(10**18), max_value=10**18, places=12, allow_nan=False)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(Account), amounts, st.sampled_from(["USD", "JPY", "KWD"])), max_size=5))
def test_balances_are_exact_sums(drawn: list[tuple[Account, Decimal, str]]) -> None:
    with Ledger("sqlite://") as ledger:
        expected: dict[tuple[Account, str], Decimal] = {}
        for number, (account, amount, currency) in enumerate(drawn):
            lines = [Line(account, amount, currency), Line(Account.CASH, amount.copy_negate(), currency)]
            made = book(ledger, str(number), lines)
            with ledger.snapshot() as connection:
                assert transaction_lines(connection, "acme", made) == lines
            for line in lines:
                key = (line.account, currency)
                expected[key] = exact_sum([expected.get(key, Decimal(0)), line.amount], 12)
        found = standing(ledger)
        assert found == expected
        for currency in ("USD", "JPY", "KWD"):
            assert exact_sum([amount for (_, code), amount in found.items() if code == currency], 12) == 0
