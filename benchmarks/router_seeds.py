"""What a router and several seeds of its bridges were found to do, as figures: quality per tier, spread over the seeds.

Used by `train_router.py`; reads the evaluations and re-splits that it leaves behind, and measures nothing.
"""

from __future__ import annotations

import json
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.results import Recorder

__all__ = ["record_router", "record_seeds"]

_CLASSES = {"all choices": "choices", "all texts": "texts"}
"""Topic of the figures by class of prompts."""


def record_router(recorder: Recorder, evaluation: Path) -> None:
    """What one router does: per tier on choices and on texts, beside its controls, and how often promises broke."""
    found = json.loads(evaluation.read_text(encoding="utf-8"))
    certificate = found["certificate"] or {"tiers": {}}
    for one in found["classes"]:
        promise = certificate["tiers"].get(one["point"], {}).get("alpha")
        _record_class(recorder, one, None if promise is None else 100 * promise)
    for point, one in found["sets"][0]["generation"].items():
        tier = point.removeprefix("router (").removesuffix(")")
        recorder.add(f"{tier}: same tokens", 100 * one["same_tokens"], "%", topic="texts")
    for one in found["sets"][0]["comparisons"]:
        for what in ("agreement", "accuracy"):
            if (gain := one[f"{what}_gain"]) is not None:
                name = f"{found['point']} over {one['control']}: {what}"
                note = f"exact McNemar, p = {one[f'{what}_p']:.2g}"
                recorder.add(name, 100 * gain, "points", topic="controls", note=note)
    resplits = evaluation.with_suffix(".resplits.json")
    if resplits.is_file():
        for one in json.loads(resplits.read_text(encoding="utf-8")):
            share = 100 * one["other_half"] / one["times"]
            note = f"{one['times']} promises made on a random half of the prompts"
            name = f"{one['tier']}: promises broken on the other half"
            recorder.add(name, share, "%", topic="controls", goal=10, better="lower", note=note)


def _record_class(recorder: Recorder, one: dict[str, Any], promise: float | None) -> None:
    """One class of prompts in one tier."""
    topic = _CLASSES.get(one["name"])
    if topic is None:
        return
    tier, note = one["point"], f"{one['prompts']:,} prompts"
    recorder.add(f"{tier}: FLOPs saved", 100 * one["flops_saved"], "%", topic=topic, note=note)
    if one["accuracy_drop"] is not None:
        drop, low, high = (100 * value for value in one["accuracy_drop"])
        facts = {"low": low, "high": high, "interval": "95%", "goal": promise, "better": "lower", "note": note}
        recorder.add(f"{tier}: accuracy drop", drop, "points", topic=topic, **facts)
    recorder.add(f"{tier}: other program than full depth", 100 * one["non_identity_rate"], "%", topic=topic)
    recorder.add(f"{tier}: same answer", 100 * one["agreement"], "%", topic=topic)


def record_seeds(recorder: Recorder, evaluations: Sequence[Path]) -> str:
    """Mean and range over the seeds of the bridges; also as text, a line per class, tier and figure."""
    found = [_figures(json.loads(path.read_text(encoding="utf-8"))) for path in evaluations]
    lines = [f"{len(found)} seeds of the bridges: mean ± spread, from lowest to highest, in %"]
    for name in found[0]:
        values = [one[name] for one in found]
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
    for one in evaluation["classes"]:
        if one["name"] not in _CLASSES:
            continue
        start = f"{one['name']}, {one['point']}"
        figures[f"{start}: FLOPs saved"] = 100 * one["flops_saved"]
        figures[f"{start}: other program"] = 100 * one["non_identity_rate"]
        figures[f"{start}: same answer"] = 100 * one["agreement"]
        if one["accuracy_drop"] is not None:  # value, low, high
            figures[f"{start}: accuracy drop"] = 100 * one["accuracy_drop"][0]
    return figures
