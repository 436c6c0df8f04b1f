from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources
from typing import TYPE_CHECKING

import pytest

from polar_sdk.router.artifact import load_router
from polar_sdk.router.learned import LearnedRouter
from polar_sdk.router.savings import measured_tiers

if TYPE_CHECKING:
    from pathlib import Path

SHIPPED = resources.files("polar_sdk") / "shipped" / "routers" / "smollm2-135m-instruct"


def test_what_the_shipped_certificate_measured_is_read_without_its_weights() -> None:
    router = load_router(str(SHIPPED))
    assert isinstance(router, LearnedRouter)
    assert router.certificate is not None
    measured = measured_tiers(router.facts.fingerprint)
    assert measured is not None
    certificate = router.certificate
    for tier in certificate.tiers:
        assert measured.saved[tier] == certificate.saves(tier)
    assert measured.prompts == certificate.kinds["prompt"].n
    assert measured.router == certificate.subject.router


def test_nothing_is_measured_of_a_model_without_a_router() -> None:
    assert measured_tiers("00" * 32) is None


@pytest.mark.parametrize("content", ["no", "{}", '{"certificate": null}', '{"certificate": {"subject": 5}}'])
def test_a_damaged_router_measured_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path))
    folder = tmp_path / "routers" / "abc"
    folder.mkdir(parents=True)
    (folder / "router.json").write_text(content, encoding="utf-8")
    assert measured_tiers("abc") is None


def test_the_users_own_router_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path))
    whole = json.loads((SHIPPED / "router.json").read_text(encoding="utf-8"))
    fingerprint = whole["certificate"]["subject"]["model"]
    folder = tmp_path / "routers" / fingerprint
    folder.mkdir(parents=True)
    (folder / "router.json").write_text(json.dumps({**whole, "weights_sha256": "own"}), encoding="utf-8")
    measured = measured_tiers(fingerprint)
    assert measured is not None
    assert measured.router == "own"


def test_reading_it_imports_no_torch() -> None:
    script = "import sys, polar_sdk.router.savings as m; m.measured_tiers('x'); print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "False\n"
    )
