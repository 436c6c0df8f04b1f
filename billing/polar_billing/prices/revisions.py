"""The changes of one revision of a price book against another, and which of them concern the past. Pure.

Books are revised by adding entries that begin later; a rate, term or plan that has been in force stays what it
was. Prepaid credits, and plans that nobody can be on yet, may be added at any time: they change no rate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from polar_billing.errors import PriceBookError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polar_billing.prices.book import PriceBook
    from polar_billing.prices.entries import Checked, PriceEntry


_MAX_NAMED: Final = 3
_NEVER: Final = datetime.max.replace(tzinfo=UTC)
"""When an added credit, or a plan that is new, changes a rate."""


@dataclass(frozen=True)
class Change:
    """One difference between two revisions."""

    path: str
    """The place in the file: `prices[2026-01-01T00:00:00+00:00].per_compute_unit`."""
    old: str | None
    """None if there was nothing."""
    new: str | None
    """None if nothing is left."""
    effective_from: datetime | None
    """From when on it makes a difference; None for always."""

    def __str__(self) -> str:
        return f"{self.path}: {self.old or 'nothing'} → {self.new or 'nothing'}"


@dataclass(frozen=True)
class _Part:
    begins: datetime | None
    values: dict[str, str]
    ends: datetime | None = None
    addable: bool = False
    """True if a new one may begin in the past."""


def changes(old: PriceBook, new: PriceBook) -> list[Change]:
    """Every difference, in the order of the paths."""
    before, after = dict(_parts(old, old)), dict(_parts(new, old))
    return [change for path in sorted(before | after) for change in _compare(path, before.get(path), after.get(path))]


def past_changes(old: PriceBook, new: PriceBook, until: datetime) -> list[Change]:
    """The differences that touch what was in force at or before a moment."""
    return [change for change in changes(old, new) if change.effective_from is None or change.effective_from <= until]


def check_revision(old: PriceBook, new: PriceBook, *, now: datetime, last_use: datetime | None) -> None:
    """Refuse a revision that changes the past: before `now`, and the service time of the old book's last use.

    Raises:
        PriceBookError: A rate, term or plan that was in force, or that rated a use, would change.
    """
    until = now if last_use is None else max(now, last_use)
    past = past_changes(old, new, until)
    if past:
        named = "; ".join(str(change) for change in past[:_MAX_NAMED])
        more = f"; and {len(past) - _MAX_NAMED} more" if len(past) > _MAX_NAMED else ""
        raise PriceBookError(
            f"price book {new.id!r} changes what was in force by {until.isoformat(timespec='seconds')}: {named}{more}.",
            hint="Keep past entries as they are and add one with a later effective_from.",
        )


def _parts(book: PriceBook, former: PriceBook) -> Iterator[tuple[str, _Part]]:
    facts = {
        "currency": book.currency,
        "decimals": str(book.statement_decimals),
        "free_outcomes": ", ".join(sorted(book.free_outcomes)) or "none",
    }
    for name, value in facts.items():
        yield name, _Part(None, {"": value})
    for entry in book.prices:
        yield _entry("prices", entry)
    for name, plan in book.plans.items():
        parts = [_entry(f"plans.{name}.prices", entry) for entry in plan.prices]
        parts += [_part(f"plans.{name}.terms", terms.effective_from, terms) for terms in plan.terms]
        for path, part in parts:
            yield path, replace(part, addable=name not in former.plans)
    for customer in book.customers:
        yield _part(f"customers.{customer.tenant}", customer.effective_from, customer)
    for credit in book.credits:
        yield f"credits.{credit.id}", _Part(credit.effective_from, _leaves(credit), addable=True)


def _entry(path: str, entry: PriceEntry) -> tuple[str, _Part]:
    name, part = _part(path, entry.effective_from, entry)
    return name, replace(part, ends=entry.effective_until)


def _part(path: str, begins: datetime, model: Checked) -> tuple[str, _Part]:
    return f"{path}[{begins.isoformat()}]", _Part(begins, _leaves(model))


def _compare(path: str, old: _Part | None, new: _Part | None) -> Iterator[Change]:
    if old is None and new is not None:
        yield Change(path, None, "added", _NEVER if new.addable else new.begins)
    elif new is None and old is not None:
        yield Change(path, "present", None, old.begins)
    elif old is not None and new is not None:
        for key in sorted(old.values.keys() | new.values.keys()):
            before, after = old.values.get(key), new.values.get(key)
            if before != after:
                begins = old.begins
                if key == "effective_until":  # an end that moves changes nothing before the earlier of the two
                    begins = min(end for end in (old.ends, new.ends) if end is not None)
                yield Change(f"{path}.{key}" if key else path, before, after, begins)


def _leaves(model: Checked) -> dict[str, str]:
    """Every value of a part by its key, nested keys joined by dots."""
    return dict(_flat("", model.model_dump(mode="json", exclude={"effective_from"}, exclude_none=True)))


def _flat(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(f"{path}.{key}" if path else str(key), part)
    elif isinstance(value, list):
        for place, part in enumerate(value):
            yield from _flat(f"{path}[{place}]", part)
    else:
        yield path, str(value)
