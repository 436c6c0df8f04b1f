"""The FLOPs of one request as a sum of exact products: how many tokens, or pairs of tokens, times FLOPs of each.

Computes from program, lengths and the model's sizes (`polar_sdk.programs.cost`) what the engine counts while it runs,
so that a bill can be checked without running anything. A cancelled or failed request is followed to the last step it
finished. Knows no prices and no store.
"""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import TYPE_CHECKING, Final, Literal

from pydantic import computed_field

from polar_billing.reports import Part
from polar_sdk.programs.cost import pieces, size
from polar_sdk.programs.program import Program

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polar_sdk.programs.cost import CostModel, Piece, Share
    from polar_sdk.usage import UsageRecord

Stage = Literal["prompt", "answer", "head", "router"]

LAYERS: Final = "layers, products"
ATTENTION: Final = "layers, attention"
LEFT: Final = "keys and values alone"


class Term(Part):
    """One product of the sum."""

    part: Stage
    what: str
    how: str
    """The quantity as a product: visits × tokens, or visits × tokens × keys."""
    quantity: int
    unit: str
    flops_each: int
    """Unit: FLOPs per `unit`."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def flops(self) -> int:
        """`quantity × flops_each`."""
        return self.quantity * self.flops_each


class Formula(Part):
    """The FLOPs that an answer needed as products, beside what the usage record says."""

    terms: tuple[Term, ...]
    total: int
    """The sum of the terms. Unit: FLOPs."""
    recorded: int
    """The usage record's total. Unit: FLOPs."""
    difference: int
    """`recorded - total`; 0 if the formula gives what was recorded."""
    drafts: int
    """FLOPs that were executed for drafts beyond these, as recorded."""
    note: str | None
    """The point at which the request ended early, or the reason that the two differ."""


class _Sum:
    """Collects visits of the same kind."""

    def __init__(self) -> None:
        self._visits: dict[tuple[Stage, str, str, int], Counter[tuple[int, ...]]] = {}

    def add(self, part: Stage, what: str, unit: str, flops_each: int, *factors: int) -> None:
        """Count one visit of that many tokens, or of tokens × keys."""
        if prod(factors) and flops_each:
            self._visits.setdefault((part, what, unit, flops_each), Counter())[factors] += 1

    def terms(self) -> Iterator[Term]:
        order: tuple[Stage, ...] = ("prompt", "answer", "head", "router")
        for part in order:
            for (own, what, unit, each), visits in self._visits.items():
                if own == part:
                    products = [(count, *factors) if count > 1 else factors for factors, count in visits.items()]
                    how = " + ".join(" × ".join(f"{factor:,}" for factor in factors) for factors in products)
                    quantity = sum(map(prod, products))
                    yield Term(part=part, what=what, how=how, quantity=quantity, unit=unit, flops_each=each)


def work_out(record: UsageRecord, cost: CostModel) -> Formula:
    """Write the executed FLOPs of a request as products, by the sizes of its model, bridges and fills.

    Raises:
        ProgramError: The program does not fit the model.
    """
    program = Program.parse(record.program)
    program.check_depth(cost.depth)
    summed = _Sum()
    notes = [note for note in (_prompt(record, cost, program, summed), _answer(record, cost, program, summed)) if note]
    for part, what, unit, each, flops in (
        ("head", "output projection", "token", cost.head, record.flops.head),
        ("router", "as recorded", "request", record.flops.router, record.flops.router),
    ):
        if each:
            summed.add("head" if part == "head" else "router", what, unit, each, flops // each)
    terms = tuple(summed.terms())
    total = sum(term.flops for term in terms)
    difference = record.flops.total - total
    if difference and record.loops_stopped:
        notes.append(
            f"the guard stopped {record.loops_stopped} loops, and the visits that it left out are not followed"
        )
    elif difference:
        notes.append("the model's sizes do not give what was recorded")
    return Formula(
        terms=terms,
        total=total,
        recorded=record.flops.total,
        difference=difference,
        drafts=record.flops.drafts,
        note="; ".join(notes) or None,
    )


def _prompt(record: UsageRecord, cost: CostModel, program: Program, summed: _Sum) -> str | None:
    """Add what the prompt ran, up to where the recorded FLOPs say that it ended."""
    steps = [
        (piece, share)
        for piece in pieces(record.tokens.input, record.tokens.cached)
        for share in cost.shares(program, piece)
    ]
    ran = _ran([share.flops for _, share in steps], record.flops.layers_prefill)
    for piece, share in steps[:ran]:
        _add_share(cost, piece, share, summed)
    return f"the prompt ended after {ran} of {len(steps)} steps" if ran < len(steps) else None


def _ran(flops: list[int], recorded: int) -> int:
    """The number of steps that sum to what was recorded; all of them where no number does."""
    left, ran = recorded, len(flops)
    for place, step in enumerate([*flops, 1]):
        if left == 0:
            ran = place
        left -= step
    return ran if sum(flops[:ran]) == recorded else len(flops)


def _add_share(cost: CostModel, piece: Piece, share: Share, summed: _Sum) -> None:
    step, parts, _ = share
    running, leaving, filled = map(size, parts)
    each = cost.step(step)
    if step.bridge:
        summed.add("prompt", f"bridge {_span(step.first, step.last)}", "token", each.linear, running)
        return
    summed.add("prompt", LAYERS, "token", each.linear, running)
    summed.add("prompt", ATTENTION, "pair of tokens", each.attention, running, piece.end)
    summed.add("prompt", LEFT, "token", each.keys_values, leaving)
    if step.begins_segment and filled:
        first, last = step.segment
        summed.add("prompt", f"fill {_span(first, last)}", "token", cost.fill((first, last)), filled)


def _answer(record: UsageRecord, cost: CostModel, program: Program, summed: _Sum) -> str | None:
    """Add the decode steps that ran: whole ones, and the first visits of one that did not end."""
    prompt, recorded = record.tokens.input, record.flops.layers_decode
    costs = [cost.step(step) for step in program]
    whole = 0
    while whole <= record.tokens.output and cost.decode(program, prompt, whole + 1) <= recorded:
        whole += 1
    pairs = cost.decode(program, prompt, whole)
    begun = [each.flops(1, prompt + whole + 1) for each in costs]
    more = _ran(begun, recorded - pairs) if recorded > pairs else 0
    keys = whole * prompt + whole * (whole + 1) // 2
    for place, (step, each) in enumerate(zip(program, costs, strict=True)):
        also = place < more
        what = f"bridge {_span(step.first, step.last)}" if step.bridge else LAYERS
        summed.add("answer", what, "token", each.linear, whole + also)
        summed.add("answer", ATTENTION, "pair of tokens", each.attention, keys + also * (prompt + whole + 1))
    return f"the answer ended after {more} of {len(costs)} steps of a token" if more else None


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
