"""The findings of a suite as rows of text, for the terminal and for HTML, and as one page that needs no other file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from polar_sdk.lab.evaluation.rendering import drop_text, interval_text, render_page, require_report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polar_sdk.lab.suites.results import SuiteEvaluation, TierResult

COLUMNS: Final = (
    "tier",
    "full depth",
    "accuracy",
    "drop (95 %)",
    "McNemar p",
    "layers used",
    "compute saved",
    "of prompts",
    "CU per 1,000",
    "tokens/answer",
    "programs",
)


def rows(found: SuiteEvaluation) -> list[tuple[str, ...]]:
    """One row per tier, full depth first."""
    return [_row(tier, found) for tier in found.tiers]


def _row(tier: TierResult, found: SuiteEvaluation) -> tuple[str, ...]:
    full = tier is found.baseline
    program, share = next(iter(tier.programs.items()))
    others = f" and {len(tier.programs) - 1} more" if len(tier.programs) > 1 else ""
    return (
        tier.name,
        f"{found.baseline.accuracy.value:.1%}",
        interval_text(tier.accuracy),
        "–" if full else drop_text(tier.accuracy_drop),
        "–" if full else f"{tier.mcnemar_p:.2g}",
        f"{tier.layers_used:.1f} of {found.depth}",
        f"{tier.flops_saved:z.1%}",
        f"{tier.prompt_flops_saved:z.1%}",
        f"{tier.compute_units_per_1000:,.1f}",
        f"{tier.answer_tokens:.1f}",
        f"{share:.0%} {program}{others}",
    )


def group_columns(found: SuiteEvaluation) -> tuple[str, ...]:
    """Heads of `group_rows`."""
    return "part", *(tier.name for tier in found.tiers)


def group_rows(found: SuiteEvaluation) -> list[tuple[str, ...]]:
    """Accuracy by group and tier; empty if the suite has no groups."""
    return [
        (name.replace("_", " "), *(f"{tier.groups[name]:.1%}" for tier in found.tiers))
        for name in found.baseline.groups
    ]


def notes(found: SuiteEvaluation) -> Iterator[str]:
    """Notes beside the table, in sentences."""
    how = "through the model's chat template" if found.chat else "as plain text"
    shots = f"{found.shots} examples before each" if found.shots else "no examples"
    template = f", {found.template_tokens} of them the template's" if found.template_tokens else ""
    yield f"{found.problems} problems, {how}, {shots}; a prompt has {found.prompt_tokens:.0f} tokens{template}."
    if found.does_not_fit:
        yield f"{found.does_not_fit} problems do not fit the context window and were left out."
    if found.used_before:
        yield f"{found.used_before} problems were left out: this router was trained or calibrated on them."
    if len(found.tiers) == 1:
        yield "This model has no tiers; name a program with --program to compare it with full depth."


def to_html(found: SuiteEvaluation) -> str:
    """The page."""
    require_report()
    return render_page(
        "suites/page.html.jinja",
        e=found,
        notes=list(notes(found)),
        columns=COLUMNS,
        rows=rows(found),
        groups=group_rows(found),
        group_columns=group_columns(found),
    )
