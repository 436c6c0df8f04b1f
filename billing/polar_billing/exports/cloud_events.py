"""Usage as CloudEvents 1.0, one event per request, in the JSON batch format; OpenMeter and others take them.

`usage_event.schema.json` beside this file is the JSON schema of an event, which each event names in `dataschema`. An
event is the same every time it is made: `source` and `id` together tell requests apart, so a reader that drops repeated
events counts a request once, however often it is exported. Knows no ledger.
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


def event_schema() -> dict[str, Any]:
    """The JSON schema of an event."""
    schema: dict[str, Any] = json.loads(resources.files("polar_billing.exports").joinpath(_SCHEMA_FILE).read_bytes())
    return schema


def usage_event(stored: StoredUsage, book: PriceBook, energy: EnergyBasis | None = None) -> dict[str, Any]:
    """The event of one stored request, by the book of its receipt; its energy is modelled if there is a basis."""
    record = stored.record
    modelled = {} if energy is None else {"energy": _energy(record.flops.executed, energy)}
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
            "tenant": record.tenant,
            "tier": record.tier,
            "tags": dict(record.tags),
            "model": record.model,
            "model_fingerprint": record.model_fingerprint,
            "router": record.router,
            "program": record.program,
            "outcome": record.outcome.value,
            "finish_reason": record.finish_reason,
            "tokens_input": record.tokens.input,
            "tokens_cached": record.tokens.cached,
            "tokens_output": record.tokens.output,
            "tokens_drafted": record.tokens.drafted,
            "tokens_accepted": record.tokens.accepted,
            "visits": record.visits.total,
            "flops": record.flops.total,
            "flops_drafts": record.flops.drafts,
            "flops_full_depth": record.identity_flops,
            "flops_saved": record.flops_saved,
            "compute_units": plain(COMPUTE.quantity(record.flops.total)),
            "queue_ns": record.queue_ns,
            "prefill_ns": record.prefill_ns,
            "decode_ns": record.decode_ns,
            "device": record.device,
            "cost": None if stored.cost is None else f"{stored.cost:f}",
            "currency": book.currency,
            "price_book": book.id,
            "price_book_hash": stored.price_book_hash,
            "unrated": stored.unrated,
            "sequence": stored.seq,
            **modelled,
        },
    }


def _energy(flops: int, basis: EnergyBasis) -> dict[str, str | None]:
    joules, grams = basis.of_flops(flops)
    return {
        "basis": basis.kind,
        "source": basis.source,
        "joules": f"{joules:f}",
        "carbon_grams": None if grams is None else f"{grams:f}",
        "grid_source": basis.grid_source,
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
