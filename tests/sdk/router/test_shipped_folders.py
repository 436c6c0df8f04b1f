"""The folders of routers that ship: whole, certified, and with the maps of their programs."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from polar_sdk.router.artifact import load_router
from polar_sdk.router.learned import LearnedRouter
from polar_sdk.router.map_set import MapSet
from polar_sdk.router.store import map_folders

ROUTERS = Path(str(resources.files("polar_sdk") / "shipped" / "routers"))


@pytest.mark.parametrize("folder", sorted(ROUTERS.iterdir()), ids=lambda folder: str(folder.name))
def test_a_folder_holds_a_certified_router_and_its_maps(folder: Path) -> None:
    router = load_router(folder)
    assert isinstance(router, LearnedRouter)
    certificate = router.certificate
    assert certificate is not None and set(certificate.tiers) >= {"economy", "standard"}
    assert certificate.subject.model == router.facts.fingerprint
    sets = [MapSet.load(each) for each in map_folders(folder)]
    assert all(each.facts.fingerprint == router.facts.fingerprint for each in sets)
    held = {segment for each in sets for segment in each.maps}
    used = {segment for program in router.programs for segment in (*program.bridges, *program.fills)}
    assert used and used <= held
