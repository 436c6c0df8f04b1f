"""Explanations of amounts: a request from its facts to its cost, a statement line from its amount to its requests.

    explain_request   facts → layers → FLOPs as products → quantity × price → cost → receipt, chain, statement lines
    explain_line      amount → quantity × unit price → sum over usage records → those records

Knows no output format, and where the sizes of a model come from.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, Literal

from sqlalchemy import func, select

from polar_billing.errors import QueryError
from polar_billing.ledger.append import find_known
from polar_billing.ledger.books import read_book
from polar_billing.ledger.records import StoredUsage
from polar_billing.ledger.rollups import joined_sum, split_sum
from polar_billing.ledger.schema import statement_table, usage_table
from polar_billing.prices.rating import ITEMS, product, rate, rate_of
from polar_billing.proof.receipts import find_request, make_receipt
from polar_billing.reports import Part
from polar_billing.reports.depth import LayerState, layers_of_record
from polar_billing.reports.formula import Formula, work_out
from polar_billing.statements.issued import find_statement
from polar_billing.statements.period_usage import charged_flops
from polar_billing.statements.statement import StatementLine
from polar_billing.statements.tracing import conditions_of, lines_of_usage, rated_in
from polar_billing.values.money import EXACT_SCALE, exact_sum, from_scaled
from polar_sdk.errors import ProgramError
from polar_sdk.reading import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import Connection

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.prices.book import PriceBook
    from polar_billing.statements.issued import IssuedStatement
    from polar_sdk.programs.cost import CostModel
    from polar_sdk.usage import UsageRecord

_LINE_ID: Final = re.compile(r"(st-[0-9a-f]{24})/([0-9]{1,9})")
_STATEMENT_ID: Final = re.compile(r"st-[0-9a-f]{24}")


class PriceStep(Part):
    """One charged item: `quantity × unit_price = exact`, where `unit_price = price × multiplier`."""

    item: str
    quantity: Decimal
    unit: str
    price: Decimal
    """Price in the price book's entry; 0 if the outcome is free."""
    multiplier: Decimal
    """Multiplier of the tier."""
    unit_price: Decimal
    exact: Decimal
    """Before rounding."""


class RequestExplanation(Part):
    """One request, from its facts to its cost."""

    kind: Literal["request"] = "request"
    request_id: str
    tenant: str
    source: str
    seq: int
    """Its number in the ledger."""
    usage: dict[str, Any]
    """The usage record."""
    layers: tuple[LayerState, ...]
    """Empty where no layer ran."""
    formula: Formula | None
    no_formula: str | None
    """Reason that the FLOPs are not taken apart."""
    price_book: str
    price_book_hash: str
    currency: str
    prices: tuple[PriceStep, ...]
    exact: Decimal
    """The sum of the steps, before rounding."""
    cost: Decimal | None
    """Cost on the receipt: the sum, rounded once to 12 decimals, half to even. None where unrated."""
    unrated: str | None
    lines: tuple[str, ...]
    """Ids of the lines of issued statements that charge it."""
    receipt: dict[str, Any]


class Charged(Part):
    """One usage record of a line."""

    seq: int
    request_id: str
    flops: int
    tokens_input: int
    tokens_output: int


class LineExplanation(Part):
    """One line of an issued statement, from its amount to the usage records."""

    kind: Literal["line"] = "line"
    id: str
    statement: str
    tenant: str
    period: str
    price_book: str
    price_book_hash: str
    currency: str
    decimals: int
    line: StatementLine
    exact: Decimal | None
    """Quantity × unit price; None for lines without them."""
    requests: int
    """Usage records that the line is about."""
    flops: int
    tokens_input: int
    tokens_output: int
    counted: Decimal | None
    """The line's quantity added up from the usage records; None if a plan prices it over the period."""
    records: tuple[Charged, ...]
    """The first of them."""


def is_line_id(text: str) -> bool:
    """Whether a text names a statement or a line of one, and no request."""
    return bool(_LINE_ID.fullmatch(text) or _STATEMENT_ID.fullmatch(text))


def line_id(statement: str, number: int) -> str:
    """The id of a line: `st-…/1`."""
    return f"{statement}/{number}"


def explain_request(
    ledger: Ledger,
    request_id: str,
    *,
    tenant: str | None = None,
    source: str | None = None,
    costs: Callable[[UsageRecord], CostModel | str] = lambda _: "no sizes of the model were given",
) -> RequestExplanation:
    """Explain the cost of a request; see `find_request` for how it is named.

    `costs` finds the sizes of the model that served a record, or says why it cannot.

    Raises:
        QueryError: There is no such request, there are several, or retention has deleted its facts.
    """
    with ledger.snapshot() as connection:
        identity = tenant, source, request_id = find_request(connection, request_id, tenant, source)
        _, stored = find_known(connection, [identity])[identity]
        if not isinstance(stored, StoredUsage):
            raise QueryError(
                f"the facts of request {request_id!r} were deleted by `polar prune`.",
                hint=f"Its receipt is still there: polar receipt {request_id} --tenant {tenant}.",
            )
        receipt = make_receipt(connection, tenant, request_id, source=source)
        book = read_book(connection, stored.price_book_hash)
        assert book is not None  # or there was no receipt
    record = stored.record
    lines = lines_of_usage(ledger, record.tenant, stored.seq)
    formula = why = None
    if not record.program:
        why = "nothing was executed: the answer came from a cache"
    elif isinstance(sizes := costs(record), str):
        why = sizes
    else:
        try:
            formula = work_out(record, sizes)
        except ProgramError as error:
            why = str(error)
    prices = _prices(record, book)
    return RequestExplanation(
        request_id=request_id,
        tenant=record.tenant,
        source=stored.source,
        seq=stored.seq,
        usage=record.model_dump(mode="json"),
        layers=layers_of_record(record),
        formula=formula,
        no_formula=why,
        price_book=book.id,
        price_book_hash=stored.price_book_hash,
        currency=book.currency,
        prices=prices,
        exact=exact_sum((step.exact for step in prices), EXACT_SCALE),
        cost=stored.cost,
        unrated=stored.unrated,
        lines=tuple(line_id(issued.statement.id, line.number) for issued, line in lines),
        receipt=receipt,
    )


def _prices(record: UsageRecord, book: PriceBook) -> tuple[PriceStep, ...]:
    charged_by = rate_of(book, record.tenant, record.tier, record.started_at)
    if isinstance(charged_by, str):
        return ()
    free = record.outcome in book.free_outcomes
    rates = {
        item.name: Decimal(0) if free else price
        for item, price in zip(ITEMS.values(), charged_by.entry.rates, strict=True)
        if price is not None
    }
    lines = rate(record, book, counterfactuals=False).lines
    return tuple(
        PriceStep(
            item=line.item.name,
            quantity=line.quantity,
            unit=line.item.unit,
            price=price,
            multiplier=charged_by.multiplier,
            unit_price=line.unit_price,
            exact=from_scaled(line.exact, EXACT_SCALE),
        )
        for line, price in zip(lines, rates.values(), strict=bool(lines))
    )


def explain_line(ledger: Ledger, name: str, *, tenant: str | None = None, records: int = 20) -> LineExplanation:
    """Explain a line of an issued statement by its id, `st-…/1`, and list the first of its usage records.

    Raises:
        QueryError: There is no such statement or line.
    """
    with ledger.snapshot() as connection:
        issued, line = _issued_line(connection, name, tenant)
        conditions = conditions_of(connection, issued, line)
        usage = usage_table.c
        charged = charged_flops(rated_in(connection, issued.statement, line)[0])
        tokens = (func.sum(usage.tokens_input), func.sum(usage.tokens_output))
        query = select(func.count(), *tokens, *split_sum(charged)).where(*conditions)
        requests, *tokens_summed, millions, rest = connection.execute(query).one()
        listed = connection.execute(
            select(usage.seq, usage.request_id, charged, usage.tokens_input, usage.tokens_output)
            .where(*conditions)
            .order_by(usage.seq)
            .limit(records)
        ).all()
    flops, (tokens_input, tokens_output) = joined_sum(millions, rest), (int(count or 0) for count in tokens_summed)
    statement = issued.statement
    same = ("tenant", "price_book", "price_book_hash", "currency", "decimals")
    return LineExplanation(
        **{name: getattr(statement, name) for name in same},
        id=line_id(statement.id, line.number),
        statement=statement.id,
        period=statement.period.label,
        line=line,
        exact=None if line.quantity is None or line.unit_price is None else product(line.quantity, line.unit_price),
        requests=requests,
        flops=flops,
        tokens_input=tokens_input,
        tokens_output=tokens_output,
        counted=_counted(line, (flops, tokens_input, tokens_output, requests)),
        records=tuple(Charged(**dict(zip(Charged.model_fields, row, strict=True))) for row in listed),
    )


def _issued_line(connection: Connection, name: str, tenant: str | None) -> tuple[IssuedStatement, StatementLine]:
    match = _LINE_ID.fullmatch(name)
    statement_id = match[1] if match else name
    query = select(statement_table.c.tenant).where(statement_table.c.id == statement_id)
    owners = [owner for owner in connection.execute(query).scalars() if tenant in (None, owner)]
    issued = find_statement(connection, owners[0], statement_id) if owners else None
    if issued is None:
        raise QueryError(
            f"no statement {shown(statement_id)} is issued{'' if tenant is None else f' to tenant {tenant!r}'}.",
            hint="A draft's lines can still change; `polar statement --tenant NAME` lists issued ones.",
        )
    lines = issued.statement.lines
    number = int(match[2]) if match else 0
    if not 1 <= number <= len(lines):
        raise QueryError(
            f"statement {statement_id!r} has {len(lines)} lines, and {shown(name)} names none of them.",
            hint=f"Name one: {statement_id}/1." if lines else "",
        )
    return issued, lines[number - 1]


def _counted(line: StatementLine, counts: Sequence[int]) -> Decimal | None:
    """The quantity of a line, added up from usage; None if the plan counts otherwise."""
    if line.kind != "usage":
        return None
    for item, count in zip(ITEMS.values(), counts, strict=True):
        if line.item == item.name or (line.item.startswith(f"{item.name} (") and line.outcome is not None):
            return item.quantity(count)
    return None
