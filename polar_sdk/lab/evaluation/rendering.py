"""An evaluation as rows of text, for the terminal and for HTML, and as one page that needs no other file.

The page holds the verdict, tables, and the quality–compute frontier, which `page.html.jinja` draws; it needs the extra
`report` (jinja2). Knows how to show, not how anything was measured.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

from polar_sdk.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_sdk.lab.evaluation.results import ClassResult, Comparison, Evaluation, SetResult, SystemResult
    from polar_sdk.lab.evaluation.text_answers import FreeFigures, TextFigures, TierTexts
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
TEXT_COLUMNS: Final = (
    "tier",
    "prompts of",
    "n",
    "FLOPs saved",
    "tokens kept (95 %)",
    "95 % kept",
    "3/4 kept",
    "noise floor",
    "KL",
    "first change",
    "chrF / repeats",
    "F1 drop",
)
_OUTCOMES: Final = {
    "identity": "full depth",
    "static": "a static program is as good",
    "routed": "a choice per prompt",
}


def rows(result: SetResult) -> list[tuple[str, ...]]:
    """One row per system."""
    return [_row(system) for system in result.systems]


def class_rows(classes: Sequence[ClassResult]) -> list[tuple[str, ...]]:
    """One row per class and point."""
    return [
        (
            result.name,
            result.point,
            str(result.prompts),
            f"{result.flops_saved:z.1%}",
            f"{result.non_identity_rate:.0%}",
            f"{result.agreement:.1%}",
            drop_text(result.accuracy_drop),
            _over(result.shuffled),
            _over(result.static),
            _OUTCOMES[result.outcome],
        )
        for result in classes
    ]


def text_rows(texts: Mapping[str, TierTexts]) -> list[tuple[str, ...]]:
    """Per tier: all prompts, then by length, then the worst kind; what was written freely, where it was."""
    rows = []
    for tier, whole in texts.items():
        parts: dict[str, TextFigures] = {"all": whole, **whole.by_length}
        parts |= {f"worst: {whole.worst_kind}": whole.by_kind[whole.worst_kind]} if whole.worst_kind else {}
        for name, part in parts.items():
            below = part.tokens_kept - part.tokens_kept_interval[0]  # above, the interval may end at 100 %
            sure = f" ± {100 * below:.1f}" if part.tokens_kept < 1 else ""
            rows.append(
                (
                    tier,
                    name.replace("_", " "),
                    str(part.prompts),
                    f"{part.flops_saved:z.1%}",
                    f"{part.tokens_kept:.1%}{sure}",
                    *(f"{share:.1%}" for share in (part.strict_kept, part.three_quarters_kept, part.noise_floor)),
                    *_free(whole.free if name == "all" else None),
                )
            )
    return rows


def _free(free: FreeFigures | None) -> tuple[str, str, str, str]:
    """KL, tokens before the first difference, chrF and repeats, and the drop in F1."""
    if free is None:
        return "", "", "", ""
    drop = "–" if free.gold_f1_drop is None else drop_text(free.gold_f1_drop)
    return (
        f"{free.kl_per_token:.4f}",
        f"{free.first_divergence:.1f}",
        f"{free.chrf:.3f} / {free.repeated_4grams:.1%}",
        drop,
    )


def _over(rival: Comparison) -> str:
    """Points of agreement gained, of tokens kept, and of accuracy where it is known, with p-values."""
    agreement = f"{rival.agreement_gain * 100:+.1f} (p {rival.agreement_p:.2g}), kept {rival.share_gain * 100:+.1f}"
    if rival.accuracy_p is None or rival.accuracy_gain is None:
        return agreement
    return f"{agreement}, right {rival.accuracy_gain * 100:+.1f} (p {rival.accuracy_p:.2g})"


def drop_text(drop: Interval | None) -> str:
    """A drop in points, with its interval."""
    return "–" if drop is None else f"{drop.value * 100:+.2f} [{drop.low * 100:+.2f}, {drop.high * 100:+.2f}]"


def _row(system: SystemResult) -> tuple[str, ...]:
    name = system.name if system.deployable else f"{system.name} (not deployable)"
    p = system.mcnemar_vs_identity_p
    return (
        name,
        "–" if system.accuracy is None else interval_text(system.accuracy),
        drop_text(system.accuracy_drop),
        "–" if p is None else f"{p:.2g}",
        interval_text(system.agreement),
        f"{system.non_identity_rate:.0%}",
        str(len(system.programs)),
        f"{system.flops_saved.total:.1%}",
        f"{system.flops_saved.prefill:.1%}",
        f"{system.flops_saved.decode:.1%}",
        "–" if system.ms_per_token is None else f"{system.ms_per_token:.1f}",
    )


def interval_text(value: Interval) -> str:
    """A share with its interval."""
    return f"{value.value:.1%} [{value.low * 100:.0f}, {value.high * 100:.0f}]"


def require_report() -> None:
    """Check that a page can be drawn, before minutes are spent on measuring.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"the page of an evaluation needs {error.name}, which is not installed.",
            hint="Install the extra report of polar-llm, in a clone: `pip install '.[report]'`.",
        ) from error


def to_html(evaluation: Evaluation, lead: Sequence[str] = ()) -> str:
    """The page, with paragraphs at its top."""
    require_report()
    return render_page(
        "evaluation/page.html.jinja",
        e=evaluation,
        lead=lead,
        sets=[(result, _charts(result), rows(result)) for result in evaluation.sets],
        columns=COLUMNS,
        classes=class_rows(evaluation.classes),
        class_columns=CLASS_COLUMNS,
        texts=text_rows(evaluation.texts),
        text_columns=TEXT_COLUMNS,
    )


def render_page(template: str, **values: object) -> str:
    """A page of the laboratory by the name of its template, a path within `polar_sdk/lab`."""
    import jinja2

    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("polar_sdk.lab", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return pages.get_template(template).render(values)


class _Axis(NamedTuple):
    """The range that an axis shows, and where its figures stand. Unit: percent."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float]) -> _Axis:
        """An axis over some values, with at most seven round figures."""
        low, high = min(values), max(values)
        steps = (factor * 10**power for power in range(-3, 3) for factor in (1, 2, 5))
        step = next((step for step in steps if high - low <= 5 * step), 500.0)
        first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
        return cls(first * step, last * step, tuple(round(tick * step, 3) for tick in range(first, last + 1)))


class _Chart(NamedTuple):
    """Agreement or accuracy over the share of FLOPs saved. Unit: percent."""

    panel: str
    x: _Axis
    y: _Axis
    line: tuple[tuple[float, float], ...]
    """The router along its dial."""
    systems: tuple[tuple[float, float, SystemResult], ...]


def _charts(result: SetResult) -> list[_Chart]:
    """The quality–compute frontier: agreement, and accuracy where it is known."""
    charts = []
    for panel in ("agreement", "accuracy") if result.labelled else ("agreement",):
        line = tuple((100 * point.flops_saved, 100 * getattr(point, panel)) for point in result.frontier)
        systems = tuple(
            (100 * system.flops_saved.total, 100 * interval.value, system)
            for system in result.systems
            if (interval := getattr(system, panel)) is not None
        )
        drawn = [*line, *(place[:2] for place in systems)]
        x, y = (_Axis.over(values) for values in zip(*drawn, strict=True))
        charts.append(_Chart(panel, x, y, line, systems))
    return charts
