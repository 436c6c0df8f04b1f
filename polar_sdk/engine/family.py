"""The arithmetic of one architecture: pure functions over the weights of a layer. Knows no cache, no rows, no programs.

A family is written once, in plain torch, which is the reference and runs everywhere. It also describes its layers as
data (`plan`), from which the native library runs them whole. Tokens of all rows are packed one after another, (N, E),
without padding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from polar_sdk.engine.products import multiply_wide
from polar_sdk.engine.types import AttentionKind
from polar_sdk.programs.cost import CostModel, LayerCost

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from polar_sdk.engine.products import Product
    from polar_sdk.engine.types import LayerPlan, Projected, Rotary, Weights


class Family(ABC):
    """The arithmetic of one architecture, with the sizes of one model. Holds no tensors.

    Reference for every family, order of casts included: `transformers.models.<model_type>.modeling_<model_type>`.
    """

    model_types: ClassVar[tuple[str, ...]]
    """Values of the configuration's `model_type` that this family runs."""
    reads_blocks: ClassVar[bool] = False
    """Whether all its matrices are taken by `parts.take`, `fuse` and `take_table`, which know those of GGUF files."""

    def __init__(self, config: Any) -> None:
        """Read the sizes that every configuration has; a family with other names for them sets them itself.

        Raises:
            UnsupportedArchitectureError: The configuration has an option that is not supported.
        """
        self.hidden: int = config.hidden_size
        self.depth: int = config.num_hidden_layers
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_dim: int = getattr(config, "head_dim", None) or self.hidden // self.heads
        self.vocab: int = config.vocab_size
        self.context_window: int = config.max_position_embeddings
        self.kinds: tuple[AttentionKind, ...] = (AttentionKind(scale=self.head_dim**-0.5),) * self.depth
        """One entry per layer."""

    @property
    def plan(self) -> LayerPlan | None:
        """Operations of the layers, all alike; None if the native library does not have them."""
        return None

    @abstractmethod
    def layer_modules(self, model: PreTrainedModel) -> list[nn.Module]:
        """The decoder layers of the Hugging Face model, in order."""

    @abstractmethod
    def take_layer(self, index: int, layer: Any) -> Weights:
        """Weights of one layer, fused where that saves products; matrices as `Plain`."""

    @abstractmethod
    def take_ends(self, model: PreTrainedModel) -> Weights:
        """Weights of embedding, final norm and head; the head is a `Plain` named `head`."""

    @abstractmethod
    def embed(self, tokens: Tensor, positions: Tensor, ends: Weights) -> Tensor:
        """Embed token ids (N,) at positions (N,); returns (N, E)."""

    def take_rotary(self, model: PreTrainedModel) -> Any:
        """The argument of `rotary_tables`, such as the model's rotary module; it must not hold weights."""
        return None

    @abstractmethod
    def rotary_tables(self, rotary: Any, length: int, dtype: torch.dtype, device: torch.device) -> list[Rotary]:
        """Cosine and sine of positions 0 … length − 1, (length, 1, r) each, one pair per `AttentionKind.rope`."""

    @abstractmethod
    def project(self, x: Tensor, rotary: Rotary, w: Weights) -> Projected:
        """The part of a layer before attention: norm, projections and positions. `x` is (N, E)."""

    @abstractmethod
    def keys_values(self, x: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
        """Keys before their turn by position, and values, (N, G, d) each, as `project` computes them."""

    @abstractmethod
    def turn(self, heads: Tensor, rotary: Rotary) -> Tensor:
        """Turn keys (N, …, d) by their positions, as `project` does."""

    @abstractmethod
    def finish(self, x: Tensor, mixed: Tensor, w: Weights) -> Tensor:
        """The part of a layer after attention. `x` is the layer's input (N, E), `mixed` is (N, H × d)."""

    @abstractmethod
    def norm(self, x: Tensor, ends: Weights) -> Tensor:
        """The final norm of (M, E)."""

    @abstractmethod
    def layer_linear(self, index: int) -> int:
        """Multiply-accumulates per token in the matrix products of one layer."""

    def logits(self, x: Tensor, ends: Weights) -> Tensor:
        """Final norm and output projection of (M, E); returns float32 logits (M, V)."""
        head: Product = ends["head"]
        return multiply_wide(self.norm(x, ends), head)

    def cost(self) -> CostModel:
        """FLOPs of every part: 2 per multiply-accumulate, so 4 per query, key and head dimension in attention."""
        attention = 4 * self.heads * self.head_dim
        keys_values = 4 * self.hidden * self.kv_heads * self.head_dim
        layers = tuple(LayerCost(2 * self.layer_linear(index), attention, keys_values) for index in range(self.depth))
        return CostModel(layers=layers, head=2 * self.hidden * self.vocab)
