"""Figures of a router and of several seeds of its training: quality per tier, and the spread over the seeds.

Used by `train_router.py`; reads the evaluations and re-splits that it wrote, and measures nothing.
"""

from __future__ import annotations

import json
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.results import Recorder
    from polar_sdk.lab.evaluation.results import Evaluation

__all__ = ["record_choices", "record_part", "record_router", "record_seeds"]

_CLASSES = {"all choices": "choices", "all texts": "texts"}
"""Topic of the figures by class of prompts."""
_TEXTS = {
    "FLOPs saved": "flops_saved",
    "tokens kept": "tokens_kept",
    "95 % kept": "strict_kept",
    "three quarters kept": "three_quarters_kept",
}


def record_router(recorder: Recorder, evaluation: Path) -> None:
    """One router: per tier on choices and on texts, beside its controls, and how often its promises broke."""
    facts = json.loads(evaluation.read_text(encoding="utf-8"))
    certificate = facts["certificate"] or {"tiers": {}}
    for result in facts["classes"]:
        alpha = certificate["tiers"].get(result["point"], {}).get("alpha")
        _record_class(recorder, result, None if alpha is None else 100 * alpha)
    for tier, whole in facts["texts"].items():
        _record_texts(recorder, tier, whole)
    for comparison in facts["sets"][0]["comparisons"]:
        for figure in ("agreement", "accuracy"):
            if (gain := comparison[f"{figure}_gain"]) is not None:
                name = f"{facts['point']} over {comparison['control']}: {figure}"
                note = f"exact McNemar, p = {comparison[f'{figure}_p']:.2g}"
                recorder.add(name, 100 * gain, "points", topic="controls", note=note)
    resplits = evaluation.with_suffix(".resplits.json")
    if resplits.is_file():
        for row in json.loads(resplits.read_text(encoding="utf-8")):
            share = 100 * row["other_half"] / row["times"]
            note = f"{row['times']} promises made on a random half of the prompts"
            name = f"{row['tier']}: promises broken on the other half"
            recorder.add(name, share, "%", topic="controls", goal=10, better="lower", note=note)


def record_choices(recorder: Recorder, evaluation: Evaluation) -> None:
    """One router's tiers on questions with choices alone."""
    assert evaluation.certificate is not None
    whole, tiers = evaluation.sets[0], evaluation.certificate.tiers
    for system in whole.systems:
        tier = system.name.removeprefix("router (").removesuffix(")")
        if system.role == "router" and tier in tiers:
            result = {**system.model_dump(), "name": "all choices", "point": tier, "prompts": whole.prompts}
            result["flops_saved"], result["agreement"] = system.flops_saved.total, system.agreement.value
            _record_class(recorder, result, 100 * tiers[tier].alpha)


def _record_texts(recorder: Recorder, tier: str, whole: dict[str, Any]) -> None:
    """Answers in text of one tier: by length, the worst kind, and what was written freely."""
    for name, part in _parts(whole).items():
        kind = whole["worst_kind"] if name == "worst kind" else None
        record_part(recorder, f"{tier}, {name}", part, topic="answers", kind=kind)
    if whole["free"] is not None:
        _record_free(recorder, tier, whole["free"])


def _record_free(recorder: Recorder, tier: str, free: dict[str, Any]) -> None:
    """Record the free answers of one tier."""
    note = f"{free['prompts']} prompts answered freely"
    recorder.add(f"{tier}: KL per token", free["kl_per_token"], "nats", topic="free", better="lower", note=note)
    recorder.add(f"{tier}: tokens before the first change", free["first_divergence"], "tokens", topic="free", note=note)
    recorder.add(f"{tier}: chrF to full depth", 100 * free["chrf"], "%", topic="free", note=note)
    recorder.add(
        f"{tier}: repeated runs of four tokens",
        100 * free["repeated_4grams"],
        "%",
        topic="free",
        better="lower",
        note=note,
    )
    if free["gold_f1_drop"] is not None:
        drop, low, high = (100 * value for value in free["gold_f1_drop"])
        facts = {"low": low, "high": high, "interval": "95%", "better": "lower", "note": note}
        recorder.add(f"{tier}: drop of F1 to the right text", drop, "points", topic="free", **facts)


def record_part(recorder: Recorder, name: str, part: dict[str, Any], *, topic: str, kind: str | None = None) -> None:
    """Record savings and tokens kept of one tier on some prompts answered in text."""
    note = f"{part['prompts']:,} prompts; noise floor {part['noise_floor']:.1%}" + (f"; {kind}" if kind else "")
    for figure, key in _TEXTS.items():
        bounds = part.get(f"{key}_interval")  # evaluations of before 2026-11-29 have none
        sure = {} if bounds is None else {"low": 100 * bounds[0], "high": 100 * bounds[1], "interval": "95%"}
        recorder.add(f"{name}: {figure}", 100 * part[key], "%", topic=topic, note=note, **sure)


def _record_class(recorder: Recorder, result: dict[str, Any], promise: float | None) -> None:
    """One class of prompts in one tier."""
    topic = _CLASSES.get(result["name"])
    if topic is None:
        return
    tier, note = result["point"], f"{result['prompts']:,} prompts"
    recorder.add(f"{tier}: FLOPs saved", 100 * result["flops_saved"], "%", topic=topic, note=note)
    if result["accuracy_drop"] is not None:
        drop, low, high = (100 * value for value in result["accuracy_drop"])
        facts = {"low": low, "high": high, "interval": "95%", "goal": promise, "better": "lower", "note": note}
        recorder.add(f"{tier}: accuracy drop", drop, "points", topic=topic, **facts)
    recorder.add(f"{tier}: other program than full depth", 100 * result["non_identity_rate"], "%", topic=topic)
    recorder.add(f"{tier}: same answer", 100 * result["agreement"], "%", topic=topic)


def record_seeds(recorder: Recorder, evaluations: Sequence[Path]) -> str:
    """Mean and range over the seeds of the router; also as text, a line per class, tier and figure."""
    by_seed = [_figures(json.loads(path.read_text(encoding="utf-8"))) for path in evaluations]
    lines = [f"{len(by_seed)} seeds of the router: mean ± spread, from lowest to highest, in %"]
    for name in by_seed[0]:
        values = [figures[name] for figures in by_seed]
        low, high = min(values), max(values)
        lines.append(f"{name:44} {fmean(values):7.2f} ± {pstdev(values):5.2f}   {low:7.2f} … {high:.2f}")
        note = f"spread {pstdev(values):.2f}; {', '.join(f'{value:.2f}' for value in values)}"
        unit = "points" if name.endswith("drop") else "%"
        facts = {"low": low, "high": high, "interval": "seeds", "note": note}
        recorder.add(name, min(max(fmean(values), low), high), unit, topic="seeds", **facts)
    return "\n".join(lines)


def _figures(evaluation: dict[str, Any]) -> dict[str, float]:
    """Figures by name, in percent."""
    figures: dict[str, float] = {}
    for result in evaluation["classes"]:
        if result["name"] not in _CLASSES:
            continue
        start = f"{result['name']}, {result['point']}"
        figures[f"{start}: FLOPs saved"] = 100 * result["flops_saved"]
        figures[f"{start}: other program"] = 100 * result["non_identity_rate"]
        figures[f"{start}: same answer"] = 100 * result["agreement"]
        if result["accuracy_drop"] is not None:  # value, low, high
            figures[f"{start}: accuracy drop"] = 100 * result["accuracy_drop"][0]
    for tier, whole in evaluation["texts"].items():
        for name, part in _parts(whole).items():
            figures |= {f"texts, {tier}, {name}: {figure}": 100 * part[key] for figure, key in _TEXTS.items()}
    return figures


def _parts(whole: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All prompts answered in text, those of each length, and those of the worst kind."""
    worst = {} if whole["worst_kind"] is None else {"worst kind": whole["by_kind"][whole["worst_kind"]]}
    by_length = {name.replace("_", " "): part for name, part in whole["by_length"].items()}
    return {"all": whole, **by_length, **worst}
