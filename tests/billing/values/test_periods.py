from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_billing.errors import PeriodError
from polar_billing.values.periods import Period, Window

# Clocks that change at midnight, by half an hour, over the date line, or not at all.
ZONES = [
    "UTC",
    "Europe/Berlin",
    "Europe/London",
    "America/New_York",
    "America/Sao_Paulo",
    "America/Havana",
    "America/St_Johns",
    "Asia/Beirut",
    "Asia/Tehran",
    "Asia/Kolkata",
    "Asia/Kathmandu",
    "Asia/Gaza",
    "Africa/Cairo",
    "Africa/Casablanca",
    "Australia/Lord_Howe",
    "Australia/Sydney",
    "Pacific/Apia",
    "Pacific/Auckland",
    "Pacific/Chatham",
    "Pacific/Kiritimati",
    "America/Asuncion",
    "America/Santiago",
    "Atlantic/Azores",
    "Antarctica/Troll",
]


@given(
    moment=st.datetimes(datetime(2008, 2, 1), datetime(2029, 11, 1), timezones=st.just(UTC)),
    zone=st.sampled_from(ZONES),
)
def test_every_instant_is_in_the_month_of_its_local_date(moment: datetime, zone: str) -> None:
    day = Period(zone=zone).local_date(moment)
    period = Period.month(f"{day:%Y-%m}", zone)
    assert period.since is not None
    assert period.until is not None
    assert period.since <= moment < period.until


@settings(max_examples=400)
@given(
    moment=st.datetimes(datetime(1970, 1, 1), datetime(2037, 1, 1), timezones=st.just(UTC)),
    zone=st.sampled_from(ZONES),
    window=st.sampled_from(Window),
)
def test_windows_have_no_gap_and_no_overlap(moment: datetime, zone: str, window: Window) -> None:
    period = Period.containing(moment, window, zone)
    assert period.since is not None
    assert period.until is not None
    assert period.since <= moment < period.until
    tick = timedelta(microseconds=1)
    assert Period.containing(period.since, window, zone) == period  # half-open: the beginning is in
    assert Period.containing(period.until - tick, window, zone) == period
    assert Period.containing(period.until, window, zone).since == period.until  # and the end is the next one's
    assert Period.containing(period.since - tick, window, zone).until == period.since


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("window", Window)
def test_windows_cover_ten_years(zone: str, window: Window) -> None:
    """Every change of a clock is crossed: each window is the successor of the one before."""
    moment, end = datetime(2008, 1, 1, tzinfo=UTC), datetime(2018, 1, 1, tzinfo=UTC)
    period = Period.containing(moment, window, zone)
    lengths = set()
    while period.until is not None and period.until < end:
        following = Period.containing(period.until, window, zone)
        assert following.since == period.until
        assert Period.containing(period.until - timedelta(minutes=30), window, zone) == period
        period = following
        assert period.since is not None
        assert period.until is not None
        lengths.add(period.until - period.since)
    expected = {Window.DAY: timedelta(days=1), Window.WEEK: timedelta(days=7), Window.MONTH: timedelta(days=30)}
    assert min(lengths) > expected[window] * 0.7
    assert max(lengths) < expected[window] * 1.3


def test_a_date_that_comes_twice_is_one_window() -> None:
    """In St. John's clocks went back at 00:01 to 23:01 of the day before, until 2011."""
    first = datetime(2009, 11, 1, 2, 30, tzinfo=UTC)  # 00:00 there, for the first time
    day = Period.containing(first, Window.DAY, "America/St_Johns")
    assert day.since == first
    again_yesterday = first + timedelta(minutes=30)
    assert Period(zone="America/St_Johns").local_date(again_yesterday).day == 31
    assert Period.containing(again_yesterday, Window.DAY, "America/St_Johns") == day
    assert Period.containing(again_yesterday, Window.MONTH, "America/St_Johns").since == first


def test_a_date_that_never_was_is_no_window() -> None:
    """Samoa went from the 29th straight to the 31st of December 2011."""
    jump = datetime(2011, 12, 30, 10, tzinfo=UTC)
    before = Period.containing(jump - timedelta(seconds=1), Window.DAY, "Pacific/Apia")
    after = Period.containing(jump, Window.DAY, "Pacific/Apia")
    assert (before.until, after.since, after.until) == (jump, jump, jump + timedelta(days=1))


def test_weeks_begin_on_monday() -> None:
    week = Period.containing(datetime(2026, 3, 29, 12, tzinfo=UTC), Window.WEEK, "Europe/Berlin")
    assert week.label == "2026-03-23 to 2026-03-30 (end excluded), Europe/Berlin"
    assert week.until is not None
    assert week.since is not None
    assert week.until - week.since == timedelta(days=7, hours=-1)


@pytest.mark.parametrize("window", Window)
@pytest.mark.parametrize("zone", ["UTC", "Pacific/Kiritimati", "America/St_Johns"])
def test_the_ends_of_the_calendar_have_a_window(window: Window, zone: str) -> None:
    for moment in (datetime(1, 1, 2, tzinfo=UTC), datetime(9999, 12, 30, tzinfo=UTC)):
        period = Period.containing(moment, window, zone)
        assert period.since is None or period.since <= moment
        assert period.until is None or moment < period.until


def test_dates_are_meant_in_the_zone() -> None:
    period = Period.between("2026-03-29", "2026-03-30", "Europe/Berlin")  # the clock goes forward: 23 hours
    assert period.since == datetime(2026, 3, 28, 23, tzinfo=UTC)
    assert period.until == datetime(2026, 3, 29, 22, tzinfo=UTC)
    assert period.label == "2026-03-29 to 2026-03-30 (end excluded), Europe/Berlin"


@pytest.mark.parametrize("text", ["2026-13", "2026", "november", "2026-1", "0000-01", "9999-12"])
def test_what_is_no_month_is_told(text: str) -> None:
    with pytest.raises(PeriodError, match=text):
        Period.month(text)


def test_wrong_dates_zones_and_orders_are_told() -> None:
    with pytest.raises(PeriodError, match="yesterday"):
        Period.between("yesterday", None)
    with pytest.raises(PeriodError, match="Mars/Olympus"):
        Period.between(None, None, "Mars/Olympus")
    with pytest.raises(PeriodError, match="2026-02-01"):
        Period.between("2026-02-01", "2026-02-01")
