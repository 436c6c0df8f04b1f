"""The layers of a model: what a program does with each, and the visits of some requests. Knows no output format."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Final, Literal

from polar_billing.reports import Part
from polar_billing.reports.totals import LayerVisits
from polar_sdk.errors import ProgramError
from polar_sdk.programs.program import Program

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polar_billing.reports.totals import UsageTotals
    from polar_sdk.usage import UsageRecord

Kind = Literal["run", "skipped", "looped", "bridged", "filled"]
KINDS: Final[tuple[Kind, ...]] = ("run", "skipped", "looped", "bridged", "filled")
WORDS: Final[dict[Kind, str]] = {
    "run": "run",
    "skipped": "skipped",
    "looped": "looped",
    "bridged": "crossed by a bridge",
    "filled": "filled for the prompt, run by the answer",
}
_MAX_PROGRAMS: Final = 6


class LayerState(Part):
    """One layer of the model in a program."""

    layer: int
    kind: Kind
    visits: int
    """Visits by one token that takes the whole program."""


class ProgramUse(Part):
    """One program, and how many requests ran it."""

    program: str
    requests: int
    layers: tuple[LayerState, ...]
    """Empty where the text is not a valid program."""


class DepthPanel(Part):
    """The visits of one tier of one model. Unit: visits per layer, index = layer."""

    model: str
    tier: str | None
    visits_prefill: tuple[int, ...]
    visits_prefill_filled: tuple[int, ...]
    """Pieces of prompts whose tokens, or most of them, a map filled; a piece may count in `visits_prefill` as well."""
    visits_decode: tuple[int, ...]
    programs: tuple[ProgramUse, ...] = ()
    """The programs that most requests ran, the most used first."""
    programs_more: int = 0
    """Requests that ran others."""

    @property
    def visits_prompt(self) -> tuple[int, ...]:
        """Pieces of prompts that the layer ran or was filled for, at least."""
        return tuple(map(max, self.visits_prefill, self.visits_prefill_filled))

    @property
    def visits(self) -> tuple[int, ...]:
        """Prompts and answers together."""
        return tuple(a + b for a, b in zip(self.visits_prompt, self.visits_decode, strict=True))


def layers_of(program: Program, depth: int) -> tuple[LayerState, ...]:
    """Say what a program makes of each layer of a model."""
    bridged = {layer for first, last in program.bridges for layer in range(first, last + 1)}
    filled = {step.first for step in program if step.fill}

    def kind(layer: int, visits: int) -> Kind:
        if visits > 1:
            return "looped"
        if visits:
            return "filled" if layer in filled else "run"
        return "bridged" if layer in bridged else "skipped"

    visits = program.visits(depth)
    return tuple(LayerState(layer=n, kind=kind(n, count), visits=count) for n, count in enumerate(visits))


def read_layers(text: str, depth: int) -> tuple[LayerState, ...]:
    """The same of a program in a usage record, which may be of another version; empty if it cannot be read."""
    try:
        return layers_of(Program.parse(text), depth) if text and depth else ()
    except ProgramError:
        return ()


def layers_of_record(record: UsageRecord) -> tuple[LayerState, ...]:
    """The layers of a record's program; empty if no layer ran."""
    visits = record.visits
    return read_layers(record.program, max(map(len, (visits.prefill, visits.prefill_filled, visits.decode))))


def depth_of(tier: str | None, groups: Iterable[UsageTotals]) -> tuple[DepthPanel, ...]:
    """The layers that a tier visited, a panel for each model."""
    models: defaultdict[str, LayerVisits] = defaultdict(LayerVisits)
    programs: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for totals in groups:
        for model, visits in totals.layer_visits.items():
            models[model].add(visits.prefill, visits.filled, visits.decode)
        for (model, program), requests in totals.programs.items():
            programs[model][program] += requests
    return tuple(_panel(model, tier, visits, programs[model]) for model, visits in sorted(models.items()))


def _panel(model: str, tier: str | None, visits: LayerVisits, programs: Counter[str]) -> DepthPanel:
    parts = (visits.prefill, visits.filled, visits.decode)
    layers = max(map(len, parts))
    prefill, filled, decode = ((*part, *[0] * (layers - len(part))) for part in parts)
    ranked = sorted(programs.items(), key=lambda item: (-item[1], item[0]))
    most = ranked[:_MAX_PROGRAMS]
    return DepthPanel(
        model=model,
        tier=tier,
        visits_prefill=prefill,
        visits_prefill_filled=filled,
        visits_decode=decode,
        programs=tuple(
            ProgramUse(program=program, requests=requests, layers=read_layers(program, layers))
            for program, requests in most
        ),
        programs_more=programs.total() - sum(requests for _, requests in most),
    )
