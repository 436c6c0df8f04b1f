"""A set of fills on disk: a folder with `fills.safetensors` and `fills.json`.

Weights are stored as int8, each output with a scale of its own, or as float16; what runs is what was read back, in the
model's dtype, so that a fill is the same before it was stored and after. Knows fills, not how they are fitted; how the
files are written and checked, `map_folder` knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import torch

from polar_sdk.engine.fill import Fill
from polar_sdk.errors import FillDamagedError, FillError, FillModelError, ProgramSyntaxError
from polar_sdk.programs.program import Program
from polar_sdk.router.map_folder import Frozen, MapFolder, MapRecord

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from polar_sdk.programs.cost import Segment
    from polar_sdk.serving.loaded import LoadedModel


Storage = Literal["int8", "float16"]
_SCALE: Final = ".scale"
_UNITS: Final = "hidden"
_CARRY: Final = "carry"


class FillRecord(Frozen):
    """One fill, as the JSON file describes it."""

    first: int
    last: int
    kind: str
    """`full rank` or `rank 64`, of a map with hidden units `full rank, 256 units`."""
    flops_per_token: int
    unexplained: float | None
    """Share of the variance of keys and values that the map misses on held-out prompts; None without such prompts."""


class _Record(MapRecord):
    segments: tuple[FillRecord, ...]
    storage: Storage


def _damaged(folder: Path, what: str) -> FillDamagedError:
    return FillDamagedError(f"fills in {str(folder)!r} are damaged: {what}.", hint="Fit them with `polar lab heal`.")


_FOLDER: Final = MapFolder("fills", "polar-fills-1", _Record, _damaged)


@dataclass(frozen=True, eq=False)
class FillSet:
    """Fills of one model, and how they came to be.

    Attributes:
        tensors: The maps as they are stored; see `stored`.
        storage: How.
        records: What is known of each.
        model: Name of the model.
        fingerprint: Of the model.
        dtype: Of the weights that the states came from.
        data: Hash of the data.
        training: How they were made: prompts, settings, the programs that they were made for, and losses where they
            were distilled.
    """

    tensors: Mapping[str, Tensor]
    storage: Storage
    records: tuple[FillRecord, ...]
    model: str
    fingerprint: str
    dtype: str
    data: str
    training: dict[str, Any]

    @cached_property
    def fills(self) -> dict[Segment, Fill]:
        """The maps, by segment, in float32.

        Raises:
            KeyError: A tensor is missing.
            ValueError: Shapes do not form a map, or a value is not finite.
        """
        return {(each.first, each.last): _fill(self.tensors, each) for each in self.records}

    @cached_property
    def programs(self) -> tuple[Program, ...]:
        """The programs that they were made for; none where an earlier version made them.

        Raises:
            ProgramSyntaxError: One does not parse.
        """
        return tuple(Program.parse(str(text)) for text in self.training.get("programs", ()))

    @property
    def bytes(self) -> int:
        """Size of the tensors. Unit: bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @classmethod
    def of(cls, fills: FillSet | str | Path) -> FillSet:
        """Fills as they are, or those in a folder."""
        return fills if isinstance(fills, FillSet) else cls.load(fills)

    def only(self, segments: set[Segment]) -> Self:
        """The same set with these segments alone."""
        records = tuple(record for record in self.records if (record.first, record.last) in segments)
        names = {f"{record.first}-{record.last}" for record in records}
        tensors = {name: tensor for name, tensor in self.tensors.items() if name.partition(".")[0] in names}
        return type(self)(
            tensors, self.storage, records, self.model, self.fingerprint, self.dtype, self.data, self.training
        )

    def check_model(self, name: str, fingerprint: str) -> None:
        """Refuse a model that these fills were not fitted on.

        Raises:
            FillModelError: The fingerprints differ.
        """
        if self.fingerprint != fingerprint:
            raise FillModelError(
                f"the fills were fitted for model {self.model} ({self.fingerprint[:12]}…), but this model is {name} "
                f"({fingerprint[:12]}…).",
                hint="Fit fills for it with `polar lab heal`.",
            )

    def place_on(self, loaded: LoadedModel) -> None:
        """Add these fills to those that a model in memory has already.

        Raises:
            FillModelError: They were fitted for another model.
            FillError: A segment or a size is not this model's.
        """
        self.check_model(loaded.name, loaded.fingerprint)
        decoder = loaded.decoder
        sizes = (decoder.family.hidden, 2, decoder.family.kv_heads, decoder.family.head_dim)
        for (first, last), fill in self.fills.items():
            if not 0 < first <= last < decoder.depth:
                raise FillError(
                    f"fill ({first}-{last}) does not fit a model of {decoder.depth} layers; fill some of 1 to "
                    f"{decoder.depth - 1}."
                )
            if (own := (fill.width, *fill.bias.shape[1:])) != sizes:
                raise FillError(
                    f"fill ({first}-{last}) has sizes {own}, not the model's {sizes}; fit it with `polar lab heal`."
                )
        placed = {segment: fill.to(decoder.dtype, decoder.device) for segment, fill in self.fills.items()}
        decoder.set_fills({**decoder.fills, **placed})

    def save(self, folder: str | Path) -> Path:
        """Write both files; the folder is created if needed. Returns the folder."""
        return _FOLDER.write(
            folder,
            dict(self.tensors),
            model=self.model,
            fingerprint=self.fingerprint,
            dtype=self.dtype,
            segments=self.records,
            storage=self.storage,
            data=self.data,
            training=self.training,
        )

    @classmethod
    def load(cls, folder: str | Path) -> FillSet:
        """Read a folder back.

        Raises:
            FillDamagedError: A file is missing, altered or malformed.
        """
        record, tensors = _FOLDER.read(folder)
        loaded = cls(
            tensors=tensors,
            storage=record.storage,
            records=record.segments,
            model=record.model,
            fingerprint=record.fingerprint,
            dtype=record.dtype,
            data=record.data,
            training=record.training,
        )
        try:
            _ = loaded.fills, loaded.programs
        except ProgramSyntaxError as error:
            raise _damaged(Path(folder), f"fills.json: {error}") from error
        except (KeyError, ValueError, RuntimeError) as error:
            raise _damaged(Path(folder), f"fills.safetensors: {error}") from error
        return loaded


def stored(fills: Mapping[Segment, Fill], storage: Storage) -> dict[str, Tensor]:
    """Maps as named tensors: `20-29.weight.0`, with `int8` also `20-29.weight.0.scale`, and `20-29.bias`.

    Hidden units are `20-29.hidden.weight` and `20-29.hidden.bias`, a carry likewise. Weights in int8 are rounded to the
    nearest of 255 steps between minus and plus the largest value of their output.
    """
    tensors: dict[str, Tensor] = {}
    for (first, last), fill in fills.items():
        name = f"{first}-{last}"
        factors = {f"{name}.weight.{index}": factor for index, factor in enumerate(fill.weight)}
        for part, pair in ((_UNITS, fill.hidden), (_CARRY, fill.carry)):
            if pair:
                factors[f"{name}.{part}.weight"] = pair[0]
                tensors[f"{name}.{part}.bias"] = pair[1].detach().float().cpu()
        for key, factor in factors.items():
            exact = factor.detach().float().cpu()
            if storage == "float16":
                tensors[key] = exact.half()
                continue
            scale = (exact.abs().amax(0) / 127).clamp(min=1e-12)
            tensors[key] = (exact / scale).round().clamp(-127, 127).to(torch.int8)
            tensors[f"{key}{_SCALE}"] = scale
        tensors[f"{name}.bias"] = fill.bias.detach().float().cpu()
    return tensors


def _fill(tensors: Mapping[str, Tensor], record: FillRecord) -> Fill:
    name = f"{record.first}-{record.last}"
    names = sorted(key for key in tensors if key.startswith(f"{name}.weight.") and not key.endswith(_SCALE))
    if not names:
        raise KeyError(f"{name}.weight.0")
    weight = tuple(_factor(tensors, key) for key in names)
    bias = tensors[f"{name}.bias"].float()
    layers, sides = record.last - record.first + 1, [side for factor in weight for side in factor.shape]
    if bias.dim() != 4 or bias.shape[:2] != (layers, 2) or any(factor.dim() != 2 for factor in weight):
        raise ValueError(f"{name} has a bias of shape {tuple(bias.shape)}, which is not that of {layers} layers")
    if sides[1:-1:2] != sides[2::2] or sides[-1] != bias.numel():
        raise ValueError(f"{name} has factors of shapes {[tuple(factor.shape) for factor in weight]}")
    hidden, carry = _pair(tensors, name, _UNITS, "hidden units"), _pair(tensors, name, _CARRY, "a carry")
    inputs = weight[0].shape[0]
    if hidden and sum(hidden[0].shape) != inputs:
        raise ValueError(f"{name} has hidden units of shape {tuple(hidden[0].shape)}, which do not fit {inputs} inputs")
    width = inputs - (hidden[0].shape[1] if hidden else 0)
    if carry and carry[0].shape != (inputs, width):
        raise ValueError(f"{name} has a carry of shape {tuple(carry[0].shape)}, not {(inputs, width)}")
    if not all(bool(tensor.isfinite().all()) for tensor in (*hidden, *weight, bias, *carry)):
        raise ValueError(f"{name} contains a value that is not finite")
    return Fill(weight, bias, hidden, carry)


def _pair(tensors: Mapping[str, Tensor], name: str, part: str, what: str) -> tuple[Tensor, ...]:
    """The weight (A, B) and the bias (B,) of a part of a map; empty where it has no such part."""
    if f"{name}.{part}.weight" not in tensors:
        return ()
    weight, bias = _factor(tensors, f"{name}.{part}.weight"), tensors[f"{name}.{part}.bias"].float()
    if weight.dim() != 2 or bias.shape != weight.shape[1:]:
        raise ValueError(f"{name} has {what} of shapes {tuple(weight.shape)} and {tuple(bias.shape)}")
    return weight, bias


def _factor(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    values = tensors[key].float()
    return values * tensors[f"{key}{_SCALE}"] if tensors[key].dtype == torch.int8 else values
