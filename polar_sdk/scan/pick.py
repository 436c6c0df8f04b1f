"""From a scan to a policy: the tiers' programs, each with the sentence that says what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_sdk.policy import Policy, Tier

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polar_sdk.scan.report import ProgramScore, ScanReport

__all__ = ["policy_of"]


def policy_of(report: ScanReport, picks: Mapping[str, ProgramScore]) -> Policy:
    """A policy for the scanned model: the picks, full depth for the other tiers, standard by default."""
    full = Tier(program=report.identity.program, note="Full depth.")
    tiers = {name: Tier(program=score.program, note=_note(report, score)) for name, score in picks.items()}
    return Policy(
        model=report.model,
        fingerprint=report.fingerprint,
        default_tier="standard",
        tiers={**tiers, "premium": full, "exact": full},
    )


def _note(report: ScanReport, score: ProgramScore) -> str:
    said = [f"{score.flops_ratio:.1%} of full depth's FLOPs"]
    if score.agreement is not None:
        said.append(f"{score.agreement:.1%} of {report.answer_tokens} answer tokens as at full depth")
    if score.same_choice is not None:
        said.append(f"{score.same_choice:.1%} of {report.questions} choices as at full depth")
    return "Scanned: " + "; ".join(said) + "."
