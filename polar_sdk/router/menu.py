"""The menu router: a head that predicts a quality for each of a few whole programs.

Quality is the predicted probability that nothing is lost against identity; identity's own is 1. (Trained on the loss
`drops` it runs from 0, lost for certain, to 1, gained for certain, and ½ is as good as identity.) With its dial at θ
the router runs the cheapest program whose predicted quality is at least 1 − θ. Knows no text and no money.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from polar_sdk.programs.cost import NOMINAL_OUTPUT, NOMINAL_PROMPT
from polar_sdk.router.learned import LearnedRouter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.programs.cost import CostModel
    from polar_sdk.programs.program import Program


def by_cost(programs: Sequence[Program], cost: CostModel) -> list[int]:
    """Indices of programs, cheapest first, at 128 prompt and 64 output tokens."""
    flops = [cost.request(program, NOMINAL_PROMPT, NOMINAL_OUTPUT).total for program in programs]
    return sorted(range(len(programs)), key=flops.__getitem__)


def needed_theta(outputs: Tensor) -> Tensor:
    """The smallest θ at which each program may run, (…, P) for outputs (…, P − 1): 1 − its quality; 0 for identity.

    Outputs are logits of the qualities of the programs after identity.
    """
    lost = torch.sigmoid(-outputs)
    return torch.cat((torch.zeros_like(lost[..., :1]), lost), -1)


def menu_dial(needed: Tensor, order: Sequence[int], points: int = 100, most: float = 1.0) -> tuple[float, ...]:
    """0, then quantiles of the θ that the cheaper programs need over these prompts, (M, P), up to `most`."""
    thetas = needed[:, list(order)].double().flatten()
    thetas = thetas[thetas <= most]
    if not thetas.numel():
        return (0.0,)
    quantiles = torch.quantile(thetas, torch.linspace(0, 1, points, dtype=torch.float64)).tolist()
    return (0.0, *sorted({theta for theta in quantiles if theta > 0}))


def cheapest(needed: Tensor, order: Sequence[int], theta: float | Tensor) -> Tensor:
    """Index of the cheapest program that may run, per prompt: (M,) for `needed` (M, P).

    Args:
        needed: The smallest θ of each program.
        order: Programs cheaper than identity, cheapest first.
        theta: The dial; a tensor (K, 1) of several gives (K, M).
    """
    chosen = torch.zeros_like(needed[:, 0] <= theta, dtype=torch.long)
    for program in reversed(order):
        chosen = torch.where(needed[:, program] <= theta, program, chosen)
    return chosen


class MenuRouter(LearnedRouter):
    """Chooses among whole programs."""

    kind: ClassVar[str] = "menu"
    _order: tuple[int, ...] = ()
    """Programs that are cheaper than identity, cheapest first."""

    def _prepare(self, decoder: Decoder) -> None:
        order = by_cost(self.programs, decoder.cost)
        self._order = tuple(order[: order.index(0)])

    def decide(self, outputs: Tensor, theta: float) -> Program:
        """The cheapest program whose quality is at least 1 − θ."""
        needed = needed_theta(outputs).tolist()
        return self.programs[next((program for program in self._order if needed[program] <= theta), 0)]

    def choose_all(self, outputs: Tensor, theta: float) -> list[Program]:
        """The same for many prompts."""
        chosen = cheapest(needed_theta(outputs).double(), self._order, theta)
        return [self.programs[program] for program in chosen.tolist()]
