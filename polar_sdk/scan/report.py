"""What a scan found, as data: a score per program, the heat map and the picks. Saves as JSON; renders nothing."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from polar_sdk.program import Program

__all__ = ["ProgramScore", "ScanReport"]

Share = Annotated[float, Field(ge=0, le=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class ProgramScore(_Frozen):
    """One program, measured against identity on the calibration items."""

    program: Program
    flops_ratio: float
    """FLOPs over identity's, at 128 prompt and 64 output tokens."""
    agreement: Share | None = None
    """Bare prompts: share of the tokens of identity's own answers that the program would choose too, given the same
    start. None where the set holds no bare prompts."""
    excess_nats: float | None = None
    """Bare prompts: mean loss in log-likelihood per token of identity's answers. Unit: nats."""
    same_choice: Share | None = None
    """Choice questions: share where the program prefers the same choice as identity. None where there are none."""
    accuracy: Share | None = None
    """Choice questions: share where the program prefers the right choice."""

    @property
    def fidelity(self) -> float:
        """How much behaves like identity: the worse of `agreement` and `same_choice`."""
        return min(value for value in (self.agreement, self.same_choice) if value is not None)


class ScanReport(_Frozen):
    """A whole scan."""

    model: str
    fingerprint: str
    dtype: str
    prompts: int
    """Bare prompts used."""
    questions: int
    """Choice questions used."""
    answer_tokens: int
    """Tokens of identity's own answers that agreement is measured on."""
    identity: ProgramScore
    skips: tuple[ProgramScore, ...]
    """One per block of skipped layers."""
    loops: tuple[ProgramScore, ...]
    """One per layer visited twice."""
    path: tuple[ProgramScore, ...]
    """Greedy removal of one layer after another, each time the one whose loss is least."""

    def cheapest(self, floor: float) -> ProgramScore:
        """The cheapest program of the path with at least that fidelity; identity if none has."""
        good = [score for score in (self.identity, *self.path) if score.fidelity >= floor]
        return min(good, key=lambda score: score.flops_ratio)
