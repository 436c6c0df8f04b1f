"""Request time: tiers, tolerances and promises of a loaded router, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from polar_sdk.errors import CertificateError, InvalidRequestError, RouterError, ToleranceError, UnknownTierError
from polar_sdk.programs.policy import Policy
from polar_sdk.router.artifact import save_router
from polar_sdk.router.base import StaticRouter
from polar_sdk.router.store import saved_router_path
from polar_sdk.testing import tiny_llama, tiny_model, tiny_tokenizer
from polar_sdk.usage import ListSink

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from polar_sdk.router.menu import MenuRouter
    from polar_sdk.usage import UsageBound


@pytest.mark.parametrize(
    ("compute", "program"),
    [
        ("economy", "0-1 4-5"),
        ("standard", "0-1 3-5"),
        (None, "0-1 3-5"),
        ("exact", "0-5"),
        (0.006, "0-5"),
        (0.05, "0-1 3-5"),
        (0.3, "0-1 4-5"),
    ],
)
def test_tiers_and_tolerances_are_certified_points(
    certified: MenuRouter, chosen: Callable[..., str], compute: Any, program: str
) -> None:
    assert chosen(tiny_model(router=certified), compute=compute) == program


def test_usage_names_the_router_its_tier_and_its_flops(certified: MenuRouter) -> None:
    usage = tiny_model(router=certified).generate("some text", compute="economy", max_tokens=2).usage
    assert (usage.router, usage.router_version, usage.tier) == ("menu", certified.version, "economy")
    assert usage.flops.router == certified.network.flops > 0
    assert usage.flops.total < usage.identity_flops


def test_a_request_that_a_sink_downgrades_still_pays_for_its_router(certified: MenuRouter) -> None:
    class Cheapest(ListSink):
        def reserve(self, bound: UsageBound) -> int:
            return len(bound.offers) - 1

    usage = tiny_model(router=certified, sink=Cheapest()).generate("some text", max_tokens=2).usage
    assert (usage.router, usage.program) == ("static", "0 3-5")
    assert usage.flops.router == certified.network.flops


@pytest.mark.parametrize("options", [{"prompt": "x" * 600}, {"temperature": -1.0}])
def test_a_request_that_is_refused_has_run_nothing(certified: MenuRouter, options: dict[str, Any]) -> None:
    engine = tiny_model(router=certified)
    with FlopCounterMode(display=False) as counter, pytest.raises(InvalidRequestError):
        engine.generate(**{"prompt": "some text", "compute": "economy", **options})
    assert counter.get_total_flops() == 0


def test_a_router_of_the_model_is_read_from_its_folder(
    certified: MenuRouter, tmp_path: Path, chosen: Callable[..., str]
) -> None:
    engine = tiny_model(router=str(save_router(certified, tmp_path)))
    assert chosen(engine, compute="economy") == "0-1 4-5"


def test_a_program_by_hand_outvotes_the_router(certified: MenuRouter, chosen: Callable[..., str]) -> None:
    assert chosen(tiny_model(router=certified), program="0-3 5") == "0-3 5"


def test_tiers_without_a_promise_are_refused(certified: MenuRouter) -> None:
    engine = tiny_model(router=certified)
    with pytest.raises(UnknownTierError, match="'premium'"):
        engine.generate("x", compute="premium")
    with pytest.raises(ToleranceError, match="500"):
        engine.generate("x", compute=0.001)


def test_an_uncalibrated_router_promises_nothing(router: MenuRouter, chosen: Callable[..., str]) -> None:
    engine = tiny_model(router=router)
    assert chosen(engine) == "0-1 3-5"  # its default θ
    assert chosen(engine, compute="exact") == "0-5"
    for compute in ("economy", 0.1):
        with pytest.raises(UnknownTierError):
            engine.generate("x", compute=compute)


def test_without_a_router_the_policy_serves_and_no_tolerance(chosen: Callable[..., str]) -> None:
    assert chosen(tiny_model(), compute="economy") == "0 3-5"
    for router in (None, StaticRouter("0-2 5")):
        with pytest.raises(ToleranceError):
            tiny_model(router=router).generate("x", compute=0.05)


def test_other_weights_underneath_void_the_promise(certified: MenuRouter) -> None:
    certificate = certified.certificate
    assert certificate is not None
    for field in ("dtype", "engine", "bridges", "menu"):
        subject = certificate.subject.model_copy(update={field: "other"})
        void = certified.with_certificate(certificate.model_copy(update={"subject": subject}))
        engine = tiny_model(router=void)
        for compute in ("economy", 0.1, None):
            with pytest.raises(CertificateError, match=field):
                engine.generate("x", compute=compute)
        assert engine.generate("x", compute="exact", max_tokens=1).usage.program == "0-5"


def test_a_router_that_breaks_the_policy_is_refused(certified: MenuRouter) -> None:
    with pytest.raises(RouterError):
        tiny_model(router=certified, policy=Policy(protected=(2,)))


def test_the_users_certified_router_is_found(
    certified: MenuRouter, router: MenuRouter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polar_sdk import PolarModel

    monkeypatch.setenv("POLAR_CACHE", str(tmp_path))

    def fresh(**settings: Any) -> PolarModel:
        return PolarModel.from_hf(tiny_llama(), tiny_tokenizer(), ledger=None, **settings)

    assert fresh().router is None
    folder = save_router(router, saved_router_path(certified.facts.fingerprint, "float32"))
    assert fresh().router is None  # it promises nothing
    save_router(certified, folder)
    served = fresh().router
    assert served is not None and served.version == certified.version
    assert fresh(policy=Policy()).router is None  # a named policy says what the tiers are
    (folder / "router.safetensors").write_bytes(b"")
    assert fresh().router is None  # nobody named it
