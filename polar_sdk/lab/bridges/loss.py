"""What distillation makes small: how far a program's predictions are from those of full depth. Knows tensors only.

Three terms, each a mean: the divergence of the token distributions; the difference of the choices' scores, centred per
question, since only differences between choices decide; and, where asked for, the cross-entropy on the right choice.
The last is no distillation: it fits the maps to labels.
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
"""Score difference that counts as one, in nats per character: most decisions are closer than a few of these."""
_TEMPERATURE: Final = 0.3
"""Of the cross-entropy, in nats per character."""


class ChoiceSlots(NamedTuple):
    """Where the choices of a pack are among its predicted tokens; Q questions of at most C choices."""

    slot: Tensor
    """For each predicted token, which entry of (Q × C) it adds to, or the last one for tokens of no choice; (M,)."""
    characters: Tensor
    """Length of each choice, (Q, C); 1 where there is none."""
    valid: Tensor
    """Whether there is a choice, (Q, C)."""
    right: Tensor
    """Index of the right choice, (Q,)."""


class Reference(NamedTuple):
    """What identity says about a pack; M predicted tokens, of which S are compared whole."""

    shown: Tensor
    """Places of those among the M, (S,): a sample gives the same gradient on average, for a fraction of the head."""
    logits: Tensor
    """(S, V)."""
    scores: Tensor | None
    """Of the choices, (Q, C); see `choice_scores`."""


def slots_of(tasks: Sequence[Task], device: torch.device) -> ChoiceSlots | None:
    """The choices of a pack; None where it has no choice question."""
    questions = [task for task in tasks if isinstance(task.item, ChoiceItem)]
    if not questions:
        return None
    most = max(len(task.characters) for task in questions)
    spare, number = len(questions) * most, 0
    slot: list[int] = []
    for task in tasks:
        chosen = isinstance(task.item, ChoiceItem)
        for at, tail in enumerate(task.question.continuations):
            slot += [number * most + at if chosen else spare] * len(tail)
        number += chosen
    rows = [[*task.characters, *[0] * (most - len(task.characters))] for task in questions]
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
        full: What identity says there.
        targets: Those tokens, (M,).
        choices: The pack's choices.
        distil: Weight of the difference of the choices' scores.
        labels: Weight of the cross-entropy on the right choice; 0 looks at no label.
    """
    mine, theirs = ours[full.shown].float().log_softmax(-1), full.logits.float().log_softmax(-1)
    loss = (theirs.exp() * (theirs - mine)).sum(-1).mean()
    if choices is None or full.scores is None:
        return loss
    scores, wanted = choice_scores(ours, targets, choices), _centred(full.scores, choices)
    apart = F.huber_loss(_centred(scores, choices) / _UNIT, wanted / _UNIT, reduction="none")
    loss = loss + distil * apart[choices.valid].mean()
    if labels:
        ruled = scores.masked_fill(~choices.valid, -1e9) / _TEMPERATURE
        loss = loss + labels * F.cross_entropy(ruled, choices.right)
    return loss


def choice_scores(logits: Tensor, targets: Tensor, choices: ChoiceSlots) -> Tensor:
    """Log-likelihood per character of each choice, (Q, C), from logits (M, V) of the tokens (M,)."""
    values = -F.cross_entropy(logits.float(), targets, reduction="none")
    sums = torch.zeros(choices.characters.numel() + 1, device=logits.device).index_add(0, choices.slot, values)
    return sums[:-1].view_as(choices.characters) / choices.characters


def _centred(scores: Tensor, choices: ChoiceSlots) -> Tensor:
    kept = scores * choices.valid
    return (scores - kept.sum(1, keepdim=True) / choices.valid.sum(1, keepdim=True)) * choices.valid
