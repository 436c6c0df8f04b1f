"""The Mistral family: Llama with a sliding window in every layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from polar_sdk.engine.families.llama import LlamaFamily
from polar_sdk.engine.parts import refuse_other_windows


class MistralFamily(LlamaFamily):
    """`MistralForCausalLM`: a query sees the last `sliding_window` keys, its own included; None = all.

    Hugging Face masks the keys with key ≤ query − sliding_window, and ignores `layer_types`.
    """

    model_types: ClassVar[tuple[str, ...]] = ("mistral",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        refuse_other_windows(config)
        self.kinds = tuple(replace(kind, window=config.sliding_window) for kind in self.kinds)
