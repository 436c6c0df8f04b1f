"""Half-open periods in a time zone: `since` belongs to the period, `until` to the next one.

Consecutive months, weeks or days of one zone share their border, also when clocks change, so they partition time: no
record falls in two periods or in none. This module knows no usage.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from enum import StrEnum
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from polar_billing.errors import PeriodError

_MONTH: Final = re.compile(r"(\d{4})-(\d{2})")


class Window(StrEnum):
    """How long a period lasts that repeats by the calendar of a zone."""

    DAY = "day"
    WEEK = "week"
    """From Monday on, as ISO 8601 has it."""
    MONTH = "month"


@dataclass(frozen=True)
class Period:
    """A half-open stretch of service time, `since <= t < until`."""

    since: datetime | None = None
    """First instant, UTC; None for no limit."""
    until: datetime | None = None
    """First instant after it, UTC; None for no limit."""
    zone: str = "UTC"
    """IANA name of the time zone that dates are given in."""

    def __post_init__(self) -> None:
        if self.since is not None and self.until is not None and self.since >= self.until:
            raise PeriodError(
                f"period from {self.since.isoformat()} until {self.until.isoformat()} is empty.",
                hint="Give an end after the beginning; the end itself is excluded.",
            )

    @classmethod
    def month(cls, text: str, zone: str = "UTC") -> Period:
        """The calendar month `YYYY-MM` of a zone.

        Raises:
            PeriodError: There is no such month or zone.
        """
        match = _MONTH.fullmatch(text.strip())
        year, month = (int(match[1]), int(match[2])) if match else (0, 0)
        if not (1 <= year < 9999 and 1 <= month <= 12):
            raise PeriodError(f"month {text!r} is not YYYY-MM.", hint="Write it like 2026-11.")
        following = date(year + month // 12, month % 12 + 1, 1)
        try:
            return cls(_midnight(date(year, month, 1), zone), _midnight(following, zone), zone)
        except OverflowError as error:
            raise PeriodError(f"month {text!r} is outside the years 1 to 9999 in UTC.", hint="Use another.") from error

    @classmethod
    def between(cls, since: str | None, until: str | None, zone: str = "UTC") -> Period:
        """The period between two dates or date-times; either may be None for no limit.

        Raises:
            PeriodError: A text is not an ISO 8601 date, the zone is unknown or the period is empty.
        """
        load_zone(zone)
        return cls(
            None if since is None else _moment(since, zone),
            None if until is None else _moment(until, zone),
            zone,
        )

    @classmethod
    def containing(cls, moment: datetime, window: Window, zone: str = "UTC") -> Period:
        """The day, week or month of a zone that contains an instant; at both ends of the calendar it has no limit.

        The borders are the instants at which a date begins for the first time. By them, and not by the local date of
        the instant: where clocks go back over midnight a date comes, goes and comes again, and some dates do not
        exist at all.

        Raises:
            PeriodError: No such zone.
        """
        first = moment.astimezone(load_zone(zone)).date()
        if window is Window.MONTH:
            first = first.replace(day=1)
        elif window is Window.WEEK and first.toordinal() > first.weekday():
            first -= timedelta(days=first.weekday())
        borders = {border for steps in (-2, -1, 0, 1, 2) if (border := _border(first, window, steps, zone))}
        return cls(
            max((border for border in borders if border <= moment), default=None),
            min((border for border in borders if border > moment), default=None),
            zone,
        )

    def local_date(self, moment: datetime) -> date:
        """The calendar day of an instant in the period's zone."""
        return moment.astimezone(load_zone(self.zone)).date()

    def is_within(self, other: Period) -> bool:
        """True if no instant of this period is outside the other one."""
        begins = other.since is None or (self.since is not None and self.since >= other.since)
        return begins and (other.until is None or (self.until is not None and self.until <= other.until))

    @property
    def ends(self) -> tuple[datetime | None, datetime | None]:
        """Its beginning and its end."""
        return self.since, self.until

    def contains(self, moment: datetime) -> bool:
        """True if an instant is in it."""
        return (self.since is None or self.since <= moment) and (self.until is None or moment < self.until)

    def overlaps(self, other: Period) -> bool:
        """True if some instant is in both."""
        starts_before = self.since is None or other.until is None or self.since < other.until
        return starts_before and (self.until is None or other.since is None or other.since < self.until)

    @property
    def label(self) -> str:
        """The period in words, for headings."""
        if self.since is None and self.until is None:
            return "all time"
        since = "the beginning" if self.since is None else self._local(self.since)
        until = "now" if self.until is None else self._local(self.until)
        return f"{since} to {until} (end excluded), {self.zone}"

    def _local(self, moment: datetime) -> str:
        local = moment.astimezone(load_zone(self.zone))
        midnight = local.timetz().replace(tzinfo=None) == time()
        return local.date().isoformat() if midnight else local.isoformat(sep=" ", timespec="minutes")


ALL_TIME: Final = Period()


def load_zone(name: str) -> ZoneInfo:
    """Look up an IANA time zone."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise PeriodError(
            f"time zone {name!r} is unknown.", hint="Use an IANA name like Europe/Berlin, or UTC."
        ) from error


def _border(first: date, window: Window, steps: int, zone: str) -> datetime | None:
    """The instant that begins the window `steps` after the one of `first`; None beyond the calendar."""
    try:
        if window is Window.MONTH:
            years, month = divmod(first.month - 1 + steps, 12)
            day = date(first.year + years, month + 1, 1)
        else:
            day = first + timedelta(days=steps * (7 if window is Window.WEEK else 1))
        return _midnight(day, zone)
    except (OverflowError, ValueError):
        return None


def _midnight(day: date, zone: str) -> datetime:
    # Where clocks jump over midnight, fold=0 reads it with the offset before the jump: the very instant of
    # the jump.
    return datetime.combine(day, time(), load_zone(zone)).astimezone(UTC)


def _moment(text: str, zone: str) -> datetime:
    try:
        value = datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise PeriodError(
            f"date {text!r} is not ISO 8601.", hint="Write it like 2026-11-01 or 2026-11-01T12:00."
        ) from error
    if value.tzinfo is None:
        value = value.replace(tzinfo=load_zone(zone))
    try:
        utc = value.astimezone(UTC)
        utc.astimezone(load_zone(zone))  # as headings say it
        return utc
    except OverflowError as error:
        raise PeriodError(
            f"date {text!r} is outside the years 1 to 9999 in UTC or {zone}.", hint="Use another year."
        ) from error
