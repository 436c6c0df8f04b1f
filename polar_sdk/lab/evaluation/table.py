"""An evaluation as rows of text: the same cells for the terminal and for the HTML page. Knows neither."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.lab.evaluation.results import ClassResult, Comparison, SetResult, SystemResult
    from polar_sdk.router.exact_tests import Interval


COLUMNS: Final = (
    "system",
    "accuracy",
    "drop (95 %)",
    "McNemar p",
    "agreement",
    "≠ identity",
    "programs",
    "FLOPs saved",
    "prefill",
    "decode",
    "ms/token",
)

CLASS_COLUMNS: Final = (
    "class",
    "tier",
    "prompts",
    "FLOPs saved",
    "≠ identity",
    "agreement",
    "drop (95 %)",
    "over shuffled",
    "over static",
    "what serves it",
)
_OUTCOMES: Final = {
    "identity": "full depth",
    "static": "a static program is as good",
    "routed": "a choice per prompt",
}


def rows(result: SetResult) -> list[tuple[str, ...]]:
    """One row per system."""
    return [_row(system) for system in result.systems]


def generation_rows(result: SetResult) -> list[tuple[str, ...]]:
    """Per tier: prompts, same answers, same tokens, FLOPs saved."""
    return [
        (name, str(one.prompts), _interval(one.same_answer), f"{one.same_tokens:.1%}", f"{one.flops_saved:.1%}")
        for name, one in result.generation.items()
    ]


def class_rows(classes: Sequence[ClassResult]) -> list[tuple[str, ...]]:
    """One row per class and point."""
    return [
        (
            one.name,
            one.point,
            str(one.prompts),
            f"{one.flops_saved:.1%}",
            f"{one.non_identity_rate:.0%}",
            f"{one.agreement:.1%}",
            _drop(one.accuracy_drop),
            _over(one.shuffled),
            _over(one.static),
            _OUTCOMES[one.outcome],
        )
        for one in classes
    ]


def _over(one: Comparison) -> str:
    """Points of agreement gained, and of accuracy where it is known, with p-values."""
    agreement = f"{one.agreement_gain * 100:+.1f} (p {one.agreement_p:.2g})"
    if one.accuracy_p is None or one.accuracy_gain is None:
        return agreement
    return f"{agreement}, right {one.accuracy_gain * 100:+.1f} (p {one.accuracy_p:.2g})"


def _drop(drop: Interval | None) -> str:
    return "–" if drop is None else f"{drop.value * 100:+.2f} [{drop.low * 100:+.2f}, {drop.high * 100:+.2f}]"


def _row(system: SystemResult) -> tuple[str, ...]:
    name = system.name if system.deployable else f"{system.name} (not deployable)"
    p = system.mcnemar_vs_identity_p
    return (
        name,
        "–" if system.accuracy is None else _interval(system.accuracy),
        _drop(system.accuracy_drop),
        "–" if p is None else f"{p:.2g}",
        _interval(system.agreement),
        f"{system.non_identity_rate:.0%}",
        str(len(system.programs)),
        f"{system.flops_saved.total:.1%}",
        f"{system.flops_saved.prefill:.1%}",
        f"{system.flops_saved.decode:.1%}",
        "–" if system.ms_per_token is None else f"{system.ms_per_token:.1f}",
    )


def _interval(value: Interval) -> str:
    return f"{value.value:.1%} [{value.low * 100:.0f}, {value.high * 100:.0f}]"
