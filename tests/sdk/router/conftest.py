"""A menu router over the tiny model whose choice is known: it reads which half of the alphabet a prompt uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from polar_sdk.programs.program import Program
from polar_sdk.router.certificate import Certificate, Counts
from polar_sdk.router.learned import RouterFacts
from polar_sdk.router.menu import MenuRouter
from polar_sdk.router.network import FeatureReader, Network
from polar_sdk.testing import tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_sdk.model import PolarModel

DEPTH = 6
MENU = (Program.identity(DEPTH), Program.skipping(DEPTH, [2]), Program.skipping(DEPTH, [2, 3]))
THETAS = (0.0, 0.05, 0.2, 0.6)


@pytest.fixture(scope="session")
def model() -> PolarModel:
    return tiny_model()


@pytest.fixture
def router(model: PolarModel) -> MenuRouter:
    """Predicts losses of 0.1 and 0.5 for the two cheaper programs, whatever the prompt."""
    import torch

    features = FeatureReader(model.decoder).stack([[1, 2, 3], [40, 50, 60], [7] * 9])
    network = Network.fresh(features, (), len(MENU) - 1, seed=0)
    network.biases[-1].copy_(torch.logit(torch.tensor([0.9, 0.5])))
    facts = RouterFacts(model="tiny", fingerprint=model.fingerprint, depth=DEPTH, dial=THETAS, default_theta=0.2)
    return MenuRouter(facts, network, MENU).bind(model.decoder, model.fingerprint)


@pytest.fixture
def certified(router: MenuRouter) -> MenuRouter:
    """None, 5, 18 and 120 of 500 prompts are lost at the four θ."""
    certificate = Certificate(
        subject=router.subject,
        data="d",
        delta=0.1,
        thetas=THETAS,
        kinds={"prompt": Counts(n=500, lost={"differs": (0, 5, 18, 120)})},
        saved=(0.0, 0.01, 0.1, 0.3),
    )
    tiers = {"economy": certificate.promise(0.3), "standard": certificate.promise(0.05)}
    return router.with_certificate(Certificate.model_validate({**certificate.model_dump(), "tiers": tiers}))


@pytest.fixture
def chosen(model: PolarModel) -> Callable[..., str]:
    """The program that a request ran."""

    def run(engine: PolarModel, **options: object) -> str:
        return engine.generate("some text", max_tokens=2, **options).usage.program  # type: ignore[arg-type]

    return run
