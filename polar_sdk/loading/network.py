"""The network of a model folder as transformers builds it, its weights not read yet.

transformers finds every weight's place by its own rules, older names and fused experts included. It is given tensors in
the dtype that the files have, so that it copies nothing; whoever runs the model casts layer by layer.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from polar_sdk.errors import ModelDamagedError
from polar_sdk.loading.mapped import map_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel

__all__ = ["damaged", "read_network"]


def read_network(folder: Path, files: Sequence[Path]) -> PreTrainedModel:
    """The network on the CPU, with weights that are read from the files when they are first used.

    Raises:
        ModelDamagedError: A weight is missing or has another shape.
        UnsupportedArchitectureError: A weight has a dtype that the engine does not run.
    """
    from safetensors import SafetensorError
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    weights = map_weights(files)
    try:
        network, report = kind.from_pretrained(
            None, config=config, state_dict=weights, dtype=_dtype(weights.values()), output_loading_info=True
        )
    except (SafetensorError, RuntimeError, KeyError) as error:
        if "memory" in str(error):
            raise
        raise damaged(folder, str(error)) from error
    # transformers fills what is missing with random numbers and goes on.
    for what in ("missing_keys", "mismatched_keys"):
        if report[what]:
            raise damaged(folder, f"{what.replace('_', ' ')}: {', '.join(map(str, sorted(report[what])[:3]))}")
    result: PreTrainedModel = network.requires_grad_(False).eval()
    result.generation_config = _generation_config(folder)
    return result


def damaged(folder: Path, reason: str) -> ModelDamagedError:
    """The error for a folder that cannot be loaded."""
    return ModelDamagedError(
        f"model folder {str(folder)!r} is damaged ({' '.join(reason.split())[:300]}).",
        hint="Copy or fetch the model again.",
    )


def _dtype(weights: Iterable[Tensor]) -> torch.dtype:
    """The floating-point dtype that most of the weights have; the few others are cast to it."""
    import torch

    sizes = Counter({torch.float32: 0})
    for weight in weights:
        if weight.is_floating_point():
            sizes[weight.dtype] += weight.numel()
    return sizes.most_common(1)[0][0]


def _generation_config(folder: Path) -> GenerationConfig:
    """The settings of generation; a model saved without them has some in its configuration."""
    from transformers import GenerationConfig

    own = (folder / "generation_config.json").is_file()
    return GenerationConfig.from_pretrained(folder, None if own else "config.json", local_files_only=True)
