from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_billing.errors import PeriodError
from polar_billing.periods import Period

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


@pytest.mark.parametrize("zone", ZONES)
def test_months_partition_the_time_line(zone: str) -> None:
    months = [Period.month(f"{year}-{month:02d}", zone) for year in range(2008, 2030) for month in range(1, 13)]
    for one, following in pairwise(months):
        assert one.until == following.since
        assert one.since is not None
        assert one.until is not None
        assert one.since < one.until


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


def test_dates_are_meant_in_the_zone() -> None:
    period = Period.between("2026-03-29", "2026-03-30", "Europe/Berlin")  # the clock goes forward: 23 hours
    assert period.since == datetime(2026, 3, 28, 23, tzinfo=UTC)
    assert period.until == datetime(2026, 3, 29, 22, tzinfo=UTC)
    assert period.label == "2026-03-29 to 2026-03-30 (end excluded), Europe/Berlin"


@pytest.mark.parametrize("text", ["2026-13", "2026", "november", "2026-1", "0000-01", "9999-12"])
def test_what_is_no_month_is_told(text: str) -> None:
    with pytest.raises(PeriodError, match=f"month '{text}' is not YYYY-MM. Write it like 2026-11."):
        Period.month(text)


def test_wrong_dates_zones_and_orders_are_told() -> None:
    with pytest.raises(PeriodError, match="date 'yesterday' is not ISO 8601"):
        Period.between("yesterday", None)
    with pytest.raises(PeriodError, match="time zone 'Mars/Olympus' is unknown"):
        Period.between(None, None, "Mars/Olympus")
    with pytest.raises(PeriodError, match="is empty"):
        Period.between("2026-02-01", "2026-02-01")
