"""What an evaluation says in words: whether routing per prompt earned anything, and what to run if it did not."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polar_sdk.lab.evaluation.results import ClassResult, Comparison, SetResult


_BOUND = 0.02
"""The accuracy drop that the first sentence speaks about."""
_NEARLY_ALL = 0.9
"""Share of the prompts with one program from which on a router is called static."""


def verdict(sets: Sequence[SetResult], classes: Sequence[ClassResult] = ()) -> list[str]:
    """Sentences about all prompts at the first point, and about the classes at each point."""
    return [*_whole(sets[0]), *_classes(classes)]


def _whole(result: SetResult) -> Iterator[str]:
    main = result.main
    yield f"The router saves {main.flops_saved.total:.1%} of the FLOPs; it leaves identity for " + (
        f"{main.non_identity_rate:.0%} of the prompts and agrees with it on {main.agreement.value:.1%}."
    )
    if main.accuracy_drop is not None:
        drop = main.accuracy_drop
        excluded = "excludes" if drop.high < _BOUND else "does not exclude"
        yield (
            f"Accuracy drops by {drop.value * 100:.2f} points (95 % interval {drop.low * 100:+.2f} to "
            f"{drop.high * 100:+.2f}), which {excluded} {_BOUND * 100:.0f} points."
        )
    if main.non_identity_rate == 0:
        yield "It chooses identity for every prompt: it saves nothing and is not worth running."
        return
    lost = [one for one in result.comparisons if one.control != "random program" and not one.beaten]
    for one in result.comparisons:
        yield _against(one)
    if lost:
        yield (
            f"The router does not beat the {' nor the '.join(one.control for one in lost)} of equal cost: which "
            f"prompt gets which program does not matter here. {_instead(result)}"
        )


def _instead(result: SetResult) -> str:
    """What to run where a router earns nothing."""
    program, share = next(iter(result.main.programs.items()))
    if share >= _NEARLY_ALL:
        return f"It is in effect a static program already: {program} for {share:.0%} of these prompts."
    static = next(system for system in result.systems if system.name == "best static program")
    return f"Use the static program instead: {static.note}."


def _against(one: Comparison) -> str:
    word = "beats" if one.beaten else "does not beat"
    accuracy = ""
    if one.accuracy_p is not None and one.accuracy_gain is not None:
        accuracy = f"accuracy {one.accuracy_gain * 100:+.2f} points, p = {one.accuracy_p:.2g}; "
    return (
        f"It {word} the {one.control} of equal cost ({accuracy}agreement {one.agreement_gain * 100:+.2f} points, "
        f"p = {one.agreement_p:.2g}; exact McNemar)."
    )


def _classes(classes: Sequence[ClassResult]) -> Iterator[str]:
    """Per point, which classes earn a choice per prompt, and what serves the others as well."""
    for point in dict.fromkeys(one.point for one in classes):
        here = [one for one in classes if one.point == point]
        routed = [one for one in here if one.outcome == "routed"]
        static = [one for one in here if one.outcome == "static"]
        identity = [one for one in here if one.outcome == "identity"]
        yield (
            f"{point}: reading the prompt beats both the shuffled router and the best static program at p < 0.01 in "
            f"{len(routed)} of {len(here)} classes{_named(routed)}."
        )
        if static:
            known = ", ".join(f"{one.name} ({_served(one)})" for one in static)
            yield f"{point}: a static program is as good within {known}."
        if identity:
            yield f"{point}: full depth for all of {', '.join(one.name for one in identity)}."


def _named(classes: Sequence[ClassResult]) -> str:
    return f": {', '.join(one.name for one in classes)}" if classes else ""


def _served(one: ClassResult) -> str:
    """Whether the router is that static program there already."""
    if one.program_share >= _NEARLY_ALL:
        return f"which it is: {one.program} for {one.program_share:.0%}"
    return f"{one.static_program}; n = {one.prompts}"
