"""Train a layerwise router: the article's policy gradient over an action per free layer, with a leave-one-out baseline.

Several programs are drawn per prompt; each is judged by its reward less the mean reward of the others. That is not
divided by a standard deviation, which would amplify noise where all do alike. Reward = FLOPs saved − price × lost.
Rewards come from a function, so that a router can learn from anything: a model, a matrix, a rule. Knows features and
rewards only.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Annotated, Final, Protocol

import torch
from pydantic import BaseModel, Field

from polar_sdk.lab.checkpoint import Checkpoint, moments_of, restore, run_key
from polar_sdk.lab.training.menu_training import Trained
from polar_sdk.router.layerwise import ACTIONS, EXECUTE, HIDDEN, program_of
from polar_sdk.router.network import Network
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from polar_sdk.programs.program import Program


_BEST: Final = "best "
"""Begins the names of the best network's tensors in a checkpoint."""


class LayerwiseSettings(BaseModel, frozen=True, extra="forbid"):
    """How a layerwise router is trained: as in the article, by leave-one-out policy gradient."""

    price: Annotated[float, Field(gt=0)] = 3.0
    """Price of a lost prompt in the reward, in full FLOPs of a prompt."""
    samples: int = Field(default=4, ge=2)
    """Programs drawn per prompt and step; each is judged against the mean of the others."""
    epochs: int = Field(default=8, ge=1)
    batch: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    entropy: float = Field(default=0.003, ge=0)
    """Weight of the entropy bonus."""
    execute: float = Field(default=0.9, gt=0, lt=1)
    """Probability of executing a layer at the start of training."""
    patience: int = Field(default=3, ge=1)
    """Epochs without a better utility on dev before training stops."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)


class Measure(Protocol):
    """Runs programs on prompts."""

    def __call__(self, rows: Sequence[int], programs: Sequence[Program], /) -> tuple[Tensor, Tensor]:
        """(lost, saved) of each pair of a prompt and a program: bool, and share of identity's FLOPs, (N,) each."""
        ...


@dataclass(frozen=True)
class LayerwiseTask:
    """The problem to learn.

    Attributes:
        features: (P, F) of all prompts.
        train: Rows to learn from.
        dev: Rows to choose by.
        depth: Layers, D.
        free: Layers that the router decides about; the others execute.
        measure: Rewards of (row, program) pairs.
    """

    features: Tensor
    train: Sequence[int]
    dev: Sequence[int]
    depth: int
    free: Sequence[int]
    measure: Measure


def fit_layerwise(
    task: LayerwiseTask,
    settings: LayerwiseSettings,
    *,
    checkpoints: Path | None = None,
    on_progress: Progress = silent,
) -> Trained:
    """Train with every seed; the seed and epoch whose greedy decision has the best utility on dev win.

    The state after each epoch is kept in the folder `checkpoints`, if there is one, and a later call resumes from it.
    """
    key = run_key(settings, float(task.features.double().sum()), *map(tuple, (task.train, task.dev, task.free)))
    checkpoint = Checkpoint(checkpoints, key)
    results = []
    for index, seed in enumerate(settings.seeds):
        run = _Run(task, settings, seed, checkpoint)

        def show(done: int, before: int = index * settings.epochs) -> None:
            on_progress("training the layerwise router", before + done, len(settings.seeds) * settings.epochs)

        results.append(run.train(show))
    checkpoint.clear(f"policy-{seed}" for seed in settings.seeds)
    utilities = [utility for utility, _, _ in results]
    best, network, history = max(results, key=lambda result: result[0])
    record = {
        "settings": settings.model_dump(mode="json"),
        "free_layers": list(task.free),
        "utility": best,
        "utility_mean": fmean(utilities),
        "utility_spread": pstdev(utilities),
        "history": history,
    }
    return Trained(network, record)


class _Run:
    """One seed's training, one epoch at a time."""

    def __init__(self, task: LayerwiseTask, settings: LayerwiseSettings, seed: int, checkpoint: Checkpoint) -> None:
        self.task, self.settings, self.seed, self.checkpoint = task, settings, seed, checkpoint
        features = task.features[list(task.train)]
        self.network = Network.fresh(features, HIDDEN, len(task.free) * len(ACTIONS), seed)
        chances = torch.full((len(task.free), len(ACTIONS)), (1 - settings.execute) / 2)
        chances[:, EXECUTE] = settings.execute
        self.network.biases[-1].copy_(chances.log().flatten())
        self.best = (-float("inf"), Network.of(self.network.tensors()))
        self.history: list[float] = []
        self.values = {str(place): tensor.requires_grad_() for place, tensor in enumerate(self.network.trainable)}
        self.optimizer = torch.optim.Adam(self.network.trainable, lr=settings.learning_rate)

    def train(self, show: Callable[[int], None]) -> tuple[float, Network, list[float]]:
        """Run the remaining epochs; returns the best utility, its network, and the utilities of all epochs."""
        self._resume()
        while len(self.history) < self.settings.epochs and not self._stalled():
            show(len(self.history))
            self._epoch(len(self.history))
            utility = self._utility()
            self.history.append(utility)
            if utility > self.best[0]:
                self.best = (utility, Network.of(self.network.tensors()))
            self._save()
        return (*self.best, self.history)

    def _epoch(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)  # the same after a resume
        rows = torch.tensor(self.task.train)[torch.randperm(len(self.task.train), generator=generator)]
        for batch in rows.split(self.settings.batch):  # type: ignore[no-untyped-call]
            self._step(batch, generator)

    def _step(self, rows: Tensor, generator: torch.Generator) -> None:
        """One step of leave-one-out policy gradient."""
        settings, count = self.settings, self.settings.samples
        log_chances = self._log_chances(rows)  # (B, L, 3)
        chances = log_chances.detach().exp().repeat_interleave(count, 0)
        drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=generator).view(len(rows) * count, -1)
        reward = self._reward(rows.repeat_interleave(count), drawn).view(-1, count)
        advantage = (reward - (reward.sum(1, keepdim=True) - reward) / (count - 1)).flatten()
        taken = log_chances.repeat_interleave(count, 0).gather(-1, drawn.unsqueeze(-1)).squeeze(-1).sum(-1)
        entropy = -(log_chances.exp() * log_chances).sum(-1).mean()
        loss = -(advantage * taken).mean() - settings.entropy * entropy
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def _log_chances(self, rows: Tensor) -> Tensor:
        outputs = self.network(self.task.features[rows])
        return outputs.view(len(rows), len(self.task.free), len(ACTIONS)).log_softmax(-1)

    def _reward(self, rows: Tensor, actions: Tensor) -> Tensor:
        """Rewards (N,) of one action per free layer, (N, L), for rows (N,)."""
        by_layer = torch.full((len(actions), self.task.depth), EXECUTE)
        by_layer[:, list(self.task.free)] = actions
        lost, saved = self.task.measure(rows.tolist(), [program_of(tuple(row)) for row in by_layer.tolist()])
        return saved.float() - self.settings.price * lost.float()

    @torch.no_grad()
    def _utility(self) -> float:
        """Mean reward of the greedy decision on the dev rows."""
        rows = torch.tensor(self.task.dev)
        return float(self._reward(rows, self._log_chances(rows).argmax(-1)).mean())

    def _stalled(self) -> bool:
        patience = self.settings.patience
        return len(self.history) > patience and max(self.history[-patience:]) < max(self.history[:-patience])

    def _save(self) -> None:
        best = {f"{_BEST}{name}": tensor for name, tensor in self.best[1].tensors().items()}
        tensors = {**self.values, **moments_of(self.optimizer, self.values), **best}
        self.checkpoint.save(f"policy-{self.seed}", tensors, {"history": self.history, "utility": self.best[0]})

    def _resume(self) -> None:
        saved = self.checkpoint.load(f"policy-{self.seed}")
        if saved is None:
            return
        tensors, facts = saved
        restore(self.optimizer, self.values, tensors)
        best = {name.removeprefix(_BEST): each for name, each in tensors.items() if name.startswith(_BEST)}
        self.best = (float(facts["utility"]), Network.of(best))
        self.history = list(facts["history"])
