"""Are these weights fit to run? Looks at devices and at values, before anything is computed with them.

Also brings weights that lie in files into memory, a few at a time, in the dtype and on the device they will run in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_sdk.engine.placement import Placement
from polar_sdk.errors import DeviceError, ModelDamagedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from polar_sdk.engine.decoder import Bring
    from polar_sdk.engine.family import Family


def check_finite(model: PreTrainedModel, name: str) -> None:
    """Refuse weights with nan or infinity in them: every answer would be noise, and it would be billed.

    Args:
        model: The model; each of its weights is read once.
        name: What the model is called, for the error.

    Raises:
        ModelDamagedError: A weight is not finite.
    """
    if (weight := first_not_finite(model)) is not None:
        raise _not_finite(name, weight)


def first_not_finite(model: PreTrainedModel) -> str | None:
    """Name of the first weight with nan or infinity in it; None where all are finite."""
    return next((name for name, weight in model.named_parameters() if not _finite(weight)), None)


def bringer(model: PreTrainedModel, name: str, dtype: torch.dtype) -> Bring:
    """What brings weights of a model into memory, in this dtype, and refuses those that `check_finite` refuses.

    The weights are copied even where nothing has to change: a file may be replaced while its model runs.
    """
    names = {id(weight): weight_name for weight_name, weight in model.named_parameters()}

    def bring(weights: Iterable[nn.Parameter], device: torch.device) -> None:
        for weight in weights:
            weight.data = weight.data.to(device, dtype, copy=True)
            if not _finite(weight):
                raise _not_finite(name, names[id(weight)])

    return bring


def _finite(weight: Tensor) -> bool:
    """A sum is finite only if every term is, and it needs no second tensor of the same size."""
    import torch

    return bool(weight.detach().sum(dtype=torch.float32).isfinite())


def _not_finite(name: str, weight: str) -> ModelDamagedError:
    return ModelDamagedError(
        f"model {name!r} is damaged: weight {weight} is not finite.", hint="Copy, fetch or train the model again."
    )


def placement_of(model: PreTrainedModel, family: Family, name: str) -> Placement:
    """Where the parts of a model lie, which its owner has placed.

    Raises:
        DeviceError: A layer lies on several devices, or not in memory.
    """
    ends = family.take_ends(model)
    layers = [_place(f"layer {index}", layer, name) for index, layer in enumerate(family.layer_modules(model))]
    return Placement(ends["embedding"].device, tuple(layers), ends["head"].weight.device)


def _place(what: str, layer: nn.Module, name: str) -> torch.device:
    devices = {weight.device for weight in layer.parameters()}
    if len(devices) > 1 or str(next(iter(devices))) == "meta":
        raise DeviceError(
            f"{what} of model {name!r} lies on {' and '.join(sorted(map(str, devices)))}; "
            "the engine runs a layer on one device, from memory.",
            hint="Move it with .to(device), or load the model with from_pretrained and a device_map.",
        )
    return devices.pop()
