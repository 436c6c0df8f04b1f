"""A model in memory: loaded once per process from its files, or taken from transformers.

The same files, device and precision give the same decoder, and weights stay until `clear_cache`.
Knows no router, no request and no usage; importing it imports no torch.
"""

from __future__ import annotations

import logging
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict, Unpack

from polar_sdk.errors import DeviceError, ModelError, did_you_mean
from polar_sdk.models.aliases import Alias, Gguf, Source, resolve
from polar_sdk.models.convert import LOADING_LOCK, quiet_transformers
from polar_sdk.models.find import LocalModel, obtain
from polar_sdk.models.fingerprint import fingerprint_of
from polar_sdk.models.network import (
    bringer,
    check_finite,
    damaged,
    keep_stored,
    read_generation_config,
    read_network,
)
from polar_sdk.models.placement import (
    AS_FILE,
    PRECISIONS,
    DeviceMap,
    Places,
    choose_device,
    choose_precision,
    place,
    placement_of,
    read_map,
    runs_blocks,
)
from polar_sdk.serving.loaded import LoadedModel
from polar_sdk.serving.threads import run_apart

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.placement import Placement
    from polar_sdk.serving.request import Cancel


_Key = tuple[str, ...]
_log: Final = logging.getLogger(__name__)
_loaded: Final[dict[_Key, LoadedModel]] = {}


class LoadOptions(TypedDict, total=False):
    """How a model is loaded: the options of `PolarModel.from_pretrained` that belong to its weights."""

    revision: str | None
    """Branch, tag or commit of a hub id; default: the main branch."""
    device: str
    """`auto`, the default, or a torch device such as `cpu` or `cuda:1`."""
    device_map: DeviceMap | None
    """Whole layers on several devices, instead of `device`: `auto` by the memory that is free; by range,
    `{"0-14": "cuda:0", "15-29": "cuda:1"}`; or by module, as Hugging Face has it. They run by torch."""
    precision: str
    """`auto`, the default, or `bf16`, `fp16`, `fp32`, `int8`, `int4`, or `gguf`: as a quantized GGUF file has its
    weights, which is what `auto` means on a CPU for a `.gguf` file, and for an alias that is not the default model."""
    kv_memory: int | None
    """Maximum bytes for keys and values of all requests together; None = half of the memory that is free when the model
    is first loaded."""


def load_pretrained(model: str | Path | None = None, **options: Unpack[LoadOptions]) -> LoadedModel:
    """Load a model, or return the one already in memory.

    Weights are known by their fingerprint. Tokenizer, chat template and generation settings are read again where their
    files have changed since; objects made before keep what they have.

    Args:
        model: Alias, folder, `.gguf` file or hub id; None = `POLAR_MODEL`, otherwise the default model.
        **options: See `LoadOptions`.

    Returns:
        The model; the same decoder for the same files, device and precision.

    Raises:
        ModelError: It cannot be found, fetched, read or placed on the device.
    """
    for name in options:
        if name not in LoadOptions.__annotations__:
            raise TypeError(f"loading has no option {name!r}; {did_you_mean(name, LoadOptions.__annotations__)}")
    source = resolve(model)
    places = _places(options.get("device", "auto"), options.get("device_map"))
    wanted = options.get("precision", "auto")
    precision, dtype = _precision(wanted, places)
    local = obtain(source, options.get("revision"))
    if wanted == "auto" and _is_quantized_file(source) and _runs_blocks(places):
        precision = AS_FILE
    elif wanted == AS_FILE and not any(file.suffix == ".gguf" for file in local.weights):
        raise _not_of_a_file(source.name)
    key = (str(local.folder), local.fingerprint, str(places), precision)
    loaded = _loaded.get(key)
    if loaded is None:
        with LOADING_LOCK:  # of several threads that ask for the same model, one loads it and the others get it
            loaded = _loaded.get(key)
            if loaded is None:
                kv_memory = options.get("kv_memory")
                loaded = run_apart(lambda stop: _load(source.name, local, places, precision, dtype, kv_memory, stop))
                _loaded[key] = loaded
    if wanted == AS_FILE and loaded.decoder.precision in PRECISIONS:
        raise _not_of_a_file(source.name)
    if loaded.text_files != _text_files(local.folder):
        with LOADING_LOCK:
            loaded = _loaded[key] = _reread(loaded, local.folder)
    return loaded if loaded.name == source.name else replace(loaded, name=source.name)


def adopt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    precision: str | None = None,
    kv_memory: int | None = None,
) -> LoadedModel:
    """Wrap a model and its tokenizer; the weights are used in place, except for fused and quantized copies.

    No file is read and nothing is cached.

    Args:
        model: On its device, or whole layers on several, in its dtype.
        tokenizer: The model's own.
        precision: `int8` or `int4` to hold the matrices in integers; None = unchanged.
        kv_memory: See `LoadOptions`.

    Raises:
        UnsupportedArchitectureError: The engine has no family for it.
        DeviceError: A layer is on several devices or not in memory, or a device has no kernel for this precision.
        ModelDamagedError: A weight is NaN or infinite.
    """
    from polar_sdk.engine.families import find_family

    name = getattr(model.config, "name_or_path", "") or model.config.model_type
    placement = placement_of(model, find_family(model.config), name)
    decoder = run_apart(lambda _: _take_over(model, placement, name, precision, kv_memory))
    return _in_memory(
        decoder,
        model,
        tokenizer,
        name=name,
        path=Path(name),
        fingerprint=fingerprint_of(model),
        dtype=decoder.dtype,
        adopted=weakref.ref(model),  # kept alive, it would hold the matrices that were fused, beside the fused ones
    )


def clear_cache() -> None:
    """Drop the loaded models; their memory is freed when nothing else holds them."""
    with LOADING_LOCK:
        _loaded.clear()


def _places(device: str, device_map: DeviceMap | None) -> Places:
    """The devices named by the caller, looked up: one for everything, or those of a map.

    Raises:
        DeviceError: One is not available here, or both were given.
    """
    if device_map is None:
        return {"": choose_device(device)}
    if device != "auto":
        raise DeviceError(f"device={device!r} and device_map={device_map!r} exclude each other; pass one of them.")
    return read_map(device_map)


def _is_quantized_file(source: Source) -> bool:
    return isinstance(source, Gguf) or (isinstance(source, Alias) and source.runs_as_file)


def _runs_blocks(places: Places) -> bool:
    return "" in places and len(set(places.values())) == 1 and runs_blocks(places[""])


def _not_of_a_file(name: str) -> DeviceError:
    return DeviceError(
        f"precision {AS_FILE!r} is not available for {name!r}, which has no matrices in blocks of a GGUF file that the "
        f"native library runs; choose from: auto, {', '.join(PRECISIONS)}."
    )


def _precision(name: str, places: Places) -> tuple[str, torch.dtype]:
    """The precision that `choose_precision` finds for the first device, which every other one must have."""
    first, *others = dict.fromkeys(places.values()) or [choose_device()]
    precision, dtype = choose_precision(name, first)
    for other in others:
        choose_precision(precision, other)
    return precision, dtype


def _load(
    name: str,
    local: LocalModel,
    places: Places,
    precision: str,
    dtype: torch.dtype,
    kv_memory: int | None,
    stop: Cancel,
) -> LoadedModel:
    from polar_sdk.engine.decoder import build_decoder
    from polar_sdk.engine.families import find_family

    text_files = _text_files(local.folder)
    with quiet_transformers(), _memory_errors(name, places, dtype), ThreadPoolExecutor(1, "polar-tokenizer") as beside:
        network = _network(local, places)
        reading = beside.submit(_read_tokenizer, local.folder, local.weights)  # while the library packs weights
        bring, family = bringer(network, name, dtype, stop), find_family(network.config)
        placement = place(places, network, family, precision, dtype)
        if precision == AS_FILE:
            kind = keep_stored(network, stop) if family.reads_blocks and family.plan else ""
            precision = kind or "bf16"
        decoder = build_decoder(network, precision=precision, kv_memory=kv_memory, placement=placement, bring=bring)
        tokenizer = reading.result()
    return _in_memory(
        decoder,
        network,
        tokenizer,
        name=name,
        path=local.folder,
        weights=local.weights,
        fingerprint=local.fingerprint,
        dtype=dtype,
        text_files=text_files,
    )


def _network(local: LocalModel, places: Places) -> PreTrainedModel:
    """The network; a map may name modules of transformers' class, which is built for it."""
    if "" in places and len(places) == 1 and local.weights[0].suffix == ".gguf":
        from polar_sdk.models.outline import read_outline

        if (outline := read_outline(local.folder, local.weights[0])) is not None:
            return outline
    return read_network(local.folder, local.weights)


def _text_files(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of last change of what a folder holds beside configuration and weights."""
    stamps = []
    for path in [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]:
        if path.name != "config.json" and path.suffix not in {".safetensors", ".gguf"} and path.is_file():
            stat = path.stat()
            stamps.append((str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns))
    return tuple(sorted(stamps))


def _reread(loaded: LoadedModel, folder: Path) -> LoadedModel:
    """The same weights with the folder's tokenizer, chat template and generation settings as they are now."""
    text_files = _text_files(folder)
    _log.warning("the tokenizer, chat template or generation settings in %s have changed: read again", folder)
    with quiet_transformers():
        tokenizer = _read_tokenizer(folder, loaded.weights)
        try:
            settings = read_generation_config(folder)
        except Exception as error:  # a wrong value breaks the class of the settings anywhere
            raise damaged(folder, f"generation settings: {error}") from error
    return replace(loaded, tokenizer=tokenizer, generation_config=settings, text_files=text_files)


def _take_over(
    model: PreTrainedModel, placement: Placement, name: str, precision: str | None, kv_memory: int | None
) -> Decoder:
    from polar_sdk.engine.decoder import build_decoder

    check_finite(model, name)
    return build_decoder(model, precision=precision, kv_memory=kv_memory, placement=placement)


def _in_memory(
    decoder: Decoder, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, fingerprint: str, **identity: Any
) -> LoadedModel:
    """The shared object for a decoder; `identity` is what only a file or only a caller's model can say."""
    from polar_sdk.models.draft_heads import find_draft_head
    from polar_sdk.serving.scheduler import Scheduler

    decoder.use_library()
    if (head := find_draft_head(fingerprint, decoder)) is not None:
        decoder.set_draft_head(head.tensors)
    loaded = LoadedModel(
        decoder=decoder,
        scheduler=Scheduler(decoder),
        tokenizer=tokenizer,
        config=network.config,
        generation_config=network.generation_config,
        device=decoder.device,
        fingerprint=fingerprint,
        **identity,
    )
    loaded.listed_ends()  # what is wrong is said here, not by the first request
    return loaded


def _read_tokenizer(folder: Path, weights: tuple[Path, ...]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder.

    That of a GGUF file was written complete by `convert`. Its own class would take it apart and rebuild it, in three
    times the time.
    """
    import transformers

    converted = any(file.suffix == ".gguf" for file in weights)
    try:
        kind: Any = transformers.PreTrainedTokenizerFast if converted else transformers.AutoTokenizer
        tokenizer: Any = kind.from_pretrained(folder, local_files_only=True)
        tokenizer.decode(tokenizer("a")["input_ids"])  # its settings are read when it is used, and not checked before
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
