"""Fixtures for tests of layers: passes with known tokens, and the native library."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from polar_sdk.engine import native as library
from polar_sdk.engine.forward import next_logits
from polar_sdk.engine.native import build
from polar_sdk.engine.row import Row
from polar_sdk.programs.program import Program

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polar_sdk.engine.decoder import Decoder


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


@pytest.fixture(scope="session")
def native() -> None:
    """The library, in this process from now on."""
    if not library._kinds_of_library():
        pytest.skip("there are no kernels for this processor")
    if build.missing():
        build.build_missing()
    assert library.load_library(torch.bfloat16, torch.device("cpu"))
