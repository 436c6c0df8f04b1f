from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, insert, select

from polar_billing.errors import AmountError
from polar_billing.ledger.schema.base import ScaledDecimal
from polar_billing.values.money import (
    EXACT_SCALE,
    currency_decimals,
    exact_sum,
    from_scaled,
    plain,
    round_half_even,
    round_lines,
    to_scaled,
)

exact_amounts = st.integers(min_value=-(10**48), max_value=10**48)
currencies = st.sampled_from(["JPY", "USD", "EUR", "KWD", "TND"])
WIDE = Context(prec=200)


@given(units=st.integers(), decimals=st.integers(min_value=0, max_value=30))
def test_scaled_integers_come_back_digit_for_digit(units: int, decimals: int) -> None:
    with localcontext(prec=3):  # a narrow context of the caller must not touch money
        assert to_scaled(from_scaled(units, decimals), decimals) == units


@given(units=st.integers(min_value=-(10**40), max_value=10**40), decimals=st.integers(min_value=0, max_value=12))
def test_rounding_is_that_of_the_decimal_module(units: int, decimals: int) -> None:
    ours = from_scaled(round_half_even(units, EXACT_SCALE, decimals), decimals)
    theirs = from_scaled(units, EXACT_SCALE).quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_EVEN, WIDE)
    assert ours == theirs


@given(amounts=st.lists(exact_amounts, max_size=50), currency=currencies)
def test_lines_and_residue_sum_to_the_total_to_the_last_unit(amounts: list[int], currency: str) -> None:
    decimals = currency_decimals(currency)
    rounded = round_lines(amounts, decimals)
    assert exact_sum([*rounded.amounts, rounded.residue], decimals) == rounded.total
    assert to_scaled(rounded.total, decimals) == round_half_even(sum(amounts), EXACT_SCALE, decimals)
    assert 2 * abs(to_scaled(rounded.residue, decimals)) <= len(amounts) + 1  # half a unit per rounding


@pytest.mark.parametrize("decimals", [0, 2, 3])
def test_a_million_charges_of_half_the_smallest_unit_leave_residue_nowhere(decimals: int) -> None:
    half = 10 ** (EXACT_SCALE - decimals) // 2
    rounded = round_lines([half] * 1_000_000, decimals)
    assert rounded.total == from_scaled(500_000, decimals)  # each line alone rounds to nothing
    assert rounded.residue == rounded.total


@pytest.mark.parametrize(("currency", "decimals"), [("JPY", 0), ("USD", 2), ("KWD", 3)])
def test_currencies_have_the_decimals_of_their_minor_unit(currency: str, decimals: int) -> None:
    assert currency_decimals(currency) == decimals


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "0.0000000000001"])
def test_what_cannot_be_kept_exactly_is_refused(value: str) -> None:
    with pytest.raises(AmountError, match="amount"):
        to_scaled(Decimal(value), 12)


def test_plain_numbers_have_no_exponent_and_no_trailing_zeros() -> None:
    assert [plain(Decimal(text)) for text in ("1E+3", "0.00036000", "100", "0E-12")] == [
        "1000",
        "0.00036",
        "100",
        "0",
    ]


@given(units=st.lists(st.integers(min_value=-(2**63) + 1, max_value=2**63 - 1), min_size=1, max_size=20))
def test_the_column_returns_every_digit_from_sqlite(units: list[int]) -> None:
    table = Table("t", MetaData(), Column("id", Integer, primary_key=True), Column("amount", ScaledDecimal()))
    engine = create_engine("sqlite://")
    amounts = [from_scaled(unit, 12) for unit in units]
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(insert(table), [{"amount": amount} for amount in amounts])
        assert list(connection.scalars(select(table.c.amount).order_by(table.c.id))) == amounts
    engine.dispose()


@pytest.mark.parametrize("value", ["9223372.036854775808", "-9223372.036854775808"])
def test_the_column_refuses_what_int64_cannot_hold(value: str) -> None:
    column = ScaledDecimal()
    with pytest.raises(AmountError, match=r"9223372\.036854775807"):
        column.process_bind_param(Decimal(value), create_engine("sqlite://").dialect)
