"""Exact money: scaled integers inside, `Decimal` outside, and the one rounding rule.

Three scales, each an integer count of a fixed unit, so that no arithmetic here can lose a digit:

* **stored** amounts count 10^-12 of the currency's major unit (`STORED_SCALE`). An int64 column then holds up to
  9,223,372.036854775807 for one request, and at a price of 1 per compute unit one FLOP costs exactly one unit. A finer
  unit would leave too little room for large amounts, a coarser one would lose the cost of a short request on a small
  model.
* **exact** amounts count 10^-30 (`EXACT_SCALE`). They are Python integers and live only in memory: quantity
  (FLOPs are 10^-12 compute units) × price (12 decimals) × tier multiplier (6 decimals) fits without rounding.
* **statement** lines count 10^-d, d being the decimals of the price book: by default those of the currency.

Rounding happens once, from exact to a line of a statement (or of a receipt, a statement of one request with
12 decimals): half to even. The total is the exact sum rounded the same way, and what the rounded lines miss
of it is a line of its own, so the lines always sum to the total to the last unit.

`CURRENCIES` are the active codes of ISO 4217, to tell a typing error from a currency; funds codes, metals and the codes
for tests are left out. Knows neither usage nor price books nor SQL.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal
from typing import TYPE_CHECKING, Final

from polar_billing.errors import AmountError, QueryError
from polar_sdk.reading import Unreadable, parse_decimal, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_CODES: Final = """
    AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BHD BIF BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF CLP CNY
    COP CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD HNL HTG HUF IDR
    ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD MMK
    MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON RSD RUB RWF
    SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD UYU
    UZS VED VES VND VUV WST XAF XCD XCG XOF XPF YER ZAR ZMW ZWG
"""
CURRENCIES: Final = frozenset(_CODES.split())
STORED_SCALE: Final = 12
"""Decimals of an amount in the ledger and on a receipt."""

EXACT_SCALE: Final = 30
"""Decimals of an amount before rounding: 12 of the quantity + 12 of the price + 6 of the multiplier."""

STORED_MAX: Final = 2**63 - 1
"""The largest amount in the ledger. Unit: 10^-12 of the currency's major unit."""
_MAX_SIZE: Final = 1_000
"""Digits of an amount before the point: far more than any sum has, and few enough to count at once."""
_EXACT: Final = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)
"""Moves the decimal point of any amount without rounding."""

# ISO 4217, the currencies whose minor unit is not a hundredth.
_ZERO_DECIMALS: Final = frozenset(
    {"BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG"}
    | {"RWF", "UGX", "UYI", "VND", "VUV", "XAF", "XOF", "XPF"}
)
_THREE_DECIMALS: Final = frozenset({"BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"})


def currency_decimals(currency: str) -> int:
    """Decimals of a currency's minor unit by ISO 4217: JPY 0, USD 2, KWD 3."""
    if currency in _ZERO_DECIMALS:
        return 0
    return 3 if currency in _THREE_DECIMALS else 2


def to_scaled(value: Decimal | int, decimals: int) -> int:
    """Count how many units of 10^-decimals a value is.

    Raises:
        AmountError: The value is not finite, has more decimals than that, or is absurdly large.
    """
    number = Decimal(value)
    if not number.is_finite():
        raise AmountError(f"amount {value} is not finite.", hint="Use a finite number.")
    if not number:
        return 0  # whatever its exponent
    if number.adjusted() > _MAX_SIZE:
        raise AmountError(f"amount {shown(str(number))} is too large to count.", hint="Use a smaller amount.")
    scaled = number.scaleb(decimals, _EXACT)
    units = int(scaled)
    if units != scaled:
        raise AmountError(f"amount {shown(str(number))} has more than {decimals} decimals.", hint="Round it first.")
    return units


def read_amount(text: str | int | Decimal) -> Decimal:
    """A finite amount that somebody wrote, within the limits of `polar_sdk.reading`.

    Raises:
        AmountError: It is not such a number.
    """
    try:
        amount = parse_decimal(text.strip() if isinstance(text, str) else text)
    except Unreadable as error:
        raise AmountError(f"amount {error}.", hint="Write it like 12.50.") from error
    if not amount.is_finite():
        raise AmountError(f"amount {amount} is not finite.", hint="Use a finite number.")
    return amount


def read_bounded(text: str | None, option: str, *, most: int, decimals: int) -> Decimal | None:
    """A number above 0 and at most `most` that somebody wrote in an option; None if it is not given.

    Raises:
        AmountError: It is not a finite number.
        QueryError: It is out of range, or has more decimals.
    """
    if text is None:
        return None
    value = read_amount(text)
    exponent = value.as_tuple().exponent
    if not 0 < value <= most or not isinstance(exponent, int) or exponent < -decimals:
        raise QueryError(
            f"{option} {shown(text)} is out of range: use more than 0 and at most {most:,}, with at most {decimals} "
            "decimals."
        )
    return value


def to_units(value: Decimal, scale: int = STORED_SCALE) -> int:
    """Count the units of 10^-scale in an amount.

    Raises:
        AmountError: It is not finite, too fine or too large to be kept exactly.
    """
    units = to_scaled(value, scale)
    if abs(units) > STORED_MAX:
        limit = from_scaled(STORED_MAX, scale)
        raise AmountError(f"amount {value:f} is beyond the ledger's limit of {limit:f}.", hint="Split it.")
    return units


def from_scaled(units: int, decimals: int) -> Decimal:
    """Turn a count of 10^-decimals units into a Decimal, exactly, whatever the decimal context."""
    return Decimal(f"{units}E-{decimals}")


def round_half_even(units: int, from_decimals: int, to_decimals: int) -> int:
    """Round a count of fine units to a count of coarser ones, halves to the even neighbour."""
    if to_decimals >= from_decimals:
        return units * int(10 ** (to_decimals - from_decimals))
    return divide_half_even(units, int(10 ** (from_decimals - to_decimals)))


def divide_half_even(numerator: int, denominator: int) -> int:
    """Divide integers to the nearest one, halves to the even neighbour; the denominator is positive."""
    whole, rest = divmod(numerator, denominator)  # floors, so 0 <= rest < denominator for a negative numerator too
    if 2 * rest > denominator or (2 * rest == denominator and whole % 2):
        whole += 1
    return whole


@dataclass(frozen=True)
class RoundedLines:
    """Lines of a statement after rounding; `sum(amounts) + residue == total`, always."""

    amounts: tuple[Decimal, ...]
    residue: Decimal
    """The difference of the rounded lines to the total; its own line on the statement."""
    total: Decimal
    """The exact sum of the lines, rounded once."""


def round_lines(exact: Sequence[int], decimals: int) -> RoundedLines:
    """Round each exact amount once, half to even, and put the residue on a line of its own."""
    lines = [round_half_even(amount, EXACT_SCALE, decimals) for amount in exact]
    total = round_half_even(sum(exact), EXACT_SCALE, decimals)
    return RoundedLines(
        amounts=tuple(from_scaled(line, decimals) for line in lines),
        residue=from_scaled(total - sum(lines), decimals),
        total=from_scaled(total, decimals),
    )


def exact_sum(amounts: Iterable[Decimal], decimals: int) -> Decimal:
    """Add amounts of that many decimals, exactly, whatever the decimal context of the thread."""
    return from_scaled(sum(to_scaled(amount, decimals) for amount in amounts), decimals)


def exact_difference(amount: Decimal, less: Decimal, decimals: int) -> Decimal:
    """Subtract an amount from another, as `exact_sum` adds them."""
    return exact_sum((amount, less.copy_negate()), decimals)


def quotient(numerator: int, denominator: int, decimals: int) -> Decimal:
    """Divide a count of 10^-decimals units; rounded to them once, half to even."""
    return from_scaled(divide_half_even(numerator, denominator), decimals)


def plain(value: Decimal) -> str:
    """Write a number without exponent and without trailing zeros."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
