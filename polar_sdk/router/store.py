"""The policy and the router that a model gets, and what must be loaded before a router serves.

Policy: the caller's, else the user's own for the model, else the shipped one, else plain limits; a policy of the
caller's that names floors and no tiers is added to the next of these. Router: the caller's, else the user's own for the
model, else the shipped one. A router that nobody named is used only if its certificate holds for what would run; a
named one is always used, and refuses requests whose promise it cannot keep. Before it serves, its bridges and fills are
loaded and its programs checked against the policy. Knows files and models, not how routers are trained.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from polar_sdk.engine.allocator import give_back_freed_memory
from polar_sdk.errors import MapError, ModelNotFoundError, ProgramError, RouterError
from polar_sdk.models.find import find_local
from polar_sdk.models.network import read_config
from polar_sdk.models.paths import cache_folder
from polar_sdk.programs.policy import Policy
from polar_sdk.programs.program import Program
from polar_sdk.router.artifact import load_router, model_of, save_router
from polar_sdk.router.base import Router
from polar_sdk.router.learned import LearnedRouter
from polar_sdk.router.map_set import MapSet

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.programs.cost import CostModel, Segment
    from polar_sdk.router.map_set import MapKind

MAP_FOLDERS: Final[Mapping[MapKind, str]] = {"bridge": "bridges", "fill": "fills"}
"""Names of the folders in a router's folder that contain its maps."""


class _Host(Protocol):
    """The model object that a router joins."""

    policy: Policy

    @property
    def fingerprint(self) -> str: ...

    @property
    def decoder(self) -> Decoder: ...

    def use_maps(self, maps: str | Path) -> object: ...


def saved_router_path(fingerprint: str, dtype: str) -> Path:
    """Folder of the user's router for a model in a precision, which `polar fit` and `polar lab train` write."""
    return cache_folder() / "routers" / f"{fingerprint}-{dtype}"


def find_policy(policy: Policy | str | Path | None, fingerprint: str) -> Policy:
    """Choose the policy for a model.

    Args:
        policy: A policy, or the path of a policy file; None = the one shipped for the model, if any.
        fingerprint: The model's.

    Raises:
        PolicyError: The named policy file is wrong.
    """
    if policy is not None:
        named = Policy.of(policy)
        return named.over(find_policy(None, fingerprint)) if named.only_adds else named
    return Policy.shipped(fingerprint) or Policy()


def find_router(router: Router | str | Path | None, host: _Host, *, look: bool) -> Router | None:
    """Choose the router for a model and prepare it to serve.

    Args:
        router: A router, or the folder of one; None looks for one.
        host: The model.
        look: Whether to look for one where none was named.

    Raises:
        RouterError: The named router is damaged, belongs to another model, or breaks the policy's bounds.
    """
    if isinstance(router, Router):
        return attach_router(router, host, None)
    if router is None and not look:
        return None
    # Objects over the same weights share what was read, checked and bound for one of them, while nothing has changed.
    folders = [*router_folders(host.fingerprint)] if router is None else [Path(router)]
    decoder = host.decoder
    key = (router is None, host.policy.model_dump_json(), *map(_stamps, folders))
    found = decoder.prepared.get(key)
    if isinstance(found, _Prepared) and found.holds(decoder):
        return found.router
    if router is None:
        chosen = next(_certified_routers(host), None)
    else:
        chosen = attach_router(load_router(router), host, Path(router))
    decoder.prepared[key] = _Prepared(chosen, _maps_of(decoder))
    return chosen


class _Prepared(NamedTuple):
    """A router that is ready to serve, and the maps that the weights had then."""

    router: Router | None
    maps: list[object]

    def holds(self, decoder: Decoder) -> bool:
        """Whether the weights have the same maps still."""
        now = _maps_of(decoder)
        return len(now) == len(self.maps) and all(one is other for one, other in zip(now, self.maps, strict=True))


def _maps_of(decoder: Decoder) -> list[object]:
    """The maps that a model in memory has."""
    return [*decoder.bridges.values(), *decoder.fills.values()]


def _stamps(folder: Path) -> tuple[object, ...]:
    """Size and time of last change of every file of a router."""
    files = [file for each in (folder, *map_folders(folder)) if each.is_dir() for file in each.iterdir()]
    stats = [(str(file), file.stat()) for file in sorted(files)]
    return str(folder), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def attach_router(router: Router, host: _Host, folder: Path | None) -> Router:
    """Load the bridges and fills that are stored beside a router, and bind it to the model.

    Raises:
        RouterModelError: It was trained for another model.
        RouterError: One of its programs breaks the policy's bounds.
    """
    if not isinstance(router, LearnedRouter):
        return router
    if router.facts.fingerprint == host.fingerprint and folder is not None:
        for maps in map_folders(folder):
            host.use_maps(maps)
    bound = router.bind(host.decoder, host.fingerprint)
    for program in bound.programs:
        try:
            host.policy.check(program, host.decoder.cost)
        except ProgramError as error:
            raise RouterError(f"the router may choose what the policy forbids: {error}") from error
    give_back_freed_memory()
    return bound


def _certified_routers(host: _Host) -> Iterator[Router]:
    """Routers for the model whose promises hold here; a damaged one is passed over, because nobody named it."""
    for folder in router_folders(host.fingerprint, host.decoder.dtype_name):
        if model_of(folder) != host.fingerprint:  # to check a certificate takes longer than to read a small model
            continue
        try:
            router = load_router(folder)
            if isinstance(router, LearnedRouter) and router.fits(host.fingerprint, host.decoder.dtype_name):
                bound = attach_router(router, host, folder)
                if isinstance(bound, LearnedRouter) and bound.certified:
                    yield bound
        except (RouterError, MapError, ProgramError):
            continue


def save_with_maps(router: LearnedRouter, folder: Path, maps: Iterable[MapSet]) -> None:
    """Write a router's folder, and in it the bridges and fills that its programs use.

    Raises:
        RouterError: None of the sets has all of its bridges, or all of its fills.
    """
    sets = list(maps)
    static = [Program.parse(row["program"]) for row in router.facts.training.get("static", ())]
    programs = [*router.programs, *static]
    used: dict[MapKind, set[Segment]] = {
        "bridge": {segment for program in programs for segment in program.bridges},
        "fill": {segment for program in programs for segment in program.fills},
    }
    for kind, segments in used.items():
        found = [each for each in sets if each.facts.kind == kind and segments <= each.maps.keys()]
        if segments and not found:
            raise RouterError(
                f"the router's programs use {kind}s, such as {min(segments)}, that would not be saved with it.",
                hint="Name the folder that holds all of them with maps=, or --maps.",
            )
        if segments:
            found[-1].only(segments).save(folder / MAP_FOLDERS[kind])
    save_router(router, folder)


def stored_costs(name: str, fingerprint: str, router: Path | None = None) -> CostModel:
    """The costs of visits of a model on this host, for checking a bill: from its configuration, without weights.

    The model is found by the fingerprint of the usage record, so that no other model's sizes can stand in for it;
    bridges and fills come with the routers that are stored for it. Fetches nothing.

    Args:
        name: Its name in the usage record, or a folder or hub id of the same model.
        fingerprint: Fingerprint of the model, in the usage record.
        router: A router's folder, whose bridges and fills go before those that are found.

    Raises:
        ModelNotFoundError: No model on this host has that fingerprint.
        UnsupportedArchitectureError: The engine does not run it.
    """
    from polar_sdk.engine.families import find_family

    local = find_local(name, fingerprint)
    if local is None:
        raise ModelNotFoundError(
            f"no model {name!r} with the fingerprint {fingerprint[:12]}… is on this host.",
            hint="Name its folder with --model.",
        )
    cost = find_family(read_config(local.folder)).cost()
    known: dict[MapKind, dict[Segment, int]] = {"bridge": {}, "fill": {}}
    folders = (*([] if router is None else [router]), *router_folders(fingerprint))
    for folder in [maps for each in folders for maps in map_folders(each)]:
        with suppress(MapError):  # damaged maps serve nobody
            facts = MapSet.load(folder).facts
            if facts.fingerprint == fingerprint:
                own = {each.segment: each.flops_per_token for each in facts.segments}
                known[facts.kind] = own | known[facts.kind]
    return cost.with_bridges(known["bridge"]).with_fills(known["fill"])


def map_folders(router: Path) -> list[Path]:
    """Folders of the bridges and the fills that are stored beside a router."""
    return [folder for name in MAP_FOLDERS.values() if (folder := router / name).is_dir()]


def router_folders(fingerprint: str, dtype: str = "*") -> Iterator[Path]:
    """Folders of routers: the user's own for the model, in that precision or in any, then every shipped one."""
    pattern = saved_router_path(fingerprint, dtype)
    for saved in sorted(pattern.parent.glob(pattern.name)):
        if (saved / "router.json").is_file():
            yield saved
    shipped = resources.files("polar_sdk") / "shipped" / "routers"
    if shipped.is_dir():
        for folder in shipped.iterdir():
            if isinstance(folder, Path) and (folder / "router.json").is_file():
                yield folder
