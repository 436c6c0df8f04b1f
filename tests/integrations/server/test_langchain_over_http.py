"""LangChain's own suite for chat models over HTTP, by `ChatOpenAI` as it is; nothing is expected to fail.

What is skipped is about images, audio, PDF, Anthropic's format and recorded traffic. `make standard-suite` runs
the same on the default model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from polar_sdk import NullSink, PolarModel
from polar_sdk.testing import scripted_model
from polar_server import Settings
from tests.integrations.server.conftest import WAIT_S, Served
from tests.integrations.test_langchain_standard import reply

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_core.language_models import BaseChatModel


# The suite's own clients warn of what they do: pydantic's old classes, parsed answers that are written out.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class _Suite(ChatModelIntegrationTests):
    """Features that both engines are asked for."""

    url: ClassVar[str]
    """URL of the server; made for each class."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "tiny",
            "base_url": self.url,
            "api_key": "none",
            "max_tokens": 120,
            "max_retries": 0,
            "stream_usage": True,
            "timeout": 20 * WAIT_S,
            # LangChain shares one asynchronous client, and each test has an event loop of its own.
            "default_headers": {"connection": "close"},
        }

    @property
    def model_override_value(self) -> str:
        return "tiny:exact"

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "json_schema"}


def _serve(engine: PolarModel) -> Iterator[str]:
    served = Served(Settings(engine=engine, name="tiny", drain=0.0))
    yield served.base_url
    served.close()


class TestTiny(_Suite):
    """The tiny engine, which says what it is told to: all of the suite but what depends on a model's wits."""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def server(cls) -> Iterator[None]:
        for url in _serve(scripted_model(reply, context_window=4096)):
            cls.url = url
            yield


@pytest.mark.long
class TestTinyFunctionCalling(TestTiny):
    """The same with structured output by calls of tools."""

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "function_calling"}


class TestTinyResponses(TestTiny):
    """The same through `/v1/responses`."""

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**super().chat_model_params, "use_responses_api": True}


@pytest.mark.model
class TestRealModel(_Suite):
    """The default model."""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def server(cls) -> Iterator[None]:
        for url in _serve(PolarModel.from_pretrained(sink=NullSink())):
            cls.url = url
            yield

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**super().chat_model_params, "model": "tiny:exact"}

    @property
    def supports_json_mode(self) -> bool:
        """False: over HTTP this mode carries no schema, and a model of 135M parameters does not keep to two keys."""
        return False
