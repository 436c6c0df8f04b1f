"""LangChain's own suites for chat models, over the tiny engine and, with the real model, as a user would run
it.

Nothing is expected to fail, and what is skipped is about images, audio, PDF and recorded traffic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from pytest_socket import disable_socket, enable_socket

from langchain_polar import ChatPolar
from polar_sdk import PolarModel
from polar_sdk.frameworks.tools import call_text
from polar_sdk.models.aliases import ALIASES
from polar_sdk.models.paths import cache_folder
from polar_sdk.testing import scripted_model, tiny_model

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def reply(prompt: Any) -> str:
    """Answers of a capable model to the questions of the suite."""
    question = str(prompt if isinstance(prompt, str) else prompt[-1]["content"])
    return next((answer for words, answer in _ANSWERS.items() if words in question), "A short answer.")


_ANSWERS = {
    "'punchline' keys": '{"setup": "Why do cats sit still?", "punchline": "They wait for the next token."}',
    "magic_function(3)": call_text("magic_function", {"input": 3}),
    "weather in San Francisco": call_text("get_weather", {"location": "San Francisco"}),
    "Pirate greeting": call_text("greeting_generator", {"answer_style": "Pirate"}),
    "你好啊集团": call_text("unicode_customer", {"customer_name": "你好啊集团", "description": "a company"}),
    "こんにちは": call_text("unicode_customer", {"customer_name": "こんにちは株式会社", "description": "a company"}),
}


class _Tools(_Suite):
    """Features that both engines are asked for; media are all that the suite may skip."""

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "json_schema"}


class TestTiny(_Tools, ChatModelIntegrationTests):
    """The tiny engine, which says what it is told to: all of the suite but what depends on a model's wits."""

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": scripted_model(reply, context_window=4096), "max_tokens": 120}

    @property
    def model_override_value(self) -> str:
        return scripted_model(reply).name


@pytest.mark.long
class TestTinyFunctionCalling(TestTiny):
    """The same with structured output by calls of tools."""

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "function_calling"}


@pytest.mark.model
class TestRealModel(_Tools, ChatModelIntegrationTests):
    """The default model, as `make standard-suite` runs it, without a network."""

    @pytest.fixture(autouse=True)
    def offline(self) -> Iterator[None]:
        """No test may open a socket, but for the pair that an event loop makes for itself."""
        disable_socket(allow_unix_socket=True)
        yield
        enable_socket()

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"max_tokens": 128, "compute": "exact"}

    @property
    def model_override_value(self) -> str:
        PolarModel.from_pretrained(ledger=None)  # fetched from here on
        return str(cache_folder() / "models" / ALIASES[0].key)
