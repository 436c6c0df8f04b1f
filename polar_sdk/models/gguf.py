"""GGUF files: their contents, and their weights for a network, as stored or as numbers.

The header is read here, since the reader of the `gguf` package makes an array of every token and takes several times as
long as loading; that package's names of tensors and its decoding are used, and transformers' names of weights. Nothing
of a file is mapped: a file that shrinks would end the process. Knows names, types and bytes, no arithmetic of layers.
"""

from __future__ import annotations

import os
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.errors import ModelDamagedError, UnsupportedArchitectureError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

    from polar_sdk.engine.large_pages import LargePages
    from polar_sdk.engine.panels import StoredMatrix
    from polar_sdk.serving.request import Cancel


_SCALARS: Final = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_HEADER: Final = 1 << 24
"""Bytes that hold most headers."""
_MAX_COUNT: Final = 1 << 26
"""More values, tensors or bytes of a name than any header has. Such a count means that the file is damaged."""
_MAX_DIMENSIONS: Final = 4
_VERSIONS: Final = (2, 3)


class _Header:
    """The bytes of a header, read from the first one on. It is read again, further, where it turns out to be longer."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        """The next number, of a type of `struct`."""
        (number,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return number

    def count(self) -> int:
        """A number of things that follow.

        Raises:
            ValueError: It is more than any file has.
        """
        count: int = self.number("Q")
        if count > _MAX_COUNT:
            raise ValueError(f"its header counts {count} values")
        return count

    def text(self) -> bytes:
        """A string."""
        length = self.count()
        start = self.at
        self.skip(length)
        return self.data[start : self.at]

    def skip(self, length: int) -> None:
        """Skip N bytes, which must exist."""
        if self.at + length > len(self.data):
            raise struct.error("a value extends beyond the header")
        self.at += length

    def skip_texts(self, count: int) -> None:
        """Skip N strings, without making any."""
        at, read = self.at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            at += 8 + read(self.data, at)[0]
        self.skip(at - self.at)


class Field:
    """A value of the header, in the way that the `gguf` package's reader has it, which transformers reads."""

    def __init__(self, header: _Header) -> None:
        kind = header.number("I")
        self.types = [kind] if kind != _ARRAY else [kind, header.number("I")]
        self._count = 1 if kind != _ARRAY else header.count()
        self._header, self._start = header, header.at
        if self.types[-1] == _STRING:
            header.skip_texts(self._count)
        else:
            header.skip(self._count * struct.calcsize(f"<{_SCALARS[self.types[-1]]}"))

    @property
    def data(self) -> range:
        """Which of the parts are values."""
        return range(self._count)

    @cached_property
    def parts(self) -> list[Any]:
        """The values: strings as bytes, numbers alone in a tuple each."""
        header = _Header(self._header.data)
        header.at = self._start
        if self.types[-1] == _STRING:
            return [header.text() for _ in self.data]
        return [(header.number(_SCALARS[self.types[-1]]),) for _ in self.data]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file.

    Attributes:
        name: In the file.
        kind: Name of its type, such as `Q4_K`.
        shape: The last axis is contiguous.
        start: Offset of its first byte in the file.
        size: Bytes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


class GgufFile:
    """The header of a file.

    Attributes:
        path: The file.
        fields: Its values by name.
        tensors: By name, in the order of the file.

    Raises:
        ModelDamagedError: It is not a whole GGUF file.
        UnsupportedArchitectureError: A tensor has a type that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._stamp = path, _stamp(path)
        length = _HEADER
        while True:
            with path.open("rb") as file:
                header = _Header(file.read(length))
            self.fields: dict[str, Field] = {}
            try:
                self.tensors = {entry.name: entry for entry in self._read(header)}
                return
            except (struct.error, IndexError) as error:
                if len(header.data) < length:
                    raise damaged(path, f"its header ends early ({error})") from error
                length *= 4
            except KeyError as error:
                raise damaged(path, f"its header has a value of the unknown type {error}") from error
            except ValueError as error:
                raise damaged(path, str(error)) from error

    def _read(self, header: _Header) -> Iterator[Entry]:
        if header.data[:4] != b"GGUF":
            raise ValueError("it does not start with GGUF")
        header.at = 4
        version = header.number("I")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}, and {' and '.join(map(str, _VERSIONS))} are known")
        tensors, values = header.count(), header.count()
        for _ in range(values):
            name = header.text().decode()
            self.fields[name] = Field(header)
        described = [self._described(header) for _ in range(tensors)]
        with_weights = len({name.split(".")[1] for name, *_ in described if name.startswith("blk.")})
        layers = self.value(f"{self.value('general.architecture')}.block_count")
        if isinstance(layers, int) and layers > with_weights:  # before a network of that size is built
            raise ValueError(f"it states {layers} layers, but its weights are those of {with_weights}")
        alignment = int(self.value("general.alignment") or 32)
        begin = -(-header.at // alignment) * alignment
        for name, kind, shape, offset in described:
            yield self._entry(name, kind, shape, begin + offset)

    def _described(self, header: _Header) -> tuple[str, int, tuple[int, ...], int]:
        name, dimensions = header.text().decode(), header.number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(header.number("Q") for _ in range(dimensions))
        return name, header.number("I"), shape[::-1], header.number("Q")

    def _entry(self, name: str, kind: int, shape: tuple[int, ...], start: int) -> Entry:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if kind not in set(GGMLQuantizationType):
            raise UnsupportedArchitectureError(f"tensor {name!r} of {str(self.path)!r} has the unknown type {kind}.")
        known = GGMLQuantizationType(kind)
        block, size = GGML_QUANT_SIZES[known]
        if not shape or shape[-1] % block or not 0 < prod(shape) <= self._stamp[0] * block:
            raise ValueError(f"tensor {name!r} of type {known.name} has shape {shape}")
        size *= prod(shape) // block
        if start + size > self._stamp[0]:
            raise ValueError(f"tensor {name!r} extends beyond the file, which has {self._stamp[0]} bytes")
        return Entry(name, known.name, shape, start, size)

    def value(self, name: str) -> Any:
        """A value of the header that is no array; None if there is none."""
        field = self.fields.get(name)
        if field is None or len(field.data) != 1:
            return None
        (value,) = field.parts
        return value.decode() if isinstance(value, bytes) else value[0]

    @property
    def kind(self) -> str:
        """How its weights are stored, as files of the kind are called: `q4_k_m`, `q8_0`, `f16`."""
        from gguf import LlamaFileType

        number = self.value("general.file_type")
        if number in set(LlamaFileType):
            return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_").lower()
        return max(self.tensors.values(), key=lambda entry: entry.size).kind.lower()

    @contextmanager
    def opened(self) -> Iterator[int]:
        """The number of the open file, for a block that reads it.

        Raises:
            ModelDamagedError: It is not the file any more whose header was read.
        """
        with self.path.open("rb", buffering=0) as file:
            changed = None
            try:
                yield file.fileno()
            except EOFError as error:
                changed = error
        if changed or _stamp(self.path) != self._stamp:
            raise damaged(self.path, "it has changed while it was read") from changed

    def read(self, entry: Entry) -> NDArray[Any]:
        """Bytes of a tensor.

        Raises:
            ModelDamagedError: It is not the file any more whose header was read.
        """
        import numpy as np

        rows = np.empty(entry.size, np.uint8)
        with self.opened() as number:
            left, at = rows.data, entry.start
            while left:  # the system reads no more than 2 GiB at a time
                if not (count := os.preadv(number, [left], at)):
                    raise EOFError
                left, at = left[count:], at + count
        return rows


class WeightSource:
    """A weight of a network in a GGUF file.

    Args:
        file: The file.
        entry: Its tensor.
        turn: Makes the network's weight of the file's, in whose rows it may lie otherwise; None = they are the same.
        shape: The weight's.
    """

    def __init__(
        self, file: GgufFile, entry: Entry, turn: Callable[[NDArray[Any]], NDArray[Any]] | None, shape: tuple[int, ...]
    ) -> None:
        self.file, self.shape, self._entry, self._turn = file, shape, entry, turn

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """The weight as numbers."""
        import numpy as np
        import torch
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        from polar_sdk.engine import native
        from polar_sdk.engine.large_pages import LargePages

        if dtype == torch.bfloat16 and native.load_library(dtype, torch.device("cpu")):
            stored = self.stored(LargePages(), None)
            if stored is not None:  # the same numbers, in a fraction of the time
                return stored.alone.look_up(torch.arange(stored.outputs))
        entry = self._entry
        try:
            whole = dequantize(self.file.read(entry).reshape(*entry.shape[:-1], -1), GGMLQuantizationType[entry.kind])
        except NotImplementedError as error:
            raise UnsupportedArchitectureError(f"tensor {entry.name!r} has type {entry.kind}: {error}") from error
        whole = whole.reshape(entry.shape)
        own = np.ascontiguousarray(self._turn(whole) if self._turn else whole)
        return torch.from_numpy(own).to(dtype).view(self.shape)

    def stored(self, memory: LargePages, stop: Cancel | None) -> StoredMatrix | None:
        """The weight as the file has it, to be packed; None if it is not in a form of the library, row by row."""
        import numpy as np
        import torch

        from polar_sdk.engine import native
        from polar_sdk.engine.panels import StoredMatrix

        entry = self._entry
        if entry.kind not in native.FORMS or len(entry.shape) != 2 or entry.shape != self.shape:
            return None
        outputs, inputs = entry.shape
        if not native.packed_size(entry.kind, inputs, outputs):
            return None
        order = None
        if self._turn:
            rows = np.arange(outputs)[:, None]
            places = self._turn(rows)
            if not np.array_equal(np.sort(places, axis=0), rows):  # a transposed matrix, say
                return None
            order = None if np.array_equal(places, rows) else torch.from_numpy(np.ascontiguousarray(places[:, 0]))

        def fill(panels: Tensor) -> None:
            if stop is not None and stop.is_set():
                raise KeyboardInterrupt
            try:
                with self.file.opened() as number:
                    native.pack(entry.kind, number, entry.start, order, inputs, outputs, panels)
            except ArithmeticError as error:
                raise ModelDamagedError(
                    f"the model is damaged: tensor {entry.name!r} is not finite.", hint="Copy or fetch the file again."
                ) from error

        return StoredMatrix(entry.kind, inputs, outputs, fill, memory)


def sources(file: GgufFile, shell: PreTrainedModel) -> dict[str, WeightSource]:
    """Where the weights of a network are in a file, by the network's names.

    Raises:
        ModelDamagedError: A weight is missing, or has another size.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    named = file.value("general.architecture")
    kind: Any = TENSOR_PROCESSORS.get(named, TensorProcessor)
    processor = kind(config=shell.config.to_dict())
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == named)
    names = get_tensor_name_map(arch, shell.config.num_hidden_layers)
    shapes = {name: tuple(weight.shape) for name, weight in shell.named_parameters(remove_duplicate=False)}
    found: dict[str, WeightSource] = {}
    for name, shape in shapes.items():
        module, _, part = processor.preprocess_name(name).rpartition(".")
        stored = f"{names.get_name(module)}.{part}"
        entry = file.tensors.get(stored)
        if entry is None:
            continue
        if sorted(entry.shape) != sorted(shape):
            raise damaged(file.path, f"tensor {stored!r} has shape {entry.shape}, and {name} has {shape}")
        turn = partial(_turned, processor, stored) if named in TENSOR_PROCESSORS else None
        found[name] = WeightSource(file, entry, turn, shape)
    tied: Any = shell.all_tied_weights_keys if shell.config.tie_word_embeddings else {}
    if missing := sorted(shapes.keys() - found.keys() - set(tied)):
        raise damaged(file.path, f"it has no {', '.join(missing[:3])}")
    return found


def _turned(processor: Any, name: str, weights: NDArray[Any]) -> NDArray[Any]:
    """A weight of transformers of the file's."""
    own: NDArray[Any] = processor.process(weights=weights, name=name).weights
    return own


def damaged(path: Path, reason: str) -> ModelDamagedError:
    """The error for a file that cannot be read."""
    return ModelDamagedError(
        f"{str(path)!r} is not a readable GGUF file: {reason}.", hint="Copy or fetch the file again."
    )


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
