"""A budget as a value: how much of a currency or of compute may be used in each window, and by whom.

Knows neither requests nor a database.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from polar_billing.errors import BudgetError
from polar_billing.values.money import CURRENCIES, STORED_SCALE, from_scaled, plain, to_scaled
from polar_billing.values.periods import Window, load_zone
from polar_sdk.errors import did_you_mean, nearest
from polar_sdk.reading import Unreadable, parse_decimal, shown
from polar_sdk.usage import flaw_of_name

if TYPE_CHECKING:
    from collections.abc import Mapping


COMPUTE_UNIT: Final = "CU"
"""The unit of a budget in compute: 10^12 FLOPs."""
MAX_COUNT: Final = 10**18
"""The largest limit, in units of 10^-decimals: a ninth of what a column holds."""
_MAX_NAME: Final = 200
"""Unit: characters."""


class Level(StrEnum):
    """The scope of a budget."""

    TENANT = "tenant"
    PROJECT = "project"
    USER = "user"
    KEY = "key"


class OverBudget(StrEnum):
    """What happens to a request for which the budget has no room."""

    REFUSE = "refuse"
    SHALLOWER = "shallower"
    """Serve a cheaper offer that fits; refuse if none does."""


@dataclass(frozen=True)
class Budget:
    """A limit per window of time; several budgets may cover a request.

    A budget is identified by tenant, level, name, unit and window; setting it again supersedes the one in force.

    Raises:
        BudgetError: A value is not one that its field allows; the message names value, limit and fix.
        PeriodError: The time zone is unknown.
    """

    tenant: str
    limit: Decimal
    """Maximum per window. Unit: `unit`."""
    unit: str = COMPUTE_UNIT
    """A currency's code, which must be that of the price book, or `CU` for compute units."""
    level: Level = Level.TENANT
    name: str | None = None
    """The project, user or key, as on a request's tag `project`, `user` or `key`; None for the whole tenant."""
    window: Window = Window.MONTH
    zone: str = "UTC"
    """IANA name of the time zone in whose calendar the windows begin."""
    over_budget: OverBudget = OverBudget.REFUSE

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "limit": _limit(self.limit),
            "level": _one_of(Level, "level", self.level),
            "window": _one_of(Window, "window", self.window),
            "over_budget": _one_of(OverBudget, "over_budget", self.over_budget),
        }
        for field, value in checked.items():
            object.__setattr__(self, field, value)  # frozen: the only place that writes
        _check_unit(self.unit)
        load_zone(self.zone)
        _check_name("tenant", self.tenant)
        self._check_scope()
        _ = self.limit_count

    def _check_scope(self) -> None:
        if self.level is Level.TENANT:
            if self.name is not None:
                raise BudgetError(
                    f"a budget of the level tenant takes no name (got {self.name!r}).",
                    hint="Leave the name out, or give the level project, user or key.",
                )
            return
        if self.name is None:
            raise BudgetError(f"a budget of the level {self.level} has no name.", hint=f"Name the {self.level}.")
        _check_name(self.level, self.name)

    def check_names(self) -> None:
        """Refuse names that no request can have. Ledgers may hold older budgets with such names.

        Raises:
            BudgetError: A name begins or ends with white space or contains a control character.
        """
        for what, name in (("tenant", self.tenant), (self.level, self.name or "")):
            if (flaw := flaw_of_name(name)) is not None:
                raise BudgetError(f"{what} {name[:40]!r} {flaw}.", hint="Remove it.")

    @property
    def decimals(self) -> int:
        """Decimals that the budget counts in: 12, or fewer if the limit is too large for 12."""
        whole = len(str(int(self.limit)))  # digits before the point
        return max(0, min(STORED_SCALE, len(str(MAX_COUNT)) - 1 - whole))

    @property
    def limit_count(self) -> int:
        """The limit in units of 10^-decimals."""
        try:
            count = to_scaled(self.limit, self.decimals)
        except ValueError:
            raise BudgetError(
                f"limit {self.limit:f} has more than {self.decimals} decimals.",
                hint="Round it, or use a smaller limit.",
            ) from None
        if count > MAX_COUNT:
            raise BudgetError(f"limit {self.limit} is too large.", hint=f"Use at most {MAX_COUNT:,}.")
        return count

    @property
    def who(self) -> str:
        """The owner of the budget, in words."""
        whole = f"tenant {self.tenant!r}"
        return whole if self.level is Level.TENANT else f"{self.level} {self.name!r} of {whole}"

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """Identifies a budget across its definitions: tenant, level, name, unit, window."""
        return (self.tenant, self.level, self.name or "", self.unit, self.window)

    def covers(self, tags: Mapping[str, str]) -> bool:
        """True if a request of the tenant with these tags counts towards this budget."""
        return self.level is Level.TENANT or tags.get(self.level) == self.name

    def amount(self, count: int) -> Decimal:
        """A count of 10^-decimals as an amount. Unit: `unit`."""
        return from_scaled(count, self.decimals)

    def say(self, count: int) -> str:
        """A count of 10^-decimals for people."""
        return f"{plain(self.amount(count))} {self.unit}"


def to_count(amount: int, decimals: int) -> int:
    """A count of 10^-12 as one of 10^-decimals, rounded up: an amount must not fit unless it is known to."""
    return -(-amount // int(10 ** (STORED_SCALE - decimals)))


def _limit(value: object) -> Decimal:
    if isinstance(value, (bool, float)) or not isinstance(value, (Decimal, int, str)):
        raise BudgetError(f"limit {shown(value)} is not a decimal number.", hint='Write it as text, like "12.50".')
    try:
        limit = parse_decimal(value)
    except Unreadable as error:
        raise BudgetError(f"limit {error}.", hint='Write it like "12.50".') from None
    if not limit.is_finite():
        raise BudgetError(f"limit {value} is not finite.", hint="Close the budget to lift its limit.")
    if limit < 0:
        raise BudgetError(f"limit {value} is negative.", hint="Use 0 or more; 0 refuses every request.")
    if limit > MAX_COUNT:
        raise BudgetError(f"limit {limit} is too large.", hint=f"Use at most {MAX_COUNT:,}.")
    return limit


def _one_of(kind: type[StrEnum], field: str, value: object) -> StrEnum:
    try:
        return kind(str(value))
    except ValueError:
        raise BudgetError(
            f"{field} {value!r} is unknown; {did_you_mean(str(value), [str(member) for member in kind])}"
        ) from None


def _check_unit(unit: object) -> None:
    units = [COMPUTE_UNIT, *CURRENCIES]
    if unit in units:
        return
    upper = str(unit).strip().upper()
    near = upper if upper in units else nearest(upper, units)
    hint = "Use an ISO 4217 code such as EUR, or CU." if near is None else f"Did you mean {near!r}?"
    raise BudgetError(f"unit {unit!r} is neither a currency nor CU.", hint=hint)


def _check_name(what: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip() or len(value) > _MAX_NAME or "\x00" in value:
        raise BudgetError(f"{what} {str(value)[:40]!r} is not a valid name.", hint=f"Use 1 to {_MAX_NAME} characters.")
