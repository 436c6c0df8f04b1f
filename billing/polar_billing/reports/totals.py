"""Sums over usage, which the usage query and the report share, so that they cannot disagree.

`UsageSums` has what sums by hour and receipts contain; `UsageTotals` adds what only records and their rating have:
layers, latencies and charged lines. Everything adds up in Python integers, exactly and in any order; amounts come from
summed quantities, not from rounded amounts. Knows no store and no output format.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import TYPE_CHECKING, Final, TypeVar

from polar_billing.errors import CurrencyMixError
from polar_billing.ledger.rollups import sum_of
from polar_billing.prices.rating import ChargeLine, Item, Rating, rate
from polar_billing.values.money import EXACT_SCALE, round_half_even
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import datetime
    from decimal import Decimal

    from polar_billing.ledger.records import StoredUsage
    from polar_billing.ledger.rollups import Sum
    from polar_billing.prices.book import PriceBook


Key = TypeVar("Key")


@dataclass
class LayerVisits:
    """Visits per layer, index = layer. Unit: visits."""

    prefill: list[int] = field(default_factory=list)
    filled: list[int] = field(default_factory=list)
    decode: list[int] = field(default_factory=list)

    def add(self, prefill: Sequence[int], filled: Sequence[int], decode: Sequence[int]) -> None:
        """Add visits layer by layer; a shorter list counts as zeros at its end."""
        pairs = ((self.prefill, prefill), (self.filled, filled), (self.decode, decode))
        self.prefill, self.filled, self.decode = (list(map(sum, zip_longest(*pair, fillvalue=0))) for pair in pairs)


@dataclass
class UsageSums:
    """Usage of a group of requests, and the sum of its receipts; see `UsageRecord` for the units."""

    requests: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    tokens_input: int = 0
    tokens_cached: int = 0
    tokens_output: int = 0
    visits: int = 0
    flops: int = 0
    identity_flops: int = 0
    receipts: int = 0
    """The sum of the receipts. Unit: 10^-12 of the currency."""
    unrated: Counter[str] = field(default_factory=Counter)
    """Requests without a price, by reason; they are in the sums above but in no amount."""

    @property
    def rated(self) -> int:
        """Requests with a price."""
        return self.requests - self.unrated.total()

    def add_sum(self, usage: Sum, unrated: str | None) -> None:
        """Count in requests that are added up already; `unrated` says why they have no price."""
        requests, tokens_input, tokens_cached, tokens_output, visits, flops, identity_flops, cost = usage.quantities
        self.requests += requests
        self.outcomes[usage.outcome] += requests
        self.tokens_input += tokens_input
        self.tokens_cached += tokens_cached
        self.tokens_output += tokens_output
        self.visits += visits
        self.flops += flops
        self.identity_flops += identity_flops
        self.receipts += cost
        if unrated is not None:
            self.unrated[unrated] += requests


@dataclass
class UsageTotals(UsageSums):
    """Usage of a group of requests, and its cost under the prices that it is rated by."""

    flops_router: int = 0
    flops_answer: int = 0
    """Decode steps and the head; the rest is the prompt and the router."""
    tokens_drafted: int = 0
    tokens_accepted: int = 0
    flops_drafts: int = 0
    """Executed for drafts beyond `flops`."""
    layer_visits: defaultdict[str, LayerVisits] = field(default_factory=lambda: defaultdict(LayerVisits))
    """By model: layers of different models do not add up."""
    programs: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By model and program."""
    latencies_ns: list[int] = field(default_factory=list)
    """Queue, prefill and decode of each completed request."""
    rated_tokens: int = 0
    """Input and output tokens of rated requests."""
    charged: Counter[tuple[Item, Decimal]] = field(default_factory=Counter)
    """Quantity per item and unit price. Unit: FLOPs, tokens or requests."""
    full_depth_exact: int = 0
    """The rated requests at full depth under the same prices. Unit: 10^-30 of the currency."""
    per_token_exact: int = 0
    without_reference: int = 0
    """Rated requests whose price entry has no per-token reference to compare with."""

    @property
    def lines(self) -> list[ChargeLine]:
        """One line per item and unit price, in a fixed order."""
        lines = [ChargeLine(item, count, price) for (item, price), count in self.charged.items()]
        return sorted(lines, key=lambda line: (line.item.name, line.unit_price))

    @property
    def exact(self) -> int:
        """The cost of the rated requests. Unit: 10^-30 of the currency."""
        return sum(line.exact for line in self.lines)

    def add(self, stored: StoredUsage, rating: Rating) -> None:
        """Count in one request."""
        self.add_sum(sum_of(stored), rating.unrated)
        record = stored.record
        self.flops_router += record.flops.router
        self.flops_answer += record.flops.answer
        self.tokens_drafted += record.tokens.drafted
        self.tokens_accepted += record.tokens.accepted
        self.flops_drafts += record.flops.drafts
        visits = record.visits
        if visits.prefill or visits.decode:
            self.layer_visits[record.model].add(visits.prefill, visits.prefill_filled, visits.decode)
            self.programs[record.model, record.program] += 1
        if record.outcome is Outcome.COMPLETED:
            self.latencies_ns.append(record.queue_ns + record.prefill_ns + record.decode_ns)
        self.add_amounts(rating, 1, record.tokens.input + record.tokens.output)

    def add_rated_sum(self, usage: Sum, rating: Rating) -> None:
        """Count in requests that are added up already, and what they cost together; their layers are not known."""
        self.add_sum(usage, rating.unrated)
        requests, tokens_input, _, tokens_output, *_ = usage.quantities
        self.add_amounts(rating, requests, tokens_input + tokens_output)

    def merge_sums(self, other: UsageTotals, decimals: int) -> None:
        """Count in another group, less what only whole records tell: layers, programs and latencies.

        What would have been charged otherwise is rounded to `decimals` here, once per group.
        """
        self.add_counts(other)
        self.full_depth_exact += _rounded(other.full_depth_exact, decimals)
        self.per_token_exact += _rounded(other.per_token_exact, decimals)
        self.outcomes.update(other.outcomes)
        self.unrated.update(other.unrated)
        self.charged.update(other.charged)

    def add_counts(self, other: UsageTotals) -> None:
        """Add another group's numbers, those that rating and rounding have no part in."""
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def add_amounts(self, rating: Rating, requests: int, tokens: int) -> None:
        """Count in what requests cost that were rated together; nothing if they have no price."""
        if rating.unrated is not None:
            return
        self.rated_tokens += tokens
        for line in rating.lines:
            self.charged[line.item, line.unit_price] += line.count
        self.full_depth_exact += sum(line.exact for line in rating.full_depth_lines)
        if rating.per_token_lines is None:
            self.without_reference += requests
        else:
            self.per_token_exact += sum(line.exact for line in rating.per_token_lines)


_SUMMED: Final = tuple(
    field.name for field in fields(UsageTotals) if field.type == "int" and not field.name.endswith("_exact")
)


def _rounded(exact: int, decimals: int) -> int:
    """An amount in units of 10^-30, rounded to a number of decimals."""
    return round_half_even(round_half_even(exact, EXACT_SCALE, decimals), decimals, EXACT_SCALE)


def only_currency(currencies: Iterable[str]) -> str | None:
    """The one currency of several amounts; None if there are no amounts.

    Raises:
        CurrencyMixError: There are several.
    """
    codes = sorted(set(currencies))
    if len(codes) > 1:
        raise CurrencyMixError(
            f"this usage was charged in {' and '.join(codes)}, which cannot be added.",
            hint=f"Choose one with --currency {codes[0]}, or rate all of it with --prices FILE.",
        )
    return codes[0] if codes else None


class Rater:
    """Rates stored usage by the book that each receipt was made by, or all of it by another book.

    Args:
        read_books: Reads every book of the ledger, by content hash. Called after usage was read, and again where that
            is of another book: a record stored in between may have brought it in.
        instead: Rate everything by this book, whatever the receipts say.
        currency: Leave out what is rated in another currency; without it, several currencies are an error.
    """

    def __init__(
        self,
        read_books: Callable[[], Mapping[str, PriceBook]],
        *,
        instead: PriceBook | None = None,
        currency: str | None = None,
    ) -> None:
        self._read_books = read_books
        self._books: Mapping[str, PriceBook] = {}
        self._instead = instead
        self._currency = currency
        self._among: Rater | None = None
        self.used: dict[str, PriceBook] = {}
        """The books that rated something, by content hash."""

    def book_of(self, stored: StoredUsage) -> PriceBook | None:
        """The book that one stored request is rated by; None if it is in a currency that is left out."""
        return self.book_of_receipt(stored.price_book_hash)

    def book_of_receipt(self, digest: str) -> PriceBook | None:
        """The same by the content hash of the book that its receipt was made by."""
        if self._among is not None and self._among.book_of_receipt(digest) is None:
            return None
        book = self._instead or self._find(digest)
        return None if self._currency is not None and book.currency != self._currency else book

    def _find(self, digest: str) -> PriceBook:
        if digest not in self._books:
            self._books = self._read_books()
        return self._books[digest]

    def under(self, book: PriceBook) -> Rater:
        """Rates what this one rates by another book."""
        other = Rater(dict, instead=book)
        other._among = self
        return other

    def changes(self) -> list[datetime]:
        """Every moment at which a price of any tenant can change, in order."""
        if self._instead is None:
            self._books = self._read_books()
        books = self._books.values() if self._instead is None else [self._instead]
        return sorted({moment for book in books for moment in book.changes()})

    def rate(self, stored: StoredUsage) -> Rating | None:
        """The rating of one stored request; None if it is in a currency that is left out."""
        book = self.book_of(stored)
        if book is None:
            return None
        self.used[book.content_hash] = book
        return rate(stored.record, book)

    @property
    def currency(self) -> str | None:
        """The one currency of everything rated; None if nothing was."""
        return only_currency({book.currency for book in self.used.values()})

    @property
    def decimals(self) -> int:
        """Decimals of a statement line: the finest of the books used."""
        return max((book.statement_decimals for book in self.used.values()), default=2)


def accumulate(usage: Iterable[StoredUsage], rater: Rater, key: Callable[[StoredUsage], Key]) -> dict[Key, UsageTotals]:
    """Rate usage and sum it by a key."""
    groups: dict[Key, UsageTotals] = {}
    for stored in usage:
        rating = rater.rate(stored)
        if rating is not None:
            groups.setdefault(key(stored), UsageTotals()).add(stored, rating)
    return groups
