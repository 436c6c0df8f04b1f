"""A sample of prompts answered freely by every tier, and how far each tier's predictions are from identity's.

Knows a model and a router; what the answers are worth, `texts` knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from polar_sdk.lab.evaluation.texts import Answer, FreeFigures, free_figures
from polar_sdk.lab.healing.bridge_fit import make_packs
from polar_sdk.lab.items import AnswerItem, ChoiceItem
from polar_sdk.lab.rewards.tasks import ANSWER_TOKENS, BATCH
from polar_sdk.programs.program import Program
from polar_sdk.router.base import IdentityRouter
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_sdk.lab.healing.bridge_fit import Pack
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.model import PolarModel
    from polar_sdk.router.base import Router
    from polar_sdk.router.learned import LearnedRouter


_PACK_TOKENS = 2048
"""Maximum tokens that are compared together: their logits are held twice."""


@dataclass(frozen=True)
class FreeRunner:
    """Lets tiers write.

    Attributes:
        model: The model.
        router: Bound to it.
        on_progress: Called with (stage, tiers done, tiers in all).
    """

    model: PolarModel
    router: LearnedRouter
    on_progress: Progress = silent

    def figures(self, tasks: Sequence[Task], thetas: Mapping[str, float]) -> dict[str, FreeFigures]:
        """Figures of each tier.

        Args:
            tasks: Prompts that are answered in text, at least one.
            thetas: θ by tier.
        """
        identity = self._written(tasks, IdentityRouter(self.model.depth))
        gold = {place: task.item.answer for place, task in enumerate(tasks) if isinstance(task.item, AnswerItem)}
        features = self.router.reader.stack([task.question.prompt for task in tasks])
        outputs = self.router.outputs(features)
        found = {}
        for done, (tier, theta) in enumerate(thetas.items()):
            self.on_progress("writing freely", done, len(thetas))
            ours = identity if theta == 0 else self._written(tasks, self.router.at(theta))
            programs = [self.router.programs[0]] * len(tasks)
            if theta:
                lengths = [len(task.question.prompt) for task in tasks]
                programs = self.router.choose_all(outputs, theta, lengths)
            found[tier] = free_figures(ours, identity, gold, self._divergence(tasks, programs))
        return found

    def _written(self, tasks: Sequence[Task], router: Router) -> list[Answer]:
        prompts = [task.item.prompt for task in tasks if not isinstance(task.item, ChoiceItem)]
        answers = [
            answer
            for start in range(0, len(prompts), BATCH)
            for answer in self.model.greedy_answers(
                prompts[start : start + BATCH], max_tokens=ANSWER_TOKENS, router=router
            )
        ]
        return [Answer(tokens, self.model.decode(tokens)) for tokens in answers]

    @torch.inference_mode()
    def _divergence(self, tasks: Sequence[Task], programs: Sequence[Program]) -> float:
        """Mean over all tokens of identity's answers of KL(identity ‖ program), in nats."""
        decoder = self.model.decoder
        identity = Program.identity(decoder.depth)
        total, count = 0.0, 0
        for program in dict.fromkeys(programs):
            chosen = [task for task, other in zip(tasks, programs, strict=True) if other == program]
            for pack in make_packs(decoder, chosen, _PACK_TOKENS):
                count += len(pack.targets)
                total += 0.0 if program == identity else self._pack_divergence(pack, program, identity)
        return total / count

    def _pack_divergence(self, pack: Pack, program: Program, identity: Program) -> float:
        decoder = self.model.decoder
        full, ours = (
            decoder.head(pack.run(decoder, pack.packed.embedded, steps)[pack.sources]).log_softmax(-1)
            for steps in (identity.steps, program.steps)
        )
        return float((full.exp() * (full - ours)).sum())
