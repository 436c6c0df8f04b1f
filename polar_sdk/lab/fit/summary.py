"""The result of a fit in words and figures: what each tier saves, keeps and promises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polar_sdk.lab.evaluation.results import Evaluation
    from polar_sdk.router.certificate import Certificate, Promise


def tiers_in_words(certificate: Certificate, evaluation: Evaluation) -> list[str]:
    """A sentence per tier."""
    said = []
    for tier, promise in certificate.tiers.items():
        if promise.theta == 0:
            said.append(f"{tier} runs full depth: nothing could be promised.")
            continue
        name = f"router ({tier})"
        saved = next(system for system in evaluation.sets[0].systems if system.name == name).flops_saved.total
        kept = evaluation.texts.get(tier)
        tokens = "" if kept is None else f" and keeps {kept.tokens_kept:.1%} of the tokens"
        long = None if kept is None else kept.by_length.get("over_500")
        more = "" if long is None else f" ({long.flops_saved:.1%} and {long.tokens_kept:.1%} over 500 tokens)"
        said.append(f"{tier} saves {saved:.1%} of the FLOPs{tokens}{more}; it promises that {_promised(promise)}.")
    return said


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
