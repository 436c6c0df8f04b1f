"""What the engine asks of a model family: embed, one layer, head. Nothing here knows programs or requests.

Tokens of all rows lie packed one after another, (N, E), without padding; the family never sees where a row begins.
Attention is the one place where rows matter, so the caller hands each layer an `Attend` function.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from polar_sdk.cost import CostModel

__all__ = ["Attend", "Decoder", "Rotary"]

Rotary = tuple["Tensor", "Tensor"]
"""Cosine and sine of each packed token, (N, 1, d) each."""


class Attend(Protocol):
    """Attention over the rows' own keys and values, stored and looked up by the caller."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend with (N, H, d), (N, G, d), (N, G, d); returns (N, H × d)."""
        ...


class Decoder(ABC):
    """The frozen weights of one model, ready to run layer by layer."""

    cost: CostModel
    device: torch.device
    dtype: torch.dtype
    kv_heads: int
    """Key and value heads, G."""
    head_dim: int
    """Size of one head, d."""
    context_window: int
    """Most tokens of prompt and answer together."""
    vocab: int
    """Size of the vocabulary, V."""

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """Embed token ids (N,) as hidden states (N, E)."""

    @abstractmethod
    def rotary(self, positions: Tensor) -> Rotary:
        """Position encoding for positions (N,)."""

    @abstractmethod
    def layer(self, index: int, hidden: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """Run layer `index` once on hidden states (N, E); returns (N, E)."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Final norm and output projection of (M, E); returns float32 logits (M, V)."""
