"""Take over a transformers model that is already in memory: no file is read, nothing is cached."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from polar_sdk.engine.decoder import build_decoder
from polar_sdk.engine.families import find_family
from polar_sdk.models.compilation import Compile, check_compile, use_compiled
from polar_sdk.models.fingerprint import fingerprint_of
from polar_sdk.models.load import run_apart
from polar_sdk.models.weights import check_finite, placement_of
from polar_sdk.serving.loaded import LoadedModel
from polar_sdk.serving.scheduler import Scheduler

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.placement import Placement


def adopt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    precision: str | None = None,
    compile: Compile = "auto",
    kv_memory: int | None = None,
) -> LoadedModel:
    """Wrap a model and its tokenizer; the weights are used in place, fused and rounded copies apart.

    Args:
        model: On its device, or whole layers on several, in its dtype.
        tokenizer: The model's own.
        precision: `int8` or `int4` to hold the matrices in integers; None = as they are.
        compile: Whether to run compiled layers.
        kv_memory: Most bytes for keys and values of all requests together; None = half of the memory that is free.

    Raises:
        UnsupportedArchitectureError: The engine has no family for it.
        DeviceError: A layer lies on several devices or not in memory, or a device has no kernel for this precision.
        ModelDamagedError: A weight is nan or infinite.
        CompileError: Layers cannot be compiled here.
    """
    check_compile(compile)
    name = getattr(model.config, "name_or_path", "") or model.config.model_type
    placement = placement_of(model, find_family(model.config), name)
    decoder = run_apart(lambda: _take_over(model, placement, name, precision, kv_memory))
    use_compiled(decoder, compile)
    return LoadedModel(
        name=name,
        path=Path(name),
        fingerprint=fingerprint_of(model),
        decoder=decoder,
        scheduler=Scheduler(decoder),
        tokenizer=tokenizer,
        config=model.config,
        generation_config=model.generation_config,
        device=decoder.device,
        dtype=decoder.dtype,
        adopted=weakref.ref(model),  # kept alive, it would hold beside the fused matrices what they were made from
    )


def _take_over(
    model: PreTrainedModel, placement: Placement, name: str, precision: str | None, kv_memory: int | None
) -> Decoder:
    check_finite(model, name)
    return build_decoder(model, precision=precision, kv_memory=kv_memory, placement=placement)
