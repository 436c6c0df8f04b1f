"""Fills: what a map writes for prompt tokens that do not run a segment, and what everybody else then computes."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch

from polar_sdk.engine.decoder import build_decoder
from polar_sdk.engine.fill import Fill, normalise
from polar_sdk.engine.hashes import hash_bridges
from polar_sdk.errors import MissingFillError
from polar_sdk.programs.program import Program

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from polar_sdk.engine.decoder import Decoder

    TinyFamily = Callable[..., PreTrainedModel]

DEPTH = 6


def random_fill(decoder: Decoder, layers: int, seed: int = 0, rank: int | None = None) -> Fill:
    """A random map over that many layers, of the size of real keys and values."""
    generator = torch.Generator().manual_seed(seed)
    family = decoder.family
    sizes = (layers, 2, family.kv_heads, family.head_dim)
    bias = torch.randn(sizes, generator=generator)
    sides = [family.hidden, rank, bias.numel()] if rank else [family.hidden, bias.numel()]
    weight = [torch.randn(a, b, generator=generator) / a**0.5 for a, b in pairwise(sides)]
    return Fill(tuple(weight), bias)


def test_keys_and_values_apart_are_those_of_the_whole_projection(variant: str, tiny_family: TinyFamily) -> None:
    decoder = build_decoder(tiny_family(variant))
    positions = torch.arange(30)
    rotary = decoder.rotary(positions, 30)
    x = decoder.embed(positions * 7, positions)
    for layer, kind in enumerate(decoder.family.kinds):
        _, expected_key, expected_value = decoder.project(layer, x, rotary)
        key, value = decoder.keys_values(layer, x)
        key = decoder.family.turn(key, rotary[kind.rope])
        assert torch.allclose(key, expected_key, atol=1e-5), f"{variant}, layer {layer}"
        assert torch.allclose(value, expected_value, atol=1e-5), f"{variant}, layer {layer}"


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_keys_and_values_apart_in_integers(precision: str, tiny_family: TinyFamily) -> None:
    model = tiny_family("llama, wide sides")
    decoder = build_decoder(model, precision=precision)
    positions = torch.arange(40)
    x = decoder.embed(positions, positions)
    _, expected_key, expected_value = decoder.project(2, x, decoder.rotary(torch.zeros_like(positions), 1))
    key, value = decoder.keys_values(2, x)
    assert torch.allclose(key, expected_key, atol=1e-5)
    assert torch.allclose(value, expected_value, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 5])
def test_a_map_is_affine_in_the_normalised_state(rank: int | None, tiny_family: TinyFamily) -> None:
    decoder = build_decoder(tiny_family("llama"))
    fill = random_fill(decoder, 3, rank=rank)
    x = torch.randn(7, decoder.family.hidden)
    found = fill(x)
    weight = fill.weight[0] if rank is None else fill.weight[0] @ fill.weight[1]
    expected = (x / x.square().mean(-1, keepdim=True).sqrt()).double() @ weight.double() + fill.bias.flatten().double()
    assert found.shape == (7, 3, 2, decoder.family.kv_heads, decoder.family.head_dim)
    assert torch.allclose(found.flatten(1).double(), expected, atol=1e-4)
    assert torch.allclose(fill(3 * x), found, atol=1e-4)  # the length of a state does not matter
    for layer in range(3):
        assert torch.allclose(fill.layer(layer)(x), found[:, layer : layer + 1], atol=1e-5)
    assert (fill.rank, fill.layers) == (rank, 3)
    assert fill.flops == 2 * sum(factor.numel() for factor in fill.weight)


def test_states_of_any_size_are_normalised_in_their_own_dtype() -> None:
    x = torch.tensor([[3.0, 4.0], [300.0, 400.0]], dtype=torch.bfloat16)
    assert normalise(x).dtype == torch.bfloat16
    assert torch.equal(normalise(x)[0], normalise(x)[1])


def test_a_fill_counts_and_is_hashed(tiny_family: TinyFamily) -> None:
    decoder = build_decoder(tiny_family("llama"))
    program = Program.parse("0-3 (4-5)")
    with pytest.raises(MissingFillError, match="this model has: none"):
        decoder.fill((4, 5))
    with pytest.raises(MissingFillError):
        hash_bridges(decoder, [program])
    fill = random_fill(decoder, 2)
    decoder.set_fills({(4, 5): fill})
    assert decoder.fill((4, 5)).digest == fill.digest
    assert decoder.cost.fills == {(4, 5): fill.flops}
    digest = hash_bridges(decoder, [program])
    assert digest
    assert hash_bridges(decoder, [Program.identity(DEPTH)]) == ""
    decoder.set_fills({(4, 5): random_fill(decoder, 2, seed=1)})
    assert hash_bridges(decoder, [program]) != digest
