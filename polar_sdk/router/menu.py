"""The menu router: a head that predicts a quality for each of a few whole programs.

Quality is the predicted probability that nothing is lost against identity; identity's own is 1. (Trained on the loss
`drops` it runs from 0, lost for certain, to 1, gained for certain, and ½ is as good as identity.) With its dial at θ
the router runs the cheapest program whose predicted quality is at least 1 − θ.

Costs are those at the prompt's own length if the router was trained that way (`own_length`). Then a loss is more
acceptable where it saves more: θ counts the loss per share of the FLOPs saved, relative to a prompt of 128 tokens. So a
long prompt, on which a filled program saves twice as much as on a short one, may take a deeper cut. The loss counts
from the quality that is as good as identity (`par`): a program that gains as many answers as it loses is the first to
run, before any that only loses few. Knows no text and no money.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final

import torch

from polar_sdk.programs.cost import NOMINAL_OUTPUT, NOMINAL_PROMPT
from polar_sdk.router.learned import LearnedRouter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.programs.cost import CostModel
    from polar_sdk.programs.program import Program
    from polar_sdk.router.certificate import AnswerForm


_FAVOUR: Final = (0.5, 2.0)
"""By how much a prompt's length may change what a loss counts."""
_LEAST: Final = 1e-3
"""θ of a program from which nothing is lost: above 0, where identity runs."""


@dataclass(frozen=True)
class Pricing:
    """Costs of the programs of a menu, by the length of the prompt.

    Attributes:
        programs: Identity first.
        cost: Of the model.
        own_length: Whether a prompt's own length counts; else every prompt has 128 tokens.
        answer: Tokens of the answer.
        par: The quality that is as good as identity: ½ where an answer can also be gained, and losses count from it.
    """

    programs: tuple[Program, ...]
    cost: CostModel
    own_length: bool = False
    answer: int = NOMINAL_OUTPUT
    par: float = 1.0
    _known: dict[int, list[float]] = field(default_factory=dict, repr=False)

    def costs(self, lengths: Sequence[int]) -> Tensor:
        """FLOPs of each program over identity's, (P, M) for P prompts."""
        return torch.tensor([self._at(length if self.own_length else NOMINAL_PROMPT) for length in lengths])

    def favour(self, lengths: Sequence[int]) -> Tensor:
        """Weight of a loss under each program after identity at these lengths, (P, M − 1); 1 at 128 tokens."""
        own, nominal = 1 - self.costs(lengths)[:, 1:], 1 - torch.tensor(self._at(NOMINAL_PROMPT))[1:]
        saving = (own > 0) & (nominal > 0)
        return torch.where(saving, nominal / own.clamp(min=1e-6), 1.0).clamp(*_FAVOUR)

    @property
    def cheaper(self) -> list[int]:
        """Programs cheaper than identity at 128 tokens, cheapest first."""
        costs = self._at(NOMINAL_PROMPT)
        return sorted((place for place, cost in enumerate(costs) if cost < 1), key=costs.__getitem__)

    def _at(self, length: int) -> list[float]:
        if length not in self._known:
            flops = [self.cost.request(program, length, self.answer).total for program in self.programs]
            self._known[length] = [value / flops[0] for value in flops]
        return self._known[length]


def needed_theta(outputs: Tensor, favour: Tensor | None = None, par: float = 1.0) -> Tensor:
    """The smallest θ at which each program may run, (…, M) for outputs (…, M − 1): what it loses; 0 for identity.

    Args:
        outputs: Logits of the qualities of the programs after identity.
        favour: What a loss counts; see `Pricing`. None = as it is.
        par: The quality at which nothing is lost.
    """
    lost = torch.sigmoid(-outputs)
    if par < 1:
        lost = ((lost - (1 - par)) / par).clamp(min=_LEAST)
    lost = lost if favour is None else lost * favour
    lost = torch.where(outputs == -torch.inf, torch.inf, lost)  # of a prompt unlike all that the router knows
    return torch.cat((torch.zeros_like(lost[..., :1]), lost), -1)


def only_for(outputs: Tensor, forms: Sequence[AnswerForm | None], form: AnswerForm) -> Tensor:
    """Outputs (…, M − 1) of prompts that are answered in this form, where no program for another form may run.

    Args:
        outputs: Logits of the qualities of the programs after identity.
        forms: Of all programs; see `RouterFacts.forms`.
        form: Of the answers.
    """
    if all(own in (None, form) for own in forms):
        return outputs
    others = torch.tensor([own not in (None, form) for own in forms[1:]], device=outputs.device)
    return outputs.masked_fill(others, -torch.inf)


def menu_dial(needed: Tensor, order: Sequence[int], points: int = 100, most: float = 1.0) -> tuple[float, ...]:
    """0, then quantiles of the θ that the cheaper programs need over these prompts, (M, P), up to `most`."""
    thetas = needed[:, list(order)].double().flatten()
    thetas = thetas[thetas <= most]
    if not thetas.numel():
        return (0.0,)
    quantiles = torch.quantile(thetas, torch.linspace(0, 1, points, dtype=torch.float64)).tolist()
    return (0.0, *sorted({theta for theta in quantiles if theta > 0}))


def cheapest(needed: Tensor, costs: Tensor, theta: float | Tensor) -> Tensor:
    """Index of the cheapest program that may run, per prompt: (P,) for `needed` (P, M).

    Args:
        needed: The smallest θ of each program; identity is first, and may always run.
        costs: Of each program over identity's, (M,) or (P, M).
        theta: The dial; a tensor (P, 1) has one for each prompt, and one of several (K, 1, 1) gives (K, P).
    """
    return torch.where(needed <= theta, costs, torch.inf).argmin(-1)


class MenuRouter(LearnedRouter):
    """Chooses among whole programs."""

    kind: ClassVar[str] = "menu"
    _pricing: Pricing | None = None

    def _prepare(self, decoder: Decoder) -> None:
        self._pricing = Pricing(
            self.programs, decoder.cost, self.facts.own_length, self.facts.answer_tokens, self.facts.par
        )

    def allowed(self, outputs: Tensor, form: AnswerForm) -> Tensor:
        """As of every learned router; and no program serves a form of answers that it is not for."""
        return only_for(super().allowed(outputs, form), self.facts.forms, form)

    def choose_all(self, outputs: Tensor, theta: float | Tensor, lengths: Sequence[int] | None = None) -> list[Program]:
        """The cheapest program, at each prompt's length, whose quality is at least 1 − θ."""
        assert self._pricing is not None, "the router is not bound to a model"
        sizes = [NOMINAL_PROMPT] * len(outputs) if lengths is None else lengths
        favour = self._pricing.favour(sizes) if self.facts.own_length else None
        needed = needed_theta(outputs.cpu(), favour, self.facts.par).double()
        dial = theta.unsqueeze(1) if isinstance(theta, torch.Tensor) else theta
        chosen = cheapest(needed, self._pricing.costs(sizes), dial)
        return [self.programs[program] for program in chosen.tolist()]
