"""Where a model runs and in which precision: reads the caller's words and looks at the hardware.

It does not know which model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from polar_sdk.errors import DeviceError

if TYPE_CHECKING:
    import torch

__all__ = ["PRECISIONS", "choose_device", "choose_precision"]

PRECISIONS: Final = ("bf16", "fp16", "fp32", "int8", "int4")
_SPELLINGS: Final = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
}
_DTYPES: Final = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


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


def choose_precision(name: str, device: torch.device) -> tuple[str, torch.dtype]:
    """Read a precision: how weights are held, and the dtype that activations have.

    `auto` is the fastest plain one that this device computes in at least bfloat16's range. int8 and int4 hold the
    matrices in integers and compute in that dtype.

    Raises:
        DeviceError: No such precision, or the device cannot compute in it.
    """
    import torch

    precision = _SPELLINGS.get(name, name)
    if precision not in {"auto", *PRECISIONS}:
        raise DeviceError(f"precision {name!r} is unknown; choose one of: auto, {', '.join(PRECISIONS)}.")
    if precision == "int4" and device.type != "cpu":
        raise DeviceError(f"precision 'int4' is not available on {str(device)!r}; choose int8, bf16 or fp16.")
    if precision in _DTYPES:
        dtype: torch.dtype = getattr(torch, _DTYPES[precision])
    else:
        dtype = _auto_dtype(device)
    if dtype is torch.bfloat16 and device.type == "mps" and not _mps_has_bfloat16():
        raise DeviceError(f"precision {name!r} is not available on {str(device)!r}; choose fp32 or fp16.")
    if precision == "auto":
        precision = next(short for short, long in _DTYPES.items() if dtype is getattr(torch, long))
    return precision, dtype


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
