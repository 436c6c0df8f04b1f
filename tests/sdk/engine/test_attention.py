"""Attention by torch's operations: in bfloat16 as in double precision, but for rounding."""

from __future__ import annotations

import pytest
import torch

from polar_sdk.engine import native
from polar_sdk.engine.attention import attend_row
from polar_sdk.engine.types import AttentionKind


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("kind", [AttentionKind(0.25), AttentionKind(0.25, window=9), AttentionKind(0.25, softcap=3.0)])
@pytest.mark.parametrize(("tokens", "before"), [(5, 0), (150, 0), (150, 40)])
def test_a_prompt_attends_as_in_double_precision(
    tokens: int, before: int, kind: AttentionKind, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "has_tiles", lambda: tiles)
    dice = torch.Generator().manual_seed(tokens)
    query, keys, values = (
        torch.randn(*shape, 32, generator=dice).bfloat16()
        for shape in ((tokens, 6), (2, before + tokens), (2, before + tokens))
    )
    expected = attend_row(query.double(), keys.double(), values.double(), kind)
    assert torch.allclose(attend_row(query, keys, values, kind).double(), expected, atol=0.05)
