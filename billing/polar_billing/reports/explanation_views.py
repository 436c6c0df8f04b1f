"""Explanations in the terminal: layers as a strip, FLOPs and amounts as products that add up. Computes nothing."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Final

from rich.console import Group
from rich.text import Text

from polar_billing.prices.rating import COMPUTE
from polar_billing.reports import text
from polar_billing.reports.depth import KINDS, WORDS
from polar_billing.values.money import plain
from polar_sdk.show.tables import add_labels, add_numbers, add_row, as_text, new_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType
    from rich.table import Table

    from polar_billing.reports.depth import LayerState
    from polar_billing.reports.explanation import LineExplanation, RequestExplanation
    from polar_billing.reports.formula import Formula

MARKS: Final = {"run": "█", "skipped": "·", "bridged": "═", "filled": "▒"}
"""A looped layer shows its number of visits instead."""
_TENS: Final = 10


def strip(layers: Sequence[LayerState]) -> str:
    """One character per layer."""
    return "".join(MARKS.get(layer.kind) or (str(layer.visits) if layer.visits < _TENS else "+") for layer in layers)


def request_view(explained: RequestExplanation) -> RenderableType:
    """A request from its facts to its receipt."""
    parts: list[RenderableType] = [*_facts(explained), Text(), *_program(explained), Text()]
    formula = explained.formula
    if formula is None:
        parts += _recorded(explained)
    else:
        parts += [_products(formula), *_agreement(formula)]
    return Group(*parts, Text(), *_price(explained), Text(), *_proof(explained))


def _facts(explained: RequestExplanation) -> Iterator[Text]:
    usage = explained.usage
    tokens = usage["tokens"]
    yield Text.assemble(("Request ", "bold"), as_text(explained.request_id, "bold"))
    yield as_text(
        f"tenant {explained.tenant} · tier {text.tier_name(usage['tier'])} · {usage['started_at']} · "
        f"{usage['outcome']} · record {explained.seq:,} of the ledger"
    )
    cached = f", {tokens['cached']:,} of them reused" if tokens["cached"] else ""
    yield as_text(
        f"model {usage['model']} ({usage['model_fingerprint'][:12]}) · {tokens['input']:,} prompt tokens{cached} · "
        f"{tokens['output']:,} answer tokens"
    )


def _program(explained: RequestExplanation) -> Iterator[Text]:
    program = explained.usage["program"]
    if not explained.layers:
        yield as_text(f"Program {program or text.DASH}")
        return
    depth = len(explained.layers)
    yield as_text(f"Program {program}, chosen by the router {explained.usage['router']}")
    yield Text("  " + "".join(f"{layer:<{_TENS}}" for layer in range(0, depth, _TENS)).rstrip())
    yield Text("  " + strip(explained.layers))
    used = [kind for kind in KINDS if any(layer.kind == kind for layer in explained.layers)]
    keys = (f"{MARKS.get(kind, '2')} {WORDS[kind]} ({_spans(explained.layers, kind)})" for kind in used)
    yield as_text("  " + "   ".join(keys), "dim")


def _spans(layers: Sequence[LayerState], kind: str) -> str:
    """The layers of a kind, as ranges."""
    spans = []
    for is_kind, run in groupby(layers, key=lambda layer: layer.kind == kind):
        members = [layer.layer for layer in run]
        if is_kind:
            spans.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ", ".join(spans)


def _products(formula: Formula) -> Table:
    table = new_table("FLOPs = quantity × FLOPs of each", ["part", "what"])
    add_labels(table, "visits × tokens × keys", width=16)
    add_numbers(table, "quantity")
    add_labels(table, "unit")
    add_numbers(table, "FLOPs of each", "FLOPs")
    last = ""
    for term in formula.terms:
        part = "" if term.part == last else term.part
        last = term.part
        figures = (f"{term.quantity:,}", term.unit, f"{term.flops_each:,}", f"{term.flops:,}")
        add_row(table, part, term.what, term.how, *figures)
    table.add_section()
    add_row(table, "sum", "", "", "", "", "", f"{formula.total:,}", style="bold")
    return table


def _agreement(formula: Formula) -> Iterator[Text]:
    note = f" ({formula.note})" if formula.note else ""
    if formula.drafts:
        yield as_text(f"Drafts executed {formula.drafts:,} FLOPs beyond these.")
    if formula.difference:
        yield as_text(
            f"The usage record says {formula.recorded:,}: {formula.difference:+,} compared with the sum{note}.",
            "yellow",
        )
    else:
        yield as_text(f"The usage record says the same, to the last FLOP{note}.", "green")


def _recorded(explained: RequestExplanation) -> Iterator[RenderableType]:
    table = new_table("FLOPs as recorded", ["part"])
    add_numbers(table, "FLOPs")
    names = {"layers_prefill": "prompt", "layers_decode": "answer", "head": "head", "router": "router"}
    names |= {"embed": "embedding"}
    flops = explained.usage["flops"]
    for field, name in names.items():
        if flops[field]:
            add_row(table, name, f"{flops[field]:,}")
    table.add_section()
    add_row(table, "sum", f"{flops['total']:,}", style="bold")
    if flops["drafts"]:
        add_row(table, "drafts beyond it", f"{flops['drafts']:,}")
    yield table
    yield as_text(f"They are not taken apart further: {(explained.no_formula or '').rstrip('.')}.", "yellow")


def _price(explained: RequestExplanation) -> Iterator[RenderableType]:
    book = f"price book {explained.price_book} ({explained.price_book_hash[:12]})"
    if explained.unrated is not None:
        yield as_text(f"Unrated under {book}: {explained.unrated}.", "yellow")
        return
    table = new_table("Cost = quantity × price × multiplier of the tier", ["item"])
    add_numbers(table, "quantity", "price", "multiplier", f"amount {explained.currency}")
    for step in explained.prices:
        figures = (f"{plain(step.quantity)} {step.unit}", f"{plain(step.price)} / {step.unit}", plain(step.multiplier))
        add_row(table, step.item, *figures, plain(step.exact))
    table.add_section()
    cost = text.DASH if explained.cost is None else f"{explained.cost:f}"
    add_row(table, "receipt", "", "", "", cost, style="bold")
    yield table
    yield as_text(f"By {book}. The receipt rounds once, to 12 decimals, half to even.", "dim")


def _proof(explained: RequestExplanation) -> Iterator[Text]:
    chain = explained.receipt["chain"]
    yield as_text(
        f"Receipt: link {chain['number']:,} of the chain of {explained.tenant}, hash {chain['hash'][:16]}…; "
        f"content {explained.receipt['content_hash'][:16]}…"
    )
    yield as_text(
        f"Charged on statement lines {', '.join(explained.lines)}."
        if explained.lines
        else "On no issued statement yet."
    )


def line_view(explained: LineExplanation) -> RenderableType:
    """A statement line from its amount to the usage records."""
    line = explained.line
    late = "" if line.corrects is None else f", late usage of {line.corrects}"
    tier = f", tier {text.tier_name(line.tier)}" if line.tier is not None or line.kind == "usage" else ""
    note = "" if line.note is None else f" ({line.note})"
    parts: list[RenderableType] = [
        Text.assemble(("Line ", "bold"), as_text(explained.id, "bold")),
        as_text(
            f"tenant {explained.tenant} · {explained.period} · "
            f"price book {explained.price_book} ({explained.price_book_hash[:12]})"
        ),
        as_text(f"{line.kind}: {line.item}{tier}{note}{late}"),
        Text(),
        *_arithmetic(explained),
        *_count(explained),
    ]
    if explained.records:
        table = new_table("Usage records; `polar explain REQUEST` goes on from here", ["request"])
        add_numbers(table, "record", "FLOPs", "tokens\nin", "\nout")
        for record in explained.records:
            figures = (record.seq, record.flops, record.tokens_input, record.tokens_output)
            add_row(table, record.request_id, *(f"{figure:,}" for figure in figures))
        parts += [Text(), table]
    if (more := explained.requests - len(explained.records)) > 0:
        parts.append(as_text(f"{more:,} more: --records {explained.requests} lists them all.", "dim"))
    return Group(*parts)


def _arithmetic(explained: LineExplanation) -> Iterator[Text]:
    line, money = explained.line, explained.currency
    amount = f"{line.amount:f} {money}"
    if line.quantity is None or line.unit_price is None or explained.exact is None:
        yield as_text(f"amount {amount}, by the terms of the plan and the lines above it on the statement")
        return
    unit_price = f"{plain(line.unit_price)} {money} / {line.unit}"
    yield as_text(f"{plain(line.quantity)} {line.unit} × {unit_price} = {plain(explained.exact)} {money}")
    yield as_text(f"rounded once to {explained.decimals} decimals, half to even: {amount}")


def _count(explained: LineExplanation) -> Iterator[Text]:
    used = f"{explained.requests:,} usage records"
    if explained.counted is None:
        yield as_text(f"about {used}: {explained.flops:,} FLOPs")
        return
    line = explained.line
    if explained.counted == line.quantity:
        of = f" ({explained.flops:,} FLOPs)" if line.unit == COMPUTE.unit else ""
        yield as_text(f"{used} add up to the quantity, exactly{of}.", "green")
    else:
        yield as_text(
            f"{used} add up to {plain(explained.counted)} {line.unit}, and the line says "
            f"{plain(line.quantity) if line.quantity is not None else text.DASH}: usage was pruned, or changed.",
            "yellow",
        )
