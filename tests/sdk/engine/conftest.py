"""What tests of compiled layers share: the folder where packages are kept, and passes with known tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch

from polar_sdk.engine.fill import Fill
from polar_sdk.engine.forward import next_logits
from polar_sdk.engine.row import Row
from polar_sdk.programs.program import Program

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.family import Family
    from polar_sdk.programs.cost import Segment


@pytest.fixture(scope="session")
def packages(request: pytest.FixtureRequest) -> Path:
    """A folder in pytest's cache: a package's name covers everything it depends on, so it is compiled once."""
    return request.config.cache.mkdir("compiled") if request.config.cache else pytest.fail("needs pytest's cache")


@pytest.fixture(scope="session")
def random_fill() -> Callable[..., Fill]:
    """Makes a random map over a segment, (family, segment, rank), of the size of real keys and values."""

    def make(family: Family, segment: Segment, rank: int | None = None, seed: int = 0) -> Fill:
        generator = torch.Generator().manual_seed(segment[0] + 100 * seed)
        bias = torch.randn(segment[1] - segment[0] + 1, 2, family.kv_heads, family.head_dim, generator=generator)
        sides = [family.hidden, rank, bias.numel()] if rank else [family.hidden, bias.numel()]
        weight = [torch.randn(a, b, generator=generator) / a**0.5 for a, b in pairwise(sides)]
        return Fill(tuple(weight), bias)

    return make


@pytest.fixture(scope="session")
def logits_of() -> Callable[[Decoder, Sequence[str], Sequence[int], int], torch.Tensor]:
    """Computes the logits of a prefill of these lengths and of decode steps, (1 + steps, B, V)."""

    @torch.inference_mode()
    def run(decoder: Decoder, programs: Sequence[str], lengths: Sequence[int], steps: int) -> torch.Tensor:
        rows = [Row(decoder, Program.parse(text)) for text in programs]
        prompts = [[(7 * place + row) % 256 for place in range(length)] for row, length in enumerate(lengths)]
        following = [[[(step + 3 * row) % 256] for row in range(len(rows))] for step in range(steps)]
        return torch.stack([next_logits(decoder, rows, tokens) for tokens in [prompts, *following]])

    return run
