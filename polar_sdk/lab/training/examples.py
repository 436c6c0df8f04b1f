"""Examples that a router learns from: features of prompts, and the outcome of every program of a menu on them.

Pure tensors, taken from a `RewardMatrix`. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from polar_sdk.errors import DataError
from polar_sdk.lab.training.outcomes import MIN_CLASS, by_class, classes_of, grouped
from polar_sdk.promises.losses import SAME_ANSWER, STRICT_ANSWER
from polar_sdk.router.certificate import FORMS, form_of
from polar_sdk.router.menu import needed_theta

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.lab.program_search.matrix import RewardMatrix
    from polar_sdk.router.certificate import Loss
    from polar_sdk.router.menu import Pricing


_BLUR: Final = 0.05
"""Width, as a share of an answer's tokens, over which it turns from kept to lost."""
_STRICT_BLUR: Final = 0.015
"""The same where a promise is strict."""


def losses(matrix: RewardMatrix, loss: Loss) -> Tensor:
    """(P, M) float32: 1 where a prompt is lost against identity under a program, −1 where it is gained; see `Loss`."""
    differs = (~matrix.agree).float()
    if loss == "differs":
        return differs
    if loss == "strict":
        return (matrix.share < STRICT_ANSWER).float()
    drops = matrix.right[:, :1].float() - matrix.right.float()
    drops = torch.where(matrix.labelled.unsqueeze(1), drops, differs)
    return drops.clamp(min=0) if loss == "harms" else drops


def kinds_of(matrix: RewardMatrix) -> list[str]:
    """The kind of each prompt for which a promise must hold: its class, where that is large enough, or what it is.

    Of a wide class and a narrow one (see `classes_of`) it is the wide one.
    """
    sizes = {name: len(rows) for name, rows in by_class(range(len(matrix)), matrix.classes).items()}
    return [
        next((each for each in classes_of(name) if sizes[each] >= MIN_CLASS), kind)
        for name, kind in zip(matrix.classes, matrix.kinds, strict=True)
    ]


def harder_kinds(matrix: RewardMatrix) -> list[str]:
    """Of the classes of texts that are too small to be kinds, those that lose most, with up to half of their prompts.

    A promise that holds for these holds for every mix of the classes in which none is more than twice as common.
    """
    texts = matrix.rows([row for row, kind in enumerate(matrix.kinds) if kind != "choice"])
    if not len(texts):
        return []
    lost = losses(texts, "strict")[:, texts.measured_on({"text"})].mean(1)
    small = [row for row, kind in enumerate(kinds_of(texts)) if kind == texts.kinds[row] and texts.classes[row]]
    classes = grouped(small, texts.classes.__getitem__)
    harder, left = [], len(small) // 2
    for name in sorted(classes, key=lambda name: (-float(lost[classes[name]].mean()), name)):
        if (left := left - len(classes[name])) < 0:
            break
        harder.append(name)
    return sorted(harder)


def learned_losses(matrix: RewardMatrix, loss: Loss, *, strict: float = 0.0) -> Tensor:
    """(P, M) float32: the losses that a router learns from, which hold less chance than `losses`.

    A prompt does not show whether a program happens to turn this wrong answer right or this right answer wrong, only
    how often it does so. So for `drops` every labelled prompt has its program's mean drop. And an answer in text that
    falls one token short of being the same is less lost than one of which nothing is kept. With `strict`, an answer in
    text is that much lost where less than 95% of its tokens are kept, whatever the loss.
    """
    learned = losses(matrix, loss)
    written = torch.tensor([kind != "choice" for kind in matrix.kinds])
    if loss in ("harms", "drops"):
        written &= ~matrix.labelled
    is_strict = strict > 0 or loss == "strict"
    edge, blur = (STRICT_ANSWER, _STRICT_BLUR) if is_strict else (SAME_ANSWER, _BLUR)
    learned[written, 1:] = torch.sigmoid((edge - matrix.share[written, 1:]) / blur)
    if strict:
        learned[written] *= strict
    known = matrix.labelled
    if loss != "drops" or not bool(known.any()):
        return learned
    for form in FORMS:
        rows = known & torch.tensor([form_of(kind) == form for kind in matrix.kinds])
        learned[rows] = learned[rows].mean(0)
    return learned


@dataclass(frozen=True, eq=False)
class Examples:
    """P prompts, M programs; column 0 is identity.

    Attributes:
        features: (P, F) float32.
        lost: (P, M) float32, from `least` to 1; see `learned_losses`.
        margin: (P, M) float32; what the target `gap` regresses on.
        flops: (P, M) float64, without the router's own.
        kinds: (P,) index of each prompt's kind: a promise holds for each kind alike, and so must a decision.
        costs: (P, M) FLOPs of each program over identity's that a decision compares; see `router.menu.Pricing`.
        favour: (P, M − 1) what a loss counts; None = as it is.
        least: The smallest possible loss: −1 for `drops`, else 0.
        par: See `router.menu.Pricing`.
    """

    features: Tensor
    lost: Tensor
    margin: Tensor
    flops: Tensor
    kinds: Tensor
    costs: Tensor
    favour: Tensor | None = None
    least: float = 0.0
    par: float = 1.0

    @classmethod
    def of(
        cls,
        matrix: RewardMatrix,
        features: Tensor,
        loss: Loss,
        pricing: Pricing,
        *,
        strict: float = 0.0,
    ) -> Examples:
        """Examples of the rows of a matrix; for the loss `harms`, of those whose answer is known.

        Args:
            matrix: Of P prompts and M programs.
            features: (P, F).
            loss: See `Loss`.
            pricing: Of the matrix's programs.
            strict: See `learned_losses`.

        Raises:
            DataError: No row has an answer, and the loss needs answers.
        """
        flops = matrix.flops.double()
        keep = matrix.labelled if loss == "harms" else torch.ones(len(matrix), dtype=torch.bool)
        if loss != "differs" and not bool(matrix.labelled.any()):
            raise DataError(
                f"the loss {loss!r} needs prompts with answers, but none has one; use 'differs', or give answers."
            )
        least = -1.0 if loss == "drops" else 0.0
        names = sorted(set(matrix.kinds))
        kinds = torch.tensor([names.index(kind) for kind in matrix.kinds])
        lost = learned_losses(matrix, loss, strict=strict)
        lengths = [len(tokens) for tokens, kept in zip(matrix.tokens, keep.tolist(), strict=True) if kept]
        favour = pricing.favour(lengths) if pricing.own_length else None
        costs = pricing.costs(lengths)
        return cls(
            features[keep], lost[keep], matrix.margin[keep], flops[keep], kinds[keep], costs, favour, least, pricing.par
        )

    def rows(self, keep: Sequence[bool]) -> Examples:
        """The examples for which `keep` is true."""
        mask = torch.tensor(keep)
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {name: each[mask] for name, each in values.items() if isinstance(each, Tensor)}
        return Examples(**values)

    def __len__(self) -> int:
        return len(self.features)

    def end(self, least: float) -> float:
        """The θ from which a program may run that is expected to keep only that share of the answers."""
        return 1 - least if self.par < 1 else 1 - least / (1 - self.least)

    def needed(self, outputs: Tensor) -> Tensor:
        """The smallest θ of each program for each prompt, (P, M), from a network's outputs (P, M − 1)."""
        return needed_theta(outputs, self.favour, self.par)

    @property
    def kept(self) -> Tensor:
        """(P, M) float32 quality from 0 (lost) to 1 (the best possible): what the value head predicts."""
        return (1 - self.lost) / (1 - self.least)

    @property
    def saved(self) -> Tensor:
        """(P, M) float32 share of identity's FLOPs that each program saves."""
        return (1 - self.flops / self.flops[:, :1]).float()
