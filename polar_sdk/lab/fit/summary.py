"""The result of a fit in words and figures: what each tier saves, keeps and promises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from polar_sdk.lab.evaluation.calibrate import FACTS
from polar_sdk.router.certificate import FORMS

if TYPE_CHECKING:
    from polar_sdk.lab.evaluation.results import Evaluation, SystemResult
    from polar_sdk.router.certificate import Certificate, Promise

TEXTS: Final = "texts"
CHOICES: Final = "choices"
"""Names of the sets of prompts that a fit is evaluated on."""


def tiers_in_words(certificate: Certificate, evaluation: Evaluation) -> list[str]:
    """A sentence per tier."""
    said = []
    for tier, promise in certificate.tiers.items():
        if promise.setting.runs_identity:
            said.append(f"{tier} runs full depth: nothing could be promised.")
            continue
        kept, parts = evaluation.texts.get(tier), []
        if kept is not None and promise.setting.text:
            long = kept.by_length.get("over_500")
            more = "" if long is None else f" ({long.flops_saved:.1%} and {long.tokens_kept:.1%} over 500 tokens)"
            parts.append(f"{kept.flops_saved:.1%} of the FLOPs and keeps {kept.tokens_kept:.1%} of the tokens{more}")
        chosen = of_choices(evaluation, tier) if promise.setting.choice else None
        if chosen is not None and chosen.accuracy is not None:
            full = of_choices(evaluation)
            assert full is not None and full.accuracy is not None
            right = f"{chosen.accuracy.value:.1%} right where full depth has {full.accuracy.value:.1%}"
            parts.append(f"{chosen.flops_saved.total:.1%} of the FLOPs of choices, with {right}")
        whole = " and ".join(FORMS[form] for form in certificate.saved if not promise.setting.of(form))
        more = whole and f" Its {whole} run full depth."
        facts = certificate.classes.get(FACTS)
        if facts is not None and promise.setting.text:
            lost, gained = facts.pair(certificate.thetas.index(promise.setting.text), "drops")
            more += f" Of {facts.n} answers about a fact in long notes, it turns {lost} wrong and {gained} right."
        said.append(f"{tier} saves {', and '.join(parts)}; it promises that {_promised(promise)}.{more}")
    return said


def of_choices(evaluation: Evaluation, tier: str | None = None) -> SystemResult | None:
    """The result of a tier, or of full depth, on the questions with choices; None where there are none."""
    name = "identity" if tier is None else f"router ({tier})"
    systems = [system for of_set in evaluation.sets if of_set.name == CHOICES for system in of_set.systems]
    return next((system for system in systems if system.name == name), None)


def _promised(promise: Promise) -> str:
    """The promise of a tier in a few words; its counts are in the certificate."""
    lost = {
        "differs": "answer differently",
        "harms": "turn a right answer into a wrong one",
        "drops": "turn a right answer into a wrong one, less those turned right",
        "strict": "lose more than 5% of their tokens",
    }[promise.loss]
    text = f"at most {promise.alpha:.2g} of such prompts {lost}"
    if promise.strict is None:
        return text
    return f"{text}, and at most {promise.strict.alpha:.2g} of the texts lose more than 5% of their tokens"


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """Per tier, all test prompts answered in text, and those of each length."""
    return {
        tier: {
            name: {"prompts": part.prompts, "flops_saved": part.flops_saved, "tokens_kept": part.tokens_kept}
            for name, part in {"all": whole, **whole.by_length}.items()
        }
        for tier, whole in evaluation.texts.items()
    }
