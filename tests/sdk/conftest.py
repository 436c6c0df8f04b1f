"""Settings and fixtures of the engine's tests: the tiny model with a list as its sink."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from polar_sdk.testing import tiny_model
from polar_sdk.usage import ListSink

if TYPE_CHECKING:
    from polar_sdk.model import PolarModel

settings.register_profile("polar", deadline=None)  # a busy machine must not fail a test
settings.load_profile("polar")


@pytest.fixture
def records() -> ListSink:
    return ListSink()


@pytest.fixture
def tiny(records: ListSink) -> PolarModel:
    """Six layers, all tiers, window of 512 tokens; its records land in `records`."""
    return tiny_model(sink=records, tenant="acme", tags={"team": "search", "stage": "test"})
