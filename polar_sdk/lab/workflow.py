"""The steps from prompts to a certified router, one call each: heal, train, calibrate, evaluate; from and to files.

`search` is in `program_search.search`, `scan` in `layer_scan`. Knows which part does a step, not how.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar_sdk.errors import DataError, RouterError
from polar_sdk.lab.evaluation.calibrate import TIER_ALPHAS
from polar_sdk.lab.evaluation.judge import Judge
from polar_sdk.lab.healing.heal import Healer
from polar_sdk.lab.healing.method import BridgeOptions, FillOptions
from polar_sdk.lab.items import builtin_items
from polar_sdk.lab.program_search.matrix import RewardMatrix
from polar_sdk.lab.training.layerwise_training import LayerwiseSettings
from polar_sdk.lab.training.menu_training import MenuSettings
from polar_sdk.lab.training.train import RouterKind, RouterTrainer
from polar_sdk.programs.program import Program
from polar_sdk.router.artifact import load_router, save_router
from polar_sdk.router.base import Router
from polar_sdk.router.map_set import MapKind, MapSet
from polar_sdk.router.store import MAP_FOLDERS, attach_router, map_folders
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from polar_sdk.lab.evaluation.results import Evaluation
    from polar_sdk.lab.items import Item
    from polar_sdk.lab.rewards.cache import RewardCache
    from polar_sdk.model import PolarModel
    from polar_sdk.programs.cost import Segment
    from polar_sdk.router.certificate import TierPromise
    from polar_sdk.router.learned import LearnedRouter
    from polar_sdk.router.network import FeatureKind


_CHECKPOINTS = "checkpoints"


def heal(
    model: PolarModel,
    items: Sequence[Item] | None = None,
    segments: str = "",
    *,
    kind: MapKind = "bridge",
    out: str | Path | None = None,
    cache: RewardCache | None = None,
    on_progress: Progress = silent,
    **options: Any,
) -> MapSet:
    """Fit maps that stand for layers; the model uses them from now on. What was interrupted resumes where it stopped.

    Args:
        model: The model.
        items: Prompts to fit on; None = the prompts that come with the package. Choice questions are for bridges only.
        segments: For bridges, first and last layers, e.g. `12-15,17-20`; groups that are not used together are
            separated by `;`. For fills, cuts, from which all layers up to the last are filled, or first and last
            layers, e.g. `27,24,20-23`, or several of these that one program fills, e.g. `18-21+23`; `default` = what
            changes least, of 10 % to 50 % of the layers, found by measuring.
        kind: Which maps to fit: bridges cross layers, fills write their keys and values for prompt tokens.
        out: Folder to write the maps to; checkpoints are kept there until training is done.
        cache: Where identity's answers to prompts are kept; None = in memory.
        on_progress: Called with (stage, steps done, steps in all).
        **options: Fields of `BridgeOptions` or `FillOptions`.

    Raises:
        DataError: The data is empty or nothing but copies.
        MapError: An option is out of range, a segment does not fit the model, or no prompt is left to fit on.
    """
    chosen = BridgeOptions.of(**options) if kind == "bridge" else FillOptions.of(**options)
    return model.use_maps(Healer(model, chosen, items, segments, out, cache, on_progress).run())


def train(
    model: PolarModel,
    rewards: RewardMatrix | str | Path,
    *,
    kind: RouterKind = "menu",
    items: Sequence[Item] | None = None,
    features: FeatureKind = "ending",
    settings: MenuSettings | LayerwiseSettings | None = None,
    out: str | Path | None = None,
    maps: str | Path | Sequence[str | Path] = (),
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
        maps: Folder of the bridges or fills that the programs use, or several; these are written beside the router.
        on_progress: Called with (stage, steps done, steps in all).

    Raises:
        RouterModelError: The rewards were measured on another model or in another dtype.
        RouterError: The kind is unknown, the settings are for another kind, or maps that programs use are missing.
        DataError: The matrix holds no train or no dev prompt, or its menu is identity alone.
    """
    _check_settings(kind, settings)
    matrix = rewards if isinstance(rewards, RewardMatrix) else RewardMatrix.load(rewards)
    used = [model.use_maps(each) for each in MapSet.load_all(maps)]
    checkpoints = None if out is None else Path(out) / _CHECKPOINTS
    trainer = RouterTrainer(model, matrix, features, checkpoints, on_progress)
    router = _trained(trainer, kind, builtin_items() if items is None else items, settings)
    if out is not None:
        _save(router, Path(out), used)
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
        _save(certified, Path(target), [] if beside is None else map(MapSet.load, map_folders(beside)))
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


def _save(router: LearnedRouter, folder: Path, maps: Iterable[MapSet]) -> None:
    """Write a router, and those bridges and fills that its programs use."""
    sets = {each.facts.kind: each for each in maps}
    static = [Program.parse(row["program"]) for row in router.facts.training.get("static", ())]
    programs = [*router.programs, *static]
    used: dict[MapKind, set[Segment]] = {
        "bridge": {segment for program in programs for segment in program.bridges},
        "fill": {segment for program in programs for segment in program.fills},
    }
    for kind, segments in used.items():
        if segments and kind not in sets:
            raise RouterError(
                f"the router's programs use {kind}s, such as {min(segments)}, that would not be saved with it.",
                hint="Name their folder with maps=, or --maps.",
            )
        if segments:
            sets[kind].only(segments).save(folder / MAP_FOLDERS[kind])
    save_router(router, folder)
