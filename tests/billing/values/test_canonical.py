"""Anybody can write the bytes that are hashed: the standard library makes the same."""

from __future__ import annotations

import json
from decimal import Decimal
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_billing.errors import AmountError
from polar_billing.testing import usage_record
from polar_billing.values.canonical import canonical_json, record_json
from polar_billing.values.money import to_units

texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | texts | st.integers(-(2**63), 2**63 - 1),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@given(values)
def test_the_bytes_are_those_of_the_standard_library(value: object) -> None:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert canonical_json(value) == text.encode()


def test_a_mapping_of_any_kind_is_written_as_one() -> None:
    record = usage_record("r1", tags={"b": "2", "a": "1"})
    frozen = record.model_copy(update={"tags": MappingProxyType(dict(record.tags))})
    assert record_json(frozen) == record_json(record)


@given(st.integers(-(2**63) + 1, 2**63 - 1))
def test_an_amount_is_counted_to_its_last_unit(units: int) -> None:
    assert to_units(Decimal(units).scaleb(-12)) == units


@pytest.mark.parametrize(
    "amount", ["1E-13", "NaN", "-Infinity", "9223372.036854775808", "1" + "0" * 5 + ".5" + "0" * 120 + "1"]
)
def test_an_amount_that_no_column_holds_is_refused(amount: str) -> None:
    with pytest.raises(AmountError):
        to_units(Decimal(amount))
