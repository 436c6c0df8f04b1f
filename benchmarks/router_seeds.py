"""What several seeds of the bridges have in common: mean, spread and range of the figures that matter.

Used by `train_router.py`; reads the evaluations that it leaves behind.
"""

from __future__ import annotations

import json
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["spread"]

_CLASSES = ("all choices", "all texts")


def spread(evaluations: Sequence[Path]) -> str:
    """A line per class, tier and figure."""
    found = [_figures(json.loads(path.read_text(encoding="utf-8"))) for path in evaluations]
    lines = [f"{len(found)} seeds of the bridges: mean ± spread, from lowest to highest, in %"]
    for name in found[0]:
        values = [one[name] for one in found]
        low, high = min(values), max(values)
        lines.append(f"{name:44} {fmean(values):7.2f} ± {pstdev(values):5.2f}   {low:7.2f} … {high:.2f}")
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
