"""Where a model runs and in which dtype: reads the caller's words and looks at the hardware.

It does not know which model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from polar_sdk.errors import DeviceError

if TYPE_CHECKING:
    import torch

__all__ = ["choose_device", "choose_dtype"]

_DTYPES: Final = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}


def choose_device(name: str = "auto") -> torch.device:
    """Read a device name: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto` (this host's accelerator, else the CPU).

    Raises:
        DeviceError: No such device here.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        name = "cpu" if accelerator is None else accelerator.type
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise _no_device(name, accelerator) from error
    if device.type == "cpu":
        return torch.device("cpu")
    if accelerator is None or device.type != accelerator.type:
        raise _no_device(name, accelerator)
    # One spelling for one device, so that `cuda` and `cuda:0` share their weights.
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    if not 0 <= index < torch.accelerator.device_count():
        raise _no_device(name, accelerator)
    return torch.device(device.type, index)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Read a dtype name; `auto` is the fastest one that this device computes in at least bfloat16's range.

    Raises:
        DeviceError: No such dtype, or the device cannot compute in it.
    """
    import torch

    if name == "auto":
        return _auto_dtype(device)
    if name not in _DTYPES:
        raise DeviceError(f"dtype {name!r} is unknown; choose one of: auto, {', '.join(_DTYPES)}.")
    dtype: torch.dtype = getattr(torch, _DTYPES[name])
    if dtype is torch.bfloat16 and device.type == "mps" and not _mps_has_bfloat16():
        raise DeviceError(f"dtype {name!r} is not available on {str(device)!r}; choose float32 or float16.")
    return dtype


def _no_device(name: str, accelerator: torch.device | None) -> DeviceError:
    import torch

    choices = ["auto", "cpu"]
    if accelerator is not None:
        choices += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    return DeviceError(f"device {name!r} is not available here; choose one of: {', '.join(choices)}.")


def _auto_dtype(device: torch.device) -> torch.dtype:
    import torch

    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = _cpu_has_bfloat16() if device.type == "cpu" else device.type == "mps" and _mps_has_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def _cpu_has_bfloat16() -> bool:
    """Does this CPU multiply bfloat16 matrices in hardware? Elsewhere bfloat16 is slower than float32."""
    import torch

    # Private names, there from torch 2.6 to 2.13; a release without them falls back to float32.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, bool)()) for check in checks)


def _mps_has_bfloat16() -> bool:
    import torch

    return torch.backends.mps.is_macos_or_newer(14, 0)
