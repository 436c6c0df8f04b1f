from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING

import pytest

from polar_billing.errors import PriceBookError
from polar_billing.prices.book import PRICE_BOOK_VARIABLE, PriceBook

if TYPE_CHECKING:
    from pathlib import Path

HEAD = 'id = "b"\ncurrency = "USD"\n'
ENTRY = "[[prices]]\neffective_from = 2026-01-01\nper_compute_unit = 0.5\ntiers = {standard = 1}\n"


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_the_example_prices_the_usual_tiers() -> None:
    book = PriceBook.example()
    assert set(book.prices[0].tiers) == {"economy", "standard", "premium", "exact"}
    assert book.statement_decimals == 6


def test_the_entry_of_the_time_of_use_is_in_force() -> None:
    later = ENTRY.replace("2026-01-01", "2026-07-01T00:00:00+02:00").replace("0.5", "0.75")
    book = PriceBook.from_toml(HEAD + later + ENTRY)  # the order in the file does not matter
    assert book.entry_at(moment("2025-12-31T23:59:59")) is None
    for when, price in {
        "2026-01-01": "0.5",
        "2026-06-30T21:59:59.999999": "0.5",
        "2026-06-30T22:00": "0.75",
    }.items():
        entry = book.entry_at(moment(when))
        assert entry is not None
        assert entry.per_compute_unit == Decimal(price)


def test_a_gap_between_entries_has_no_price() -> None:
    ended = ENTRY.replace("tiers", "effective_until = 2026-02-01\ntiers")
    book = PriceBook.from_toml(HEAD + ended + ENTRY.replace("2026-01-01", "2026-03-01"))
    assert book.entry_at(moment("2026-01-31T23:59")) is not None
    assert book.entry_at(moment("2026-02-01")) is None
    assert book.entry_at(moment("2026-03-01")) is not None


def test_the_hash_covers_content_and_nothing_else() -> None:
    book = PriceBook.from_toml(HEAD + ENTRY)
    same = PriceBook.from_toml("# a comment\n" + HEAD + ENTRY.replace("0.5", "0.500"))
    other = PriceBook.from_toml(HEAD + ENTRY.replace("0.5", "0.51"))
    assert book.content_hash == same.content_hash != other.content_hash
    assert PriceBook.from_document(book.document) == book
    assert PriceBook.from_document(book.document).content_hash == book.content_hash


def test_prices_keep_their_digits_under_any_decimal_context() -> None:
    with localcontext(prec=2):
        book = PriceBook.from_toml(HEAD + ENTRY.replace("0.5", "1234.567890123456"))
    assert book.prices[0].per_compute_unit == Decimal("1234.567890123456")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ENTRY, "id: field required; currency: field required"),
        (HEAD, "prices: field required"),
        (HEAD + ENTRY.replace("0.5", "-0.5"), "prices[0].per_compute_unit = '-0.5': input should be greater"),
        (
            HEAD + ENTRY.replace("0.5", "nan"),
            "prices[0].per_compute_unit = 'NaN': input should be a finite number",
        ),
        (
            HEAD + ENTRY.replace("0.5", "true"),
            "prices[0].per_compute_unit = 'True': must be a decimal number",
        ),
        (
            HEAD + ENTRY.replace("0.5", '"half"'),
            "prices[0].per_compute_unit = 'half': 'half' is not a number",
        ),
        (HEAD + ENTRY.replace("0.5", "0.0000000000001"), "prices[0].per_compute_unit = '1E-13'"),
        (HEAD + ENTRY.replace("standard = 1", "standard = -1"), "prices[0].tiers.standard = '-1'"),
        (HEAD + ENTRY.replace("per_compute_unit", "per_cu"), "prices[0].per_cu = '0.5': extra inputs"),
        (
            HEAD + ENTRY.replace("per_compute_unit = 0.5\n", ""),
            "prices[0]: prices nothing; give at least one of",
        ),
        (HEAD + ENTRY.replace("standard = 1", ""), "prices[0]: names no tier"),
        (HEAD + ENTRY.replace("2026-01-01", "2026-01-01T00:00:00"), "needs an offset from UTC"),
        (HEAD + ENTRY + ENTRY, "prices: two entries are effective from 2026-01-01T00:00:00+00:00; keep one"),
        (
            HEAD + ENTRY.replace("tiers", "effective_until = 2026-03-01\ntiers") + ENTRY.replace("-01-01", "-02-01"),
            "prices: the entry until 2026-03-01T00:00:00+00:00 overlaps the one from 2026-02-01T00:00:00+00:00",
        ),
        (HEAD + ENTRY.replace("tiers", "effective_until = 2025-01-01\ntiers"), "is not after"),
        (HEAD.replace("USD", "dollar") + ENTRY, "currency = 'dollar'"),
        (HEAD + "decimals = 13\n" + ENTRY, "decimals = '13'"),
        ("id = ", "is not valid TOML"),
    ],
)
def test_a_wrong_book_is_refused_with_file_key_and_value(text: str, said: str) -> None:
    with pytest.raises(PriceBookError) as caught:
        PriceBook.from_toml(text, name="mine.toml")
    message = str(caught.value)
    assert message.startswith("price book 'mine.toml'")
    assert said in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_the_variable_names_the_book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(HEAD + ENTRY)
    monkeypatch.setenv(PRICE_BOOK_VARIABLE, str(file))
    assert PriceBook.load().id == "b"
    monkeypatch.setenv(PRICE_BOOK_VARIABLE, str(tmp_path / "none.toml"))
    with pytest.raises(PriceBookError, match=r"none\.toml' cannot be read \(No such file or directory\)"):
        PriceBook.load()
