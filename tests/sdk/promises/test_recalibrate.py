"""`polar recalibrate`: new promises from kept prompts, and one clear line where there are none or too few."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from polar_sdk.model import PolarModel
from polar_sdk.request import kept as kept_module
from polar_sdk.request.kept import KeptPrompts, kept_path
from polar_sdk.router.artifact import load_router, save_router
from polar_sdk.router.certificate import Certificate, Counts
from polar_sdk.router.learned import LearnedRouter
from polar_sdk.router.store import saved_router_path
from polar_sdk.testing import tiny_llama, tiny_policy, tiny_tokenizer
from tests.sdk.command import polar
from tests.sdk.fixed_router import fixed_router
from tests.sdk.router.conftest import MENU, THETAS

if TYPE_CHECKING:
    from pathlib import Path

WORDS = [
    "red",
    "blue",
    "green",
    "apple",
    "pear",
    "stone",
    "river",
    "mountain",
    "sky",
    "cloud",
    "fish",
    "bird",
    "lamp",
    "chair",
    "table",
    "window",
]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PolarModel:
    """A model in a folder, whose router promises two tiers."""
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_module, "user_data_path", lambda *_, **__: tmp_path / "data")
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tiny_policy(6).save(tmp_path / "policy.json")
    model = PolarModel.from_pretrained(folder, precision="fp32", policy=tiny_policy(6), ledger=None)
    router = fixed_router(model, MENU, (0.9, 0.5), dial=THETAS)
    counts = {"prompt": Counts(n=500, lost={"differs": (0, 5, 18, 120)})}
    saved = {"text": (0.0, 0.01, 0.1, 0.3)}
    bare = Certificate(subject=router.subject, data="d", delta=0.1, thetas=THETAS, kinds=counts, saved=saved)
    tiers = {"economy": bare.promise(0.3), "standard": bare.promise(0.1)}
    certified = Certificate.model_validate({**bare.model_dump(), "tiers": tiers})
    save_router(router.with_certificate(certified), tmp_path / "router")
    return model


def keep(engine: PolarModel, count: int) -> KeptPrompts:
    dice, kept = random.Random(0), KeptPrompts(kept_path(engine.fingerprint), engine.decode, frozenset("*"), 1.0)
    for number in range(count):
        text = f"{' '.join(dice.sample(WORDS, 6))} {number}"
        kept.keep(engine.prompt_tokens(text), "acme" if number % 2 else "other", "economy")
    return kept


def test_new_promises_from_kept_prompts(engine: PolarModel, tmp_path: Path) -> None:
    options = ["--model", tmp_path / "model", "--precision", "fp32", "--policy", tmp_path / "policy.json"]
    options += ["--router", tmp_path / "router"]
    none = polar("recalibrate", *options)
    assert none.exit_code == 2 and "--audit-keep" in none.output

    kept = keep(engine, 12)
    few = polar("recalibrate", *options)
    assert few.exit_code == 2 and "needs at least 22 calibration prompts" in few.output

    kept = keep(engine, 30)
    done = polar("recalibrate", *options)
    assert done.exit_code == 0, done.output
    made = load_router(saved_router_path(engine.fingerprint, engine.dtype))
    before = load_router(tmp_path / "router")
    assert isinstance(made, LearnedRouter) and made.certificate is not None
    assert isinstance(before, LearnedRouter) and before.certificate is not None
    assert {name: promise.asked for name, promise in made.certificate.tiers.items()} == {
        name: promise.asked for name, promise in before.certificate.tiers.items()
    }
    assert 22 <= made.certificate.kinds["prompt"].n <= len(kept)

    forgotten = polar("recalibrate", "--forget", "acme", *options)
    assert forgotten.exit_code == 0 and "removed" in forgotten.output
    assert {row.split('"tenant": "')[1].split('"')[0] for row in kept.path.read_text().splitlines()} == {"other"}
