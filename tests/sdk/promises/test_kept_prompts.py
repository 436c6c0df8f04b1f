"""Prompts of audited requests: nothing is kept unless a provider says of whom, for how long, and the tenant agrees."""

from __future__ import annotations

import json
import stat
import time
from typing import TYPE_CHECKING, Any

import pytest

from polar_sdk.errors import AuditError
from polar_sdk.lab import read_items
from polar_sdk.lab.items import TokensItem
from polar_sdk.lab.rewards.cache import RewardCache
from polar_sdk.lab.rewards.tasks import make_tasks
from polar_sdk.request import kept as kept_module
from polar_sdk.request.kept import KeptPrompts
from polar_sdk.request.options import Audits
from polar_sdk.testing import tiny_model
from polar_sdk.usage import ListSink
from tests.sdk.promises.test_audits import until
from tests.sdk.router import conftest as router_conftest

if TYPE_CHECKING:
    from pathlib import Path

    from polar_sdk.model import PolarModel
    from polar_sdk.router.menu import MenuRouter

model, router, certified = router_conftest.model, router_conftest.router, router_conftest.certified


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where kept prompts go."""
    data = tmp_path / "data"
    monkeypatch.setattr(kept_module, "user_data_path", lambda *_, **__: data)
    return data


def asked(certified: MenuRouter, audits: Audits | None, **options: Any) -> tuple[PolarModel, ListSink]:
    sink = ListSink()
    engine = tiny_model(router=certified, sink=sink, audit_share=1.0, audits=audits)
    for tenant in ("acme", "other"):
        engine.generate(f"what {tenant} asks", compute="economy", max_tokens=3, tenant=tenant, **options)
    until(lambda: len(sink.audits) == 2)
    return engine, sink


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in folder.rglob("*.jsonl") for line in path.read_text().splitlines()]


def test_nothing_of_a_prompt_is_stored_by_default(certified: MenuRouter, folder: Path) -> None:
    _, sink = asked(certified, None)
    assert not folder.exists()
    for stored in [*sink.audits, *sink.records]:
        assert "what acme asks" not in stored.model_dump_json()


def test_prompts_of_named_tenants_are_kept_for_their_owner_alone(certified: MenuRouter, folder: Path) -> None:
    engine, _ = asked(certified, Audits(keep=["acme"]))
    (row,) = rows(folder)
    assert row["tokens"] == engine.prompt_tokens("what acme asks")
    assert (row["tenant"], row["tier"]) == ("acme", "economy")
    assert 29.9 < (row["until"] - time.time()) / 86_400 < 30.1
    (path,) = folder.rglob("*.jsonl")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_tenant_may_forbid_it_and_what_was_kept_is_removed(certified: MenuRouter, folder: Path) -> None:
    engine, sink = asked(certified, Audits(keep=["*"]))
    assert {row["tenant"] for row in rows(folder)} == {"acme", "other"}
    engine.generate("private", compute="economy", max_tokens=3, tenant="acme", tags={"keep_prompts": "no"})
    until(lambda: len(sink.audits) == 3)
    assert [row["tenant"] for row in rows(folder)] == ["other"]


def test_where_full_depth_serves_instead_prompts_are_kept_still(certified: MenuRouter, folder: Path) -> None:
    from tests.sdk.promises.test_fallback import put_at_risk

    sink = ListSink()
    engine = tiny_model(router=certified, sink=sink, audit_share=1.0, audits=Audits(keep=["acme"]))
    for tier in ("economy", "standard"):
        put_at_risk(sink, certified, tier)
    before = len(sink.audits)
    assert engine.generate("new traffic", compute="economy", max_tokens=3, tenant="acme").usage.tier == "exact"
    until(lambda: len(rows(folder)) == 1)
    assert len(sink.audits) == before


def test_prompts_go_when_their_time_is_up(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    KeptPrompts(path, str, frozenset({"acme"}), days=1e-9).keep([1, 2], "acme", "economy")
    lasting = KeptPrompts(path, str, frozenset({"acme"}), days=1)
    lasting.keep([3, 4], "acme", "economy")
    assert [json.loads(line)["tokens"] for line in path.read_text().splitlines()] == [[3, 4]]
    assert (len(lasting), lasting.forget("other"), lasting.forget("acme"), len(lasting)) == (1, 0, 1, 0)
    assert not path.read_text()


def test_a_damaged_file_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    path.write_text("not JSON\n")
    with pytest.raises(AuditError, match=str(path)):
        len(KeptPrompts(path, str))


@pytest.mark.parametrize("wrong", [{"keep": "acme"}, {"keep_days": 0}, {"keep_days": float("nan")}, {"tenant": " x"}])
def test_options_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"keep|tenant"):
        Audits(**wrong)


def test_a_kept_prompt_is_measured_as_it_was_asked(certified: MenuRouter, folder: Path, tmp_path: Path) -> None:
    engine = tiny_model(router=certified, sink=ListSink(), audit_share=1.0, audits=Audits(keep=["*"]))
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is asked"}]
    engine.generate(messages, compute="economy", max_tokens=3)
    until(lambda: len(rows(folder)) == 1)
    (path,) = folder.rglob("*.jsonl")
    (item,) = read_items(path)
    assert isinstance(item, TokensItem)
    (task,) = make_tasks(engine, [item], RewardCache(tmp_path / "rewards"))
    assert task.question.prompt == tuple(engine.prompt_tokens(messages))
    assert task.question.continuations == tuple(engine.greedy_answers([messages], max_tokens=48))
