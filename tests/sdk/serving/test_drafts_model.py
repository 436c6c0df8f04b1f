"""Drafts of the default model: the same answers, or a tie within rounding, in fewer passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from polar_sdk import PolarModel, Program
from polar_sdk.engine.forward import next_logits
from polar_sdk.engine.row import Row

if TYPE_CHECKING:
    from polar_sdk.request.generation import Generation

pytestmark = pytest.mark.model

TEXT = (
    "The lighthouse on Gull Point was built in 1871. In 1961 the lamp was connected to the mains, and the last keeper, "
    "Thomas Hale, moved to the mainland. Today the lighthouse is open to visitors from April to October."
)
PROMPTS = [f"Repeat this text word for word:\n\n{TEXT}", f"Summarize in one sentence: {TEXT}", "What is a tide?"]
TIE = 0.5
"""Logits of bfloat16 that differ by less are within what passes of different sizes round differently."""


def _gap(model: PolarModel, plain: Generation, drafted: Generation) -> float:
    """How far apart the two tokens are that the answers differ in first, computed one token at a time."""
    place = next(
        n for n, pair in enumerate(zip(plain.token_ids, drafted.token_ids, strict=False)) if len(set(pair)) > 1
    )
    row = Row(model.decoder, Program.identity(model.depth), prompt=len(plain.prompt_ids))
    with torch.inference_mode():
        logits = next_logits(model.decoder, [row], [plain.prompt_ids])
        for token in plain.token_ids[:place]:
            logits = next_logits(model.decoder, [row], [[token]])
    return float(logits[0, plain.token_ids[place]] - logits[0, drafted.token_ids[place]])


def test_answers_are_the_same_or_tied() -> None:
    model = PolarModel.from_pretrained(ledger=None)
    accepted = 0
    for prompt in PROMPTS:
        options = {"max_tokens": 40, "program": Program.identity(model.depth)}
        plain = model.generate(prompt, tenant="plain", **options)  # type: ignore[arg-type]
        drafted = model.generate(prompt, tenant="drafted", speculate="prompt", **options)  # type: ignore[arg-type]
        if drafted.token_ids == plain.token_ids:
            assert drafted.usage.flops.total == plain.usage.flops.total
        else:
            assert _gap(model, plain, drafted) < TIE
        accepted += drafted.usage.tokens.accepted
    assert accepted > 20
