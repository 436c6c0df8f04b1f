"""lm-evaluation-harness: full depth has the scores of the harness's own Hugging Face class, on local tasks."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from polar_sdk.errors import InvalidRequestError, UnknownTierError
from polar_sdk.model import PolarModel
from polar_sdk.testing import tiny_llama, tiny_policy, tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

TASKS: dict[str, dict[str, Any]] = {
    "own_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "num_fewshot": 1,
        "fewshot_split": "test",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "own_last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "own_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "own_writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        # Stops that are in no special token: the harness's own class finds them there too, and stops early.
        "generation_kwargs": {"until": ["M", "%"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
ROWS = [
    {
        "question": f"Which of these has {thing} in it?" + " Think about it." * (n % 3),
        "choices": [f"a {thing}", "the sea", f"{thing} and more of it"],
        "answer": n % 3,
        "text": f"All about {thing}: " + f"it is number {n} of many. " * (4 * n),
    }
    for n, thing in enumerate("salt wood iron silk wool glass sand clay".split())  # noqa: SIM905
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The harness's own reader of tasks, which finds those in a folder."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    for name, task in TASKS.items():
        found = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(json.dumps({**found, "test_split": "test", **task}))  # JSON is YAML
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def network() -> Any:
    return tiny_llama(layers=6, seed=0, max_position_embeddings=256)


@pytest.fixture
def polar(network: Any) -> PolarModel:
    return PolarModel.from_hf(network, tiny_tokenizer(), policy=tiny_policy(6), ledger=None)


def results(model: Any, tasks: Any, **options: Any) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(TASKS), task_manager=tasks, bootstrap_iters=0, log_samples=True, **options
    )
    assert isinstance(found, dict)
    return found


def scores(found: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {
        (task, name): value
        for task, own in found["results"].items()
        for name, value in own.items()
        if isinstance(value, float) and "stderr" not in name
    }


def answers(found: dict[str, Any], task: str) -> list[Any]:
    return [sample["resps"] for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"])]


@pytest.mark.parametrize("chat", [False, True])
def test_full_depth_scores_as_the_harnesss_own_class(chat: bool, polar: PolarModel, network: Any, tasks: Any) -> None:
    """Of the same weights: every answer, text and metric; some texts are longer than the window."""
    from lm_eval.models.huggingface import HFLM

    from lm_eval_polar import PolarLM

    theirs = HFLM(pretrained=network, tokenizer=tiny_tokenizer(), device="cpu", batch_size=1)  # padding moves near ties
    expected = results(theirs, tasks, apply_chat_template=chat)
    found = results(PolarLM(polar, compute="exact"), tasks, apply_chat_template=chat)
    assert answers(found, "own_writing") == answers(expected, "own_writing")
    assert scores(found) == pytest.approx(scores(expected), rel=1e-3, abs=1e-6)
    for task in ("own_choice", "own_last_word", "own_rolling"):
        for ours, other in zip(_flat(answers(found, task)), _flat(answers(expected, task)), strict=True):
            assert float(ours) == pytest.approx(float(other), rel=1e-3, abs=1e-2)
    assert found["config"]["polar"]["compute_saved"] == 0


def _flat(value: Any) -> list[float]:
    if isinstance(value, list | tuple):
        return [number for part in value for number in _flat(part)]
    return [float(value == "True") if isinstance(value, str) and value in ("True", "False") else float(value)]


def test_a_tier_runs_its_program_and_its_saving_is_in_the_results(polar: PolarModel, tasks: Any) -> None:
    from lm_eval_polar import PolarLM

    full = results(PolarLM(polar, compute="exact"), tasks)
    chosen: list[dict[str, Any]] = [{"compute": "economy"}, {"program": "0 3-5"}]
    for options in chosen:
        found = results(PolarLM(polar, **options), tasks)
        facts = found["config"]["polar"]
        assert set(facts["programs"]) == {"0 3-5"}
        assert 0.3 < facts["compute_saved"] < 0.35
        assert facts["flops"] == round(facts["flops_at_full_depth"] * (1 - facts["compute_saved"]))
        assert scores(found) != scores(full)
    # Scores are those of the program, as `score` has them.
    question, choices = ROWS[0]["question"], ROWS[0]["choices"]
    [first] = [sample for sample in found["samples"]["own_last_word"] if sample["doc_id"] == 0]
    expected = polar.score(str(question), [f" {choices[0]}"], program="0 3-5")[0]  # type: ignore[index]
    assert float(_flat(first["resps"])[0]) == pytest.approx(expected, abs=1e-3)


def test_a_prompt_longer_than_the_window_loses_its_start(polar: PolarModel) -> None:
    from lm_eval.api.instance import Instance

    from lm_eval_polar import PolarLM

    model = PolarLM(polar, compute="exact")
    long, short = "x" * 300 + "the end", ("x" * 300 + "the end")[-200:]

    def ask(context: str) -> str:
        args = (context, {"until": [], "max_gen_toks": 56})
        return model.generate_until([Instance("generate_until", {}, args, 0)], disable_tqdm=True)[0]

    assert ask(long) == ask(short)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"num_beams": 4}, "num_beams"),
        ({"max_gen_toks": 256}, "no room"),
        ({"max_gen_toks": 0}, "no room"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], word: str, polar: PolarModel) -> None:
    from lm_eval.api.instance import Instance

    from lm_eval_polar import PolarLM

    model = PolarLM(polar)
    with pytest.raises(InvalidRequestError, match=word):
        model.generate_until([Instance("generate_until", {}, ("hello", settings), 0)])


def test_a_tier_that_is_none_fails_before_any_task(polar: PolarModel) -> None:
    from lm_eval_polar import PolarLM

    with pytest.raises(UnknownTierError):
        PolarLM(polar, compute="luxury")


@pytest.mark.model
def test_the_command(tmp_path: Path, tasks: Any) -> None:
    """`python -m lm_eval_polar` with the default model, as one would type it."""
    folder = next(path for path in tmp_path.parent.glob("tasks*") if (path / "own_choice.yaml").exists())
    words = ["--model", "polar", "--model_args", "compute=exact,max_length=512", "--tasks", "own_choice,own_writing"]
    words += ["--include_path", str(folder), "--limit", "3", "--output_path", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval_polar", *words], capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [file] = tmp_path.glob("out/**/results*.json")
    found = json.loads(file.read_text())
    assert found["config"]["polar"]["programs"] == {"0-29": found["config"]["polar"]["programs"]["0-29"]}
    assert 0 <= found["results"]["own_choice"]["acc,none"] <= 1
