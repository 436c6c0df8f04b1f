"""Options of fitting and training maps. Knows no model."""

from __future__ import annotations

from typing import ClassVar, Final, Self

from pydantic import BaseModel, Field, ValidationError

from polar_sdk.errors import MapError
from polar_sdk.lab.healing.loss import LossWeights
from polar_sdk.lab.rewards.tasks import ANSWER_TOKENS
from polar_sdk.programs.program import TAIL
from polar_sdk.router.map_set import Storage

_SOFTENING: Final = 2.0
"""Temperature at which token distributions are compared where fills are trained."""


class HealOptions(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """How maps of every kind are fitted."""

    ridge: float = Field(default=1e-3, gt=0)
    """Penalty as a multiple of the mean variance of an entry of what the maps read."""
    rank: int | None = Field(default=None, ge=1)
    """Maximum rank of each map; None = full."""
    distil: int = Field(default=0, ge=0)
    """Steps of training on top of the closed form."""
    rate: float = Field(default=2e-4, gt=0)
    """Learning rate of the training."""
    seed: int = 0
    """Of everything that is drawn."""
    answer_tokens: int = Field(default=24, ge=1)
    """Maximum tokens of identity's answers to prompts."""
    start: str | None = None
    """Folder of maps to start from; those of the segments in it are not fitted again, and keep rank and units."""

    @property
    def weights(self) -> LossWeights:
        """Of the terms of the training's loss."""
        return LossWeights()

    @classmethod
    def of(cls, **options: object) -> Self:
        """Options by name.

        Raises:
            MapError: One of them is unknown or out of range.
        """
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                raise MapError(f"{name!r} is not an option here; use {', '.join(cls.model_fields)}.") from error
            raise MapError(f"{name}={first['input']} is out of range: {first['msg']}.") from error


class BridgeOptions(HealOptions):
    """How bridges are fitted."""

    choices: float = Field(default=1.0, ge=0)
    """Weight of the difference between the choices' scores in the training."""
    labels: float = Field(default=0.0, ge=0)
    """Weight of the right choices in the training; more than 0 fits the maps to labels, which is fine-tuning."""
    drop: float = Field(default=0.25, ge=0, lt=1)
    """Probability that a bridge is left out in every other training step and its layers run instead, so that bridges
    also serve programs that use only some of them."""
    storage: ClassVar[Storage] = "exact"

    @property
    def weights(self) -> LossWeights:
        """The divergence, and what is known of choices."""
        return LossWeights(choices=self.choices, labels=self.labels)


class FillOptions(HealOptions):
    """How fills are fitted."""

    rate: float = Field(default=3e-4, gt=0)
    """Learning rate of the training."""
    answer_tokens: int = Field(default=ANSWER_TOKENS, ge=1)
    """Maximum tokens of identity's answers to prompts."""
    units: int = Field(default=0, ge=0)
    """Hidden units of each map; 0 = none, so that it is affine."""
    prompts: int = Field(default=2000, ge=1)
    """Maximum prompts to fit and to train on, drawn by hash."""
    tail: int = Field(default=TAIL, ge=1)
    """Last tokens of each prompt that run all layers in the training, as `search` lets them; the last one must."""
    hidden: float = Field(default=1.0, ge=0)
    """Weight of the error of the last states in the training."""
    storage: Storage = "int8"
    """How weights are stored."""

    @property
    def weights(self) -> LossWeights:
        """The divergence of softened distributions, and the error of the last states."""
        return LossWeights(temperature=_SOFTENING, hidden=self.hidden)
