"""The utility of the deployed decision: what training selects by, never its loss.

A menu router is used with its dial at the loosest θ whose share of lost prompts stays below a risk, for each kind of
prompt alike. Its utility is the share of FLOPs saved there, the mean over several risks. Pure tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from polar_sdk.router.menu import cheapest, menu_dial

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.lab.training.examples import Examples


class Frontier(NamedTuple):
    """What a menu router does along its dial, on given prompts."""

    thetas: tuple[float, ...]
    lost: Tensor
    """Share of lost prompts at each θ, of the kind of prompt that loses most."""
    saved: Tensor
    """Share of all FLOPs saved at each θ."""

    @property
    def efficient(self) -> Frontier:
        """Without the θ that a looser one is no worse than: a certificate's walk would stop at them for nothing."""
        later = self.lost.flip(0).cummin(0).values.flip(0)
        keep = ((self.lost <= later) & (self.saved >= 0)).tolist()
        keep[0] = True
        thetas = tuple(theta for theta, kept in zip(self.thetas, keep, strict=True) if kept)
        return Frontier(thetas, self.lost[keep], self.saved[keep])

    def best(self, risk: float) -> int:
        """Place of the loosest θ before the share of lost prompts first exceeds the risk."""
        beyond = (self.lost > risk).nonzero()
        return int(beyond[0]) - 1 if len(beyond) else len(self.thetas) - 1

    def utility(self, risks: Sequence[float]) -> float:
        """Mean over the risks of the share of FLOPs saved."""
        return sum(float(self.saved[self.best(risk)]) for risk in risks) / len(risks)


def frontier(
    needed: Tensor, examples: Examples, order: Sequence[int], thetas: Sequence[float] = (), most: float = 1.0
) -> Frontier:
    """Walk the dial.

    Args:
        needed: (P, M) least θ of each program for each prompt.
        examples: What the programs did on those prompts.
        order: Programs cheaper than identity, cheapest first.
        thetas: Where to look, ascending from 0; none = where the choices change, those left out that a looser θ is no
            worse than.
        most: Where to stop looking, then.
    """
    walk = tuple(thetas) or menu_dial(needed, order, most=most)
    chosen = cheapest(needed.double(), order, torch.tensor(walk, dtype=torch.float64).unsqueeze(1))
    prompts = torch.arange(len(examples))
    flops = examples.flops[prompts, chosen].sum(1)
    saved = 1 - flops / examples.flops[:, 0].sum()
    lost = examples.lost[prompts, chosen].double()
    kinds = [lost[:, examples.kinds == kind].mean(1) for kind in sorted(set(examples.kinds.tolist()))]
    found = Frontier(walk, torch.stack(kinds).amax(0), saved)
    return found if thetas else found.efficient
