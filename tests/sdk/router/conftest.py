"""A menu router over the tiny model whose choice is known, with and without a certificate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from polar_sdk.programs.program import Program
from polar_sdk.router.certificate import Certificate, Counts, form_of
from polar_sdk.testing import tiny_model
from tests.sdk.fixed_router import fixed_router

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_sdk.model import PolarModel
    from polar_sdk.router.menu import MenuRouter

DEPTH = 6
MENU = (Program.identity(DEPTH), Program.skipping(DEPTH, [2]), Program.skipping(DEPTH, [2, 3]))
THETAS = (0.0, 0.05, 0.2, 0.6)


@pytest.fixture(scope="session")
def model() -> PolarModel:
    return tiny_model()


def known_router(model: PolarModel) -> MenuRouter:
    """Predicts losses of 0.1 and 0.5 for the two cheaper programs, whatever the prompt."""
    return fixed_router(model, MENU, (0.9, 0.5), dial=THETAS, default_theta=0.2)


def certified_router(router: MenuRouter, kind: str = "prompt") -> MenuRouter:
    """None, 5, 18 and 120 of 500 prompts of a kind are lost at the four θ."""
    certificate = Certificate(
        subject=router.subject,
        data="d",
        delta=0.1,
        thetas=THETAS,
        kinds={kind: Counts(n=500, lost={"differs": (0, 5, 18, 120)})},
        saved={form_of(kind): (0.0, 0.01, 0.1, 0.3)},
    )
    tiers = {"economy": certificate.promise(0.3), "standard": certificate.promise(0.05)}
    return router.with_certificate(Certificate.model_validate({**certificate.model_dump(), "tiers": tiers}))


@pytest.fixture
def router(model: PolarModel) -> MenuRouter:
    """Of `known_router`, without a certificate."""
    return known_router(model)


@pytest.fixture
def certified(router: MenuRouter) -> MenuRouter:
    """The same with a certificate."""
    return certified_router(router)


@pytest.fixture
def chosen(model: PolarModel) -> Callable[..., str]:
    """The program that a request ran."""

    def run(engine: PolarModel, **options: object) -> str:
        return engine.generate("some text", max_tokens=2, **options).usage.program  # type: ignore[arg-type]

    return run
