"""A set of bridges on disk: a folder with `bridges.safetensors` and `bridges.json`. No pickle.

The JSON holds the model's fingerprint, what was measured of each segment, the hash of the data, how the maps were made,
and the hash of the tensor file. Knows bridges, not how they are fitted.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from polar_sdk.engine.bridge import Bridge
from polar_sdk.errors import BridgeDamagedError, BridgeModelError
from polar_sdk.reading import Unreadable, parse_json, read_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from polar_sdk.programs.cost import Segment
    from polar_sdk.serving.loaded import LoadedModel


_FORMAT: Final = "polar-bridges-1"
_JSON: Final = "bridges.json"
_TENSORS: Final = "bridges.safetensors"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SegmentRecord(_Frozen):
    """One bridge, as the JSON file describes it."""

    first: int
    last: int
    kind: str
    """`full rank`, or `rank 64`."""
    flops_per_token: int
    error_of_skip: float | None
    """Squared error on held-out prompts, divided by that of a plain skip, in the program that uses the whole group;
    below 1 the bridge is better. None where no prompt was held out."""


class _Record(_Frozen):
    format: str
    model: str
    fingerprint: str
    dtype: str
    segments: tuple[SegmentRecord, ...]
    data: str
    training: dict[str, Any]
    sha256: str


@dataclass(frozen=True)
class BridgeSet:
    """Bridges of one model, and how they came to be.

    Attributes:
        bridges: The maps, by segment.
        records: What is known of each.
        model: Name of the model.
        fingerprint: Of the model.
        dtype: Of the weights that the states came from.
        data: Hash of the data.
        training: How they were made: groups, prompts, tokens, settings, and losses where they were distilled.
    """

    bridges: dict[Segment, Bridge]
    records: tuple[SegmentRecord, ...]
    model: str
    fingerprint: str
    dtype: str
    data: str
    training: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Size of the tensors. Unit: bytes."""
        return sum(tensor.nbytes for bridge in self.bridges.values() for tensor in bridge.tensors)

    @classmethod
    def of(cls, bridges: BridgeSet | str | Path) -> BridgeSet:
        """Bridges as they are, or those in a folder."""
        return bridges if isinstance(bridges, BridgeSet) else cls.load(bridges)

    def check_model(self, name: str, fingerprint: str) -> None:
        """Refuse a model that these bridges were not fitted on.

        Raises:
            BridgeModelError: The fingerprints differ.
        """
        if self.fingerprint != fingerprint:
            raise BridgeModelError(
                f"the bridges were fitted for model {self.model} ({self.fingerprint[:12]}…), but this model is {name} "
                f"({fingerprint[:12]}…).",
                hint="Fit bridges for it with `polar heal`.",
            )

    def place_on(self, loaded: LoadedModel) -> None:
        """Add these bridges to those that a model in memory has already.

        Raises:
            BridgeModelError: They were fitted for another model.
        """
        self.check_model(loaded.name, loaded.fingerprint)
        decoder = loaded.decoder
        placed = {segment: bridge.to(decoder.dtype, decoder.device) for segment, bridge in self.bridges.items()}
        decoder.set_bridges({**decoder.bridges, **placed})

    def save(self, folder: str | Path) -> Path:
        """Write both files; the folder is created if needed. Returns the folder."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{first}-{last}.{name}": tensor.contiguous()
            for (first, last), bridge in self.bridges.items()
            for name, tensor in _named(bridge).items()
        }
        data = save_tensors(tensors)
        record = _Record(
            format=_FORMAT,
            model=self.model,
            fingerprint=self.fingerprint,
            dtype=self.dtype,
            segments=self.records,
            data=self.data,
            training=self.training,
            sha256=hashlib.sha256(data).hexdigest(),
        )
        (target / _TENSORS).write_bytes(data)
        (target / _JSON).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return target

    @classmethod
    def load(cls, folder: str | Path) -> BridgeSet:
        """Read a folder back.

        Raises:
            BridgeDamagedError: A file is missing, altered or malformed.
        """
        source = Path(folder)
        try:
            record = _Record.model_validate(parse_json(read_bytes(source / _JSON)))
            data = (source / _TENSORS).read_bytes()
        except OSError as error:
            raise _damaged(source, f"{error.filename} cannot be read: {error.strerror}") from error
        except Unreadable as error:
            raise _damaged(source, f"{_JSON}: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            raise _damaged(source, f"{_JSON}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        if record.format != _FORMAT:
            raise _damaged(source, f"{_JSON} has format {record.format!r}, not {_FORMAT!r}")
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise _damaged(source, f"{_TENSORS} is not the file that {_JSON} describes")
        return cls(
            bridges=_bridges(source, record, data),
            records=record.segments,
            model=record.model,
            fingerprint=record.fingerprint,
            dtype=record.dtype,
            data=record.data,
            training=record.training,
        )


def _named(bridge: Bridge) -> dict[str, Tensor]:
    weights = {f"weight.{index}": factor for index, factor in enumerate(bridge.weight)}
    return {**weights, "bias": bridge.bias, "first": bridge.first}


def _bridges(source: Path, record: _Record, data: bytes) -> dict[Segment, Bridge]:
    try:
        tensors = load_tensors(data)
        return {(each.first, each.last): _bridge(tensors, f"{each.first}-{each.last}") for each in record.segments}
    except (SafetensorError, KeyError) as error:
        raise _damaged(source, f"{_TENSORS}: {error}") from error


def _bridge(tensors: dict[str, Tensor], name: str) -> Bridge:
    weights = [tensors[key] for key in sorted(tensors) if key.startswith(f"{name}.weight.")]
    if not weights:
        raise KeyError(f"{name}.weight.0")
    return Bridge(tuple(weights), tensors[f"{name}.bias"], tensors[f"{name}.first"])


def _damaged(folder: Path, what: str) -> BridgeDamagedError:
    return BridgeDamagedError(f"bridges in {str(folder)!r} are damaged: {what}.", hint="Fit them with `polar heal`.")
