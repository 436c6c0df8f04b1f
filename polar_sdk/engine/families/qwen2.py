"""The Qwen 2 family: Llama with biases on queries, keys and values, and sliding windows in some layers."""

from __future__ import annotations

from typing import Any, ClassVar

from polar_sdk.engine.families.llama import LlamaFamily
from polar_sdk.engine.parts import attention_kinds


class Qwen2Family(LlamaFamily):
    """`Qwen2ForCausalLM`: layers of type `sliding_attention` see the last `sliding_window` keys, own included."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.kinds = attention_kinds(config, self.head_dim**-0.5)
