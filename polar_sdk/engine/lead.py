"""The lead: what the first layers make of a prompt, run before its request because a router reads their output.

It is not computed again: a request whose program begins with those layers takes over their states, keys and values and
continues after them. Knows tokens and layers, not what a router reads in the states.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from polar_sdk.engine.attention import write_pages
from polar_sdk.engine.pages import PAGE
from polar_sdk.programs.cost import chunks
from polar_sdk.programs.program import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.eager import Kernels
    from polar_sdk.engine.pages import PageTable
    from polar_sdk.programs.cost import CostModel
    from polar_sdk.programs.program import Program


class Lead:
    """What the first layers made of one prompt of T tokens. Taken over once, by one row.

    Attributes:
        layers: Number of layers that ran.
        flops: What they executed. Unit: FLOPs.
        states: After the last of them, (T, E), on that layer's device.
        keys: Of each layer, (T, G, d), on its device.
        values: Of each layer, (T, G, d).
        kernels: What ran them; None = not known.
    """

    def __init__(
        self,
        flops: int,
        states: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        kernels: Kernels | None = None,
    ) -> None:
        self.layers, self.flops = len(keys), flops
        self.states, self.kernels = states, kernels
        self.keys, self.values = list(keys), list(values)

    @property
    def tokens(self) -> int:
        """Length of the prompt, T."""
        return len(self.states)

    def begins(self, program: Program) -> bool:
        """Whether a program can take it over."""
        return begins(program, self.layers)

    def fill(self, pages: PageTable, stores: Sequence[Tensor], start: int, end: int) -> None:
        """Write keys and values of tokens `start` … `end` − 1 to the pages of a row's first visits.

        Args:
            pages: Of the row, with room for the tokens.
            stores: Of each layer.
            start: The first token.
            end: The token after the last one.
        """
        positions = torch.arange(start, end)
        places = pages.places[positions // PAGE]
        for layer, store in enumerate(stores):
            pages_of_layer, offsets = places[:, layer].to(store.device), (positions % PAGE).to(store.device)
            write_pages(store, pages_of_layer, offsets, self.keys[layer][start:end], self.values[layer][start:end])

    def release(self) -> None:
        """Free the tensors; whoever still holds the lead holds only its numbers."""
        self.states = self.states[:0].clone()
        self.keys, self.values = [], []


def begins(program: Program, layers: int) -> bool:
    """Whether a program's first steps are plain visits of the first layers, so that it can take a lead over.

    Its last visit must come after them: the lead runs all tokens to the end of its layers, which the last visit of a
    program does not.
    """
    leading = tuple(Step(layer, layer) for layer in range(layers))
    return program.steps[:layers] == leading and program.last_visit >= layers


def lead_flops(cost: CostModel, layers: int, tokens: int) -> int:
    """FLOPs of the first layers over a prompt, which runs in the same chunks as every prompt."""
    pieces = chunks(tokens)
    return sum(layer.flops(end - start, end) for layer in cost.layers[:layers] for start, end in pieces)


@torch.inference_mode()
def run_lead(decoder: Decoder, tokens: Sequence[int], layers: int) -> Lead:
    """Run the first layers over a prompt.

    Args:
        decoder: The weights.
        tokens: Token ids of the prompt, at least one.
        layers: Number of layers, at least one.
    """
    decoder = decoder.pinned(decoder.kernels)
    states: list[Tensor] = []
    keys: list[list[Tensor]] = [[] for _ in range(layers)]
    values: list[list[Tensor]] = [[] for _ in range(layers)]

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys[layer].append(key)
        values[layer].append(value)
        all_keys, all_values = (torch.cat(pieces).transpose(0, 1) for pieces in (keys[layer], values[layer]))
        return decoder.kernels.attend(query, all_keys, all_values, decoder.family.kinds[layer])

    for start, end in chunks(len(tokens)):
        here = decoder.device
        positions = torch.arange(start, end, device=here)
        x = decoder.embed(torch.tensor(tokens[start:end], device=here), positions)
        rotary = decoder.rotary(positions, end)
        for layer, device in enumerate(decoder.placement.layers[:layers]):
            if device != here:
                here, x, positions = device, x.to(device), positions.to(device)
                rotary = decoder.rotary(positions, end)
            x = decoder.run_step(Step(layer, layer), x, positions, rotary, partial(attend, layer))
        states.append(x)
    flops = lead_flops(decoder.cost, layers, len(tokens))
    merged = list(map(torch.cat, keys)), list(map(torch.cat, values))
    return Lead(flops, torch.cat(states), *merged, decoder.kernels)
