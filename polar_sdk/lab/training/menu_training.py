"""Train the value head of a menu router on the whole reward matrix, on prompts lost and prompts kept.

There are two targets. `agreement`: the log-loss of "nothing is lost" per program, plus the exact policy gradient: as
every reward is known, the expected utility of a soft decision is a plain sum and needs no sampling. `gap`: the margin
under each program, then mapped to a probability on the dev prompts.

Runs are compared by the utility of the deployed decision on dev, never by a loss. A menu router serves with its dial at
the loosest θ whose share of lost prompts stays below a risk, for each kind of prompt alike; the utility is the share of
FLOPs saved there, averaged over several risks. Knows tensors only, no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import BaseModel, Field

from polar_sdk.lab.checkpoint import Checkpoint, run_key
from polar_sdk.router.certificate import Loss
from polar_sdk.router.menu import cheapest, menu_dial
from polar_sdk.router.network import Network
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from polar_sdk.lab.training.examples import Examples


Target = Literal["agreement", "gap"]
"""Target of the value head: whether nothing is lost, or the margin under the program."""


class MenuSettings(BaseModel, frozen=True, extra="forbid"):
    """How a menu router is trained; every combination of targets, sizes and penalties is tried with every seed."""

    loss: Loss = "differs"
    own_length: bool = True
    """Whether programs are compared at each prompt's own length; see `router.menu`."""
    strict: float = Field(default=0.0, ge=0, le=1)
    """How much of an answer in text counts as lost where less than 95% of its tokens are kept, whatever the loss."""
    targets: tuple[Target, ...] = Field(default=("agreement", "gap"), min_length=1)
    hidden: tuple[tuple[int, ...], ...] = Field(default=((), (64,)), min_length=1)
    """Hidden layers of the head; () is a linear one."""
    penalties: tuple[float, ...] = Field(default=(0.3, 3.0), min_length=1)
    """Weights of the squared weights, relative to the number of features over prompts."""
    gradient: float = Field(default=1.0, ge=0)
    """Weight of the exact policy gradient beside the regression (target `agreement`)."""
    prices: tuple[float, float] = (2.0, 30.0)
    """Range of the price of a lost prompt, in full FLOPs of a prompt, for the policy gradient."""
    temperature: float = Field(default=0.05, gt=0)
    """Temperature of the stochastic decision whose expected utility the policy gradient increases."""
    risks: tuple[float, ...] = Field(default=(0.02, 0.05, 0.1), min_length=1)
    """Shares of lost prompts at which the deployed decision is judged."""
    least: float = Field(default=0.5, gt=0, lt=1)
    """The dial ends where the router would run a program that it expects to keep the answer with less probability.

    Without this limit, giving up on a few prompts, by the cheapest program, would count for less than a small risk on
    many: cheap on average, and useless to those who sent these prompts.
    """
    most: float = Field(default=1.0, gt=0, le=1)
    """Of a table: a kind that is recognised gets no program by which it may lose a larger share of its prompts. Few of
    them are in a calibration, so that it may not notice."""
    steps: int = Field(default=200, ge=1)
    check_every: int = Field(default=10, ge=1)
    """Steps between measurements of the deployed utility."""
    patience: int = Field(default=6, ge=1)
    """Measurements without a better utility before a run stops."""
    learning_rate: float = Field(default=0.01, gt=0)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)


_Config = tuple[str, tuple[int, ...], float]
"""Target, hidden sizes, penalty."""


@dataclass(frozen=True)
class Trained:
    """The network that was picked, and how training went.

    Attributes:
        network: Its outputs are logits of "nothing is lost" per program after identity.
        record: For the artifact: picked configuration, utilities of all, spread over seeds.
    """

    network: Network
    record: dict[str, Any]


def fit_menu(
    train: Examples,
    dev: Examples,
    order: Sequence[int],
    settings: MenuSettings,
    *,
    checkpoints: Path | None = None,
    on_progress: Progress = silent,
) -> Trained:
    """Train every configuration with every seed, and pick one.

    The configuration with the best mean utility over its seeds wins, not a single lucky run; then its best seed.

    Args:
        train: To fit on.
        dev: To choose by; shares no prompt with `train`.
        order: Programs cheaper than identity, cheapest first.
        settings: What to try.
        checkpoints: Folder for finished runs, read by a later call with the same data and settings; None keeps none.
        on_progress: Called with (stage, runs done, runs in all).
    """
    configs: list[_Config] = list(product(settings.targets, settings.hidden, settings.penalties))
    runs = [(config, seed) for config in configs for seed in settings.seeds]
    sums = [
        float(each.double().sum())
        for part in (train, dev)
        for each in (part.features, part.lost, part.margin, part.flops)
    ]
    checkpoint = Checkpoint(checkpoints, run_key(settings, sums))
    results: dict[tuple[_Config, int], tuple[float, Network]] = {}
    for index, (config, seed) in enumerate(runs):
        on_progress("training the menu router", index, len(runs))
        if (saved := checkpoint.load(f"run-{index}")) is not None:
            results[config, seed] = float(saved[1]["utility"]), Network.of(saved[0])
            continue
        utility, network = results[config, seed] = _run(train, dev, order, settings, config, seed)
        checkpoint.save(f"run-{index}", network.tensors(), {"utility": utility})
    on_progress("training the menu router", len(runs), len(runs))
    checkpoint.clear(f"run-{index}" for index in range(len(runs)))
    utilities = {config: [results[config, seed][0] for seed in settings.seeds] for config in configs}
    best = max(configs, key=lambda config: fmean(utilities[config]))
    utility, network = max((results[best, seed] for seed in settings.seeds), key=lambda result: result[0])
    return Trained(network, _record(best, utility, utilities, settings))


def _record(
    best: _Config, utility: float, utilities: dict[_Config, list[float]], settings: MenuSettings
) -> dict[str, Any]:
    return {
        "settings": settings.model_dump(mode="json"),
        "picked": {"target": best[0], "hidden": list(best[1]), "penalty": best[2]},
        "utility": utility,
        "utility_mean": fmean(utilities[best]),
        "utility_spread": pstdev(utilities[best]),
        "utilities": [
            {"target": config[0], "hidden": list(config[1]), "penalty": config[2], "by_seed": values}
            for config, values in utilities.items()
        ],
    }


def _run(
    train: Examples, dev: Examples, order: Sequence[int], settings: MenuSettings, config: _Config, seed: int
) -> tuple[float, Network]:
    """Utility and network of one configuration with one seed, at the step whose deployed utility on dev was best."""
    target, hidden, penalty = config
    network = Network.fresh(train.features, hidden, train.lost.shape[1] - 1, seed)
    generator = torch.Generator().manual_seed(seed)
    parameters = network.trainable
    for tensor in parameters:
        tensor.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    regression = _regression(train, target)
    weight = penalty * train.features.shape[1] / (2 * len(train))
    best, waited = (-float("inf"), network), 0
    for step in range(1, settings.steps + 1):
        optimizer.zero_grad()
        outputs = network(train.features)
        loss = (
            regression(outputs) + weight * sum(weights.square().sum() for weights in network.weights) / outputs.shape[1]
        )
        if target == "agreement" and settings.gradient:
            loss = loss - settings.gradient * _expected_utility(outputs, train, settings, generator)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % settings.check_every == 0 or step == settings.steps:
            candidate = _deployable(network, dev, target)
            utility = _utility(candidate, dev, order, settings)
            best, waited = ((utility, candidate), 0) if utility > best[0] else (best, waited + 1)
            if waited >= settings.patience:
                break
    return best


def _regression(train: Examples, target: str) -> Callable[[Tensor], Tensor]:
    """The regression loss of a target, as a function of the outputs."""
    if target == "agreement":
        kept = train.kept[:, 1:]
        return lambda outputs: F.binary_cross_entropy_with_logits(outputs, kept)
    margin = train.margin[:, 1:]
    scaled = (margin - margin.mean(0)) / margin.std(0, unbiased=False).clamp(min=1e-6)
    return lambda outputs: F.smooth_l1_loss(outputs, scaled)


def _expected_utility(
    outputs: Tensor, examples: Examples, settings: MenuSettings, generator: torch.Generator
) -> Tensor:
    """Mean expected utility of a soft decision at a random price; its gradient is the exact policy gradient."""
    low, high = settings.prices
    price = low * (high / low) ** float(torch.rand((), generator=generator))
    saved = examples.saved
    identity = torch.zeros_like(outputs[:, :1])
    predicted = torch.cat((identity, 1 - (1 - examples.least) * torch.sigmoid(outputs)), 1)
    chances = ((saved - price * predicted) / settings.temperature).softmax(-1)
    gained = (saved - price * examples.lost) / (1 + price)
    expected: Tensor = (chances * gained).sum(-1).mean()
    return expected


@torch.no_grad()
def _deployable(network: Network, dev: Examples, target: str) -> Network:
    """A frozen copy whose outputs are logits of "nothing is lost"."""
    frozen = Network.of(network.tensors())
    if target == "agreement":
        return frozen
    slope, shift = _logistic(frozen(dev.features), dev.kept[:, 1:])
    weights = (*frozen.weights[:-1], frozen.weights[-1] * slope)
    biases = (*frozen.biases[:-1], frozen.biases[-1] * slope + shift)
    return Network(frozen.mean, frozen.scale, weights, biases)


@torch.enable_grad()
def _logistic(outputs: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """One slope and a shift per program that map outputs to logits of `kept`, by regularised maximum likelihood."""
    log_slope = torch.zeros((), requires_grad=True)
    shift = torch.zeros(outputs.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([log_slope, shift], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = outputs * log_slope.exp() + shift
        loss = F.binary_cross_entropy_with_logits(logits, kept)
        loss = loss + (log_slope.square() + shift.square().mean()) / len(outputs)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return log_slope.detach().exp(), shift.detach()


@torch.no_grad()
def _utility(network: Network, dev: Examples, order: Sequence[int], settings: MenuSettings) -> float:
    needed = dev.needed(network(dev.features))
    return frontier(needed, dev, order, max_theta=dev.end(settings.least)).utility(settings.risks)


class Frontier(NamedTuple):
    """Losses and savings of a menu router on some prompts along its dial."""

    thetas: tuple[float, ...]
    lost: Tensor
    """Share of lost prompts at each θ, of the kind of prompt that loses the most."""
    saved: Tensor
    """Share of all FLOPs saved at each θ."""

    @property
    def efficient(self) -> Frontier:
        """Without the θs that a looser one matches: there the walk of a certificate would stop needlessly."""
        later = self.lost.flip(0).cummin(0).values.flip(0)
        keep = ((self.lost <= later) & (self.saved >= 0)).tolist()
        keep[0] = True
        thetas = tuple(theta for theta, kept in zip(self.thetas, keep, strict=True) if kept)
        return Frontier(thetas, self.lost[keep], self.saved[keep])

    def best(self, risk: float) -> int:
        """Index of the loosest θ before the share of lost prompts first exceeds the risk."""
        above = (self.lost > risk).nonzero()
        return int(above[0]) - 1 if len(above) else len(self.thetas) - 1

    def utility(self, risks: Sequence[float]) -> float:
        """Share of FLOPs saved, averaged over the risks."""
        return sum(float(self.saved[self.best(risk)]) for risk in risks) / len(risks)


def frontier(
    needed: Tensor, examples: Examples, order: Sequence[int], thetas: Sequence[float] = (), max_theta: float = 1.0
) -> Frontier:
    """Walk the dial.

    Args:
        needed: (P, M) least θ of each program for each prompt.
        examples: What the programs did on those prompts.
        order: Programs cheaper than identity, cheapest first.
        thetas: Where to measure, ascending from 0; none = where the choices change, without the θs that a looser one
            matches.
        max_theta: Where the dial ends if no `thetas` are given.
    """
    walk = tuple(thetas) or menu_dial(needed, order, most=max_theta)
    chosen = cheapest(needed.double(), examples.costs, torch.tensor(walk, dtype=torch.float64).view(-1, 1, 1))
    prompts = torch.arange(len(examples))
    flops = examples.flops[prompts, chosen].sum(1)
    saved = 1 - flops / examples.flops[:, 0].sum()
    lost = examples.lost[prompts, chosen].double()
    kinds = [lost[:, examples.kinds == kind].mean(1) for kind in sorted(set(examples.kinds.tolist()))]
    walked = Frontier(walk, torch.stack(kinds).amax(0), saved)
    return walked if thetas else walked.efficient
