"""LangChain's own suites for chat models, over the tiny engine and, with the real model, as a user would run
it.

What `ChatPolar` does not claim (tools, structured output, images) it leaves unimplemented, and the suites see
that by themselves; nothing is expected to fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from langchain_polar import ChatPolar
from polar_sdk import PolarModel
from polar_sdk.models.aliases import ALIASES
from polar_sdk.models.paths import cache_folder
from polar_sdk.testing import tiny_model

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

_TINY = tiny_model()


class _Suite:
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatPolar


class TestUnit(_Suite, ChatModelUnitTests):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": _TINY}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"POLAR_MODEL": "some/model"}, {}, {"model": "some/model"}


class TestTiny(_Suite, ChatModelIntegrationTests):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": _TINY, "max_tokens": 24}


@pytest.mark.model
class TestRealModel(_Suite, ChatModelIntegrationTests):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"max_tokens": 10}

    @property
    def model_override_value(self) -> str:
        PolarModel.from_pretrained(ledger=None)  # fetched and converted from here on
        return str(cache_folder() / "models" / ALIASES[0].key)
