"""The devices and the precision that a model runs in: one device, or a device map for its layers.

Device and precision follow from the caller's settings and the hardware. A map names devices for ranges of layers
(`{"0-14": "cuda:0", "15-29": "cuda:1"}`), or for modules as Hugging Face does
(`{"model.embed_tokens": 0, "model.layers.0": 0, …}`), or is made from the memory that is free. A layer is never split.
Reads no weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.engine.placement import Placement
from polar_sdk.errors import DeviceError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from polar_sdk.engine.family import Family

PRECISIONS: Final = ("bf16", "fp16", "fp32", "int8", "int4")
AS_FILE: Final = "gguf"
"""The precision of a GGUF file's own weights."""
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
    matrices in integers, and gguf as the file has them, and compute in that dtype.

    Raises:
        DeviceError: No such precision, or the device cannot compute in it.
    """
    import torch

    precision = _SPELLINGS.get(name, name)
    if precision not in {"auto", AS_FILE, *PRECISIONS}:
        raise DeviceError(f"precision {name!r} is unknown; choose from: auto, {', '.join(PRECISIONS)}, {AS_FILE}.")
    if precision == AS_FILE and not runs_blocks(device):
        raise DeviceError(
            f"precision {AS_FILE!r} is not available on {str(device)!r} here; it needs the native library on a CPU.",
            hint="Choose bf16, int8 or int4, or see `polar models kernels`.",
        )
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


def runs_blocks(device: torch.device) -> bool:
    """Whether the weights of GGUF files can run as they are stored."""
    import torch

    from polar_sdk.engine import native

    return native.load_library(torch.bfloat16, device)


def _no_device(name: str, accelerator: torch.device | None) -> DeviceError:
    import torch

    choices = ["auto", "cpu"]
    if accelerator is not None:
        choices += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    return DeviceError(f"device {name!r} is not available here; choose from: {', '.join(choices)}.")


def _auto_dtype(device: torch.device) -> torch.dtype:
    import torch

    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = _cpu_has_bfloat16() if device.type == "cpu" else device.type == "mps" and _mps_has_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def _cpu_has_bfloat16() -> bool:
    """Is bfloat16 faster than float32 here: by native kernels that came with the package, or in torch by hardware?"""
    import torch

    from polar_sdk.engine import native

    if native.comes_along():
        return True
    # Private names, there from torch 2.6 to 2.13; a release without them falls back to float32.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, bool)()) for check in checks)


def _mps_has_bfloat16() -> bool:
    import torch

    return torch.backends.mps.is_macos_or_newer(14, 0)


DeviceMap = str | Mapping[str, "str | int | torch.device"]
"""`auto`; or devices by range of layers or by module; as text, `0-14=cuda:0,15-29=cuda:1`."""
Places = dict[str, "torch.device"]
"""A map with its devices looked up; empty = choose them by the memory that is free."""
_RANGE: Final = re.compile(r"(\d+)(?:-(\d+))?")
_SPARE: Final = 0.9
"""Share of the free memory that a map made here fills with weights: keys and values need the rest."""
_BYTES: Final = {"int8": 1.0, "int4": 0.625}
"""Bytes per weight in integers; int4 with a scale and a zero point per 32."""


def read_map(device_map: DeviceMap) -> Places:
    """Look up the devices of a map, whatever the model.

    Raises:
        DeviceError: It is not a map, or names a device that is not available here.
    """
    if device_map == "auto":
        return {}
    if isinstance(device_map, str):
        pairs = [pair.partition("=") for pair in device_map.split(",")]
        device_map = {name.strip(): device.strip() for name, _, device in pairs}
    if not isinstance(device_map, Mapping) or not device_map:
        raise DeviceError(f"device_map={device_map!r} is not a map; use 'auto', or for example {{'0-14': 'cuda:0'}}.")
    return {str(name): _device(str(name), device) for name, device in device_map.items()}


def _device(name: str, device: object) -> torch.device:
    """A device as `choose_device` reads it; a number counts accelerators, as in Hugging Face's maps."""
    text = f"{_accelerator()}:{device}" if str(device).isdigit() else str(device)
    if text in {"", "disk", "meta", "auto"}:
        raise DeviceError(
            f"device_map gives {name!r} the device {text!r}; weights must be in memory: use a device such as 'cpu'."
        )
    return choose_device(text)


def _accelerator() -> str:
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cuda" if accelerator is None else accelerator.type


def place(places: Places, network: PreTrainedModel, family: Family, precision: str, dtype: torch.dtype) -> Placement:
    """The placement that a map describes for a network; an empty map is filled from the memory that is free.

    Raises:
        DeviceError: A layer or module of the map is not in the model, one of the model's is not in the map, or the
            map does not fit the memory.
    """
    if places and all(map(_RANGE.fullmatch, places)):
        placement = _by_range(places, family.depth)
    else:
        placement = _by_module(places or _balanced(network, family, precision, dtype), network, family)
    if len(placement.devices) > 1:
        check_room(placement, network, family, precision, dtype)
    return placement


def _by_range(places: Places, depth: int) -> Placement:
    layers: dict[int, torch.device] = {}
    for text, device in places.items():
        first, last = (int(end) for end in (text.split("-") * 2)[:2])
        if not first <= last < depth:
            raise DeviceError(
                f"device_map places layers {text}; the model has {depth} layers, 0 to {depth - 1}, from low to high."
            )
        for layer in range(first, last + 1):
            if layer in layers:
                raise DeviceError(f"device_map places layer {layer} twice; give each layer one device.")
            layers[layer] = device
    if missing := [layer for layer in range(depth) if layer not in layers]:
        raise DeviceError(
            f"device_map has no device for {_listed(missing)} of {depth} layers; give each layer one device."
        )
    ordered = tuple(layers[layer] for layer in range(depth))
    return Placement(ordered[0], ordered, ordered[-1])


def _by_module(places: Places, network: PreTrainedModel, family: Family) -> Placement:
    names = {id(module): name for name, module in network.named_modules()}
    _check_names(places, network)
    layers = tuple(_of_layer(names[id(module)], module, places) for module in family.layer_modules(network))
    embedding: Any = network.get_input_embeddings()
    head: Any = network.get_output_embeddings()  # type: ignore[no-untyped-call]
    first = _lookup(names[id(embedding)], places)
    last = _lookup(names[id(head)], places) or (layers[-1] if head.weight is embedding.weight else None)
    for name, device in ((names[id(embedding)], first), (names[id(head)], last)):
        if device is None:
            raise DeviceError(f"device_map has no device for {name!r}; add it, or '' for everything that is not named.")
    assert first is not None
    assert last is not None
    return Placement(first, layers, last)


def _check_names(places: Places, network: PreTrainedModel) -> None:
    known = [name for name, _ in network.named_modules()] + [name for name, _ in network.named_parameters()]
    for name in places:
        if name not in known:
            near = nearest(name, known)
            raise DeviceError(
                f"device_map names {name!r}, which the model does not have"
                + (f"; did you mean {near!r}?" if near else "; name modules, or layers as in '0-14'.")
            )


def _of_layer(name: str, layer: nn.Module, places: Places) -> torch.device:
    weights = {_lookup(f"{name}.{weight}", places): weight for weight, _ in layer.named_parameters()}
    if None in weights:
        raise DeviceError(f"device_map has no device for '{name}.{weights[None]}'; assign one device to each layer.")
    if len(weights) > 1:
        raise DeviceError(f"device_map splits layer {name!r} over {_and(weights)}; assign one device to each layer.")
    (device,) = weights
    assert device is not None
    return device


def _lookup(name: str, places: Places) -> torch.device | None:
    """The device of the longest name in the map that is a prefix of this one."""
    while name not in places and name:
        name = name.rpartition(".")[0]
    return places.get(name)


def _balanced(network: PreTrainedModel, family: Family, precision: str, dtype: torch.dtype) -> Places:
    """A map that fills the accelerators of this host evenly, and the CPU where they cannot hold everything."""
    import torch
    from accelerate import infer_auto_device_map
    from accelerate.utils import CustomDtype, get_balanced_memory, get_max_memory

    stored = {"int8": torch.int8, "int4": CustomDtype.INT4}.get(precision, dtype)
    whole = list({type(layer).__name__ for layer in family.layer_modules(network)})
    free = {where: int(_SPARE * size) for where, size in get_max_memory().items()}
    options = {"no_split_module_classes": whole, "dtype": stored}
    devices = infer_auto_device_map(network, get_balanced_memory(network, free, **options), **options)
    if "disk" in devices.values():
        sizes = ", ".join(f"{size / 2**30:.1f} GiB on {where}" for where, size in free.items())
        needed = _size(network.parameters(), precision, dtype) / 2**30
        raise DeviceError(
            f"the model needs {needed:.1f} GiB in {precision}; {sizes} are free.",
            hint="Choose a lower precision, such as int8, or a smaller model.",
        )
    return {name: _device(name, device) for name, device in devices.items()}


def placement_of(model: PreTrainedModel, family: Family, name: str) -> Placement:
    """The placement of a model whose owner has placed its parts.

    Raises:
        DeviceError: A layer is on several devices, or not in memory.
    """
    ends = family.take_ends(model)
    layers = [_one_device(f"layer {index}", layer, name) for index, layer in enumerate(family.layer_modules(model))]
    return Placement(ends["embedding"].device, tuple(layers), ends["head"].weight.device)


def _one_device(what: str, layer: nn.Module, name: str) -> torch.device:
    devices = {weight.device for weight in layer.parameters()}
    if len(devices) > 1 or str(next(iter(devices))) == "meta":
        raise DeviceError(
            f"{what} of model {name!r} is on {' and '.join(sorted(map(str, devices)))}; "
            "the engine runs a layer on one device, from memory.",
            hint="Move it with .to(device), or load the model with from_pretrained and a device_map.",
        )
    return devices.pop()


def check_room(
    placement: Placement, network: PreTrainedModel, family: Family, precision: str, dtype: torch.dtype
) -> None:
    """Refuse a placement that the devices have no memory for, before a weight is read.

    Raises:
        DeviceError: One does not have enough.
    """
    from polar_sdk.engine.decoder import free_memory

    needed: Counter[torch.device] = Counter()
    for device, module in zip(placement.layers, family.layer_modules(network), strict=True):
        needed[device] += int(_size(module.parameters(), precision, dtype))
    for device, size in needed.items():
        if size > (free := free_memory(device)):
            layers = [layer for layer, where in enumerate(placement.layers) if where == device]
            raise DeviceError(
                f"{_listed(layers)} need {size / 2**30:.2f} GiB on {device}, where {free / 2**30:.2f} GiB are free.",
                hint="Assign another device to some of them, or choose a lower precision, such as int8.",
            )


def _size(weights: Iterator[nn.Parameter], precision: str, dtype: torch.dtype) -> float:
    return sum(weight.numel() for weight in weights) * _BYTES.get(precision, dtype.itemsize)


def _listed(layers: Sequence[int]) -> str:
    shown = ", ".join(map(str, layers[:8]))
    return f"layer{'s' if len(layers) > 1 else ''} {shown}{', …' if len(layers) > 8 else ''}"


def _and(devices: Mapping[Any, str]) -> str:
    return " and ".join(sorted(map(str, devices)))
