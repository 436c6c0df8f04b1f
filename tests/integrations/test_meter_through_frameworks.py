"""Both frameworks into one ledger, found without naming it: what they report is what the ledger holds."""

from __future__ import annotations

import gc
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import langchain_polar
import llama_index_polar
from langchain_polar import ChatPolar
from llama_index_polar import PolarLLM
from polar_sdk.testing import tiny_model
from tests.integrations.conftest import leave_in_a_cycle

if TYPE_CHECKING:
    from polar_sdk import PolarModel

billing: Any = pytest.importorskip("polar_billing")


@pytest.fixture
def metered() -> PolarModel:
    return tiny_model(ledger="auto")


def test_importing_loads_no_framework_and_constructing_no_torch() -> None:
    code = (
        "import sys, langchain_polar.demo, llama_index_polar; "
        "assert not {'langchain_core', 'llama_index.core'} & set(sys.modules); "
        "langchain_polar.PolarLLM(); langchain_polar.ChatPolar(); llama_index_polar.PolarLLM().to_payload(); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", [langchain_polar, llama_index_polar])
def test_public_names(package: Any) -> None:
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = package.Chat


def test_nothing_runs_when_nothing_can_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLAR_LEDGER", "sqlite:////no/such/folder/ledger.sqlite3")
    engine = tiny_model(ledger="auto")
    with pytest.raises(OSError):
        ChatPolar(engine=engine, max_tokens=5).invoke("Hello")
    with pytest.raises(OSError):
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
    leave_in_a_cycle(lambda: engine.stream("Hello", max_tokens=200), lambda: engine.generate("other", max_tokens=2))
    stored = billing.Ledger().read(billing.Selection(billing.ALL_TENANTS))
    assert sorted(usage.record.outcome for usage in stored) == ["cancelled", "completed"]
    meter.close()
