"""Price books: dated prices, chosen by the time of use, read from TOML and checked.

A book is never edited in the ledger: every book that rated a request is kept there whole, under the SHA-256 of its
content, so a changed file cannot change what was already charged. Usage for which a book has no price is unrated, with
a reason, never free by accident.

This module knows no usage records (see `rating`) and no database.
"""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

from pydantic import Field, StringConstraints, ValidationError, field_serializer, model_validator

from polar_billing.errors import AmountError, PriceBookError
from polar_billing.prices.entries import Checked, Name, Timeline, entry_at
from polar_billing.prices.plans import Credit, Customer, Plan, in_order
from polar_billing.values.canonical import canonical_text
from polar_billing.values.money import (
    CURRENCIES,
    STORED_MAX,
    STORED_SCALE,
    currency_decimals,
    from_scaled,
    plain,
    to_scaled,
)
from polar_sdk import reading
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from polar_billing.prices.entries import PriceEntry
    from polar_billing.prices.plans import Terms


PRICE_BOOK_VARIABLE: Final = "POLAR_PRICE_BOOK"
EXAMPLE_BOOK: Final = "example_prices.toml"
EXAMPLE_PLANS: Final = "example_plans.toml"
_MAX_PROBLEMS: Final = 3
_MAX_DOCUMENT: Final = 64 * 2**20
"""Unit: bytes."""
_ADDED_LATER: Final = ("plans", "customers", "credits", "charge_drafts")


class PriceBook(Checked):
    """Dated prices in one currency."""

    id: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100)]
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")]
    """ISO 4217 code."""
    decimals: Annotated[int, Field(strict=True, ge=0, le=STORED_SCALE)] | None = None
    """Decimals a statement line is rounded to; by default those of the currency's minor unit."""
    free_outcomes: frozenset[Outcome] = frozenset()
    """Outcomes that are metered but charged at 0, for example `error`."""
    charge_drafts: Annotated[bool, Field(strict=True)] = False
    """Whether compute units include work on drafted tokens that were not kept. By default, they are
    what the answers needed, as without drafts."""
    prices: Annotated[Timeline, Field(min_length=1)]

    plans: dict[Name, Plan] = Field(default_factory=dict)
    """Terms of customers' contracts, by name."""
    customers: Annotated[tuple[Customer, ...], in_order("customers", "tenant", "effective_from")] = ()
    """Tenants with a plan, and from when; others pay the plain rates."""
    credits: Annotated[tuple[Credit, ...], in_order("credits", "id")] = ()
    """Prepaid money of tenants."""

    @model_validator(mode="after")
    def _plans_exist(self) -> Self:
        for customer in self.customers:
            if customer.plan is not None and customer.plan not in self.plans:
                raise ValueError(
                    f"customer {customer.tenant!r} is on plan {customer.plan!r}, which the book does not have"
                )
        for credit in self.credits:
            try:
                to_scaled(credit.amount, self.statement_decimals)
            except AmountError:
                raise ValueError(
                    f"credit {credit.id!r} ({credit.amount}) has more than the {self.statement_decimals} decimals of a "
                    "statement"
                ) from None
        return self

    @field_serializer("free_outcomes")
    def _sorted(self, outcomes: frozenset[Outcome]) -> list[str]:
        return sorted(outcomes)

    @property
    def statement_decimals(self) -> int:
        """Decimals of a statement line: those of the book, or of its currency."""
        return currency_decimals(self.currency) if self.decimals is None else self.decimals

    @cached_property
    def document(self) -> str:
        """The content as canonical JSON; what the ledger keeps and the hash covers."""
        content = self.model_dump(mode="json")
        for key in _ADDED_LATER:  # absent where empty, so that older books keep their hash
            if not content[key]:
                del content[key]
        return canonical_text(content)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over the content, hexadecimal; comments and order in the file do not matter."""
        return hashlib.sha256(self.document.encode()).hexdigest()

    def entry_at(self, moment: datetime, tenant: str | None = None) -> PriceEntry | None:
        """The entry in force at a time of use, or None before the first and in a gap.

        Args:
            moment: The time of use.
            tenant: The tenant, whose plan may have its own rates; None for the plain rates.
        """
        return entry_at(self.entries_at(moment, tenant), moment)

    def entries_at(self, moment: datetime, tenant: str | None) -> tuple[PriceEntry, ...]:
        """The timeline of rates that a tenant is on at a moment: its plan's, or else the book's."""
        plan = None if tenant is None else self.plan_at(moment, tenant)
        return plan.prices if plan is not None and plan.prices else self.prices

    def customer_at(self, moment: datetime, tenant: str) -> Customer | None:
        """The book's entry about a tenant at a moment."""
        past = [customer for customer in self._by_tenant.get(tenant, ()) if customer.effective_from <= moment]
        return past[-1] if past else None

    def plan_at(self, moment: datetime, tenant: str) -> Plan | None:
        """The plan a tenant is on at a moment; None for the plain rates."""
        customer = self.customer_at(moment, tenant)
        return None if customer is None or customer.plan is None else self.plans[customer.plan]

    def terms_at(self, moment: datetime, tenant: str) -> tuple[str | None, Terms | None]:
        """The name of the plan that a tenant is on at a moment, and its terms then; None if there are none."""
        customer = self.customer_at(moment, tenant)
        if customer is None or customer.plan is None:
            return None, None
        return customer.plan, self.plans[customer.plan].terms_at(moment)

    def customers_of(self, tenant: str) -> tuple[Customer, ...]:
        """Everything the book says of a tenant, by time."""
        return self._by_tenant.get(tenant, ())

    def changes_of(self, tenant: str) -> list[datetime]:
        """Every moment at which a tenant's rates, plan or terms can change, in order."""
        return self._changes(self.customers_of(tenant))

    def changes(self) -> list[datetime]:
        """The same of any tenant."""
        return self._changes(self.customers)

    def _changes(self, customers: Iterable[Customer]) -> list[datetime]:
        timelines = [self.prices, *(plan.prices for plan in self.plans.values())]
        moments = {entry.effective_from for entries in timelines for entry in entries}
        moments |= {entry.effective_until for entries in timelines for entry in entries if entry.effective_until}
        moments |= {terms.effective_from for plan in self.plans.values() for terms in plan.terms}
        return sorted(moments | {customer.effective_from for customer in customers})

    @cached_property
    def _by_tenant(self) -> dict[str, tuple[Customer, ...]]:
        grouped = groupby(self.customers, key=lambda customer: customer.tenant)
        return {tenant: tuple(customers) for tenant, customers in grouped}

    @classmethod
    def load(cls, path: str | Path | None = None) -> Self:
        """Read a price book.

        Args:
            path: A TOML file; None for the file of `POLAR_PRICE_BOOK`, or else the example of the package.

        Raises:
            PriceBookError: The file is missing or wrong; the message names file, key and value.
        """
        named = path or os.environ.get(PRICE_BOOK_VARIABLE)
        if not named:
            return cls.example()
        file = Path(named).expanduser()
        try:
            text = reading.read_text(file, reading.MAX_TOML_BYTES)
        except (OSError, reading.Unreadable) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise PriceBookError(
                f"price book {str(file)!r} cannot be read ({reason}).",
                hint="Name a readable TOML file." if path else f"Correct the path in {PRICE_BOOK_VARIABLE}.",
            ) from error
        return cls.from_toml(text, name=str(file))

    @classmethod
    def example(cls, name: str = EXAMPLE_BOOK) -> Self:
        """A book shipped with the package, by default the one without plans; prices are examples, not advice."""
        text = resources.files("polar_billing").joinpath(name).read_text(encoding="utf-8")
        return cls.from_toml(text, name=name)

    @classmethod
    def from_toml(cls, text: str, *, name: str = "<text>") -> Self:
        """Read a price book from TOML text; `name` stands for the file in messages.

        Raises:
            PriceBookError: It is not TOML, or a key is missing or wrong; or it can charge nothing, see `check_rates`.
        """
        try:
            book = cls.model_validate(reading.parse_toml(text))
        except reading.Unreadable as error:
            raise PriceBookError(f"price book {name!r} is {error.fault}.") from error
        except ValidationError as error:
            raise PriceBookError(f"price book {name!r}: {_problems(error)}") from error
        book.check_rates(name)
        return book

    @classmethod
    def from_document(cls, document: str) -> Self:
        """Read a book back from the canonical JSON that the ledger keeps.

        Raises:
            PriceBookError: The text is not such a document.
        """
        try:
            return cls.model_validate(reading.parse_object(document, max_bytes=_MAX_DOCUMENT))
        except reading.Unreadable as error:
            raise PriceBookError(f"a stored price book is {error.fault}.", hint="Run `polar verify`.") from error
        except ValidationError as error:
            raise PriceBookError(f"a stored price book: {_problems(error)}", hint="Run `polar verify`.") from error

    def check_rates(self, name: str | None = None) -> None:
        """Refuse rates by which no use could be charged. Books already in force are not checked again.

        Args:
            name: What stands for the book in messages; None for its id.

        Raises:
            PriceBookError: A tier or the currency matches nothing, or one request or compute unit costs more than the
                ledger holds.
        """
        book = f"price book {self.id if name is None else name!r}"
        if self.currency not in CURRENCIES:
            raise PriceBookError(f"{book}: currency = {self.currency!r} is not in use.", hint="Use an ISO 4217 code.")
        timelines = {"": self.prices} | {f"plans.{plan}.": self.plans[plan].prices for plan in self.plans}
        for where, entries in timelines.items():
            for entry in entries:
                _check_entry(entry, f"{book}: {where}prices from {entry.effective_from.isoformat()}", self.currency)


def _check_entry(entry: PriceEntry, where: str, currency: str) -> None:
    for tier in entry.tiers:
        if not tier or tier != tier.strip():
            raise PriceBookError(f"{where}: tier {tier!r} can never match.", hint="Write it without blanks.")
    once = {"per_request": entry.per_request, "per_compute_unit": entry.per_compute_unit}
    multipliers = {**{f"tier {tier!r}": value for tier, value in entry.tiers.items()}, "untiered": entry.untiered}
    for who, multiplier in multipliers.items():
        for key, price in once.items():
            if price is None or multiplier is None:
                continue
            cost = to_scaled(price, STORED_SCALE) * to_scaled(multiplier, 6)
            if cost > STORED_MAX * 10**6:
                raise PriceBookError(
                    f"{where}: {key} = {plain(price)} × {plain(multiplier)} ({who}) is more than a receipt holds, "
                    f"{from_scaled(STORED_MAX, STORED_SCALE):f} {currency}.",
                    hint="Lower the price or the multiplier.",
                )


def _problems(error: ValidationError) -> str:
    """Say on one line which keys are wrong, with what value and why."""
    problems = error.errors(include_url=False)
    text = "; ".join(_problem(dict(problem)) for problem in problems[:_MAX_PROBLEMS])
    more = len(problems) - _MAX_PROBLEMS
    return f"{text}; and {more} more." if more > 0 else f"{text}."


def _problem(problem: dict[str, Any]) -> str:
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
    reason = str(problem["msg"]).removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    value = problem["input"]
    if isinstance(value, (dict, list, tuple)):
        return f"{key}: {reason}" if key else reason
    return f"{key} = {reading.shown(str(value))}: {reason}"
