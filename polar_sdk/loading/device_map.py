"""Where each layer goes: reads a device map, or makes one from the memory that is free.

A map names devices for ranges of layers (`{"0-14": "cuda:0", "15-29": "cuda:1"}`), or for modules as Hugging Face does
(`{"model.embed_tokens": 0, "model.layers.0": 0, …}`). A layer is never cut in two. It reads no weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.engine.placement import Placement
from polar_sdk.errors import DeviceError
from polar_sdk.loading.place import choose_device
from polar_sdk.spelling import nearest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from polar_sdk.engine.family import Family

__all__ = ["DeviceMap", "Places", "check_room", "place", "read_map"]

DeviceMap = str | Mapping[str, "str | int | torch.device"]
"""`auto`; or devices by range of layers or by module; as text, `0-14=cuda:0,15-29=cuda:1`."""
Places = dict[str, "torch.device"]
"""A map with its devices looked up; empty = make one."""
_RANGE: Final = re.compile(r"(\d+)(?:-(\d+))?")
_SPARE: Final = 0.9
"""Share of the free memory that a map made here fills with weights: keys and values need some too."""
_BYTES: Final = {"int8": 1.0, "int4": 0.625}
"""Bytes per weight in integers; int4 with a scale and a zero point per 32."""


def read_map(device_map: DeviceMap) -> Places:
    """Look the devices of a map up, whatever the model.

    Raises:
        DeviceError: It is no map, or names a device that is not here.
    """
    if device_map == "auto":
        return {}
    if isinstance(device_map, str):
        pairs = [pair.partition("=") for pair in device_map.split(",")]
        device_map = {name.strip(): device.strip() for name, _, device in pairs}
    if not isinstance(device_map, Mapping) or not device_map:
        raise DeviceError(f"device_map={device_map!r} is no map; use 'auto', or for example {{'0-14': 'cuda:0'}}.")
    return {str(name): _device(str(name), device) for name, device in device_map.items()}


def _device(name: str, device: object) -> torch.device:
    """A device as `choose_device` reads it; a number counts accelerators, as in Hugging Face's maps."""
    text = f"{_accelerator()}:{device}" if str(device).isdigit() else str(device)
    if text in {"", "disk", "meta", "auto"}:
        raise DeviceError(
            f"device_map gives {name!r} the device {text!r}; weights must lie in memory: name a device such as 'cpu'."
        )
    return choose_device(text)


def _accelerator() -> str:
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cuda" if found is None else found.type


def place(places: Places, network: PreTrainedModel, family: Family, precision: str, dtype: torch.dtype) -> Placement:
    """The placement that a map means for a network; an empty map is made from the memory that is free.

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
            raise DeviceError(f"device_map has no device for {name!r}; add it, or '' for all that is not named.")
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
    found = {_lookup(f"{name}.{weight}", places): weight for weight, _ in layer.named_parameters()}
    if None in found:
        raise DeviceError(f"device_map has no device for '{name}.{found[None]}'; give each layer one device.")
    if len(found) > 1:
        raise DeviceError(f"device_map cuts layer {name!r} in pieces on {_and(found)}; give each layer one device.")
    (device,) = found
    assert device is not None
    return device


def _lookup(name: str, places: Places) -> torch.device | None:
    """The device of the longest name in the map that this one begins with."""
    while name not in places and name:
        name = name.rpartition(".")[0]
    return places.get(name)


def _balanced(network: PreTrainedModel, family: Family, precision: str, dtype: torch.dtype) -> Places:
    """A map over the accelerators that are here, evenly, and over the CPU where those do not hold all."""
    import torch
    from accelerate import infer_auto_device_map
    from accelerate.utils import CustomDtype, get_balanced_memory, get_max_memory

    stored = {"int8": torch.int8, "int4": CustomDtype.INT4}.get(precision, dtype)
    whole = list({type(layer).__name__ for layer in family.layer_modules(network)})
    free = {where: int(_SPARE * size) for where, size in get_max_memory().items()}
    options = {"no_split_module_classes": whole, "dtype": stored}
    made = infer_auto_device_map(network, get_balanced_memory(network, free, **options), **options)
    if "disk" in made.values():
        sizes = ", ".join(f"{size / 2**30:.1f} GiB on {where}" for where, size in free.items())
        needed = _size(network.parameters(), precision, dtype) / 2**30
        raise DeviceError(
            f"the model needs {needed:.1f} GiB in {precision}; free are {sizes}.",
            hint="Choose a lower precision, such as int8, or a smaller model.",
        )
    return {name: _device(name, device) for name, device in made.items()}


def check_room(
    placement: Placement, network: PreTrainedModel, family: Family, precision: str, dtype: torch.dtype
) -> None:
    """Refuse a placement that the devices have no memory for, before a weight is read.

    Raises:
        DeviceError: One has not enough.
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
                hint="Give some of them another device, or choose a lower precision, such as int8.",
            )


def _size(weights: Iterator[nn.Parameter], precision: str, dtype: torch.dtype) -> float:
    return sum(weight.numel() for weight in weights) * _BYTES.get(precision, dtype.itemsize)


def _listed(layers: Sequence[int]) -> str:
    shown = ", ".join(map(str, layers[:8]))
    return f"layer{'s' if len(layers) > 1 else ''} {shown}{', …' if len(layers) > 8 else ''}"


def _and(devices: Mapping[Any, str]) -> str:
    return " and ".join(sorted(map(str, devices)))
