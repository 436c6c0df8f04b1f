"""Settings of training, for both kinds of learned router. Values only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from polar_sdk.router.certificate import Loss

Target = Literal["agreement", "gap"]
"""What the value head predicts: whether nothing is lost, or the margin under the program."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MenuSettings(_Settings):
    """How a menu router is trained; every combination of targets, sizes and penalties is tried with every seed."""

    loss: Loss = "differs"
    targets: tuple[Target, ...] = Field(default=("agreement", "gap"), min_length=1)
    hidden: tuple[tuple[int, ...], ...] = Field(default=((), (64,)), min_length=1)
    """Hidden layers of the head; () is a linear one."""
    penalties: tuple[float, ...] = Field(default=(0.3, 3.0), min_length=1)
    """Squared weights, relative to the number of features over prompts."""
    gradient: float = Field(default=1.0, ge=0)
    """Weight of the exact policy gradient beside the regression (target `agreement`)."""
    prices: tuple[float, float] = (2.0, 30.0)
    """Range of what a lost prompt weighs against the whole FLOPs of one, for the policy gradient."""
    temperature: float = Field(default=0.05, gt=0)
    """Of the stochastic decision whose expected utility the policy gradient raises."""
    risks: tuple[float, ...] = Field(default=(0.02, 0.05, 0.1), min_length=1)
    """Shares of lost prompts at which the deployed decision is judged."""
    least: float = Field(default=0.5, gt=0, lt=1)
    """The dial ends where the router would run a program that it expects to keep an answer less often than that.

    Without it a few prompts given up for lost, by the cheapest program, count for less than many that are a little at
    risk: cheap on average, and of no use to those who asked.
    """
    steps: int = Field(default=200, ge=1)
    check_every: int = Field(default=10, ge=1)
    """Steps between looks at the deployed utility."""
    patience: int = Field(default=6, ge=1)
    """Looks without a better utility before a run stops."""
    learning_rate: float = Field(default=0.01, gt=0)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)


class PolicySettings(_Settings):
    """How a policy router is trained: the article's way, leave-one-out policy gradient."""

    price: Annotated[float, Field(gt=0)] = 3.0
    """What a lost prompt weighs in the reward, against the whole FLOPs of one."""
    samples: int = Field(default=4, ge=2)
    """Programs drawn per prompt and step; each is judged against the mean of the others."""
    epochs: int = Field(default=8, ge=1)
    batch: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    entropy: float = Field(default=0.003, ge=0)
    """Weight of the entropy bonus."""
    execute: float = Field(default=0.9, gt=0, lt=1)
    """Probability of executing a layer that the policy starts from."""
    patience: int = Field(default=3, ge=1)
    """Epochs without a better utility on dev before training stops."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
