"""A tiny real engine for the integration tests, and a sink that shows what it recorded."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from polar_sdk import ListSink, UsageRecord
from polar_sdk.testing import tiny_model

if TYPE_CHECKING:
    from polar_sdk import PolarModel


class _WatchedSink(ListSink):
    """Says when the engine has taken a request up: it asks `check` right before it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def check(self) -> None:
        self.asked += 1


@pytest.fixture
def sink() -> ListSink:
    return _WatchedSink()


@pytest.fixture
def engine(sink: ListSink) -> PolarModel:
    return tiny_model(sink=sink)


class _PricedSink(ListSink):
    """Prices a request at a tenth of a cent per output token, as a meter would: with a receipt."""

    def emit(self, record: UsageRecord) -> Any:
        super().emit(record)
        return {"cost": str(Decimal("0.001") * record.tokens.output), "currency": "EUR", "price_book": "t1"}


@pytest.fixture
def priced_sink() -> ListSink:
    return _PricedSink()


@pytest.fixture
def priced(priced_sink: ListSink) -> PolarModel:
    return tiny_model(sink=priced_sink)
