"""What LlamaIndex adds to `polar_sdk.settings`: its way to say who asks. Knows no messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_index_instrumentation.dispatcher import active_instrument_tags
from pydantic import model_validator

from polar_sdk.settings import ModelSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PolarSettings"]


class PolarSettings(ModelSettings):
    """Settings of a PoLar model; those marked *per call* may also be passed to `chat` and its kin.

    `tenant` and tags may also be told as `instrument_tags({"tenant": …})` around any LlamaIndex call; these are laid
    over those of the object, and those of the call over both.
    """

    max_tokens: int = 256
    """Most tokens of the answer; LlamaIndex keeps this much of the context window free. Per call."""

    @model_validator(mode="before")
    @classmethod
    def _drop_class_name(cls, values: Any) -> Any:
        """Take what `to_dict` gives: LlamaIndex writes the name of the class into it."""
        if isinstance(values, dict):
            return {name: value for name, value in values.items() if name != "class_name"}
        return values

    def _options(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Engine options of one call.

        Raises:
            TypeError: An option that does not exist, with the nearest that does.
        """
        around = {key: str(value) for key, value in active_instrument_tags.get().items()}
        tenant = around.pop("tenant", None)
        return {
            **self._with_options(call)._answering(),
            "tenant": call.get("tenant") or tenant or self._own_tenant,
            "tags": {**self.usage_tags, **around, **(call.get("usage_tags") or {})},
            "request_id": call.get("request_id"),
        }
