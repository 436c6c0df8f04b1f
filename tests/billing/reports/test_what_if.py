"""Other books, other mixes, per-token prices and hardware, each checked by hand or by sum."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from polar_billing.errors import QueryError
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.reports.hardware import BusyTime, Hardware, read_hardware
from polar_billing.reports.html import report_html
from polar_billing.reports.mix import TierSaving, evaluated_savings, read_mix
from polar_billing.reports.report import Questions, Report, build_report
from polar_billing.reports.text import Amounts
from polar_billing.reports.usage_tables import report_view
from polar_billing.testing import usage_record
from polar_billing.values.money import exact_sum
from polar_sdk.show.tables import show
from polar_sdk.usage import FlopUsage, Outcome, TokenUsage
from tests.billing.storing import store_record

if TYPE_CHECKING:
    from pathlib import Path

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.reports.mix import Savings

BOOK = """
id = "round"
currency = "USD"
decimals = 6
free_outcomes = ["error"]
[[prices]]
effective_from = 2026-01-01
per_compute_unit = 2
per_request = 0.5
tiers = { economy = 0.5, standard = 1, exact = 1.5 }
[prices.token_reference]
per_million_input_tokens = 1000
per_million_output_tokens = 3000
"""
OTHER = BOOK.replace('"round"', '"flat"').replace("per_compute_unit = 2\n", "").replace("0.5\ntiers", "3\ntiers")
START = datetime(2026, 11, 1, tzinfo=UTC)
CU = 10**12


def book(text: str = BOOK) -> PriceBook:
    return PriceBook.from_toml(text)


@pytest.fixture
def filled(ledger: Ledger) -> Ledger:
    """Four requests of two tenants: 2 CU each at full depth, 1 executed by economy; one failed."""
    priced = book()
    for number, (tenant, tier, executed) in enumerate(
        [("acme", "economy", 1), ("acme", "standard", 2), ("globex", "standard", 2), ("globex", "standard", 2)]
    ):
        record = usage_record(
            f"r{number}",
            tenant=tenant,
            tier=tier,
            tokens=TokenUsage(input=800 if tenant == "acme" else 200, output=100),
            flops=FlopUsage(head=executed * CU, total=executed * CU),
            identity_flops=2 * CU,
            outcome=Outcome.ERROR if number == 3 else Outcome.COMPLETED,
            started_at=START + timedelta(seconds=10 * number),
            queue_ns=10**9,
            prefill_ns=2 * 10**9,
            decode_ns=10**9,
        )
        store_record(ledger, record, priced, "test")
    return ledger


def halves(_: str) -> Savings:
    return {
        "economy": TierSaving(tier="economy", saved=Decimal("0.5"), source="a test"),
        "standard": TierSaving(tier="standard", saved=Decimal("-0.25"), source="a test"),
        "exact": TierSaving(tier="exact", saved=Decimal(0), source="by definition"),
    }


def asked(ledger: Ledger, **questions: Any) -> Report:
    return build_report(ledger, questions=Questions(savings=halves, **questions))


def test_whoever_looks_sees_how_much_of_the_usage_is_read(filled: Ledger) -> None:
    steps: list[tuple[str, int, int]] = []
    questions = Questions(books=(book(OTHER),), hardware=read_hardware("2.5", None))
    now = datetime(2026, 12, 1, tzinfo=UTC)
    report = build_report(filled, questions=questions, now=now, progress=lambda *step: steps.append(step))
    assert report == build_report(filled, questions=questions, now=now)
    requests = report.figures.requests
    once = [(done, requests) for done in range(requests + 1)]
    read = {stage: [(done, total) for name, done, total in steps if name == stage] for stage, _, _ in steps}
    assert sorted(read.values()) == [once, once * 2]  # for what was charged and by the other book, and for the times


def test_another_book_charges_what_rating_by_it_does(filled: Ledger) -> None:
    other = book(OTHER)
    report = asked(filled, books=(other,))
    assert report.what_if is not None
    (scenario,) = report.what_if.scenarios
    # acme: one economy request at 3 × 0.5 and one standard at 3; globex: one at 3, and an error, which is free.
    assert [outcome.charge for outcome in scenario.tenants] == [Decimal("4.5"), Decimal(3)]
    rerated = build_report(filled, prices=other)
    assert [tenant.total for tenant in rerated.tenants] == [outcome.charge for outcome in scenario.tenants]
    assert scenario.charge == Decimal("7.5")
    assert scenario.difference == scenario.charge - report.total
    assert scenario.per_1000_requests == Decimal(1875)
    assert scenario.compute_units == report.figures.compute_units == 7


def test_another_book_may_have_another_currency_and_lack_a_tier(filled: Ledger) -> None:
    euros = book(OTHER.replace('"USD"', '"EUR"').replace("economy = 0.5, ", ""))
    report = asked(filled, books=(euros,), hardware=Hardware(per_device_hour=Decimal(1), tokens_per_second=Decimal(9)))
    assert report.what_if is not None
    (scenario,) = report.what_if.scenarios
    assert (scenario.currency, scenario.charge, scenario.unrated) == ("EUR", Decimal(6), 1)
    assert scenario.per_1000_requests == Decimal(2000)  # of the three requests with a price
    assert [outcome.charge for outcome in scenario.tenants] == [Decimal(3), Decimal(3)]
    assert {scenario.difference, scenario.hardware_cost, scenario.margin} == {None}
    assert "6.000000 EUR" in report_html(report)
    assert "has no price for 1 of these requests" in report_html(report)


def test_another_book_rates_what_is_in_the_chosen_currency(filled: Ledger) -> None:
    record, euros = usage_record("euro", tenant="euro", tier="standard"), book(BOOK.replace('"USD"', '"EUR"'))
    store_record(filled, record, euros, "test")
    report = build_report(filled, currency="USD", questions=Questions(books=(book(OTHER),)))
    assert report.what_if is not None
    assert report.what_if.scenarios[0].charge == Decimal("7.5")


def test_a_mix_is_full_depth_less_what_was_measured_by_the_tiers_prices(filled: Ledger) -> None:
    report = asked(filled, mixes=(read_mix("economy=30,standard=70"),))
    assert report.what_if is not None
    (scenario,) = report.what_if.scenarios
    assert scenario.mix == "30 % economy, 70 % standard"
    # A request: economy (2 × 1 CU + 0.5) × 0.5 = 1.25, standard 2 × 2.5 CU + 0.5 = 5.5.
    each = Decimal("0.3") * Decimal("1.25") + Decimal("0.7") * Decimal("5.5")
    assert [outcome.charge for outcome in scenario.tenants] == [2 * each, each]
    assert scenario.charge == exact_sum([2 * each, each], 6)
    assert scenario.compute_units == 4 * (Decimal("0.3") * 1 + Decimal("0.7") * Decimal("2.5"))
    assert any("economy saves 50 % of full depth: a test." in line for line in report.what_if.assumptions)
    assert any("On this usage it saved 50 % over 1 requests." in line for line in report.what_if.assumptions)


def test_a_mix_of_one_tier_is_that_tier(filled: Ledger) -> None:
    report = asked(filled, mixes=(read_mix("exact=100"),), books=(book(OTHER),))
    assert report.what_if is not None
    by_name = {(scenario.price_book, scenario.mix): scenario for scenario in report.what_if.scenarios}
    assert by_name["round", "100 % exact"].charge == 3 * (Decimal(4) + Decimal("0.5")) * Decimal("1.5")
    assert by_name["flat", "100 % exact"].charge == 3 * Decimal(3) * Decimal("1.5")
    assert by_name["round", "100 % exact"].compute_units == 8


def test_what_one_tenant_gains_by_compute_prices_others_lose(filled: Ledger) -> None:
    rows = {row.tenant: row for row in build_report(filled).token_pricing}
    # Per compute: acme (2 × 1 + 0.5) × 0.5 + 4.5, globex 4.5. Per token: 2 × 1.1, and 0.5; errors are free.
    assert (rows["acme"].per_compute, rows["acme"].per_token) == (Decimal("5.75"), Decimal("2.2"))
    assert (rows["globex"].per_compute, rows["globex"].per_token) == (Decimal("4.5"), Decimal("0.5"))
    assert sum(row.at_equal_revenue for row in rows.values()) == sum(row.per_compute for row in rows.values())
    assert rows["acme"].difference == -rows["globex"].difference
    assert rows["acme"].difference > 0
    assert rows["acme"].winner == "pays less per compute"
    assert rows["globex"].winner == "pays more per compute"


def test_a_stated_throughput_gives_cost_margin_and_break_even(filled: Ledger) -> None:
    report = asked(filled, hardware=Hardware(per_device_hour=Decimal(36), tokens_per_second=Decimal(10)))
    device = report.hardware
    assert device is not None
    # 2,400 tokens at 10 per second: 240 s, at 0.01 per second.
    assert device.tokens == 2400
    assert (device.device_seconds, device.cost) == (Decimal(240), Decimal("2.4"))
    assert device.margin == report.total - Decimal("2.4")
    assert device.cost_per_million_tokens == 1000
    assert device.break_even_tokens_per_second == round(Decimal("0.01") * 2400 / report.total, 3)
    assert device.charge_per_million_tokens == round(report.total * 10**6 / 2400, 6)
    # 7 CU: 1 by economy, 6 by standard.
    assert {row.tier: row.cost for row in device.by_tier} == {
        "economy": round(Decimal("2.4") / 7, 6),
        "standard": round(Decimal("2.4") * 6 / 7, 6),
    }
    for row in (*device.by_tier, *device.by_tenant):
        assert row.margin == (row.charge or 0) - row.cost


def test_recorded_times_count_a_busy_device_once(filled: Ledger) -> None:
    report = asked(filled, hardware=Hardware(per_device_hour=Decimal(36), tokens_per_second=None))
    assert report.hardware is not None
    assert report.hardware.device_seconds == 12  # four requests of 3 s, not at the same time
    assert (report.hardware.measured, report.hardware.devices) == ("recorded", ("none",))
    assert report.hardware.tokens_per_second == 200
    busy = BusyTime()
    for begin, seconds, device in ((0, 4, "a"), (1, 1, "a"), (3, 4, "a"), (9, 1, "a"), (0, 2, "b")):
        record = usage_record(started_at=START + timedelta(seconds=begin), prefill_ns=seconds * 10**9, decode_ns=0)
        busy.add(record.model_copy(update={"device": device}))
    assert busy.ns == (7 + 1 + 2) * 10**9


def test_hardware_is_shared_by_compute_in_a_mix(filled: Ledger) -> None:
    hardware = Hardware(per_device_hour=Decimal(36), tokens_per_second=Decimal(10))
    report = asked(filled, mixes=(read_mix("exact=100"),), hardware=hardware)
    assert report.what_if is not None
    (scenario,) = report.what_if.scenarios
    assert scenario.hardware_cost == round(Decimal("2.4") * 8 / 7, 6)
    assert scenario.margin is not None
    assert scenario.charge is not None
    assert scenario.margin == scenario.charge - scenario.hardware_cost


def test_every_figure_and_assumption_is_shown(filled: Ledger) -> None:
    hardware = Hardware(per_device_hour=Decimal("0.8"), tokens_per_second=None)
    report = asked(filled, mixes=(read_mix("economy=40,exact=60"),), books=(book(OTHER),), hardware=hardware)
    assert report.what_if is not None
    console = Console(width=250, record=True, no_color=True, file=io.StringIO())
    show(report_view(report), console)
    text, html = console.export_text(), report_html(report)
    unit = Amounts.of(report).charges
    for scenario in report.what_if.scenarios:
        assert unit.show(scenario.charge) in text
        assert unit.show(scenario.charge) in html
    for assumption in report.what_if.assumptions:
        assert assumption in text
        assert assumption.replace("'", "&#39;") in html
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_nothing_asked_of_nothing_is_answered_by_nothing(ledger: Ledger) -> None:
    report = asked(ledger, mixes=(read_mix("economy=100"),))
    assert report.is_empty
    assert report.what_if is None


def test_usage_without_a_price_has_no_scenarios(ledger: Ledger) -> None:
    Meter(ledger).emit(usage_record(tier="gold"))
    report = asked(ledger, books=(book(),), hardware=Hardware(per_device_hour=Decimal(1), tokens_per_second=None))
    assert report.what_if is not None
    (scenario,) = report.what_if.scenarios
    assert (scenario.charge, scenario.unrated, scenario.per_1000_requests) == (None, 1, None)
    assert report.hardware is not None
    assert report.hardware.break_even_tokens_per_second is None
    report_html(report)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("standard", "TIER=PERCENT"),
        ("=5", "TIER=PERCENT"),
        ("standard=70", "70 %"),
        ("standard=70,economy=40", "110 %"),
        ("standard=50,standard=50", "'standard' twice"),
        ("standard=0,economy=100", "'0'"),
        ("standard=33.333,economy=66.667", "'33.333'"),
        ("standard=x,economy=1", "'x'"),
    ],
)
def test_a_wrong_mix_is_one_clear_line(text: str, said: str) -> None:
    with pytest.raises(QueryError) as caught:
        read_mix(text)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("price", "rate_text", "said"),
    [
        ("0", None, "--device-hour '0'"),
        ("1e9", None, "--device-hour '1e9'"),
        ("1", "1e-9", "--tokens-per-second '1e-9'"),
        (None, "4", "--device-hour"),
    ],
)
def test_wrong_hardware_is_one_clear_line(price: str | None, rate_text: str | None, said: str) -> None:
    with pytest.raises(QueryError) as caught:
        read_hardware(price, rate_text)
    assert said in str(caught.value)


def test_a_tier_without_measurement_or_price_is_named(filled: Ledger) -> None:
    with pytest.raises(QueryError, match="'gold'"):
        asked(filled, mixes=(read_mix("gold=100"),))
    only = book(BOOK.replace(", exact = 1.5", ""))
    with pytest.raises(QueryError, match=r"'round' .* 'exact'"):
        asked(filled, mixes=(read_mix("exact=100"),), books=(only,))


def test_times_must_be_known_for_a_throughput(ledger: Ledger) -> None:
    Meter(ledger).emit(usage_record(prefill_ns=0, decode_ns=0))
    with pytest.raises(QueryError, match="--tokens-per-second"):
        asked(ledger, hardware=Hardware(per_device_hour=Decimal(1), tokens_per_second=None))


def test_an_evaluation_says_what_tiers_save(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(
        '{"sets": [{"prompts": 1200, "systems": ['
        '{"role": "router", "name": "router (economy)", "flops_saved": {"total": 0.4125}},'
        '{"role": "control", "name": "random program", "flops_saved": {"total": 0.1}}]}]}'
    )
    found = evaluated_savings(file)
    assert {tier: saving.saved for tier, saving in found.items()} == {"economy": Decimal("0.4125")}
    assert found["economy"].source == "1,200 prompts of evaluation.json"
    for wrong in ("{}", '{"sets": []}', "no", '{"sets": [{"prompts": "x"}]}'):
        file.write_text(wrong)
        with pytest.raises(QueryError):
            evaluated_savings(file)
    with pytest.raises(QueryError):
        evaluated_savings(tmp_path / "missing.json")
