"""The network of a model folder as transformers builds it, with weights that are read when they are first used.

The weights of a GGUF file are not in it: its parameters have no numbers, but state where these come from (`source`). If
`outline.py` knows the network of such a file, transformers does not build it at all.

transformers finds every weight's place by its own rules, older names and fused experts included. It is given tensors in
the dtype that the files have, so that it copies nothing; the engine casts layer by layer, with `bringer`,
which refuses weights that are not finite.

Every layer has its own mapping, because the pages of a mapping count as memory of the process until all tensors in it
are gone: after copying and dropping the weights of a layer, its part of the file is dropped too. Knows files, names and
values of weights, no architecture.
"""

from __future__ import annotations

import mmap
import re
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.errors import ModelDamagedError, PolarError, UnsupportedArchitectureError
from polar_sdk.models.gguf import GgufFile, WeightSource, sources
from polar_sdk.reading import not_finite, parse_object

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

    from polar_sdk.engine.decoder import Bring
    from polar_sdk.serving.request import Cancel

_DTYPES: Final = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_FEW_WEIGHTS: Final = 10**6
"""More than the files of a tiny model hold may be described without harm."""
_MAX_HEADER: Final = 100_000_000
"""The format's own limit. Unit: bytes."""
_LAYER: Final = re.compile(r".*?\.\d+\.")
"""The prefix of the names of the weights of one layer: `model.layers.7.`."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor in a file; the bytes from `start` to `end` are its values."""

    name: str
    dtype: str
    shape: list[int]
    start: int
    end: int


def map_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """All weights of these files by name; only the headers are read yet. The weights must not be written to.

    Raises:
        UnsupportedArchitectureError: A weight has a dtype that the engine does not run.
        OSError: A file cannot be read.
    """
    weights: dict[str, Tensor] = {}
    for path in files:
        groups: dict[str, list[_Entry]] = defaultdict(list)
        for entry in _entries(path):
            layer = _LAYER.match(entry.name)
            groups[layer.group() if layer else entry.name].append(entry)
        for entries in groups.values():
            weights |= _map(path, entries)
    return weights


def _entries(path: Path) -> Iterator[_Entry]:
    """The entries of the header: 8 bytes of length, then JSON with offsets that count from its end."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_object(file.read(min(length, _MAX_HEADER)), max_bytes=_MAX_HEADER)
    for name, facts in header.items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in facts["data_offsets"])
            yield _Entry(name, _known_dtype(name, facts["dtype"]), facts["shape"], start, end)


def _known_dtype(name: str, dtype: str) -> str:
    if dtype not in _DTYPES:
        raise UnsupportedArchitectureError(
            f"weight {name} is stored as {dtype}, which is not supported; choose from: {', '.join(_DTYPES)}."
        )
    return _DTYPES[dtype]


def _map(path: Path, entries: list[_Entry]) -> dict[str, Tensor]:
    """The tensors of one layer, over one mapping, which ends with the last of them."""
    import torch

    start = min(entry.start for entry in entries)
    start -= start % mmap.ALLOCATIONGRANULARITY
    length = max(entry.end for entry in entries) - start
    tensors: dict[str, Tensor] = {}
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        mapping = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start) if length else b""
        for entry in entries:
            dtype = getattr(torch, entry.dtype)
            if entry.start == entry.end:
                tensors[entry.name] = torch.empty(entry.shape, dtype=dtype)
                continue
            count = (entry.end - entry.start) // dtype.itemsize
            flat = torch.frombuffer(mapping, dtype=dtype, count=count, offset=entry.start - start)
            tensors[entry.name] = flat.view(entry.shape)
    return tensors


def read_network(folder: Path, files: Sequence[Path]) -> PreTrainedModel:
    """The network on the CPU, with weights that are read from the files when they are first used.

    Raises:
        ModelDamagedError: A weight is missing or has another shape.
        UnsupportedArchitectureError: A weight has a dtype that the engine does not run.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = read_config(folder)
    try:
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        generation = read_generation_config(folder)
    except Exception as error:  # a wrong value breaks the configuration's class anywhere
        raise damaged(folder, f"configuration: {error}") from error
    try:
        gguf = GgufFile(files[0]) if files[0].suffix == ".gguf" else None
        if gguf is None:
            weights, origins = map_weights(files), dict[str, WeightSource]()
            _check_parameters(kind, config, weights.values())
        else:
            with torch.device("meta"):  # shapes only
                origins = sources(gguf, kind(config))
            weights = {name: torch.zeros((), dtype=torch.bfloat16).expand(each.shape) for name, each in origins.items()}
        network, report = kind.from_pretrained(
            None, config=config, state_dict=weights, dtype=_dtype(weights.values()), output_loading_info=True
        )
    except (MemoryError, PolarError):
        raise
    except Exception as error:  # a size that does not fit the others breaks the model's class anywhere
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        raise damaged(folder, str(error)) from error
    for name, weight in network.named_parameters():
        if name in origins:
            weight.source = origins[name]
    # transformers fills what is missing with random numbers and goes on.
    for what in ("missing_keys", "mismatched_keys"):
        if report[what]:
            raise damaged(folder, f"{what.replace('_', ' ')}: {', '.join(map(str, sorted(report[what])[:3]))}")
    result: PreTrainedModel = network.requires_grad_(False).eval()
    result.generation_config = generation
    return result


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a model folder.

    Raises:
        ModelDamagedError: It is missing, or a value of it is wrong.
    """
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a wrong value breaks the configuration's class anywhere
        raise damaged(folder, f"configuration: {error}") from error
    return config


def _check_parameters(kind: Any, config: Any, weights: Iterable[Tensor]) -> None:
    """Refuse a configuration of a far larger network: transformers would fill what the files lack with random numbers.

    Raises:
        ValueError: The network has more than twice the weights that are stored; tied ones may be stored once.
    """
    import torch

    with torch.device("meta"):  # shapes only
        described = sum(weight.numel() for weight in kind(config).parameters())
    stored = sum(weight.numel() for weight in weights)
    if described > 2 * stored + _FEW_WEIGHTS:
        raise ValueError(f"config.json describes {described:,} weights, and the files hold {stored:,}")


def check_finite(model: PreTrainedModel, name: str) -> None:
    """Refuse a model with nan or infinity in it: every answer would be noise, and it would be billed.

    Args:
        model: The model; each of its weights is read once.
        name: What the model is called, for the error.

    Raises:
        ModelDamagedError: A weight, or a value of the configuration, is not finite.
    """
    for key, value in model.config.to_dict().items():
        if (flaw := not_finite(value)) is not None:
            raise ModelDamagedError(
                f"the configuration of model {name!r} is wrong: {key} = {flaw}; it must be finite.",
                hint="Correct it before the model is built.",
            )
    if (weight := first_not_finite(model)) is not None:
        raise _not_finite(name, weight)


def first_not_finite(model: PreTrainedModel) -> str | None:
    """Name of the first weight with nan or infinity in it; None where all are finite."""
    return next((name for name, weight in model.named_parameters() if not _finite(weight)), None)


def bringer(model: PreTrainedModel, name: str, dtype: torch.dtype, stop: Cancel) -> Bring:
    """A function that brings weights of a model into memory, in this dtype, and refuses what `check_finite` refuses.

    The weights are copied even where nothing has to change: a file may be replaced while its model runs. It ends the
    load once `stop` is set.
    """
    names = {id(weight): weight_name for weight_name, weight in model.named_parameters()}

    def bring(weights: Iterable[nn.Parameter], device: torch.device) -> None:
        for weight in weights:
            if stop.is_set():
                raise KeyboardInterrupt
            if hasattr(weight, "stored"):
                weight.data = weight.data.new_empty(0)  # nobody takes zeros for it
                continue
            origin = getattr(weight, "source", None)
            weight.data = origin.numbers(dtype).to(device) if origin else weight.data.to(device, dtype, copy=True)
            if not _finite(weight):
                raise _not_finite(name, names[id(weight)])

    return bring


def keep_stored(model: PreTrainedModel, stop: Cancel) -> str:
    """Let those matrices of a GGUF file that the native library multiplies with stay as they are stored (`stored`).

    Returns:
        The kind of the file; empty if there are no such matrices.
    """
    from polar_sdk.engine.large_pages import LargePages

    kind, memory = "", LargePages()
    weight: Any
    for weight in model.parameters():
        origin: WeightSource | None = getattr(weight, "source", None)
        if origin is not None and (stored := origin.stored(memory, stop)) is not None:
            weight.stored, kind = stored, origin.file.kind
    return kind


def _finite(weight: Tensor) -> bool:
    """A sum is finite only if every term is, and needs no second tensor of the same size."""
    import torch

    return bool(weight.detach().sum(dtype=torch.float32).isfinite())


def _not_finite(name: str, weight: str) -> ModelDamagedError:
    return ModelDamagedError(
        f"model {name!r} is damaged: weight {weight} is not finite.", hint="Copy, fetch or train the model again."
    )


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


def read_generation_config(folder: Path) -> GenerationConfig:
    """The generation settings; a model saved without them has some in its configuration."""
    from transformers import GenerationConfig

    own = (folder / "generation_config.json").is_file()
    return GenerationConfig.from_pretrained(folder, None if own else "config.json", local_files_only=True)
