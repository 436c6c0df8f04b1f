"""The steps from prompts to a certified router, one call each: heal, train, calibrate, evaluate; from and to files.

`search` is in `program_search.search`, `scan` in `layer_scan`. Knows which part does a step, not how.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from polar_sdk.errors import DataError, RouterError
from polar_sdk.lab.evaluation.calibrate import TIER_ALPHAS
from polar_sdk.lab.evaluation.judge import Judge
from polar_sdk.lab.healing.fill_healer import FillHealer, FillOptions
from polar_sdk.lab.healing.heal import Healer, HealOptions
from polar_sdk.lab.items import builtin_items
from polar_sdk.lab.program_search.matrix import RewardMatrix
from polar_sdk.lab.training.layerwise_training import LayerwiseSettings
from polar_sdk.lab.training.menu_training import MenuSettings
from polar_sdk.lab.training.train import RouterKind, RouterTrainer
from polar_sdk.programs.program import Program
from polar_sdk.router.artifact import load_router, save_router
from polar_sdk.router.base import Router
from polar_sdk.router.bridge_set import BridgeSet
from polar_sdk.router.fill_set import FillSet
from polar_sdk.router.store import BRIDGES, FILLS, attach_router
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from polar_sdk.lab.evaluation.results import Evaluation
    from polar_sdk.lab.items import Item
    from polar_sdk.lab.rewards.cache import RewardCache
    from polar_sdk.model import PolarModel
    from polar_sdk.router.certificate import TierPromise
    from polar_sdk.router.learned import LearnedRouter
    from polar_sdk.router.network import FeatureKind


_CHECKPOINTS = "checkpoints"


def heal(
    model: PolarModel,
    items: Sequence[Item] | None = None,
    segments: str = "",
    *,
    out: str | Path | None = None,
    cache: RewardCache | None = None,
    on_progress: Progress = silent,
    **options: Any,
) -> BridgeSet:
    """Fit bridges over segments of layers; the model uses them from now on.

    Args:
        model: The model.
        items: Prompts to fit on; None = the prompts that come with the package.
        segments: First and last layers, e.g. `12-15,17-20`; groups that are not used together are separated by `;`.
        out: Folder to write the bridges to; checkpoints are kept there too.
        cache: Where identity's answers to prompts are kept; None = in memory.
        on_progress: Called with (stage, steps done, steps in all).
        **options: Fields of `HealOptions`.

    Raises:
        DataError: The data is empty or nothing but copies.
        BridgeError: An option is out of range, a segment does not fit the model, no prompt is left to fit on, or a
            checkpoint is of another run.
    """
    healer = Healer(model, items, segments, out, cache, on_progress, HealOptions(**options))
    return model.use_bridges(healer.run())


def heal_fills(
    model: PolarModel,
    items: Sequence[Item] | None = None,
    segments: str = "default",
    *,
    out: str | Path | None = None,
    cache: RewardCache | None = None,
    on_progress: Progress = silent,
    **options: Any,
) -> FillSet:
    """Fit fills, which write the keys and values of layers for prompt tokens; the model uses them from now on.

    Args:
        model: The model.
        items: Prompts to fit on; None = the prompts that come with the package. Choice questions are left out.
        segments: Cuts, from which all layers up to the last are filled, or first and last layers, e.g. `27,24,20-23`,
            or several of these that one program fills, e.g. `18-21+23`;
            `default` = what changes least, of 10 % to 50 % of the layers, found by measuring.
        out: Folder to write the fills to; checkpoints are kept there too.
        cache: Where identity's answers to prompts are kept; None = in memory.
        on_progress: Called with (stage, steps done, steps in all).
        **options: Fields of `FillOptions`.

    Raises:
        DataError: The data is empty or nothing but copies.
        FillError: An option is out of range, a segment does not fit the model, no prompt is left to fit on, or a
            checkpoint is of another run.
    """
    return model.use_fills(FillHealer(model, items, segments, out, cache, on_progress, FillOptions(**options)).run())


def train(
    model: PolarModel,
    rewards: RewardMatrix | str | Path,
    *,
    kind: RouterKind = "menu",
    items: Sequence[Item] | None = None,
    features: FeatureKind = "ending",
    settings: MenuSettings | LayerwiseSettings | None = None,
    out: str | Path | None = None,
    bridges: str | Path | None = None,
    fills: str | Path | None = None,
    on_progress: Progress = silent,
) -> LearnedRouter:
    """Train a router on what programs do on prompts; once it is calibrated, it serves.

    Args:
        model: The model.
        rewards: The reward matrix of `search`, or its file.
        kind: `menu` chooses among the matrix's programs, `policy` layer by layer; `static` reads nothing.
        items: For `policy`: the items that were searched on; None = the prompts that come with the package.
        features: `ending` for the embeddings of all tokens and of the last ones, `embedding` for those of all.
        settings: How to train, `LayerwiseSettings` for `policy`; None = the defaults.
        out: Folder to write the router to; checkpoints are kept there until training is done.
        bridges: Folder of the bridges that the programs cross; these are written beside the router.
        fills: Folder of the fills that the programs use; likewise.
        on_progress: Called with (stage, steps done, steps in all).

    Raises:
        RouterModelError: The rewards were measured on another model or in another dtype.
        RouterError: The kind is unknown, the settings are for another kind, or maps that programs use are missing.
        DataError: The matrix holds no train or no dev prompt, or its menu is identity alone.
    """
    _check_settings(kind, settings)
    matrix = rewards if isinstance(rewards, RewardMatrix) else RewardMatrix.load(rewards)
    maps = _Maps(
        None if bridges is None else model.use_bridges(bridges), None if fills is None else model.use_fills(fills)
    )
    checkpoints = None if out is None else Path(out) / _CHECKPOINTS
    trainer = RouterTrainer(model, matrix, features, checkpoints, on_progress)
    router = _trained(trainer, kind, builtin_items() if items is None else items, settings)
    if out is not None:
        _save(router, Path(out), maps)
    return router


def _trained(trainer: RouterTrainer, kind: RouterKind, items: Sequence[Item], settings: Any) -> LearnedRouter:
    if kind == "policy":
        return trainer.layerwise(items, settings)
    return trainer.menu(settings) if kind == "menu" else trainer.static(settings)


def calibrate(
    model: PolarModel,
    items: Sequence[Item] | None = None,
    *,
    router: Router | str | Path | None = None,
    tiers: Mapping[str, TierPromise] | None = None,
    delta: float = 0.1,
    out: str | Path | None = None,
    on_progress: Progress = silent,
) -> LearnedRouter:
    """Certify what a router promises, on prompts it was not trained on.

    Args:
        model: The model.
        items: Prompts; None = the prompts that come with the package. What the router was trained on is left out.
        router: A trained router or its folder; None = this model's.
        tiers: What each tier is to promise; None = `TIER_ALPHAS`.
        delta: Maximum probability that a promise is wrong.
        out: Folder to write the certified router to; None = the folder `router`, where that is one.
        on_progress: Called with (stage, steps done, steps in all).

    Raises:
        CalibrationSizeError: A tier's α needs more prompts.
        DataError: No unseen prompt is left, or the labels are of one class.
        RouterError: There is no learned router.
    """
    judge = Judge(model, _obtain(model, router), on_progress=on_progress)
    certified = judge.calibrate(
        builtin_items() if items is None else items, tiers=TIER_ALPHAS if tiers is None else tiers, delta=delta
    )
    target = out if out is not None else router
    if isinstance(target, (str, Path)):
        beside = None if isinstance(router, Router) or router is None else Path(router)
        _save(certified, Path(target), _Maps() if beside is None else _beside(beside))
    return certified


def evaluate(
    model: PolarModel,
    data: Sequence[Item] | Mapping[str, Sequence[Item]] | None = None,
    *,
    router: Router | str | Path | None = None,
    points: Mapping[str, float] | None = None,
    timed: int = 8,
    free: int = 0,
    seed: int = 0,
    on_progress: Progress = silent,
) -> Evaluation:
    """Measure a router beside identity and honest controls, on prompts it has not seen.

    Args:
        model: The model.
        data: Items, or several sets by name; None = the prompts that come with the package. What the router was
            trained or calibrated on is left out.
        router: A trained router or its folder; None = this model's.
        points: θ by name; None = the certified tiers. The first is compared with the controls.
        timed: Prompts that are timed; 0 times none.
        free: Prompts that every tier also answers freely, for texts as a reader sees them.
        seed: Of the controls.
        on_progress: Called with (stage, steps done, steps in all).

    Raises:
        DataError: There is no set, no unseen prompt is left, or the labels are of one class.
        RouterError: There is no learned router.
    """
    items = builtin_items() if data is None else data
    sets = items if isinstance(items, Mapping) else {"data": items}
    if not sets:
        raise DataError("there is no set to evaluate on; give at least one.")
    judge = Judge(model, _obtain(model, router), on_progress=on_progress)
    return judge.evaluate(sets, points=points, timed=timed, free=free, seed=seed)


def _check_settings(kind: str, settings: MenuSettings | LayerwiseSettings | None) -> None:
    by_kind = {"menu": MenuSettings, "policy": LayerwiseSettings, "static": MenuSettings}
    if kind not in by_kind:
        raise RouterError(f"router kind {kind!r} cannot be trained; choose from: {', '.join(by_kind)}.")
    if settings is not None and not isinstance(settings, by_kind[kind]):
        raise RouterError(f"kind {kind!r} takes {by_kind[kind].__name__}, not {type(settings).__name__}.")


def _obtain(model: PolarModel, router: Router | str | Path | None) -> Router | None:
    """The router; one from a folder is bound to the model, and its bridges and fills are loaded too."""
    if router is None or isinstance(router, Router):
        return router
    return attach_router(load_router(router), model, Path(router))


class _Maps(NamedTuple):
    """What the programs of a router may use."""

    bridges: BridgeSet | None = None
    fills: FillSet | None = None


def _beside(router: Path) -> _Maps:
    """The maps that are stored beside a router."""
    bridges, fills = router / BRIDGES, router / FILLS
    return _Maps(BridgeSet.load(bridges) if bridges.is_dir() else None, FillSet.load(fills) if fills.is_dir() else None)


def _save(router: LearnedRouter, folder: Path, maps: _Maps) -> None:
    """Write a router, and those bridges and fills that its programs use."""
    static = [Program.parse(row["program"]) for row in router.facts.training.get("static", ())]
    programs = [*router.programs, *static]
    crossed = {segment for program in programs for segment in program.bridges}
    filled = {segment for program in programs for segment in program.fills}
    if crossed and maps.bridges is None:
        raise RouterError(
            f"the router's programs cross layers by bridges, such as {min(crossed)}, that would not be saved with it.",
            hint="Name their folder with bridges=, or --bridges.",
        )
    if filled and maps.fills is None:
        raise RouterError(
            f"the router's programs fill layers by maps, such as {min(filled)}, that would not be saved with it.",
            hint="Name their folder with fills=, or --fills.",
        )
    if crossed and maps.bridges is not None:
        kept = {segment: bridge for segment, bridge in maps.bridges.bridges.items() if segment in crossed}
        records = tuple(record for record in maps.bridges.records if (record.first, record.last) in crossed)
        replace(maps.bridges, bridges=kept, records=records).save(folder / BRIDGES)
    if filled and maps.fills is not None:
        maps.fills.only(filled).save(folder / FILLS)
    save_router(router, folder)
