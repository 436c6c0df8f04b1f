"""Scores and hidden states of texts, for choosing programs and for routers: from texts to tokens, with checks.

The engine computes (`polar_sdk.engine.scoring`); nothing here is routed, admitted or metered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from polar_sdk.engine.pack import Question
from polar_sdk.engine.scoring import score_programs, states_after
from polar_sdk.errors import ContextWindowError, InvalidRequestError, ProgramDepthError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.programs.program import Program
    from polar_sdk.request.encoder import PromptEncoder
    from polar_sdk.request.options import Prompt, Template


Pool = Literal["mean", "last", "none"]
"""How the states of a prompt's tokens are returned: their mean, the last one, or all of them."""


def loglikelihoods(
    decoder: Decoder,
    encoder: PromptEncoder,
    questions: Sequence[tuple[str, Sequence[str]]],
    programs: Sequence[Program],
) -> list[list[tuple[float, ...]]]:
    """As `PolarModel.score_batch`, for programs that may run."""
    encoded = [_question(decoder, encoder, prompt, continuations) for prompt, continuations in questions]
    scores = score_programs(decoder, encoded, programs)
    return [[score.loglikelihoods for score in scores[program]] for program in programs]


def hidden_states(
    decoder: Decoder,
    encoder: PromptEncoder,
    prompts: Sequence[Prompt],
    layer: int,
    pool: Pool,
    program: Program,
    template: Template,
) -> Tensor | list[Tensor]:
    """As `PolarModel.hidden_states`, for a program that may run."""
    if pool not in ("mean", "last", "none"):
        raise InvalidRequestError(f"pool={pool!r} is unknown; use 'mean', 'last' or 'none'.")
    steps = program.steps
    if not 0 <= layer <= len(steps):
        raise ProgramDepthError(f"layer={layer} is out of range; the program has {len(steps)} steps: use 0 to it.")
    encoded = [tuple(encoder.encode(prompt, template)) for prompt in prompts]
    if (longest := max(map(len, encoded), default=0)) > decoder.context_window:
        raise ContextWindowError(
            f"a prompt has {longest} tokens; the context window is {decoder.context_window}: shorten the prompt."
        )
    states = [state.to(decoder.device) for state in states_after(decoder, encoded, steps[:layer])]
    if pool == "none":
        return [tokens.float() for tokens in states]
    pooled = [tokens.float().mean(0) if pool == "mean" else tokens[-1].float() for tokens in states]
    return torch.stack(pooled) if pooled else torch.empty((0, decoder.family.hidden), device=decoder.device)


def _question(decoder: Decoder, encoder: PromptEncoder, prompt: str, continuations: Sequence[str]) -> Question:
    tails = tuple(tuple(encoder.plain(text)) for text in continuations)
    if not all(tails):
        raise InvalidRequestError("a continuation is empty; give each at least one token of text.")
    question = Question(tuple(encoder.encode(prompt, "raw")), tails)
    if question.longest > decoder.context_window:
        raise ContextWindowError(
            f"the prompt and its longest continuation have {question.longest} tokens; the context window is "
            f"{decoder.context_window}: shorten them."
        )
    return question
