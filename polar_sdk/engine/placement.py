"""Which device holds which layer. Knows devices and layer indices, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Placement:
    """A device for every part of a model.

    Attributes:
        first: Of the embedding, where tokens enter.
        layers: Of each layer, with its pages of keys and values.
        last: Of the final norm and the head, where logits are computed.
    """

    first: torch.device
    layers: tuple[torch.device, ...]
    last: torch.device

    @classmethod
    def whole(cls, device: torch.device, depth: int) -> Placement:
        """All of a model on one device."""
        return cls(device, (device,) * depth, device)

    @cached_property
    def stores(self) -> tuple[torch.device, ...]:
        """The devices of layers, each once: they store the pages of keys and values."""
        return tuple(dict.fromkeys(self.layers))

    @cached_property
    def store_of(self) -> tuple[int, ...]:
        """For each layer, which of `stores` its pages are in."""
        return tuple(map(self.stores.index, self.layers))

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices, each once, in the order in which a token passes them."""
        return tuple(dict.fromkeys((self.first, *self.layers, self.last)))

    def __str__(self) -> str:
        """The devices, such as `cuda:0` or `cuda:0+cuda:1`."""
        return "+".join(map(str, self.devices))
