"""The registry of model families: one small module each, found by the configuration's `model_type`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_sdk.errors import UnsupportedArchitectureError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from polar_sdk.engine.decoder import Decoder

__all__ = ["SUPPORTED", "build_decoder"]


def _llama(model: PreTrainedModel) -> Decoder:
    from polar_sdk.engine.families.llama import LlamaDecoder

    return LlamaDecoder(model)


_FAMILIES: dict[str, Callable[[PreTrainedModel], Decoder]] = {"llama": _llama}
SUPPORTED = tuple(sorted(_FAMILIES))
"""Values of `model_type` that the engine runs."""


def build_decoder(model: PreTrainedModel) -> Decoder:
    """Take over the weights of a Hugging Face causal language model.

    Raises:
        UnsupportedArchitectureError: No family for this architecture, or an option of it that is not supported.
    """
    kind = model.config.model_type
    if kind not in _FAMILIES:
        raise UnsupportedArchitectureError(
            f"architecture {kind!r} is not supported; supported are: {', '.join(SUPPORTED)}."
        )
    return _FAMILIES[kind](model)
