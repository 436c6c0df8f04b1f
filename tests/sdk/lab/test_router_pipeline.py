"""The commands from prompts to a certified router, and the script that makes the shipped one, on a tiny model."""

from __future__ import annotations

import json
import random
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from polar_sdk.router.artifact import load_router
from polar_sdk.router.learned import LearnedRouter
from polar_sdk.router.map_set import MapSet
from polar_sdk.testing import tiny_llama, tiny_policy, tiny_tokenizer
from tests.sdk.command import polar

WORDS = ["red", "blue", "green", "apple", "pear", "stone", "river", "mountain", "sky", "cloud", "fish", "bird", "lamp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and two data files."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    tiny_policy(6).save(path / "policy.json")
    data = path / "data"
    data.mkdir()
    dice = random.Random(0)
    for name, count in (("first", 150), ("second", 110)):
        rows = [
            {
                "question": f"{' '.join(dice.sample(WORDS, 5))} {name} {number}",
                "choices": dice.sample(WORDS, 3),
                "answer": dice.randrange(3),
            }
            for number in range(count)
        ]
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path_factory.getbasetemp() / "router-cache"))


def facts(*words: object) -> dict[str, Any]:
    result = polar(*words, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_from_prompts_to_a_certified_router(folder: Path, tmp_path: Path) -> None:
    here = ["--model", folder, "--precision", "fp32", "--policy", folder / "policy.json"]
    first, second = folder / "data" / "first.jsonl", folder / "data" / "second.jsonl"
    menu, router = tmp_path / "menu.json", tmp_path / "router"
    quick = ["--population", 2, "--generations", 0, "--menu", 3, "--prompts", 12, "--budgets", "0.8,0.6"]
    assert polar("lab", "search", "--data", first, "--out", menu, *quick, *here).exit_code == 0
    rewards = tmp_path / "menu.rewards.safetensors"

    trained = facts("lab", "train", "--rewards", rewards, "--seeds", "0", "--out", router, *here)
    assert trained["kind"] == "menu" and trained["training"]["parameters"] > 0

    refused = polar("lab", "calibrate", "--router", router, "--data", second, "--tier", "premium=0.01", *here)
    assert refused.exit_code == 2
    assert (
        "α = 1 % needs at least 230 calibration prompts at δ = 0.1; there are 110 of kind 'choice'." in refused.output
    )
    assert "not a promise" in polar("lab", "calibrate", "--router", router, "--tier", "gold=0.1", *here).output

    tiers = ["--tier", "economy=0.5", "--tier", "standard=0.2:harms"]
    told = facts("lab", "calibrate", "--router", router, "--data", second, "--resplits", 3, *tiers, *here)
    assert {(one["tier"], one["kind"], one["times"]) for one in told["resplits"]} == {
        (tier, kind, 3) for tier in ("economy", "standard") for kind in ("choice", "any")
    }
    certified = told["certificate"]
    assert certified["kinds"]["choice"]["n"] == 110 and set(certified["tiers"]) == {"economy", "standard"}

    page = tmp_path / "page.html"
    seen = [*here, "--router", router]
    found = facts("evaluate", "--data", first, "--timed", 1, "--compute", "economy", "--html", page, *seen)
    assert found["point"] == "economy" and found["certificate_holds"]
    assert 0 < found["sets"][0]["prompts"] < 100  # what was trained on is left out
    assert found["certificate"] == certified
    assert {"flops_saved", "accuracy_drop_ci95", "non_identity_rate", "mcnemar_vs_shuffled_p"} < set(found)
    assert [(one["name"], one["point"]) for one in found["classes"]] == [("first", "economy")]
    assert found["classes"][0]["outcome"] in ("identity", "static", "routed")
    names = [one["name"] for one in found["sets"][0]["systems"]]
    assert names[:3] == ["identity", "router (economy)", "identity again"] and names[-1] == "oracle"
    assert [one["ms_per_token"] is not None for one in found["sets"][0]["systems"]][:3] == [True, True, False]
    assert "<svg" in page.read_text()
    table = polar("evaluate", "--data", first, "--timed", 0, "--theta", 0.5, *seen)
    assert "not deployable" in table.output and "best static program" in table.output

    answer = facts("run", "red apple", "--compute", "0.5", "--max-tokens", 2, "--no-ledger", *seen)
    assert answer["usage"]["router"] in ("menu", "identity")

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "\n".join(json.dumps({"prompt": f"{word} {word} {number}"}) for number, word in enumerate(WORDS))
    )
    attack = ["redteam", "--data", prompts, "--attempts", 4, "--tries", 1, "--seeds", 4, *seen]
    attacked = facts(*attack)
    assert [tier["tier"] for tier in attacked["tiers"]] == ["economy", "standard"]
    assert len(attacked["sent"]["without"]) == attacked["attempts"] == 4
    shown = polar(*attack).output
    assert shown.startswith("4 attempts (") and "strict" in shown and "economy: without defences" in shown


def test_mistakes_of_the_commands_are_one_line(folder: Path, tmp_path: Path) -> None:
    here = ["--model", folder, "--precision", "fp32"]
    for words, expected in (
        (["lab", "train", "--rewards", tmp_path / "no.safetensors"], "cannot be read"),
        (["lab", "train", "--rewards", tmp_path / "no.safetensors", "--seeds", "a"], "not a list of whole numbers"),
        (["lab", "calibrate", "--router", tmp_path / "no"], "there is no router in folder"),
        (["evaluate", "--router", tmp_path / "no"], "there is no router in folder"),
        (["evaluate", "--html", tmp_path / "no" / "page.html"], "its folder does not exist"),
        (["evaluate"], "the model has no router"),
        (["redteam"], "has no certified router"),
    ):
        result = polar(*words, *here)
        assert result.exit_code == 2 and expected in result.output, result.output


@pytest.mark.long
def test_the_script_makes_an_artifact(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POLAR_DATA", str(folder / "data"))
    out = tmp_path / "shipped"
    quick = "--precision fp32 --sets first,second --heal-sets first,second --limit 110 --segments 2-3"
    quick += " --cuts 4,3 --fit-per-kind 6 --per-kind 14 --distil 2 --tune 2 --menu 3 --prompts 12 --free 4"
    quick += " --programs 0-3|(4-5);0-1|[2-3]|4-5"
    quick += " --population 2 --generations 0 --steps 20 --seeds 0,1 --epochs 1 --resplits 2 --timed 1"
    quick += " --tier economy=0.5:strict=0.8 standard=0.3"
    words = ["--model", str(folder), "--work", str(tmp_path / "work"), "--out", str(out)]
    words += [word.replace("|", " ") for word in quick.split()]
    words += ["--results", str(tmp_path / "results")]
    monkeypatch.syspath_prepend(Path(__file__).parents[3])
    import_module("benchmarks.train_router").main(words)
    router = load_router(out)
    assert isinstance(router, LearnedRouter) and router.certificate is not None
    assert set(router.certificate.tiers) == {"economy", "standard"}
    for name in ("static", "menu-ending-0", "menu-ending-1", "menu-embedding", "policy"):
        found = json.loads((tmp_path / "work" / f"{name}.json").read_text())
        assert [one["name"] for one in found["sets"]] == ["all", "texts", "first", "second"]
        assert (tmp_path / "work" / f"{name}.html").is_file()
        assert {"economy", "standard", "exact"} <= set(found["texts"])
    said = capsys.readouterr().out
    assert "2 seeds of the router" in said and "all choices, economy: FLOPs saved" in said
    (results,) = (tmp_path / "results").glob("*.json")
    figures = [one["name"] for one in json.loads(results.read_text())["figures"]]
    assert {"economy: FLOPs saved", "standard: accuracy drop", "economy, all: tokens kept"} <= set(figures)
    assert "economy: promises broken on the other half" in figures
    assert {"exact, all: tokens kept", "economy: KL per token"} <= set(figures)
    if any(program.bridges for program in router.programs):
        assert (out / "bridges" / "maps.json").is_file()
    assert {segment for program in router.programs for segment in program.fills} == {(4, 5)}
    assert set(MapSet.load(out / "fills").fills) == {(4, 5)}


def test_no_passage_stands_in_two_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[3])
    router_texts = import_module("benchmarks.router_texts")
    rows = [
        {"passage": f"Passage {number}a of {{braces}}.", "question": f"What is {number}", "answer": "x"}
        for number in range(100)
    ]
    (tmp_path / "passages.train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("POLAR_DATA", str(tmp_path))
    asked = router_texts.texts("route", 9)
    left = router_texts.unused_passages(asked)
    assert left and all(passage not in item.prompt for passage in left for item in asked)
    made = router_texts.tasks_about(
        left, {"one": ("Read {text}",), "two": ("{text} or {other}?", "{other}: {text}")}, 9
    )
    assert [item.task for item in made[:4]] == ["one", "two", "one", "two"]
    assert made[1].prompt == f"{left[1]} or {left[2]}?" and made[3].prompt == f"{left[5]}: {left[4]}"
    assert all(sum(passage in item.prompt for item in made) <= 1 for passage in left)
    assert router_texts.unused_passages([*asked, *made]) == left[sum(2 if item.task == "two" else 1 for item in made) :]
