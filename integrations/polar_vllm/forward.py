"""One pass of a stock model of vLLM in which tokens take different layers.

Rows of states are gathered before a stretch of layers and put back after it; the layers are the model's own. Attention
finds the batch of a stretch in the forward context. Knows vLLM's models and its forward context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from polar_sdk.engine.maps import Fill
    from polar_sdk.programs.cost import Segment
    from polar_vllm.plan import Span, Stretch


class Batch(Protocol):
    """The batch of a pass, as a runner knows it."""

    def indices(self, spans: Sequence[Span]) -> Tensor:
        """Places of the tokens of spans in the batch, in the order of the spans."""

    def slots(self, indices: Tensor) -> Tensor:
        """Where their keys and values go."""

    def attend(self, stretch: int, spans: Sequence[Span], indices: Tensor, layers: Sequence[str]) -> None:
        """From here on the named attention layers see these spans as the batch's requests."""


class Layered:
    """A decoder of vLLM, layer by layer.

    Args:
        model: A model for generation, of an architecture with `architectures` below.
        fills: The maps, by segment.
    """

    def __init__(self, model: Any, fills: Mapping[Segment, Fill]) -> None:
        self._core, self._fills = model.model, fills
        self._layers = list(self._core.layers)
        self._names = [layer.self_attn.attn.layer_name for layer in self._layers]

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self._layers)

    def __call__(self, tokens: Tensor, positions: Tensor, plan: Sequence[Stretch], batch: Batch) -> Tensor:
        """Run a plan.

        Args:
            tokens: Ids of the batch, (N,).
            positions: Their positions, (N,).
            plan: The stretches of layers.
            batch: Where the tokens are.

        Returns:
            States after the last norm, (N, E); those of tokens that left before are zero.
        """
        hidden = self._core.embed_input_ids(tokens)
        residual = torch.zeros_like(hidden)
        for number, stretch in enumerate(plan):
            for segment, spans in stretch.filled.items():
                self._fill(segment, batch.indices(spans), tokens, positions, hidden, residual, batch)
            if stretch.leaving:
                self._leave(stretch.first, batch.indices(stretch.leaving), positions, hidden, residual, batch)
            if not stretch.running:
                continue
            index = batch.indices(stretch.running)
            batch.attend(number, stretch.running, index, self._names[stretch.first : stretch.after])
            rows = positions[index], hidden[index], residual[index] if stretch.first else None
            ran, kept = self._run(stretch, *rows)
            if stretch.after == self.depth:
                ran, _ = self._core.norm(ran, kept)
                return torch.zeros_like(hidden).index_copy_(0, index, ran)
            hidden.index_copy_(0, index, ran)
            residual.index_copy_(0, index, kept)
        return torch.zeros_like(hidden)

    def _run(
        self, stretch: Stretch, positions: Tensor, hidden: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        for layer in self._layers[stretch.first : stretch.after]:
            hidden, residual = layer(positions, hidden, residual)
        assert residual is not None
        return hidden, residual

    def _fill(
        self,
        segment: Segment,
        index: Tensor,
        tokens: Tensor,
        positions: Tensor,
        hidden: Tensor,
        residual: Tensor,
        batch: Batch,
    ) -> None:
        """Write keys and values of a segment's layers, and carry the states over it."""
        first, last = segment
        state, fill = hidden[index] + residual[index], self._fills[segment]
        embedded = self._core.embed_input_ids(tokens[index]) if fill.token else None
        written, carried = fill.crossed(state, embedded)
        keys = written[:, :, 0].reshape(len(index), -1)  # (N, L × G × d): as many heads, all at one position
        turned, _ = self._layers[first].self_attn.rotary_emb(positions[index], keys, None)
        turned = turned.view(len(index), last - first + 1, -1)
        slots = batch.slots(index)
        for place, layer in enumerate(self._layers[first : last + 1]):
            _store(layer.self_attn.attn, turned[:, place], written[:, place, 1], slots)
        residual.index_copy_(0, index, carried)
        hidden.index_fill_(0, index, 0)

    def _leave(
        self, layer: int, index: Tensor, positions: Tensor, hidden: Tensor, residual: Tensor, batch: Batch
    ) -> None:
        """Keys and values alone, of tokens that nothing reads after this layer."""
        block = self._layers[layer]
        attention = block.self_attn
        read, _ = block.input_layernorm(hidden[index], residual[index])
        joined, _ = attention.qkv_proj(read)
        query, key, value = joined.split([attention.q_size, attention.kv_size, attention.kv_size], -1)
        if hasattr(attention, "k_norm"):
            key = attention.k_norm(key.reshape(len(index), -1, attention.head_dim)).view(key.shape)
        _, key = attention.rotary_emb(positions[index], query.contiguous(), key.contiguous())
        _store(attention.attn, key, value, batch.slots(index))


def _store(attention: Any, key: Tensor, value: Tensor, slots: Tensor) -> None:
    heads = attention.num_kv_heads, attention.head_size
    key, value = (part.reshape(-1, *heads).contiguous() for part in (key, value))
    attention.impl.do_kv_cache_update(attention, key, value, attention.kv_cache, slots)
