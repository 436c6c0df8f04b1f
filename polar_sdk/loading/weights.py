"""Are these weights fit to run? Looks at devices and at values, before anything is computed with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_sdk.errors import DeviceError, ModelDamagedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_finite", "check_one_device", "first_not_finite"]


def check_finite(model: PreTrainedModel, name: str) -> None:
    """Refuse weights with nan or infinity in them: every answer would be noise, and it would be billed.

    Args:
        model: The model; each of its weights is read once.
        name: What the model is called, for the error.

    Raises:
        ModelDamagedError: A weight is not finite.
    """
    if (weight := first_not_finite(model)) is not None:
        raise ModelDamagedError(
            f"model {name!r} is damaged: weight {weight} is not finite.", hint="Copy, fetch or train the model again."
        )


def first_not_finite(model: PreTrainedModel) -> str | None:
    """Name of the first weight with nan or infinity in it; None where all are finite."""
    import torch

    for name, weight in model.named_parameters():
        # A sum is finite only if every term is, and it needs no second tensor of the same size.
        if not bool(weight.detach().sum(dtype=torch.float32).isfinite()):
            return name
    return None


def check_one_device(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose weights lie on several devices, or are not in memory.

    Raises:
        DeviceError: They do, or are not.
    """
    devices = sorted({str(value.device) for value in model.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        raise DeviceError(
            f"the weights of model {name!r} lie on {' and '.join(devices)}; the engine runs a model on one device.",
            hint="Load it without device_map, and move it with .to(device).",
        )
