"""Keys and values of one row: one slot per *visit*, so a layer that runs twice keeps two independent histories.

Knows nothing of layers: position in the program is the only index. Storage grows in steps and holds no padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder

__all__ = ["VisitCache"]

_STEP = 64
"""Capacity is a multiple of this many tokens."""


class VisitCache:
    """Keys and values, (visits, 2, G, capacity, d), of which the first `length` tokens are filled."""

    def __init__(self, decoder: Decoder, visits: int, capacity: int) -> None:
        self._shape = (visits, 2, decoder.kv_heads, decoder.head_dim)
        self._dtype, self._device = decoder.dtype, decoder.device
        self._store = self._allocate(capacity)
        self.length = 0
        """Tokens whose keys and values every visit holds; advanced by the forward pass, not by a visit."""

    def _allocate(self, capacity: int) -> Tensor:
        visits, two, heads, size = self._shape
        rounded = -(-max(capacity, 1) // _STEP) * _STEP
        return torch.empty((visits, two, heads, rounded, size), dtype=self._dtype, device=self._device)

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return self._store.numel() * self._store.element_size()

    def reserve(self, tokens: int) -> None:
        """Make room for that many tokens in all, keeping what is there; grows by at least a half."""
        capacity = self._store.shape[3]
        if tokens > capacity:
            grown = self._allocate(max(tokens, capacity + capacity // 2))
            grown[:, :, :, : self.length] = self._store[:, :, :, : self.length]
            self._store = grown

    def append(self, visit: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values (T, G, d) of one visit.

        Returns:
            All keys and all values of the visit, (G, S, d) each, new ones last; views, valid until the next growth.
        """
        end = self.length + key.shape[0]
        slot = self._store[visit]
        slot[0, :, self.length : end] = key.transpose(0, 1)
        slot[1, :, self.length : end] = value.transpose(0, 1)
        return slot[0, :, :end], slot[1, :, :end]
