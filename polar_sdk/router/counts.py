"""What calibration counted for one kind of prompt, and how surely less than a share of such prompts is lost.

Knows counts and the tests on them; no programs, no promises.
"""

from __future__ import annotations

from typing import Final, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from polar_sdk.errors import CalibrationSizeError, CertificateError
from polar_sdk.statistics import binomial_cdf, least_paired_prompts, least_prompts, paired_loss_p

__all__ = ["LOSSES", "Counts", "Loss"]

Loss = Literal["differs", "harms", "drops"]
"""What counts as lost.

`differs`: the answer differs from identity's: another choice, or in text fewer than three quarters of the tokens that
identity would choose (`polar_sdk.rewards.SAME_ANSWER`). `harms`: identity is right and the program is wrong. `drops`:
the same, less the prompts where it is the other way round, so that α bounds the drop of accuracy; where no right answer
is known, an answer that differs is lost.
"""
LOSSES: Final[tuple[Loss, ...]] = get_args(Loss)


class Counts(BaseModel):
    """Prompts of one kind, lost and gained at each θ of a dial."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int = Field(ge=1)
    """Calibration prompts."""
    lost: dict[Loss, tuple[int, ...]]
    """Lost prompts at each θ; `harms` and `drops` only where the answers are known."""
    gained: tuple[int, ...] = ()
    """Prompts gained at each θ, for the loss `drops`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        counted = {f"lost[{loss}]": counts for loss, counts in self.lost.items()}
        counted |= {"gained": self.gained} if "drops" in self.lost else {}
        for name, counts in counted.items():
            if len(counts) != len(self.lost["differs"]) or not all(0 <= k <= self.n for k in counts):
                raise ValueError(f"{name} needs one count of 0 to {self.n} per theta")
        return self

    def pair(self, at: int, loss: Loss) -> tuple[int, int]:
        """Prompts lost and gained at the θ of that number."""
        counted = self._counted(loss)
        return self.lost[counted][at], self.gained[at] if counted == "drops" else 0

    def p_value(self, at: int, alpha: float, delta: float, loss: Loss) -> float:
        """Of "more than α is lost at that θ"."""
        lost, gained = self.pair(at, loss)
        if self._counted(loss) == "drops":
            return paired_loss_p(lost, gained, self.n, alpha, delta)
        return binomial_cdf(lost, self.n, alpha)

    def check_size(self, kind: str, alpha: float, delta: float, loss: Loss) -> None:
        """Raise where not even identity could be certified.

        Raises:
            CalibrationSizeError: There are too few prompts of this kind.
        """
        paired = self._counted(loss) == "drops"
        needed = (least_paired_prompts if paired else least_prompts)(alpha, delta)
        if self.n < needed:
            raise CalibrationSizeError(
                f"α = {alpha * 100:g} % needs at least {needed} calibration prompts at δ = {delta:g}; you gave "
                f"{self.n} of kind {kind!r}.",
                hint="Give more prompts of that kind, none of it, or a larger α.",
            )

    def _counted(self, loss: Loss) -> Loss:
        """What was counted for a loss: without right answers a drop is an answer that differs."""
        counted: Loss = "differs" if loss == "drops" and "drops" not in self.lost else loss
        if counted not in self.lost:
            raise CertificateError(f"loss {loss!r} was not counted; calibrate on a set with answers.")
        return counted
