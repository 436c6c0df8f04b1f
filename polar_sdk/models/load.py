"""Load a model once per process and hand it to everybody: decoder, tokenizer and what identifies them.

It knows no router, no request and no usage. Weights stay until `clear_cache`.

Run heavy work in a thread that ends with it.

libgomp keeps a pool for every thread that ever ran a parallel region, and once the pools hold more threads than there
are cores, none of them may spin while it waits: a model loaded in the main thread then decodes at half the speed in the
engine's (`benchmarks/LOG.md`). The pool of a thread that has ended is gone.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from polar_sdk.errors import DeviceError, ModelError
from polar_sdk.models.aliases import resolve
from polar_sdk.models.compilation import Compile, check_compile, use_compiled
from polar_sdk.models.convert import LOADING_LOCK, quiet_transformers
from polar_sdk.models.find import LocalModel, obtain
from polar_sdk.models.network import damaged, read_network
from polar_sdk.models.placement import DeviceMap, Places, choose_device, choose_precision, place, read_map
from polar_sdk.models.weights import bringer
from polar_sdk.serving.loaded import LoadedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch
    from transformers import PreTrainedTokenizerBase


T = TypeVar("T")


def run_apart(call: Callable[[], T]) -> T:
    """Call in a thread of its own and wait for it; what it raises is raised here."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as problem:  # handed to the caller, whatever it is
            done.set_exception(problem)

    thread = threading.Thread(target=copy_context().run, args=(run,), name="polar-load", daemon=True)
    thread.start()
    result = done.result()
    thread.join()  # so that its pool is gone
    return result


_Key = tuple[str, ...]
_loaded: dict[_Key, LoadedModel] = {}


def load_pretrained(
    model: str | Path | None = None,
    *,
    revision: str | None = None,
    device: str = "auto",
    device_map: DeviceMap | None = None,
    precision: str = "auto",
    compile: Compile = "auto",
    kv_memory: int | None = None,
) -> LoadedModel:
    """Load a model, or return the one already in memory.

    Args:
        model: Alias, folder, `.gguf` file or hub id; None stands for `POLAR_MODEL` or else the default alias.
        revision: Branch, tag or commit of a hub model.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`, …
        device_map: Devices of layers, in the place of `device`; see `DeviceMap`.
        precision: `auto`, `bf16`, `fp16`, `fp32`, `int8` or `int4`.
        compile: Whether to run compiled layers; see `Compile`.
        kv_memory: Most bytes for keys and values of all requests together; None = half of the memory that is free.
            Looked at when the model is first loaded.

    Returns:
        The model; the same decoder for the same files, device and precision.

    Raises:
        ModelError: It cannot be found, fetched, read or placed on the device.
    """
    source = resolve(model)
    places = _places(device, device_map)
    kind, dtype = _precision(precision, places)
    check_compile(compile)
    local = obtain(source, revision)
    key = (str(local.folder), local.fingerprint, str(places), kind, str(compile is not False))
    loaded = _loaded.get(key)
    if loaded is None:
        with LOADING_LOCK:  # of several threads that ask for the same model, one loads it and the others get it
            loaded = _loaded.get(key)
            if loaded is None:
                loaded = run_apart(lambda: _load(source.name, local, places, kind, dtype, kv_memory))
                _loaded[key] = loaded
    use_compiled(loaded.decoder, compile)
    return loaded if loaded.name == source.name else replace(loaded, name=source.name)


def _places(device: str, device_map: DeviceMap | None) -> Places:
    """The devices that were asked for, looked up: one for everything, or those of a map.

    Raises:
        DeviceError: One is not here, or both were given.
    """
    if device_map is None:
        return {"": choose_device(device)}
    if device != "auto":
        raise DeviceError(f"device={device!r} and device_map={device_map!r} exclude each other; give one of them.")
    return read_map(device_map)


def _precision(name: str, places: Places) -> tuple[str, torch.dtype]:
    """What `choose_precision` says of the first device, which every other one must be able to do."""
    first, *others = dict.fromkeys(places.values()) or [choose_device()]
    kind, dtype = choose_precision(name, first)
    for other in others:
        choose_precision(kind, other)
    return kind, dtype


def clear_cache() -> None:
    """Forget the loaded models; their memory is freed when nobody else holds them."""
    with LOADING_LOCK:
        _loaded.clear()


def _load(
    name: str, local: LocalModel, places: Places, precision: str, dtype: torch.dtype, kv_memory: int | None
) -> LoadedModel:
    from polar_sdk.engine.decoder import build_decoder
    from polar_sdk.engine.families import find_family
    from polar_sdk.serving.scheduler import Scheduler

    with quiet_transformers(), _memory_errors(name, places, dtype):
        network = read_network(local.folder, local.weights)
        tokenizer = _read_tokenizer(local.folder)
        bring = bringer(network, name, dtype)
        placement = place(places, network, find_family(network.config), precision, dtype)
        decoder = build_decoder(network, precision=precision, kv_memory=kv_memory, placement=placement, bring=bring)
    return LoadedModel(
        name=name,
        path=local.folder,
        fingerprint=local.fingerprint,
        decoder=decoder,
        scheduler=Scheduler(decoder),
        tokenizer=tokenizer,
        config=network.config,
        generation_config=network.generation_config,
        device=decoder.device,
        dtype=dtype,
    )


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizer library raises bare Exceptions
        raise damaged(folder, f"tokenizer: {error}") from error
    result: PreTrainedTokenizerBase = tokenizer
    return result


@contextmanager
def _memory_errors(name: str, places: Places, dtype: torch.dtype) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        kind = str(dtype).removeprefix("torch.")
        devices = "+".join(dict.fromkeys(map(str, places.values()))) or "this host"
        raise ModelError(
            f"model {name!r} in {kind} does not fit the memory of {devices!r}.",
            hint="Choose a smaller model, precision='int8', or another device.",
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    # On the CPU torch raises a plain RuntimeError: "DefaultCPUAllocator: not enough memory: …".
    return isinstance(error, MemoryError) or "memory" in str(error)
