"""A set of maps of one kind on disk: a folder with `maps.safetensors`, and `maps.json` about them. No pickle.

Fills are stored as int8, with a scale for each output, or as float16; bridges are stored unchanged. What runs is what
was read back, in the model's dtype, so that a map is the same before and after it is stored. Knows maps, not how they
are fitted.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from polar_sdk.engine.maps import Bridge, Fill, Map
from polar_sdk.errors import MapDamagedError, MapError, MapModelError, ProgramSyntaxError
from polar_sdk.programs.program import Program
from polar_sdk.reading import read_document

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence, Set

    from torch import Tensor

    from polar_sdk.programs.cost import Segment
    from polar_sdk.serving.loaded import LoadedModel


MapKind = Literal["bridge", "fill"]
Storage = Literal["int8", "float16", "exact"]
"""How matrices are stored; `exact` is the dtype they have."""
_FORMAT: Final = "polar-maps-1"
_CLASSES: Final[dict[MapKind, type[Map]]] = {"bridge": Bridge, "fill": Fill}
_JSON: Final = "maps.json"
_TENSORS: Final = "maps.safetensors"
_SCALE: Final = ".scale"


class MapRecord(BaseModel, frozen=True, extra="forbid"):
    """One map, as the JSON file describes it."""

    first: int
    last: int
    form: str
    """`full rank` or `rank 64`; with more that is read, `full rank, 256 units, token rank 96`."""
    flops_per_token: int
    error: float | None = None
    """On held-out prompts; None without such prompts. Of a bridge, the squared error of states, divided by that of a
    plain skip, in the program that uses the whole group; below 1 the bridge is better. Of a fill, the share of the
    variance of keys and values that it misses."""

    @property
    def segment(self) -> Segment:
        """First and last layer."""
        return self.first, self.last

    @classmethod
    def of(cls, segment: Segment, fitted: Map, error: float | None) -> Self:
        """The record of a map."""
        form = "full rank" if fitted.rank is None else f"rank {fitted.rank}"
        form += f", {fitted.units} units" if fitted.units else ""
        if isinstance(fitted, Fill) and fitted.token:
            form += f", token rank {min(min(factor.shape) for factor in fitted.token)}"
        return cls(first=segment[0], last=segment[1], form=form, flops_per_token=fitted.flops, error=error)


class MapFacts(BaseModel, frozen=True, extra="forbid"):
    """How maps came to be."""

    kind: MapKind
    """The kind of all maps of the set."""
    model: str
    fingerprint: str
    """Identifies the model."""
    dtype: str
    """Dtype of the weights that the states came from."""
    storage: Storage
    segments: tuple[MapRecord, ...]
    data: str
    """Hash of the data."""
    training: dict[str, Any]
    """Prompts, settings, the programs that the maps were made for, and losses where they were trained."""


class _File(MapFacts):
    format: str
    sha256: str
    """SHA-256 of the tensor file."""


@dataclass(frozen=True, eq=False)
class MapSet:
    """Bridges or fills of one model.

    Attributes:
        facts: How they came to be.
        tensors: The maps as they are stored; see `stored`.
    """

    facts: MapFacts
    tensors: Mapping[str, Tensor]

    @cached_property
    def maps(self) -> dict[Segment, Map]:
        """The maps, by segment.

        Raises:
            ValueError: A tensor is missing, shapes do not form a map, or a value is not finite.
        """
        return {record.segment: self._map(f"{record.first}-{record.last}.") for record in self.facts.segments}

    @cached_property
    def bridges(self) -> dict[Segment, Bridge]:
        """The maps that are bridges, by segment."""
        return {segment: each for segment, each in self.maps.items() if isinstance(each, Bridge)}

    @cached_property
    def fills(self) -> dict[Segment, Fill]:
        """The maps that are fills, by segment."""
        return {segment: each for segment, each in self.maps.items() if isinstance(each, Fill)}

    @cached_property
    def programs(self) -> tuple[Program, ...]:
        """The programs that they were made for; none where that was not recorded.

        Raises:
            ProgramSyntaxError: One does not parse.
        """
        return tuple(Program.parse(str(text)) for text in self.facts.training.get("programs", ()))

    @property
    def bytes(self) -> int:
        """Size of the tensors. Unit: bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @classmethod
    def load_all(cls, folders: str | Path | Sequence[str | Path]) -> list[MapSet]:
        """Read one folder, or several.

        Raises:
            MapDamagedError: A file is missing, altered or malformed.
        """
        return [cls.load(folder) for folder in ((folders,) if isinstance(folders, str | Path) else folders)]

    @classmethod
    def of(cls, maps: MapSet | str | Path) -> MapSet:
        """Maps as they are, or those in a folder."""
        return maps if isinstance(maps, MapSet) else cls.load(maps)

    def only(self, segments: Set[Segment]) -> MapSet:
        """The same set with these segments alone."""
        records = tuple(record for record in self.facts.segments if record.segment in segments)
        names = {f"{record.first}-{record.last}" for record in records}
        tensors = {name: tensor for name, tensor in self.tensors.items() if name.partition(".")[0] in names}
        return MapSet(self.facts.model_copy(update={"segments": records}), tensors)

    def over(self, other: MapSet) -> MapSet:
        """This set with the maps and programs of another, for segments that it lacks; both have the same storage."""
        others = other.only(set(other.maps) - set(self.maps))
        programs = dict.fromkeys(program.text for program in (*other.programs, *self.programs))
        facts = self.facts.model_copy(
            update={
                "segments": (*others.facts.segments, *self.facts.segments),
                "training": {**self.facts.training, "programs": list(programs)},
            }
        )
        return MapSet(facts, {**others.tensors, **self.tensors})

    def check_model(self, name: str, fingerprint: str) -> None:
        """Refuse a model that these maps were not fitted on.

        Raises:
            MapModelError: The fingerprints differ.
        """
        facts = self.facts
        if facts.fingerprint != fingerprint:
            raise MapModelError(
                f"the {facts.kind}s were fitted for model {facts.model} ({facts.fingerprint[:12]}…), but this model is "
                f"{name} ({fingerprint[:12]}…).",
                hint=f"Fit {facts.kind}s for it with `polar lab heal`.",
            )

    def place_on(self, loaded: LoadedModel) -> None:
        """Add these maps to those that a model in memory has already.

        Raises:
            MapModelError: They were fitted for another model.
            MapError: A segment or a size is not this model's.
        """
        self.check_model(loaded.name, loaded.fingerprint)
        decoder, kind = loaded.decoder, self.facts.kind
        family, lowest = decoder.family, int(kind == "fill")
        for (first, last), each in self.maps.items():
            named = f"{kind} {first}-{last}"
            if not lowest <= first <= last < decoder.depth:
                raise MapError(
                    f"{named} does not fit a model of {decoder.depth} layers; it needs some of {lowest} to "
                    f"{decoder.depth - 1}."
                )
            written = (last - first + 1, 2, family.kv_heads, family.head_dim)
            sizes = (family.hidden, *(written if kind == "fill" else (family.hidden,)))
            if (own := (each.width, *each.bias.shape)) != sizes:
                raise MapError(f"{named} has sizes {own}, not the model's {sizes}; fit it with `polar lab heal`.")
        there = decoder.dtype, decoder.device
        decoder.set_bridges({**decoder.bridges, **{key: each.to(*there) for key, each in self.bridges.items()}})
        decoder.set_fills({**decoder.fills, **{key: each.to(*there) for key, each in self.fills.items()}})

    def save(self, folder: str | Path) -> Path:
        """Write both files; the folder is created if needed. Returns the folder."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        data = save_tensors({name: tensor.contiguous() for name, tensor in self.tensors.items()})
        file = _File(format=_FORMAT, sha256=hashlib.sha256(data).hexdigest(), **dict(self.facts))
        (target / _TENSORS).write_bytes(data)
        (target / _JSON).write_text(file.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return target

    @classmethod
    def load(cls, folder: str | Path) -> MapSet:
        """Read a folder back.

        Raises:
            MapDamagedError: A file is missing, altered or malformed.
        """
        source = Path(folder)
        file = read_document(source / _JSON, _File, lambda reason: _damaged(source, f"{_JSON} {reason}"))
        try:
            data = (source / _TENSORS).read_bytes()
        except OSError as error:
            raise _damaged(source, f"{_TENSORS} cannot be read ({error.strerror})") from error
        if file.format != _FORMAT:
            raise _damaged(source, f"{_JSON} has format {file.format!r}, not {_FORMAT!r}")
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise _damaged(source, f"{_TENSORS} is not the file that {_JSON} describes")
        facts = MapFacts(**file.model_dump(exclude={"format", "sha256"}))
        try:
            made = cls(facts, load_tensors(data))
            _ = made.maps, made.programs
        except ProgramSyntaxError as error:
            raise _damaged(source, f"{_JSON}: {error}") from error
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise _damaged(source, f"{_TENSORS}: {error}") from error
        return made

    def _map(self, prefix: str) -> Map:
        names = [name for name in self.tensors if name.startswith(prefix) and not name.endswith(_SCALE)]
        try:
            parts = {name.removeprefix(prefix): self._read(name) for name in names}
            made = _CLASSES[self.facts.kind].of(parts)
        except KeyError as error:
            raise ValueError(f"{prefix}{error.args[0].removeprefix(prefix)} is missing") from error
        except ValueError as error:
            raise ValueError(f"{prefix[:-1]}: {error}") from error
        if not all(bool(part.isfinite().all()) for part in parts.values()):
            raise ValueError(f"{prefix[:-1]} contains a value that is not finite")
        return made

    def _read(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        if tensor.dtype == torch.int8:
            return tensor.float() * self.tensors[f"{name}{_SCALE}"]
        return tensor if self.facts.storage == "exact" else tensor.float()


def stored(maps: Mapping[Segment, Map], storage: Storage) -> dict[str, Tensor]:
    """Maps as named tensors: `20-29.weight.0`, `20-29.bias` and so on; with `int8` also `20-29.weight.0.scale`.

    Matrices in int8 are rounded to the nearest of 255 steps between minus and plus the largest value of their output.
    Only matrices are rounded.
    """
    tensors: dict[str, Tensor] = {}
    for (first, last), each in maps.items():
        for part, tensor in each.parts.items():
            name, own = f"{first}-{last}.{part}", tensor.detach().cpu()
            exact = own.float()
            if storage == "exact":
                tensors[name] = own
            elif exact.dim() != 2:
                tensors[name] = exact
            elif storage == "float16":
                tensors[name] = exact.half()
            else:
                scale = (exact.abs().amax(0) / 127).clamp(min=1e-12)
                tensors[name] = (exact / scale).round().clamp(-127, 127).to(torch.int8)
                tensors[f"{name}{_SCALE}"] = scale
    return tensors


def _damaged(folder: Path, reason: str) -> MapDamagedError:
    return MapDamagedError(f"maps in {str(folder)!r} are damaged: {reason}.", hint="Fit them with `polar lab heal`.")
