"""The costs of visits of a model on this host, for whoever checks a bill: from its configuration, without its weights.

The model is found by the fingerprint of the usage record, so that no other model's sizes can stand in for it; bridges
and fills come with the routers that are stored for it. Fetches nothing. Knows FLOPs, no money.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from polar_sdk.errors import MapError, ModelNotFoundError
from polar_sdk.models.find import find_local
from polar_sdk.models.network import read_config
from polar_sdk.router.map_set import MapSet
from polar_sdk.router.store import map_folders, router_folders

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from polar_sdk.programs.cost import CostModel, Segment
    from polar_sdk.router.map_set import MapKind


def stored_costs(name: str, fingerprint: str, router: Path | None = None) -> CostModel:
    """The costs of a model on this host, bridges and fills of its routers included.

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
    for folder in (*([] if router is None else [router]), *router_folders(fingerprint)):
        for found in _maps(folder, fingerprint):
            own = {each.segment: each.flops_per_token for each in found.facts.segments}
            known[found.facts.kind] = own | known[found.facts.kind]
    return cost.with_bridges(known["bridge"]).with_fills(known["fill"])


def _maps(router: Path, fingerprint: str) -> Iterator[MapSet]:
    """The maps beside a router, without those that are another model's, or damaged."""
    for folder in map_folders(router):
        with suppress(MapError):
            found = MapSet.load(folder)
            if found.facts.fingerprint == fingerprint:
                yield found
