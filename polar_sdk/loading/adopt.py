"""Take over a transformers model that is already in memory: no file is read, nothing is cached."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from polar_sdk.engine.families import build_decoder
from polar_sdk.loading.fingerprint import fingerprint_of
from polar_sdk.loading.load import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["adopt"]


def adopt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
    """Wrap a model and its tokenizer; the weights are used in place, fused copies apart.

    Raises:
        UnsupportedArchitectureError: The engine has no family for it.
    """
    decoder = build_decoder(model)
    name = getattr(model.config, "name_or_path", "") or model.config.model_type
    return LoadedModel(
        name=name,
        path=Path(name),
        fingerprint=fingerprint_of(model),
        decoder=decoder,
        tokenizer=tokenizer,
        config=model.config,
        generation_config=model.generation_config,
        device=decoder.device,
        dtype=decoder.dtype,
    )
