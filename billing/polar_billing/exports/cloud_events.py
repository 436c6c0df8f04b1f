"""Usage as CloudEvents 1.0, one event per request, in the JSON batch format, for OpenMeter and others.

`usage_event.schema.json` beside this file is the JSON schema of an event, which each event names in `dataschema`. An
event is the same every time it is made: `source` and `id` together identify a request, so a reader that drops repeated
events counts a request once, even if it is exported several times. Knows no ledger.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from polar_billing.prices.rating import COMPUTE
from polar_billing.values.money import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from polar_billing.ledger.records import StoredUsage
    from polar_billing.prices.book import PriceBook
    from polar_billing.reports.energy import EnergyBasis


EVENT_TYPE: Final = "polar.usage"
SCHEMA_ID: Final = "urn:polar-llm:schema:usage-event:1"
_SCHEMA_FILE: Final = "usage_event.schema.json"
_OF_RECORD: Final = (
    "tenant", "tier", "model", "model_fingerprint", "router", "program", "finish_reason", "device", "queue_ns",
    "prefill_ns", "decode_ns",
)  # fmt: skip


def event_schema() -> dict[str, Any]:
    """The JSON schema of an event."""
    schema: dict[str, Any] = json.loads(resources.files("polar_billing.exports").joinpath(_SCHEMA_FILE).read_bytes())
    return schema


def usage_event(stored: StoredUsage, book: PriceBook, energy: EnergyBasis | None = None) -> dict[str, Any]:
    """The event of one stored request, by the book of its receipt; its energy is modelled if there is a basis."""
    record = stored.record
    modelled: dict[str, Any] = {}
    if energy is not None:
        joules, grams = energy.of_flops(record.flops.executed)
        modelled["energy"] = {
            "basis": energy.kind,
            "source": energy.source,
            "joules": f"{joules:f}",
            "carbon_grams": None if grams is None else f"{grams:f}",
            "grid_source": energy.grid_source,
        }
    facts = usage_facts(stored, book)
    return {
        "specversion": "1.0",
        "type": EVENT_TYPE,
        "source": f"/polar/{quote(record.tenant, safe='')}/{quote(stored.source, safe='')}",
        "id": record.request_id,
        "subject": record.tenant,
        "time": record.started_at.isoformat().replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "dataschema": SCHEMA_ID,
        "data": {
            **facts,
            "tags": dict(record.tags),
            "visits": record.visits.total,
            "compute_units": plain(facts["compute_units"]),
            "cost": None if stored.cost is None else f"{stored.cost:f}",
            **modelled,
        },
    }


def usage_facts(stored: StoredUsage, book: PriceBook) -> dict[str, Any]:
    """The facts of one stored request and its receipt that every export of usage has, by the name of their column."""
    record, tokens, flops = stored.record, stored.record.tokens, stored.record.flops
    return {
        **{name: getattr(record, name) for name in _OF_RECORD},
        "outcome": record.outcome.value,
        "tokens_input": tokens.input,
        "tokens_cached": tokens.cached,
        "tokens_output": tokens.output,
        "tokens_drafted": tokens.drafted,
        "tokens_accepted": tokens.accepted,
        "flops": flops.total,
        "flops_drafts": flops.drafts,
        "flops_full_depth": record.identity_flops,
        "flops_saved": record.flops_saved,
        "compute_units": COMPUTE.quantity(flops.total),
        "cost": stored.cost,
        "currency": book.currency,
        "price_book": book.id,
        "price_book_hash": stored.price_book_hash,
        "unrated": stored.unrated,
        "sequence": stored.seq,
    }


def batch_text(
    usage: Iterable[StoredUsage],
    read_books: Callable[[], Mapping[str, PriceBook]],
    energy: EnergyBasis | None = None,
) -> Iterator[str]:
    """A batch as pieces of JSON text, one event a line, so that a long one is never whole in memory.

    `read_books` reads every book by content hash. It is called once, after the first request was read: a record stored
    in between may have brought its book in.
    """
    opening, books = "[\n", cache(read_books)
    for stored in usage:
        event = usage_event(stored, books()[stored.price_book_hash], energy)
        yield opening + json.dumps(event, separators=(",", ":"))
        opening = ",\n"
    yield "[]\n" if opening == "[\n" else "\n]\n"
