"""The layerwise router, as designed in the article: for each layer an MLP decides to skip, execute or loop it.

It reads the pooled input embeddings, and has two hidden layers of 256 units. With its dial at θ, a layer whose
probability of "execute" is below θ gets the likelier of the other two: 0 is identity, 1/2 the usual reading. Protected
layers always execute. Knows no text and no money.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Final

import torch

from polar_sdk.programs.program import Program
from polar_sdk.router.learned import LearnedRouter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


ACTIONS: Final = ("skip", "execute", "loop")
"""An action's index is the number of visits it gives its layer."""
EXECUTE: Final = 1
HIDDEN: Final = (256, 256)
"""Units of the hidden layers."""


@lru_cache(maxsize=4096)
def program_of(actions: tuple[int, ...]) -> Program:
    """The program of one action per layer."""
    return Program.editing(len(actions), dict(enumerate(actions)))


class LayerwiseRouter(LearnedRouter):
    """Chooses an action per layer."""

    kind: ClassVar[str] = "policy"

    @property
    def free(self) -> tuple[int, ...]:
        """Layers that the router decides about."""
        return tuple(self.facts.training["free_layers"])

    def log_probabilities(self, outputs: Tensor) -> Tensor:
        """Log-probability of each action of each free layer, (…, L, 3)."""
        return outputs.reshape(*outputs.shape[:-1], len(self.free), len(ACTIONS)).log_softmax(-1)

    def choose_all(self, outputs: Tensor, theta: float | Tensor, lengths: Sequence[int] | None = None) -> list[Program]:
        """Per layer: execute, unless its probability is below θ; whatever the prompt's length."""
        chances = self.log_probabilities(outputs).exp()
        other = torch.where(chances[..., 2] > chances[..., 0], 2, 0)
        dial = theta.unsqueeze(1) if isinstance(theta, torch.Tensor) else theta
        chosen = torch.where(chances[..., EXECUTE] < dial, other, EXECUTE)
        actions = torch.full((len(outputs), self.facts.depth), EXECUTE)
        actions[:, list(self.free)] = chosen.cpu()
        # With more loops than skips a program would cost more than identity, which no router here may do.
        actions[actions.sum(-1) > self.facts.depth] = EXECUTE
        return [program_of(row) for row in map(tuple, actions.tolist())]


def layerwise_dial(execute: Tensor, points: int = 40) -> tuple[float, ...]:
    """0, then quantiles of the probabilities of executing, over layers and prompts."""
    thetas = torch.quantile(execute.double().flatten(), torch.linspace(0, 1, points, dtype=torch.float64)) + 1e-9
    return (0.0, *sorted(set(thetas.clamp(max=1.0).tolist())))
