"""Full depth beside routed: the same days, with the same prompts at the same times, served in both ways.

Each seed is a day of its own. Of even seeds full depth goes first, of odd ones the other way, so that what slows the
machine for a while harms both. Knows no output.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polar_sdk.show.progress import silent
from polar_simulate.capacity import unshared_starts, warm_up
from polar_simulate.day import Day
from polar_simulate.trial import FULL_DEPTH, Trial, compute_needed, run_trial

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from polar_sdk import PolarModel
    from polar_sdk.show.progress import Progress
    from polar_simulate.capacity import Speed
    from polar_simulate.prompt_file import FilePrompt


@dataclass
class Comparison:
    """Trials of the same days, as far as they have run."""

    speed: Speed
    seeds: Sequence[int]
    full: list[Trial] = field(default_factory=list)
    """Every request at full depth."""
    routed: list[Trial] = field(default_factory=list)
    """Every request on the tier that it was drawn for."""

    @property
    def trials(self) -> list[Trial]:
        """All of them."""
        return [*self.full, *self.routed]

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended one."""
        return any(trial.interrupted for trial in self.trials)

    @property
    def faults(self) -> list[str]:
        """What is amiss in the ledgers."""
        return [fault for trial in self.trials for fault in trial.faults]

    def same_answers(self, tier: str | None = None) -> list[float]:
        """For each seed, the share of requests answered in both trials that have the same tokens.

        Args:
            tier: Only requests that were routed on it.
        """
        shares = []
        of_full = {trial.seed: trial.tally.answers for trial in self.full}
        for trial in self.routed:
            wanted = set(trial.tally.numbers_of(tier)) if tier is not None else set(trial.tally.answers)
            both = wanted & set(of_full.get(trial.seed, ()))
            if both:
                same = sum(trial.tally.answers[one] == of_full[trial.seed][one] for one in both)
                shares.append(same / len(both))
        return shares

    def as_json(self) -> dict[str, Any]:
        """All figures of all trials."""
        tiers = dict.fromkeys(tier for trial in self.routed for tier in trial.audit.by_tier)
        return {
            "seeds": list(self.seeds),
            "factor": self.speed.factor,
            "day_seconds": self.speed.seconds,
            "peak_requests_per_second": self.speed.peak,
            "capacity_requests_per_second": self.speed.capacity,
            "interrupted": self.interrupted,
            "full_depth": [trial.as_json() for trial in self.full],
            "routed": [trial.as_json() for trial in self.routed],
            "same_answers": self.same_answers(),
            "same_answers_by_tier": {tier: self.same_answers(tier) for tier in tiers},
        }


def compare(
    model: PolarModel,
    folder: Path,
    speed: Speed,
    seeds: Sequence[int],
    progress: Progress = silent,
    prompts: Sequence[FilePrompt] = (),
) -> Comparison:
    """Serve each day at full depth and routed.

    Args:
        model: What answers; its own sink is not used.
        folder: Where the ledgers go, one per seed and way; those that are there are replaced.
        speed: How fast, and how many requests a day has.
        seeds: One day each.
        progress: Is told how far each trial is.
        prompts: The user's own, instead of generated messages.

    Returns:
        The comparison; after Ctrl-C what there was.
    """
    comparison = Comparison(speed, seeds)
    ways = [("full depth", FULL_DEPTH, comparison.full), ("routed", None, comparison.routed)]
    with unshared_starts(model):
        warm_up(model, prompts)
        for seed in seeds:
            arrivals = Day(speed.requests, seed, prompts).arrivals
            needed = compute_needed(model, arrivals)
            for name, tier, trials in ways[:: -1 if seed % 2 else 1]:
                stage = f"{name}, seed {seed}"
                trial = run_trial(
                    model,
                    arrivals,
                    folder / f"{name.replace(' ', '-')}-seed-{seed}.sqlite3",
                    seed=seed,
                    tier=tier,
                    factor=speed.factor,
                    needed=needed,
                    progress=lambda done, stage=stage: progress(stage, done, speed.requests),  # type: ignore[misc]
                )
                trials.append(trial)
                if trial.interrupted:
                    return comparison
    return comparison
