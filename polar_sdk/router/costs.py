"""What the visits of a model on this host cost, for whoever checks a bill: from its configuration, without its weights.

The model is found by the fingerprint of the usage record, so that no other model's sizes can stand in for it; bridges
and fills come with the routers that are stored for it. Fetches nothing. Knows FLOPs, no money.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_sdk.errors import BridgeError, FillError, ModelNotFoundError
from polar_sdk.models.find import find_local
from polar_sdk.models.network import read_config
from polar_sdk.router.bridge_set import BridgeSet
from polar_sdk.router.fill_set import FillSet
from polar_sdk.router.store import BRIDGES, FILLS, router_folders

if TYPE_CHECKING:
    from pathlib import Path

    from polar_sdk.programs.cost import CostModel, Segment


def stored_costs(name: str, fingerprint: str, router: Path | None = None) -> CostModel:
    """The costs of a model on this host, bridges and fills of its routers included.

    Args:
        name: Its name in the usage record, or a folder or hub id of the same model.
        fingerprint: Of the usage record.
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
    bridges: dict[Segment, int] = {}
    fills: dict[Segment, int] = {}
    for folder in (*([] if router is None else [router]), *router_folders(fingerprint)):
        bridges = {**_maps(BridgeSet, folder / BRIDGES, fingerprint), **bridges}
        fills = {**_maps(FillSet, folder / FILLS, fingerprint), **fills}
    return cost.with_bridges(bridges).with_fills(fills)


def _maps(kind: type[BridgeSet | FillSet], folder: Path, fingerprint: str) -> dict[Segment, int]:
    """FLOPs per token of the maps beside a router; none where they are another model's, or damaged."""
    if not folder.is_dir():
        return {}
    try:
        found = kind.load(folder)
    except (BridgeError, FillError):
        return {}
    if found.fingerprint != fingerprint:
        return {}
    return {(each.first, each.last): each.flops_per_token for each in found.records}
