"""Usage, the tables of a report, and FOCUS rows as Parquet files, with the extra `parquet`.

Money and quantities are decimals, times are UTC to the microsecond, tags a map. Texts are unchanged: nothing runs a
cell of a Parquet file as a formula. Writing raises `MissingExtraError` without pyarrow, and `OutputError` if the file
cannot be written. Knows no ledger.
"""

from __future__ import annotations

from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from polar_billing.errors import MissingExtraError
from polar_billing.exports.cloud_events import usage_facts
from polar_billing.exports.focus import COLUMNS, COST_DECIMALS, NUMBERS, OWN_COLUMNS, TIMES
from polar_billing.exports.output import whole
from polar_billing.prices.rating import COMPUTE, UNIT_PRICE_SCALE
from polar_billing.reports.csv import report_rows
from polar_billing.values.money import STORED_SCALE, from_scaled, round_half_even, to_scaled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from decimal import Decimal
    from pathlib import Path

    import pyarrow

    from polar_billing.ledger.records import StoredUsage
    from polar_billing.prices.book import PriceBook
    from polar_billing.reports.energy import EnergyBasis
    from polar_billing.reports.report import Report

    Row = Mapping[str, Any]

BATCH: Final = 10_000
"""Rows of a group: what is in memory at once."""
_DIGITS: Final = 38


def write_usage(
    path: Path,
    usage: Iterable[StoredUsage],
    read_books: Callable[[], Mapping[str, PriceBook]],
    energy: EnergyBasis | None = None,
) -> int:
    """Write one row per request, and return their number; see `cloud_events.batch_text` for `read_books`."""
    arrow = _arrow()
    text, count, moment = arrow.string(), arrow.int64(), arrow.timestamp("us", tz="UTC")
    layers, cost = arrow.list_(count), arrow.decimal128(_DIGITS, STORED_SCALE)
    types = {
        **dict.fromkeys(("sequence",), count),
        **dict.fromkeys(("source", "request_id", "tenant", "tier"), text),
        "tags": arrow.map_(text, text),
        **dict.fromkeys(("model", "model_fingerprint", "router", "router_version", "program"), text),
        **dict.fromkeys(("outcome", "finish_reason", "error", "device", "dtype"), text),
        **dict.fromkeys(("started_at", "stored_at"), moment),
        **dict.fromkeys(("tokens_input", "tokens_cached", "tokens_output", "tokens_drafted", "tokens_accepted"), count),
        **dict.fromkeys(("visits_prefill", "visits_prefill_filled", "visits_decode"), layers),
        **dict.fromkeys(("flops_embed", "flops_layers_prefill", "flops_layers_decode", "flops_head"), count),
        **dict.fromkeys(("flops_router", "flops", "flops_drafts", "flops_full_depth", "flops_saved"), count),
        "compute_units": arrow.decimal128(_DIGITS, COMPUTE.decimals),
        **dict.fromkeys(("kv_bytes_peak", "queue_ns", "prefill_ns", "decode_ns"), count),
        "cost": cost,
        **dict.fromkeys(("currency", "price_book", "price_book_hash", "unrated"), text),
        **dict.fromkeys(("energy_joules", "carbon_grams"), arrow.decimal128(_DIGITS, STORED_SCALE)),
        **dict.fromkeys(("energy_basis", "energy_source", "grid_source"), text),
    }
    books = cache(read_books)
    return _write(path, types, (_usage_row(stored, books()[stored.price_book_hash], energy) for stored in usage))


def _usage_row(stored: StoredUsage, book: PriceBook, energy: EnergyBasis | None) -> Row:
    record, flops = stored.record, stored.record.flops
    more = ("request_id", "router_version", "error", "dtype", "started_at", "kv_bytes_peak")
    modelled: Row = {}
    if energy is not None:
        joules, grams = energy.of_flops(flops.executed)
        said = {"energy_basis": energy.kind, "energy_source": energy.source, "grid_source": energy.grid_source}
        modelled = {"energy_joules": joules, "carbon_grams": grams, **said}
    return {
        **usage_facts(stored, book),
        **{name: getattr(record, name) for name in more},
        "source": stored.source,
        "tags": list(record.tags.items()),
        "stored_at": stored.stored_at,
        "visits_prefill": record.visits.prefill,
        "visits_prefill_filled": record.visits.prefill_filled,
        "visits_decode": record.visits.decode,
        "flops_embed": flops.embed,
        "flops_layers_prefill": flops.layers_prefill,
        "flops_layers_decode": flops.layers_decode,
        "flops_head": flops.head,
        "flops_router": flops.router,
        **modelled,
    }


def write_report(path: Path, report: Report) -> int:
    """Write the rows of `polar report --csv`, and return their number."""
    arrow = _arrow()
    header, rows = report_rows(report)
    amounts = [
        name for name in header if name.startswith(("compute_units", "charge", "price_")) or name.endswith("_share")
    ]
    types = {
        **dict.fromkeys(header, arrow.int64()),
        **dict.fromkeys(amounts, arrow.decimal128(_DIGITS, STORED_SCALE)),
        **dict.fromkeys(("since", "until"), arrow.timestamp("us", tz="UTC")),
        **dict.fromkeys(("tenant", "kind", "tier", "currency"), arrow.string()),
    }
    return _write(path, types, rows)


def write_focus(path: Path, rows: Iterable[Row]) -> int:
    """Write FOCUS rows, and return their number; costs that are not rounded have 18 decimals here."""
    arrow = _arrow()
    types = {
        **dict.fromkeys((*COLUMNS, *OWN_COLUMNS), arrow.string()),
        **dict.fromkeys(("x_LineNumber",), arrow.int64()),
        **dict.fromkeys(TIMES, arrow.timestamp("us", tz="UTC")),
        **dict.fromkeys(NUMBERS, arrow.decimal128(_DIGITS, UNIT_PRICE_SCALE)),
    }

    def rounded(cost: Decimal | None) -> Decimal | None:
        if cost is None:
            return None
        units = round_half_even(to_scaled(cost, COST_DECIMALS), COST_DECIMALS, UNIT_PRICE_SCALE)
        return from_scaled(units, UNIT_PRICE_SCALE)

    exact = ("ContractedCost", "ListCost")
    return _write(path, types, ({**row, **{name: rounded(row.get(name)) for name in exact}} for row in rows))


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError.of("Parquet", error, "parquet") from error
    return pyarrow


def _write(path: Path, types: Mapping[str, pyarrow.DataType], rows: Iterable[Row]) -> int:
    arrow = _arrow()
    schema = arrow.schema(list(types.items()))
    written, following = 0, iter(rows)
    with whole(path) as draft, arrow.parquet.ParquetWriter(draft, schema, compression="zstd") as writer:
        while batch := list(islice(following, BATCH)):
            columns = [arrow.array([row.get(name) for row in batch], kind) for name, kind in types.items()]
            writer.write_batch(arrow.record_batch(columns, schema=schema))
            written += len(batch)
    return written
