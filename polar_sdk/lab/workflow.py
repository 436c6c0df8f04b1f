"""The three steps as one call each: train, calibrate, evaluate; from files and to files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar_sdk.errors import DataError, RouterError
from polar_sdk.lab.evaluation.calibrate import TIER_ALPHAS
from polar_sdk.lab.evaluation.judge import Judge
from polar_sdk.lab.items import builtin_items
from polar_sdk.lab.program_search.matrix import RewardMatrix
from polar_sdk.lab.training.settings import MenuSettings, PolicySettings
from polar_sdk.lab.training.train import RouterKind, Trainer
from polar_sdk.router.artifact import load_router, save_router
from polar_sdk.router.base import Router
from polar_sdk.router.bridge_set import BridgeSet
from polar_sdk.router.store import BRIDGES, attach_router

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_sdk.lab.evaluation.calibrate import TierPromise
    from polar_sdk.lab.evaluation.results import Evaluation
    from polar_sdk.lab.items import Item
    from polar_sdk.model import PolarModel
    from polar_sdk.router.features import FeatureKind
    from polar_sdk.router.learned import LearnedRouter

    Progress = Callable[[str, int, int], None]


_CHECKPOINTS = "checkpoints"


def train_router(
    model: PolarModel,
    rewards: RewardMatrix | str | Path,
    *,
    kind: RouterKind,
    items: Sequence[Item] | None,
    features: FeatureKind,
    layers: int,
    settings: MenuSettings | PolicySettings | None,
    out: str | Path | None,
    bridges: str | Path | None,
    on_progress: Progress,
) -> LearnedRouter:
    """See `PolarModel.train_router`."""
    _check_settings(kind, settings)
    matrix = rewards if isinstance(rewards, RewardMatrix) else RewardMatrix.load(rewards)
    made = None if bridges is None else BridgeSet.load(bridges)
    if bridges is not None:
        model.load_bridges(bridges)
    checkpoints = None if out is None else Path(out) / _CHECKPOINTS
    trainer = Trainer(model, matrix, features, layers, checkpoints, on_progress)
    router = _trained(trainer, kind, builtin_items() if items is None else items, settings)
    if out is not None:
        _save(router, Path(out), made)
    return router


def _trained(trainer: Trainer, kind: RouterKind, items: Sequence[Item], settings: Any) -> LearnedRouter:
    if kind == "policy":
        return trainer.policy(items, settings)
    return trainer.menu(settings) if kind == "menu" else trainer.static(settings)


def calibrate_router(
    model: PolarModel,
    items: Sequence[Item] | None,
    *,
    router: Router | str | Path | None,
    tiers: Mapping[str, TierPromise] | None,
    delta: float,
    out: str | Path | None,
    on_progress: Progress,
) -> LearnedRouter:
    """See `PolarModel.calibrate`."""
    judge = Judge(model, _obtain(model, router), on_progress=on_progress)
    certified = judge.calibrate(
        builtin_items() if items is None else items, tiers=TIER_ALPHAS if tiers is None else tiers, delta=delta
    )
    target = out if out is not None else router
    if isinstance(target, (str, Path)):
        beside = None if isinstance(router, Router) or router is None else Path(router) / BRIDGES
        made = BridgeSet.load(beside) if beside is not None and beside.is_dir() else None
        _save(certified, Path(target), made)
    return certified


def evaluate_router(
    model: PolarModel,
    data: Sequence[Item] | Mapping[str, Sequence[Item]] | None,
    *,
    router: Router | str | Path | None,
    points: Mapping[str, float] | None,
    timed: int,
    seed: int,
    on_progress: Progress,
) -> Evaluation:
    """See `PolarModel.evaluate`."""
    given = builtin_items() if data is None else data
    sets = given if isinstance(given, Mapping) else {"data": given}
    if not sets:
        raise DataError("there is no set to evaluate on; give at least one.")
    judge = Judge(model, _obtain(model, router), on_progress=on_progress)
    return judge.evaluate(sets, points=points, timed=timed, seed=seed)


def _check_settings(kind: str, settings: MenuSettings | PolicySettings | None) -> None:
    wanted = {"menu": MenuSettings, "static": MenuSettings, "policy": PolicySettings}
    if kind not in wanted:
        raise RouterError(f"router kind {kind!r} cannot be trained; menu, static and policy can.")
    if settings is not None and not isinstance(settings, wanted[kind]):
        raise RouterError(f"kind {kind!r} takes {wanted[kind].__name__}, not {type(settings).__name__}.")


def _obtain(model: PolarModel, router: Router | str | Path | None) -> Router | None:
    """A router at hand, bound; from a folder, its bridges are loaded too."""
    if router is None or isinstance(router, Router):
        return router
    return attach_router(load_router(router), model, Path(router))


def _save(router: LearnedRouter, folder: Path, made: BridgeSet | None) -> None:
    """Write a router, and of the bridges those that its programs cross."""
    crossed = {segment for program in router.programs for segment in program.bridges}
    crossed |= {segment for one in router.facts.training.get("static", ()) for segment in _segments(one["program"])}
    if crossed and made is None:
        raise RouterError(
            f"the router's programs cross layers by bridges, such as {min(crossed)}, that would be left behind.",
            hint="Name their folder with bridges=, or --bridges.",
        )
    if crossed and made is not None:
        kept = {segment: bridge for segment, bridge in made.bridges.items() if segment in crossed}
        records = tuple(record for record in made.records if (record.first, record.last) in crossed)
        replace(made, bridges=kept, records=records).save(folder / BRIDGES)
    save_router(router, folder)


def _segments(text: str) -> Sequence[tuple[int, int]]:
    from polar_sdk.programs.program import Program

    return Program.parse(text).bridges
