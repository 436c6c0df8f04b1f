"""A folder of fitted maps: a safetensors file and a JSON file that describes it. No pickle.

The JSON holds the model's fingerprint, what was measured of each segment, the hash of the data, how the maps were made,
and the hash of the tensor file. What the maps are, `bridge_set` and `fill_set` know.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from polar_sdk.reading import Unreadable, parse_json, read_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from polar_sdk.errors import PolarError


class Frozen(BaseModel):
    """What the JSON is made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class MapRecord(Frozen):
    """What the JSON of every kind of map says."""

    format: str
    model: str
    fingerprint: str
    dtype: str
    data: str
    training: dict[str, Any]
    sha256: str
    """Of the tensor file."""


R = TypeVar("R", bound=MapRecord)


@dataclass(frozen=True)
class MapFolder(Generic[R]):
    """How one kind of map is stored.

    Attributes:
        name: Of both files, `.json` and `.safetensors`.
        format: Of the JSON.
        record: Its contents.
        damaged: Makes the error for a folder, and for what is wrong with it.
    """

    name: str
    format: str
    record: type[R]
    damaged: Callable[[Path, str], PolarError]

    def write(self, folder: str | Path, tensors: dict[str, Tensor], **facts: Any) -> Path:
        """Write both files; the folder is created if needed. Returns the folder."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        data = save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()})
        record = self.record(format=self.format, sha256=hashlib.sha256(data).hexdigest(), **facts)
        (target / f"{self.name}.safetensors").write_bytes(data)
        (target / f"{self.name}.json").write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return target

    def read(self, folder: str | Path) -> tuple[R, dict[str, Tensor]]:
        """Read both files.

        Raises:
            PolarError: The error of `damaged`: a file is missing, altered or malformed.
        """
        source = Path(folder)
        try:
            record = self.record.model_validate(parse_json(read_bytes(source / f"{self.name}.json")))
            data = (source / f"{self.name}.safetensors").read_bytes()
        except OSError as error:
            raise self.damaged(source, f"{error.filename} cannot be read: {error.strerror}") from error
        except Unreadable as error:
            raise self.damaged(source, f"{self.name}.json: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            raise self.damaged(
                source, f"{self.name}.json: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            ) from error
        if record.format != self.format:
            raise self.damaged(source, f"{self.name}.json has format {record.format!r}, not {self.format!r}")
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise self.damaged(source, f"{self.name}.safetensors is not the file that {self.name}.json describes")
        try:
            return record, load_tensors(data)
        except SafetensorError as error:
            raise self.damaged(source, f"{self.name}.safetensors: {error}") from error
