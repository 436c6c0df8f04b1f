"""Both frameworks into one ledger, found without naming it: what they report is what the ledger holds."""

from __future__ import annotations

import gc
import threading
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.caches import InMemoryCache
from llama_index.core.llms import ChatMessage

from langchain_polar import ChatPolar, get_polar_cost_callback
from llama_index_polar import PolarLLM
from polar_sdk.request import recorder
from polar_sdk.testing import tiny_model

if TYPE_CHECKING:
    from polar_sdk import PolarModel

billing: Any = pytest.importorskip("polar_billing")


@pytest.fixture
def metered() -> PolarModel:
    return tiny_model(ledger="auto")


def test_costs_agree_to_the_last_decimal(metered: PolarModel) -> None:
    chat = ChatPolar(engine=metered, max_tokens=5, cache=InMemoryCache())
    with get_polar_cost_callback() as costs:
        chat.invoke("Hello", config={"metadata": {"tenant": "acme"}})
        chat.invoke("Hello", config={"metadata": {"tenant": "acme"}})
        list(chat.stream("Hi", compute="economy"))
    raw: Any = PolarLLM(engine=metered, max_tokens=5, tenant="globex").chat([ChatMessage("Hello")]).raw
    stored = list(billing.Ledger().read(billing.Selection(billing.ALL_TENANTS)))
    assert [one.record.outcome for one in stored] == ["completed", "cached", "completed", "completed"]
    assert {one.record.tenant for one in stored} == {"acme", "default", "globex"}
    assert [call.cost for call in costs.calls] == [one.cost for one in stored[:3]]
    assert Decimal(raw["cost_details"]["amount"]) == stored[3].cost
    assert stored[0].cost
    assert stored[1].cost == 0


def test_nothing_runs_when_nothing_can_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLAR_LEDGER", "sqlite:////no/such/folder/ledger.sqlite3")
    engine = tiny_model(ledger="auto")
    with pytest.raises(OSError, match="no/such/folder"):
        ChatPolar(engine=engine, max_tokens=5).invoke("Hello")
    with pytest.raises(OSError, match="no/such/folder"):
        PolarLLM(engine=engine, max_tokens=5).complete("Hello")


def test_a_stream_collected_in_the_meters_thread_does_not_wait_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from polar_billing.metering.writer import Writer

    meter = billing.Meter(durability="commit")
    engine = tiny_model(sink=meter)
    store = Writer._store

    def collect(*arguments: Any) -> None:
        gc.collect()
        store(*arguments)

    monkeypatch.setattr(Writer, "_store", collect)
    gc.disable()
    try:
        cycle: list[Any] = [engine.stream("Hello", max_tokens=200)]
        next(cycle[0])
        cycle.append(cycle)
        del cycle
        asking = threading.Thread(target=lambda: engine.generate("other", max_tokens=2), daemon=True)
        asking.start()
        asking.join(20)
    finally:
        gc.enable()
    assert not asking.is_alive()
    assert recorder.flush()
    stored = billing.Ledger().read(billing.Selection(billing.ALL_TENANTS))
    assert sorted(usage.record.outcome for usage in stored) == ["cancelled", "completed"]
    meter.close()
