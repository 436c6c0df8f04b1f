"""Early exit with confidence, as CALM has it, over a Hugging Face model: what our engine has no use for, as a peer.

A token of the answer stops at one layer where the head is sure of its choice there. The layers above then take their
keys and values from the state it stopped with. The model was not trained for it.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class Run(NamedTuple):
    """One answer."""

    chosen: tuple[int, ...]
    """The token chosen at each place, the first one by the prompt's pass."""
    exits: int
    """Tokens of the answer, the first one aside, that stopped early."""
    first: float
    """Time to the first token. Unit: seconds."""
    rest: float
    """Time for all others. Unit: seconds."""


class EarlyExit:
    """A model that may stop at one layer.

    Args:
        folder: Of the model.
        layer: Number of layers that a token runs before the head is asked.
    """

    def __init__(self, folder: Path, layer: int) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        self._turn = sys.modules[type(self._model).__module__].apply_rotary_pos_emb
        self._layer = layer

    @torch.inference_mode()
    def answer(self, prompt: Sequence[int], tokens: int, confidence: float, forced: Sequence[int] = ()) -> Run:
        """Answer greedily.

        Args:
            prompt: Token ids.
            tokens: Length of the answer.
            confidence: Probability of the likeliest token from which the layers above are left out; over 1 = never.
            forced: Tokens that stand in the answer, whatever is chosen.
        """
        from transformers import DynamicCache

        begin, cache = time.perf_counter(), DynamicCache()
        ids = torch.tensor([list(prompt)])
        logits = self._model(ids, cache=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        chosen = [int(logits.argmax())]
        first = time.perf_counter() - begin
        exits = 0
        while len(chosen) < tokens:
            last = forced[len(chosen) - 1] if forced else chosen[-1]
            token, early = self._step(last, len(prompt) + len(chosen) - 1, cache, confidence)
            chosen.append(token)
            exits += early
        return Run(tuple(chosen), exits, first, time.perf_counter() - begin - first)

    def _step(self, token: int, position: int, cache: Any, confidence: float) -> tuple[int, bool]:
        inner = self._model.model
        x, place = inner.embed_tokens(torch.tensor([[token]])), torch.tensor([[position]])
        angles = inner.rotary_emb(x, place)
        for index, layer in enumerate(inner.layers):
            if index == self._layer and confidence <= 1:
                chances = self._model.lm_head(inner.norm(x))[0, -1].softmax(-1)
                if float(chances.max()) >= confidence:
                    self._leave(x, angles, cache)
                    return int(chances.argmax()), True
            x = layer(x, position_ids=place, cache=cache, position_embeddings=angles)
        return int(self._model.lm_head(inner.norm(x))[0, -1].argmax()), False

    def _leave(self, x: Any, angles: Any, cache: Any) -> None:
        """Keys and values of the layers that are left out, from the state before them."""
        for index in range(self._layer, len(self._model.model.layers)):
            layer = self._model.model.layers[index]
            attention, state = layer.self_attn, layer.input_layernorm(x)
            shape = (1, 1, -1, attention.head_dim)
            key = attention.k_proj(state).view(shape).transpose(1, 2)
            value = attention.v_proj(state).view(shape).transpose(1, 2)
            cache.update(self._turn(key, key, *angles)[0], value, index)
