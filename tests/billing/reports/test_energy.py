"""Energy: counters that start again, logs, and reports whose parts sum to the total and say what they rest on."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from polar_billing.errors import BillingError, QueryError
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.metering.energy import Interval, energy_counters, read_energy_log, record_energy
from polar_billing.metering.meter import Meter
from polar_billing.reports.energy import EnergyBasis, read_energy, share_out
from polar_billing.reports.html import report_html
from polar_billing.reports.report import Questions, Report, build_report
from polar_billing.reports.usage_tables import report_view
from polar_billing.testing import usage_record
from polar_billing.values.periods import Period

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from polar_billing.ledger.ledger import Ledger

NOVEMBER = Period.month("2026-11")
BEGIN = datetime(2026, 11, 1, tzinfo=UTC)


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """A folder as the kernel has it: two packages, memory, and zones that are within others."""
    folder = tmp_path / "powercap"
    for zone, name in {
        "intel-rapl:0": "package-0",
        "intel-rapl:1": "package-1",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram",
        "intel-rapl:2": "psys",
        "intel-rapl-mmio:0": "package-0",
    }.items():
        (folder / zone).mkdir(parents=True)
        (folder / zone / "name").write_text(f"{name}\n")
        (folder / zone / "max_energy_range_uj").write_text("262143328850\n")
        (folder / zone / "energy_uj").write_text("262143328000\n")
    (folder / "dtpm").mkdir()
    return folder


def ticking() -> Iterator[datetime]:
    moment = BEGIN
    while True:
        yield moment
        moment += timedelta(seconds=10)


def test_packages_and_memory_are_counted_once_and_over_their_range(powercap: Path, tmp_path: Path) -> None:
    counters = energy_counters(powercap)
    assert [counter.name.split()[-1] for counter in counters] == ["package-0", "dram", "package-1"]
    readings = iter([5_000_000, 9_000_000, 9_000_000])

    def sleep(_: float) -> None:
        (powercap / "intel-rapl:0" / "energy_uj").write_text(str(next(readings)))

    moments = ticking()
    log = tmp_path / "energy.jsonl"
    with log.open("w") as file:
        assert record_energy(file, counters, 10, 30, sleep=sleep, now=lambda: next(moments)) == 3
    first, second, third = read_energy_log(log)
    assert [sum(each.microjoules.values()) for each in (first, second, third)] == [5_000_850, 4_000_000, 0]
    assert (first.since, third.until) == (BEGIN, BEGIN + timedelta(seconds=30))


def test_a_machine_without_counters_says_so(tmp_path: Path) -> None:
    with pytest.raises(QueryError) as caught:
        energy_counters(tmp_path)
    assert "--flops-per-joule" in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "[]",
        "\x00",
        '{"since": "2026-11-01T00:00:00Z", "until": "2026-11-01T00:00:00Z", "microjoules": {}}',
        '{"since": "2026-11-01T00:00:00Z", "until": "2026-11-01T00:01:00Z", "microjoules": {"a": -1}}',
        '{"since": "2026-11-01T00:00:00Z", "until": "2026-11-01T00:01:00Z", "microjoules": {"a": 1.5}}',
        '{"since": "2026-11-01T00:00:00Z", "until": "2026-11-01T00:01:00Z", "microjoules": 3}',
        '{"since": 3, "until": "2026-11-01T00:01:00Z", "microjoules": {}}',
    ],
)
def test_a_log_with_something_else_names_the_line(tmp_path: Path, line: str) -> None:
    log = tmp_path / "energy.jsonl"
    log.write_text(Interval(BEGIN, BEGIN + timedelta(seconds=1), {"a": 1}).line + line + "\n")
    with pytest.raises(QueryError, match=r"energy\.jsonl', line 2"):
        read_energy_log(log)


def test_intervals_at_the_same_time_are_refused(tmp_path: Path) -> None:
    log = tmp_path / "energy.jsonl"
    log.write_text("".join(Interval(BEGIN, BEGIN + timedelta(seconds=n), {"a": 1}).line for n in (5, 9)))
    with pytest.raises(QueryError):
        read_energy_log(log)
    with pytest.raises(QueryError, match=r"absent"):
        read_energy_log(tmp_path / "absent")


@given(st.integers(0, 10**15), st.lists(st.integers(0, 10**18), max_size=9))
def test_shares_sum_to_the_total(total: int, parts: list[int]) -> None:
    shares = share_out(total, parts)
    assert sum(shares) == (total if sum(parts) else 0)
    whole = sum(parts)
    assert all(abs(share * whole - total * part) <= whole for share, part in zip(shares, parts, strict=True))


@pytest.fixture
def used(ledger: Ledger) -> Ledger:
    with Meter(ledger) as meter:
        for n, tenant in enumerate(["acme", "acme", "globex"]):
            for tier, path in {
                "economy": (0, 1, 5),
                "standard": (0, 1, 2, 4, 5),
                "premium": (0, 1, 2, 2, 3, 4, 5),
            }.items():
                drafts = (4, 1, 2_000_000_000) if tier == "standard" else (0, 0, 0)
                record = usage_record(f"{n}{tier}", tenant=tenant, tier=tier, path=path, prompt=10 + n, drafts=drafts)
                meter.emit(record)
    return ledger


def report_of(ledger: Ledger, basis: EnergyBasis | None) -> Report:
    return build_report(ledger, Selection(ALL_TENANTS, NOVEMBER), questions=Questions(energy=basis))


def test_modelled_energy_follows_executed_flops(used: Ledger) -> None:
    basis = read_energy("2000000000", "data sheet", None, "381.5", "national average of 2025")
    report = report_of(used, basis)
    energy = report.energy
    assert energy is not None
    assert report.figures.compute_units_drafts == Decimal("0.006")
    units = report.figures.compute_units + report.figures.compute_units_drafts
    assert abs(energy.joules - units * 500) < Decimal("0.000001")
    (standard,) = (tier for tier in report.tiers if tier.tier == "standard")
    (share,) = (share for share in energy.by_tier if share.tier == "standard")
    own = standard.figures.compute_units + standard.figures.compute_units_drafts
    assert abs(share.joules - own * 500) <= Decimal("0.000001")
    assert energy.joules_saved is not None
    assert abs(energy.joules_saved - report.figures.compute_units_saved * 500) <= Decimal("0.000001")
    assert energy.carbon_grams is not None
    assert abs(energy.carbon_grams - energy.joules * Decimal("381.5") / 3_600_000) < Decimal("0.000001")
    for shares in (energy.by_tier, energy.by_tenant):
        assert sum(share.joules for share in shares) == energy.joules
        assert sum(share.carbon_grams or 0 for share in shares) == energy.carbon_grams
    for stated in ("2000000000", "(data sheet)", "381.5", "(national average of 2025)"):
        assert stated in energy.said


def test_measured_energy_is_the_logs_over_the_period(used: Ledger, tmp_path: Path) -> None:
    log = tmp_path / "energy.jsonl"
    minute = timedelta(minutes=1)
    log.write_text(
        Interval(BEGIN - minute, BEGIN + minute, {"a": 4_000_000, "b": 2_000_000}).line
        + Interval(BEGIN + minute, BEGIN + 2 * minute, {"a": 1_000_001}).line
    )
    energy = report_of(used, read_energy(None, None, log, None, None)).energy
    assert energy is not None
    assert (energy.basis, energy.joules, energy.measured_seconds) == ("measured", Decimal("4.000001"), Decimal(120))
    assert (energy.joules_saved, energy.carbon_grams) == (None, None)
    assert sum(share.joules for share in energy.by_tenant) == energy.joules
    assert "energy log energy.jsonl, 120 s" in energy.said
    log.write_text(Interval(BEGIN - 2 * minute, BEGIN, {"a": 4_000_000}).line)
    with pytest.raises(QueryError):
        report_of(used, read_energy(None, None, log, None, None))


def test_every_view_says_which_it_is(used: Ledger) -> None:
    report = report_of(used, read_energy("1e9", "<b>a guess</b>", None, "400", "=stated"))
    console = Console(width=200, file=io.StringIO(), no_color=True)
    console.print(report_view(report))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Energy, modelled" in printed
    assert "g CO2e" in printed
    page = report_html(report)
    assert "Energy, modelled" in page
    assert "&lt;b&gt;a guess" in page
    assert '"basis":"modelled"' in report.model_dump_json()
    assert "Energy," not in report_html(report_of(used, None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("1e9", None, None, None, None), "--energy-source"),
        (("1e9", " ", None, None, None), "--energy-source"),
        (("0", "x", None, None, None), "'0'"),
        (("1e16", "x", None, None, None), "'1e16'"),
        (("1e9", "x", None, "400", None), "--grid-source"),
        ((None, None, None, "400", "x"), "--grid-intensity"),
        (("1e9", "x", None, "10001", "x"), "'10001'"),
    ],
)
def test_a_figure_needs_its_source_and_its_range(options: tuple[str | None, ...], message: str) -> None:
    with pytest.raises(BillingError, match=message):
        read_energy(*options)  # type: ignore[arg-type]


def test_nothing_said_is_no_energy() -> None:
    assert read_energy(None, None, None, None, None) is None
