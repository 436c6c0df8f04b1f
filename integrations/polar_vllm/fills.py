"""The fill maps of a server, and the part of them that a worker needs. Knows tensors, and no vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polar_sdk.engine.hashes import hash_fills
from polar_sdk.engine.maps import Fill
from polar_sdk.router.map_set import MapSet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor

    from polar_sdk.programs.cost import Segment


@dataclass(frozen=True)
class Fills:
    """Maps by segment.

    Attributes:
        maps: As they were stored.
        digest: Hash of all of them: two servers with the same digest fill alike.
        fingerprint: The model that they were fitted on.
    """

    maps: Mapping[Segment, Fill]
    digest: str
    fingerprint: str

    @classmethod
    def read(cls, folders: Sequence[str | Path]) -> Fills:
        """Read folders of maps, at least one; what is no fill in them is left out.

        Raises:
            MapError: A file is damaged.
            ValueError: They were fitted on different models, or two maps fill the same segment.
        """
        sets = [MapSet.load(folder) for folder in folders]
        if len(models := {each.facts.fingerprint for each in sets}) > 1:
            raise ValueError(f"fills in {', '.join(map(str, folders))} were fitted on {len(models)} different models.")
        maps: dict[Segment, Fill] = {}
        for each in sets:
            if both := maps.keys() & each.fills.keys():
                raise ValueError(
                    f"two maps fill layers {min(both)[0]} to {min(both)[1]}; name only one of their folders."
                )
            maps |= each.fills
        return cls(maps, hash_fills(maps), models.pop())

    def check(self, depth: int, hidden: int, kv_heads: int, head_dim: int) -> None:
        """Refuse a model with other sizes.

        Raises:
            ValueError: A map does not fit.
        """
        for (first, last), fill in self.maps.items():
            sizes = fill.width, *fill.bias.shape
            wanted = hidden, last - first + 1, 2, kv_heads, head_dim
            if not 1 <= first <= last < depth or sizes != wanted:
                raise ValueError(
                    f"fill {first}-{last} has sizes {sizes}, but this model of {depth} layers needs {wanted}: it was "
                    "fitted on another model."
                )

    def part(self, heads: slice, dtype: torch.dtype, device: Any) -> dict[Segment, Fill]:
        """The maps for some of the heads of keys and values, as a worker of a tensor parallel group computes them.

        States are the same on all workers, so hidden units and carries are whole, and no worker needs another's result.
        """
        return {segment: _part(fill, heads).to(dtype, device) for segment, fill in self.maps.items()}


def _part(fill: Fill, heads: slice) -> Fill:
    def of(factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not factors:
            return ()
        chosen = factors[-1].view(len(factors[-1]), *fill.bias.shape)[..., heads, :]
        return *factors[:-1], chosen.reshape(len(chosen), -1).contiguous()

    bias = fill.bias[..., heads, :].contiguous()
    return Fill(of(fill.weight), bias, fill.hidden, fill.carry, of(fill.token))
