"""The loss of distillation: how far a program's predictions are from those of full depth. Knows tensors only.

Its terms are means: the divergence of the token distributions; the error of the last states; the difference between
the choices' scores, centred per question, since only differences between choices matter; and the cross-entropy on the
right choice. The last is not distillation: it fits the maps to labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from polar_sdk.lab.items import ChoiceItem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.lab.rewards.tasks import Task


_UNIT: Final = 0.1
"""Score difference that counts as 1, in nats per character: most decisions are closer than a few of these."""
_TEMPERATURE: Final = 0.3
"""Temperature of the cross-entropy, in nats per character."""


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms.

    Attributes:
        temperature: T at which token distributions are compared; their divergence counts T² times.
        hidden: Weight of the squared error of the last states, over their mean square (SwiftKV, arXiv 2410.03960).
        choices: Weight of the difference between the choices' scores.
        labels: Weight of the cross-entropy on the right choice; 0 uses no label.
    """

    temperature: float = 1.0
    hidden: float = 0.0
    choices: float = 0.0
    labels: float = 0.0


class ChoiceSlots(NamedTuple):
    """Which of a pack's predicted tokens belong to which choice; Q questions of at most C choices."""

    slot: Tensor
    """For each predicted token, the entry of (Q × C) that it adds to; Q × C for tokens of no choice, (M,)."""
    characters: Tensor
    """Length of each choice, (Q, C); 1 where there is none."""
    valid: Tensor
    """Whether there is a choice, (Q, C)."""
    right: Tensor
    """Index of the right choice, (Q,)."""


class Predictions(NamedTuple):
    """Predictions of one program, or of identity, for a pack of M predicted tokens.

    Distributions are compared at a sample of S of them, which gives the same gradient on average, for a fraction of the
    head's cost.
    """

    logits: Tensor
    """Logits of the sample, (S, V)."""
    states: Tensor
    """The last states, (M, E)."""
    scores: Tensor | None = None
    """Scores of the choices, (Q, C), where there are some; see `choice_scores`."""


def slots_of(tasks: Sequence[Task], device: torch.device) -> ChoiceSlots | None:
    """The choices of a pack; None where it has no choice question."""
    questions = [task for task in tasks if isinstance(task.item, ChoiceItem)]
    if not questions:
        return None
    width = max(len(task.characters) for task in questions)
    spare, row = len(questions) * width, 0
    slot: list[int] = []
    for task in tasks:
        is_choice = isinstance(task.item, ChoiceItem)
        for column, tail in enumerate(task.question.continuations):
            slot += [row * width + column if is_choice else spare] * len(tail)
        row += is_choice
    rows = [[*task.characters, *[0] * (width - len(task.characters))] for task in questions]
    characters = torch.tensor(rows, dtype=torch.float32, device=device)
    right = [task.item.answer for task in questions if isinstance(task.item, ChoiceItem)]
    return ChoiceSlots(
        torch.tensor(slot, device=device), characters.clamp(min=1), characters > 0, torch.tensor(right, device=device)
    )


def loss_of(ours: Predictions, full: Predictions, choices: ChoiceSlots | None, weights: LossWeights) -> Tensor:
    """The loss of one pack under a program, a scalar.

    Args:
        ours: The program's predictions.
        full: Identity's.
        choices: The pack's choices.
        weights: Weights of the terms.
    """
    heat = weights.temperature
    ours_log, full_log = (logits.float().div(heat).log_softmax(-1) for logits in (ours.logits, full.logits))
    loss = heat**2 * (full_log.exp() * (full_log - ours_log)).sum(-1).mean()
    if weights.hidden:
        states = full.states.float()
        loss = loss + weights.hidden * ((ours.states.float() - states).square().mean() / states.square().mean())
    if choices is None or ours.scores is None or full.scores is None:
        return loss
    scores, reference = _centred(ours.scores, choices), _centred(full.scores, choices)
    difference = F.huber_loss(scores / _UNIT, reference / _UNIT, reduction="none")
    loss = loss + weights.choices * difference[choices.valid].mean()
    if weights.labels:
        logits = ours.scores.masked_fill(~choices.valid, -1e9) / _TEMPERATURE
        loss = loss + weights.labels * F.cross_entropy(logits, choices.right)
    return loss


def choice_scores(logits: Tensor, targets: Tensor, choices: ChoiceSlots) -> Tensor:
    """Log-likelihood per character of each choice, (Q, C), from logits (M, V) of the tokens (M,)."""
    values = -F.cross_entropy(logits.float(), targets, reduction="none")
    sums = torch.zeros(choices.characters.numel() + 1, device=logits.device).index_add(0, choices.slot, values)
    return sums[:-1].view_as(choices.characters) / choices.characters


def _centred(scores: Tensor, choices: ChoiceSlots) -> Tensor:
    kept = scores * choices.valid
    return (scores - kept.sum(1, keepdim=True) / choices.valid.sum(1, keepdim=True)) * choices.valid
