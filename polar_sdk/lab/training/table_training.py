"""A table of programs by kind of prompt, as a network that recognises the kinds.

A prompt shows what is asked of it, and so how often a program loses the answers to such prompts; whether it loses this
one, it hardly shows. A network that learns losses prompt by prompt, from a few hundred, takes chance for knowledge: it
saves a little more on kinds that it was trained on, and breaks promises on others. A table gives all prompts of a kind
the same outputs, and those of no kind that it knows the outputs of the largest one. That an
answer is one of given choices is told by the request: choices have outputs of their own, and those of a recognised kind
as much less than these as its texts have less than others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F  # noqa: N812

from polar_sdk.lab.training.examples import losses
from polar_sdk.lab.training.outcomes import grouped
from polar_sdk.router.certificate import form_of
from polar_sdk.router.exact_tests import upper_loss
from polar_sdk.router.network import Network

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.lab.program_search.matrix import RewardMatrix
    from polar_sdk.router.certificate import Loss

_PENALTY: Final = 1.0
"""Of a recogniser's squared weights, over the number of prompts. From 0.01 to 10, no more than a few of a hundred
prompts are told otherwise."""
_WIDTH: Final = 2.0
"""Log-odds from "surely another kind" to "surely this kind"; between them outputs change steadily."""
_WORDING: Final = 0.1
"""Weight of a wording beside a prompt. With 1, a recogniser takes 7% of other texts for decisions, and not 4%, to find
87 of 100 decisions in new wordings, and not 83."""
_DOUBT: Final = 0.1
"""Probability that a kind loses more than its row says."""
_STEP: Final = 1e-4
"""Least difference between the losses of two programs."""
_SURE: Final = 1e-4
"""Least share of answers that may be lost or kept."""


def losses_by_kind(matrix: RewardMatrix, kinds: Sequence[str], loss: Loss, strict: float = 0.0) -> dict[str, Tensor]:
    """Per kind, the share of its prompts that each program loses, (M,); the largest kind is the first.

    It is the share that a program loses at most, less what it gains, with 90% confidence, so that few prompts prove
    little: of a kind with 33 prompts that lose none, 6.7% may be lost. With `strict`, as much as that of the share of
    answers in text that keep less than 95% of their tokens is lost. A program loses no less than one that runs more
    layers, though a few prompts may say so; one for another form of answers loses all.
    """
    lost = losses(matrix, loss)
    partly = losses(matrix, "strict") * torch.tensor([[float(kind != "choice")] for kind in matrix.kinds])
    found = {}
    for kind, rows in sorted(grouped(range(len(matrix)), kinds.__getitem__).items(), key=lambda each: -len(each[1])):
        counts = zip((lost[rows] > 0).sum(0).tolist(), (lost[rows] < 0).sum(0).tolist(), strict=True)
        own = torch.tensor([upper_loss(worse, better, len(rows), _DOUBT) for worse, better in counts])
        own = torch.maximum(own, strict * partly[rows].mean(0)) if strict else own
        flops = matrix.flops[rows].double().sum(0)
        measured = matrix.measured_on({form_of(matrix.kinds[row]) for row in rows})
        deepest_first = sorted(measured, key=lambda column: -float(flops[column]))
        found[kind] = torch.ones_like(own)
        found[kind][deepest_first] = own[deepest_first].cummax(0).values
    return found


def fit_table(
    matrix: RewardMatrix,
    features: Tensor,
    kinds: Sequence[str],
    loss: Loss,
    *,
    wordings: int = 0,
    strict: float = 0.0,
    least: float = 0.0,
    most: float = 1.0,
) -> Network:
    """A network whose outputs are logits of "nothing is lost", the same for all prompts of a kind.

    Args:
        matrix: P prompts and M programs; column 0 is identity.
        features: Of these prompts, and of others that only show what a kind looks like, (Q, F).
        kinds: Of each of them, Q.
        loss: See `Loss`.
        wordings: Number of the last of them that only show by which words kinds are told, and not how prompts spread.
        strict: See `losses_by_kind`.
        least: The smallest possible loss; see `Examples`.
        most: See `MenuSettings`.
    """
    table = losses_by_kind(matrix, kinds[: len(matrix)], loss, strict)
    told = [kind for kind in table if kind != "choice"][1:]
    table |= {kind: table[kind].where(table[kind] <= most, 1.0) for kind in told}
    for kind in table:  # a certificate goes from one program to the next, and must not pass two in one step
        own = [row for row, each in enumerate(kinds[: len(matrix)]) if each == kind]
        table[kind] = table[kind] + _STEP * matrix.flops[own].sum(0).argsort(descending=True).argsort()
    rows = {kind: ((1 - lost[1:]) / (1 - least)).clamp(_SURE, 1 - _SURE).logit() for kind, lost in table.items()}
    choosing = rows.pop("choice") if len(rows) > 1 and "choice" in rows else None
    usual, *others = rows
    network = Network.fresh(
        features[: len(features) - wordings], (2 * len(others),) if others else (), len(rows[usual]), seed=0
    )
    network.biases[-1].copy_(rows[usual])
    standardised = (features - network.mean) * network.scale
    weights = torch.ones(len(features))
    weights[len(features) - wordings :] = _WORDING
    for place, kind in enumerate(others):
        towards, bias = _recogniser(standardised, torch.tensor([name == kind for name in kinds]), weights)
        # relu(x) − relu(x − 1) rises from 0 to 1 with the log-odds of the kind
        for unit, (edge, sign) in enumerate(((0.5, 1), (-0.5, -1)), 2 * place):
            network.weights[0][unit], network.biases[0][unit] = towards / _WIDTH, bias / _WIDTH + edge
            network.weights[1][:, unit] = sign * (rows[kind] - rows[usual])
    return network if choosing is None else replace(network, choosing=choosing - rows[usual])


@torch.enable_grad()
def _recogniser(features: Tensor, known: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and bias of log-odds that tell some rows from the others, both sides weighted alike.

    Logistic regression with a penalty on squared weights. Rows of a side weigh as given.
    """
    sides = known.float()
    share = (sides * rows).sum() / rows.sum()
    counts = (sides * share + (1 - sides) * (1 - share)) * rows.mean() / rows
    weights = torch.zeros(features.shape[1], requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        odds = features @ weights + bias
        loss = F.binary_cross_entropy_with_logits(odds, sides, weight=0.5 / counts)
        loss = loss + _PENALTY * weights.square().sum() / len(features)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach(), bias.detach()[0]
