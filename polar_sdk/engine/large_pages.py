"""Weights in memory of large pages.

Every token reads all weights, and the processor has to translate the address of each of their pages. With pages of 2
MiB instead of 4 KiB, two cores read a third more in the same time (`benchmarks/LOG.md`). Linux provides them to memory
that requests them; elsewhere, and if none are left, nothing changes. Memory that weights occupied before is freed.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from polar_sdk.engine.types import Weights


_PAGE: Final = 1 << 21
_BLOCK: Final = 1 << 24
"""Bytes to ask for at a time; what is not used of them takes no memory."""
_ALIGNED: Final = 64
"""Bytes to which tensors are aligned, as torch's own are."""
_ADVICE: Final[int | None] = getattr(mmap, "MADV_HUGEPAGE", None)


class LargePages:
    """Memory that is allocated in order, and freed when all tensors in a block of it are gone."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def place(self, weights: Weights) -> Weights:
        """The same weights, with those matrices in this memory that are on a CPU; the rest is small."""
        return {name: self.matrix(value) if isinstance(value, tuple) else value for name, value in weights.items()}

    def matrix(self, matrix: Any) -> Any:
        """The same matrix, a named tuple of tensors, in this memory where it is on a CPU."""
        return type(matrix)(*(None if part is None else self._copy(part) for part in matrix))

    def _copy(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        if tensor.device.type != "cpu" or not size or _ADVICE is None:
            return tensor
        return self.empty(size).view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def empty(self, size: int) -> Tensor:
        """So many bytes."""
        if self._used + size > self._block.numel():
            self._block, self._used = _block(max(size, _BLOCK)), 0
        place = self._block[self._used : self._used + size]
        self._used += -(-size // _ALIGNED) * _ALIGNED
        return place


def ask_for_large_pages(memory: mmap.mmap) -> None:
    """Ask for large pages, where the system knows them; it may refuse, and gives small ones then."""
    if _ADVICE is not None:
        with suppress(OSError):
            memory.madvise(_ADVICE)


def _block(size: int) -> Tensor:
    """That many bytes, from the beginning of a large page on."""
    memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ask_for_large_pages(memory)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _PAGE
    return whole[start : start + size]
