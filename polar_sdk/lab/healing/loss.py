"""The loss of distillation: how far a program's predictions are from those of full depth. Knows tensors only.

It has three terms, each a mean: the divergence of the token distributions; the difference between the choices' scores,
centred per question, since only differences between choices matter; and optionally the cross-entropy on the right
choice. The last is not distillation: it fits the maps to labels.
"""

from __future__ import annotations

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


_SOFTENING: Final = 2.0
"""Temperature at which token distributions are compared where fills are trained."""


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


class Reference(NamedTuple):
    """Identity's predictions for a pack: M predicted tokens, whose distributions are compared at a sample of S.

    A sample gives the same gradient on average, for a fraction of the head's cost.
    """

    sampled: Tensor
    """Rows of the sample among the M, (S,)."""
    logits: Tensor
    """(S, V)."""
    scores: Tensor | None
    """Of the choices, (Q, C); see `choice_scores`."""


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


def loss_of(
    ours: Tensor, full: Reference, targets: Tensor, choices: ChoiceSlots | None, *, distil: float, labels: float
) -> Tensor:
    """The loss of one pack, a scalar.

    Args:
        ours: Logits of the program where a continuation's token is predicted, (M, V).
        full: Identity's predictions there.
        targets: Those tokens, (M,).
        choices: The pack's choices.
        distil: Weight of the difference between the choices' scores.
        labels: Weight of the cross-entropy on the right choice; 0 uses no label.
    """
    ours_log, full_log = ours[full.sampled].float().log_softmax(-1), full.logits.float().log_softmax(-1)
    loss = (full_log.exp() * (full_log - ours_log)).sum(-1).mean()
    if choices is None or full.scores is None:
        return loss
    scores, reference = choice_scores(ours, targets, choices), _centred(full.scores, choices)
    difference = F.huber_loss(_centred(scores, choices) / _UNIT, reference / _UNIT, reduction="none")
    loss = loss + distil * difference[choices.valid].mean()
    if labels:
        logits = scores.masked_fill(~choices.valid, -1e9) / _TEMPERATURE
        loss = loss + labels * F.cross_entropy(logits, choices.right)
    return loss


def fill_loss(ours: Tensor, full: Tensor, states: Tensor, reference: Tensor, *, hidden: float) -> Tensor:
    """The loss of one pack under a filled program, a scalar, after SwiftKV (arXiv 2410.03960).

    It is T² times the divergence at temperature T = 2, and the squared error of the last states over their mean square.

    Args:
        ours: Logits of the program at a sample of the predicted tokens, (S, V).
        full: Identity's logits there.
        states: The program's last states where it predicts, (M, E).
        reference: Identity's.
        hidden: Weight of the states' error.
    """
    ours_log, full_log = (logits.float().div(_SOFTENING).log_softmax(-1) for logits in (ours, full))
    divergence = (full_log.exp() * (full_log - ours_log)).sum(-1).mean()
    error = (states.float() - reference.float()).square().mean() / reference.float().square().mean()
    return _SOFTENING**2 * divergence + hidden * error


def choice_scores(logits: Tensor, targets: Tensor, choices: ChoiceSlots) -> Tensor:
    """Log-likelihood per character of each choice, (Q, C), from logits (M, V) of the tokens (M,)."""
    values = -F.cross_entropy(logits.float(), targets, reduction="none")
    sums = torch.zeros(choices.characters.numel() + 1, device=logits.device).index_add(0, choices.slot, values)
    return sums[:-1].view_as(choices.characters) / choices.characters


def _centred(scores: Tensor, choices: ChoiceSlots) -> Tensor:
    kept = scores * choices.valid
    return (scores - kept.sum(1, keepdim=True) / choices.valid.sum(1, keepdim=True)) * choices.valid
