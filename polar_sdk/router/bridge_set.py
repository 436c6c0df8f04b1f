"""A set of bridges on disk: a folder with `bridges.safetensors` and `bridges.json`.

Knows bridges, not how they are fitted; how the files are written and checked, `map_folder` knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.engine.bridge import Bridge
from polar_sdk.errors import BridgeDamagedError, BridgeModelError
from polar_sdk.router.map_folder import Frozen, MapFolder, MapRecord

if TYPE_CHECKING:
    from torch import Tensor

    from polar_sdk.programs.cost import Segment
    from polar_sdk.serving.loaded import LoadedModel


class SegmentRecord(Frozen):
    """One bridge, as the JSON file describes it."""

    first: int
    last: int
    kind: str
    """`full rank`, or `rank 64`."""
    flops_per_token: int
    error_of_skip: float | None
    """Squared error on held-out prompts, divided by that of a plain skip, in the program that uses the whole group;
    below 1 the bridge is better. None where no prompt was held out."""


class _Record(MapRecord):
    segments: tuple[SegmentRecord, ...]


def _damaged(folder: Path, what: str) -> BridgeDamagedError:
    return BridgeDamagedError(
        f"bridges in {str(folder)!r} are damaged: {what}.", hint="Fit them with `polar lab heal`."
    )


_FOLDER: Final = MapFolder("bridges", "polar-bridges-1", _Record, _damaged)


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
                hint="Fit bridges for it with `polar lab heal`.",
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
        tensors = {
            f"{first}-{last}.{name}": tensor
            for (first, last), bridge in self.bridges.items()
            for name, tensor in _named(bridge).items()
        }
        return _FOLDER.write(
            folder,
            tensors,
            model=self.model,
            fingerprint=self.fingerprint,
            dtype=self.dtype,
            segments=self.records,
            data=self.data,
            training=self.training,
        )

    @classmethod
    def load(cls, folder: str | Path) -> BridgeSet:
        """Read a folder back.

        Raises:
            BridgeDamagedError: A file is missing, altered or malformed.
        """
        record, tensors = _FOLDER.read(folder)
        return cls(
            bridges=_bridges(Path(folder), record, tensors),
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


def _bridges(source: Path, record: _Record, tensors: dict[str, Tensor]) -> dict[Segment, Bridge]:
    try:
        return {(each.first, each.last): _bridge(tensors, f"{each.first}-{each.last}") for each in record.segments}
    except KeyError as error:
        raise _damaged(source, f"bridges.safetensors: {error}") from error


def _bridge(tensors: dict[str, Tensor], name: str) -> Bridge:
    weights = [tensors[key] for key in sorted(tensors) if key.startswith(f"{name}.weight.")]
    if not weights:
        raise KeyError(f"{name}.weight.0")
    return Bridge(tuple(weights), tensors[f"{name}.bias"], tensors[f"{name}.first"])
