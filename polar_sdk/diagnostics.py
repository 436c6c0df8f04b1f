"""What a model says about texts and programs without answering: scores, hidden states, scans. None of it is metered.

The part of `PolarModel` that calibration, routers and evaluation use. Knows programs and texts, no requests of tenants,
no tiers and no sinks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch

from polar_sdk.engine.scoring import Question, score_programs, states_after
from polar_sdk.errors import ContextWindowError, InvalidRequestError, ProgramDepthError
from polar_sdk.programs.program import Program

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.lab.items import Item as CalibrationItem
    from polar_sdk.lab.layer_scan import ScanReport
    from polar_sdk.model import PolarModel
    from polar_sdk.models.load import LoadedModel
    from polar_sdk.programs.policy import Policy
    from polar_sdk.request.prompts import PromptEncoder, Template
    from polar_sdk.request.request import Prompt


Pool = Literal["mean", "last", "none"]
"""What becomes of the states of a prompt's tokens: their mean, the last one, or all of them."""


class Diagnostics:
    """Scores, hidden states and scans over the weights of a `PolarModel`."""

    policy: Policy
    _loaded: LoadedModel
    _encoder: PromptEncoder

    def score(
        self, prompt: str, continuations: Sequence[str], *, program: Program | str | None = None
    ) -> tuple[float, ...]:
        """Log-likelihood of each continuation after a plain-text prompt, in nats, summed over its tokens.

        A diagnostic for choosing programs: it is not metered and takes no tier. Many at once are faster: `score_batch`.

        Args:
            prompt: Text before the continuations, no template applied.
            continuations: Texts to compare, each at least one token.
            program: What runs; None = identity.

        Raises:
            As `score_batch`.
        """
        return self.score_batch([(prompt, continuations)], [program])[0][0]

    def score_batch(
        self,
        questions: Sequence[tuple[str, Sequence[str]]],
        programs: Sequence[Program | str | None] = (None,),
    ) -> list[list[tuple[float, ...]]]:
        """Log-likelihoods of continuations of many prompts under many programs, in nats, summed over tokens.

        Questions run packed; a prompt runs once however many continuations it has, and visits that programs share at
        their start run once. Not metered.

        Args:
            questions: (prompt, continuations) pairs of plain texts, no template applied; each continuation has at
                least one token.
            programs: What runs; None = identity.

        Returns:
            For each program, for each question, one log-likelihood per continuation, in the orders given.

        Raises:
            InvalidRequestError: A continuation without a token.
            EmptyPromptError: A prompt without text.
            ContextWindowError: A prompt and a continuation do not fit the model.
            ProgramError: A program cannot or may not run.
        """
        chosen = [self._chosen(program) for program in programs]
        asked = [self._question(prompt, continuations) for prompt, continuations in questions]
        scores = score_programs(self._loaded.decoder, asked, chosen)
        return [[score.loglikelihoods for score in scores[program]] for program in chosen]

    @overload
    def hidden_states(
        self,
        prompts: Sequence[Prompt],
        layer: int,
        pool: Literal["mean", "last"] = "mean",
        program: Program | str | None = None,
        *,
        template: Template = "auto",
    ) -> Tensor: ...

    @overload
    def hidden_states(
        self,
        prompts: Sequence[Prompt],
        layer: int,
        pool: Literal["none"],
        program: Program | str | None = None,
        *,
        template: Template = "auto",
    ) -> list[Tensor]: ...

    def hidden_states(
        self,
        prompts: Sequence[Prompt],
        layer: int,
        pool: Pool = "mean",
        program: Program | str | None = None,
        *,
        template: Template = "auto",
    ) -> Tensor | list[Tensor]:
        """Hidden states of prompts after the first layers, before any final norm; for example what a router reads.

        Only those layers run. Not metered.

        Args:
            prompts: Texts or message lists, B of them.
            layer: Layers that run, 0 to D; 0 = the embeddings of the input. Under a program, that many of its steps.
            pool: `mean` over the tokens of a prompt, its `last` token, or `none`.
            program: Whose steps run; None = identity.
            template: As in `RequestOptions`.

        Returns:
            Float32 on the model's first device: (B, E) pooled, or with `none` one tensor (T, E) per prompt of T tokens.

        Raises:
            InvalidRequestError: Or one of its kinds: an empty prompt, one longer than the context window, no such pool.
            ProgramError: No such layer, or the program cannot or may not run.
        """
        if pool not in ("mean", "last", "none"):
            raise InvalidRequestError(f"pool={pool!r} is unknown; use 'mean', 'last' or 'none'.")
        steps = self._chosen(program).steps
        if not 0 <= layer <= len(steps):
            raise ProgramDepthError(f"layer={layer} is out of range; the program has {len(steps)} steps: use 0 to it.")
        asked = [tuple(self._encoder.encode(prompt, template)) for prompt in prompts]
        self._check_window(asked)
        decoder = self._loaded.decoder
        states = [state.to(decoder.device) for state in states_after(decoder, asked, steps[:layer])]
        if pool == "none":
            return [tokens.float() for tokens in states]
        pooled = [tokens.float().mean(0) if pool == "mean" else tokens[-1].float() for tokens in states]
        return torch.stack(pooled) if pooled else torch.empty((0, decoder.family.hidden), device=decoder.device)

    def scan(self, items: Sequence[CalibrationItem] | None = None, **options: Any) -> ScanReport:
        """Measure which layers this model can do without; see `lab.layer_scan.Scanner`.

        Args:
            items: Calibration items; None = the prompts that come with the package.
            **options: `lengths`, `loops` and `removals` of `Scanner.scan`.
        """
        from polar_sdk.lab.items import builtin_items
        from polar_sdk.lab.layer_scan import Scanner

        return Scanner(cast("PolarModel", self), builtin_items() if items is None else items).scan(**options)

    def _chosen(self, program: Program | str | None) -> Program:
        """A program that may run; None = identity."""
        decoder = self._loaded.decoder
        chosen = Program.identity(decoder.depth) if program is None else Program.of(program)
        self.policy.check(chosen, decoder.cost)
        return chosen

    def _question(self, prompt: str, continuations: Sequence[str]) -> Question:
        encode = self._loaded.tokenizer.encode
        tails = tuple(tuple(encode(text, add_special_tokens=False)) for text in continuations)
        if not all(tails):
            raise InvalidRequestError("a continuation is empty; give each at least one token of text.")
        question = Question(tuple(self._encoder.encode(prompt, "raw")), tails)
        longest = len(question.prompt) + max(map(len, tails), default=0)
        if longest > (window := self._loaded.decoder.context_window):
            raise ContextWindowError(
                f"the prompt and its longest continuation have {longest} tokens; the context window is {window}: "
                "shorten them."
            )
        return question

    def _check_window(self, prompts: Sequence[Sequence[int]]) -> None:
        window = self._loaded.decoder.context_window
        if (longest := max(map(len, prompts), default=0)) > window:
            raise ContextWindowError(f"a prompt has {longest} tokens; the context window is {window}: shorten it.")
