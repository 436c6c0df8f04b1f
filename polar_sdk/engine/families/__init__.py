"""The registry of model families: one small module each, found by the configuration's `model_type`.

To add one, write its module beside `llama.py` and list it here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.errors import UnsupportedArchitectureError

if TYPE_CHECKING:
    from polar_sdk.engine.family import Family


_FAMILIES: Final = {
    "gemma2": "gemma2:Gemma2Family",
    "gemma3": "gemma3:Gemma3Family",
    "gemma3_text": "gemma3:Gemma3Family",
    "gpt2": "gpt2:GPT2Family",
    "gpt_neox": "gpt_neox:GPTNeoXFamily",
    "llama": "llama:LlamaFamily",
    "mistral": "mistral:MistralFamily",
    "mixtral": "mixtral:MixtralFamily",
    "opt": "opt:OPTFamily",
    "phi3": "phi3:Phi3Family",
    "qwen2": "qwen2:Qwen2Family",
    "qwen2_moe": "qwen2_moe:Qwen2MoeFamily",
    "qwen3": "qwen3:Qwen3Family",
}
SUPPORTED: Final = tuple(sorted(_FAMILIES))
"""Values of `model_type` that the engine runs."""


def find_family(config: Any) -> Family:
    """The family of a configuration.

    Raises:
        UnsupportedArchitectureError: There is no family for this architecture, or one of its options is not supported.
    """
    kind = config.model_type
    if kind not in _FAMILIES:
        raise UnsupportedArchitectureError(
            f"architecture {kind!r} is not supported; choose from: {', '.join(SUPPORTED)}."
        )
    module, name = _FAMILIES[kind].split(":")
    family: type[Family] = getattr(import_module(f"{__name__}.{module}"), name)
    return family(config)
