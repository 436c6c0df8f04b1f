"""Routers on disk: what is written is read back, and what was altered, lost or foreign is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from polar_sdk.errors import RouterDamagedError, RouterError
from polar_sdk.model import PolarModel
from polar_sdk.programs.policy import Policy
from polar_sdk.programs.program import Program
from polar_sdk.router.artifact import load_router, save_router
from polar_sdk.router.base import IdentityRouter, Route, Router, StaticRouter
from polar_sdk.router.layerwise import LayerwiseRouter
from polar_sdk.router.learned import RouterFacts
from polar_sdk.router.menu import MenuRouter
from polar_sdk.router.network import Network
from polar_sdk.testing import random_fill, tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

TOKENS = (5, 80, 33, 7, 120)


@pytest.fixture
def folder(certified: MenuRouter, tmp_path: Path) -> Path:
    return save_router(certified, tmp_path / "router")


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "router.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


def test_a_menu_router_comes_back_as_it_was(folder: Path, certified: MenuRouter, model: PolarModel) -> None:
    read = load_router(folder)
    assert isinstance(read, MenuRouter)
    bound = read.bind(model.decoder, model.fingerprint)
    assert (bound.facts, bound.programs, bound.certificate) == (
        certified.facts,
        certified.programs,
        certified.certificate,
    )
    assert bound.version == certified.version and bound.certified
    assert bound.choose(TOKENS, 0.3) == certified.choose(TOKENS, 0.3)
    assert sorted(path.name for path in folder.iterdir()) == ["router.json", "router.safetensors"]


def test_what_a_router_allows_of_choices_is_kept(model: PolarModel, router: MenuRouter, tmp_path: Path) -> None:
    network = replace(router.network, choosing=torch.tensor([-1.0, 2.0]))
    one = MenuRouter(router.facts, network, router.programs).bind(model.decoder, model.fingerprint)
    assert one.subject.router != router.subject.router, "a certificate covers it"
    save_router(one, tmp_path)
    found = load_router(tmp_path)
    assert isinstance(found, MenuRouter)
    outputs = torch.tensor([[0.0, 0.0], [-torch.inf, 3.0]])
    assert found.allowed(outputs, "text").tolist() == outputs.tolist()
    assert found.allowed(outputs, "choice").tolist() == [[-1.0, 2.0], [-torch.inf, 5.0]]
    with pytest.raises(ValueError, match="choosing"):
        Network.of({**network.tensors(), "choosing": torch.zeros(3)})


def test_a_policy_router_comes_back_as_it_was(model: PolarModel, tmp_path: Path) -> None:
    facts = RouterFacts(model="t", fingerprint=model.fingerprint, depth=6, training={"free_layers": [1, 2, 3, 4]})
    network = Network.fresh(torch.randn(9, 49), (256, 256), 12, seed=3)
    network.weights[-1].normal_()
    router = LayerwiseRouter(facts, network, [Program.identity(6)]).bind(model.decoder, model.fingerprint)
    read = load_router(save_router(router, tmp_path))
    assert isinstance(read, LayerwiseRouter)
    assert read.bind(model.decoder, model.fingerprint).choose(TOKENS, 0.5) == router.choose(TOKENS, 0.5)


def test_fixed_routers_come_back_as_they_were(tmp_path: Path) -> None:
    static = load_router(save_router(StaticRouter("0-2 5"), tmp_path / "static"))
    assert isinstance(static, StaticRouter) and static.program.text == "0-2 5"
    identity = load_router(save_router(IdentityRouter(6), tmp_path / "identity"))
    assert isinstance(identity, IdentityRouter) and identity.program == Program.identity(6)


def test_a_router_of_ones_own_cannot_be_saved(tmp_path: Path) -> None:
    class Own(Router):
        kind = "own"

        def route(self, tokens: Sequence[int]) -> Route:
            return Route(Program.identity(6))

    with pytest.raises(RouterError, match="'own' cannot be saved"):
        save_router(Own(), tmp_path)


def standard(facts: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = facts["certificate"]["tiers"]["standard"]
    return found


def alter_weights(folder: Path) -> None:
    path = folder / "router.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "bias.0": tensors["bias.0"] + 1}, path)


@pytest.mark.parametrize(
    "damage",
    [
        alter_weights,
        lambda folder: edit(folder, lambda facts: facts["programs"].append("0-1")),
        lambda folder: edit(folder, lambda facts: facts["facts"].update(forms=["choice"])),
        lambda folder: edit(folder, lambda facts: standard(facts)["setting"].update(text=0.6)),
        lambda folder: edit(folder, lambda facts: facts["certificate"]["subject"].update(router="0" * 64)),
        lambda folder: (folder / "router.json").write_bytes((folder / "router.json").read_bytes()[:40]),
        lambda folder: (folder / "router.safetensors").write_bytes(b"cut"),
        lambda folder: (folder / "router.safetensors").unlink(),
    ],
    ids=[
        "weights",
        "menu",
        "forms",
        "loosened promise",
        "certificate of other weights",
        "json cut",
        "weights cut",
        "missing",
    ],
)
def test_a_router_that_was_altered_is_refused(folder: Path, damage: Callable[[Path], object]) -> None:
    damage(folder)
    with pytest.raises(RouterDamagedError):
        load_router(folder)


def test_where_there_is_no_router(tmp_path: Path) -> None:
    with pytest.raises(RouterError, match="nowhere"):
        load_router(tmp_path / "nowhere")


def test_features_that_the_weights_were_not_trained_on_are_refused(folder: Path) -> None:
    edit(folder, lambda facts: facts["facts"].update(features="ending"))
    with pytest.raises(RouterDamagedError, match=r"49 numbers.* 97"):
        tiny_model(router=folder)


def test_objects_over_the_same_weights_share_a_router_until_it_changes(
    folder: Path, certified: MenuRouter, model: PolarModel
) -> None:
    one, other = (PolarModel(model.loaded, router=folder, ledger=None) for _ in range(2))
    assert one.router is other.router
    assert PolarModel(model.loaded, router=folder, policy=Policy(max_visits=2), ledger=None).router is not one.router
    edit(folder, lambda facts: facts.update(certificate=None))
    changed = PolarModel(model.loaded, router=folder, ledger=None).router
    assert isinstance(changed, MenuRouter)
    assert isinstance(one.router, MenuRouter)
    assert (one.router.certified, changed.certified) == (True, False)
    model.decoder.set_fills({(2, 3): random_fill(model.decoder, (2, 3))})
    try:
        assert PolarModel(model.loaded, router=folder, ledger=None).router is not changed
    finally:
        model.decoder.set_fills({})
    save_router(certified, folder)
    (folder / "router.safetensors").write_bytes(b"")
    with pytest.raises(RouterDamagedError):
        PolarModel(model.loaded, router=folder, ledger=None)
