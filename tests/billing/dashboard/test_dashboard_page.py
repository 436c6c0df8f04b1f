"""The operations page as HTML: whole without a script, safe with any name, small, sensible where there is little."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from html import unescape
from typing import TYPE_CHECKING, Any, Final

import pytest

from polar_billing.access.keys import ApiKeys
from polar_billing.budgets.budget import Budget
from polar_billing.budgets.enforcement import Budgets
from polar_billing.dashboard.page import FRESH_S, Dashboard
from polar_billing.dashboard.templates import MAX_TENANTS
from polar_billing.errors import PeriodError
from polar_billing.ledger.audits import Audits
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.reports.report import build_report
from polar_billing.reports.text import unit_for
from polar_billing.testing import audit, usage_record
from polar_billing.values.periods import Period, Window
from polar_sdk.engine_state import Look, TierLook
from polar_sdk.usage import Outcome
from tests.billing.reports.test_report_html import Page
from tests.billing.storing import unguarded

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime(2026, 11, 15, 12, 30, tzinfo=UTC)
HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "'; DROP TABLE polar_usage; --",
    "{{ 7 * 7 }}{% raw %}",
    "שלום עולם",
    "x" * 200,
]


ENGINE: Final = Look(
    model="tiny",
    tokens_per_second=111.25,
    running=3,
    places=32,
    waiting=5,
    pages_used=12,
    pages=96,
    answers=8,
    unrecorded=0,
    unusual=False,
    unaudited=0,
    draining=False,
    router="menu 0123",
    void=None,
    tiers=(TierLook("economy", "at most <2 %> differ", 0.25),),
)


def dashboard(ledger: Ledger, **settings: Any) -> Dashboard:
    return Dashboard(ledger, clock=lambda: NOW, **settings)


def html(ledger: Ledger, path: str = "", live: Look | None = None) -> str:
    """A page that must be there."""
    answer = dashboard(ledger).answer(path, live)
    assert answer.status == 200, answer.content
    return answer.content.decode()


def words(page: str) -> str:
    return " ".join("".join(Page(page).text).split())


def section(page: str, name: str) -> str:
    """The text of one section."""
    match = re.search(rf'<section [^>]*id="{name}".*?</section>', page, re.DOTALL)
    assert match is not None
    return " ".join(unescape(re.sub("<[^>]+>", " ", match[0])).split())


def busy(ledger: Ledger, tenants: list[str], count: int = 120) -> None:
    """Requests of the last hour by all tenants, with keys and budgets."""
    chance, keys, budgets = random.Random(1), ApiKeys(ledger), Budgets(ledger)
    paths = {"economy": (0, 1, 4, 5), "standard": (0, 1, 2, 3, 4, 5), "premium": (0, 1, 2, 2, 3, 4, 5), None: (0, 5)}
    ids = {}
    for tenant in tenants:
        ids[tenant] = keys.create(tenant, tenant, expires_in=timedelta(days=9))[0].key_id
        budgets.set(Budget(tenant, Decimal("0.001"), "USD"))
    Meter(ledger).emit_many(
        usage_record(
            f"{tenants[number % len(tenants)][:100]}-{number}",
            tenant=tenants[number % len(tenants)],
            tier=(tier := chance.choice(list(paths))),
            path=paths[tier],
            outcome=chance.choice([*[Outcome.COMPLETED] * 5, *Outcome]),
            started_at=NOW - timedelta(seconds=chance.randint(0, 3_500)),
            tags={"key": ids[tenants[number % len(tenants)]], "kind": tenants[number % len(tenants)]},
        )
        for number in range(count)
    )
    for number, tenant in enumerate(tenants):
        promise = {"tier": tenant, "promise": f"{number:064x}", "tenant": tenant}
        Audits(ledger, "polar").store([audit(lost=number > 0, **promise) for _ in range(12)])


def test_promises_and_what_tiers_saved_this_week_are_shown(ledger: Ledger) -> None:
    assert "No promise was audited yet." in section(html(ledger), "audits")
    busy(ledger, ["acme", "globex"])
    shown = section(
        html(ledger, live=replace(ENGINE, tiers=(TierLook("economy", "x", 0.25), TierLook("standard", "y", 0.1)))),
        "audits",
    )
    assert "acme 000000000000 in force" in shown
    assert "globex 000000000000 at risk" in shown
    assert shown.count("economy 25.0 %") == 2  # what standard would save as economy, for both kinds


def test_the_page_is_well_formed_and_needs_no_inline_style_or_script(ledger: Ledger) -> None:
    busy(ledger, ["acme", "globex"])
    for page in (html(ledger), html(ledger, live=ENGINE), html(ledger, "requests/1")):
        parsed = Page(page)
        assert parsed.open == []
        assert len(parsed.ids) == len(set(parsed.ids))
        assert not parsed.tags & {"style", "img", "iframe", "object", "embed", "form", "base"}
        assert not re.search(r"\s(style|on\w+)=", re.sub(r">[^<]*<", "><", page))
        assert "://" not in page
        scripts = re.findall(r"<script([^>]*)>(.*?)</script>", page, re.DOTALL)
        assert all(
            re.fullmatch(r' src="(\.\./)?page\.js\?[0-9a-f]{12}" defer', attributes) for attributes, _ in scripts
        )
        assert not any(content for _, content in scripts)
        for link in parsed.links:
            assert re.match(r"#|$|(\.\./)?(page\.(css|js)|icon\.svg)\?|(\.\./)?(requests/\d+|#requests)$", link), link


def test_the_figures_on_the_page_are_those_of_the_report(ledger: Ledger) -> None:
    busy(ledger, ["acme", "globex"])
    today = Selection(ALL_TENANTS, Period.containing(NOW, Window.DAY))
    report = build_report(ledger, today)
    tenants, tiers = [tenant.total for tenant in report.tenants], [tier.figures.charge for tier in report.tiers]
    unit = unit_for([report.total, *tiers, *tenants], report.currency)
    page = html(ledger)
    shown = section(page, "charges")
    for figures in (report.figures, *(tier.figures for tenant in report.tenants for tier in tenant.tiers)):
        assert figures.charge is not None
        assert figures.charge_full_depth is not None
        cells = [
            f"{figures.requests:,}",
            f"{figures.tokens_input:,}",
            f"{figures.tokens_output:,}",
            f"{figures.compute_units:.4f}",
        ]
        assert " ".join(cells) in shown
        saved = unit.show(figures.charge_full_depth - figures.charge, signed=True)
        assert f"{unit.show(figures.charge)} {unit.show(figures.charge_full_depth)} {saved}" in shown
    assert f"{unit.show(report.total)} {unit.name}" in words(page)
    for tenant in report.tenants:
        assert tenant.tenant in shown
    latest = next(ledger.read(Selection(ALL_TENANTS), newest=1))
    assert f"{latest.record.started_at:%H:%M:%S} {latest.record.tenant}" in section(page, "requests")


def test_names_are_shown_and_never_markup(ledger: Ledger) -> None:
    busy(ledger, HOSTILE)
    page = html(ledger, live=replace(ENGINE, model="<b>bold</b>", void="a\u202eb\u2066c"))
    parsed = Page(page)
    text = "".join(parsed.text)
    assert not parsed.tags & {"b", "i", "img"}
    assert page.count("<script") == 1
    for name in HOSTILE:
        assert text.count(name) >= 4, name  # its cost, its requests, its budget and its key
        assert f"<bdi>{name}</bdi>" in unescape(page)
    assert "a\ufffdb\ufffdc" in text
    assert "\u202e" not in page
    assert "<b>bold</b>" in text
    for stored in ledger.read(Selection(ALL_TENANTS), newest=7):
        receipt = Page(html(ledger, f"requests/{stored.seq}"))
        assert not receipt.tags & {"b", "i", "img"}
        assert "Verified." in "".join(receipt.text)


def test_a_hundred_requests_of_long_names_stay_below_150_kb(ledger: Ledger) -> None:
    busy(ledger, [f"{number:02d}{'x' * 198}" for number in range(60)], 200)
    page = html(ledger, live=ENGINE)
    assert page.count('class="verify"') == 100
    assert len(page.encode()) < 150_000
    assert f"The {MAX_TENANTS} tenants with the largest charge; the total is of all 60." in section(page, "charges")
    report = build_report(ledger, Selection(ALL_TENANTS, Period.containing(NOW, Window.DAY)))
    assert f"of all 60 tenants {report.figures.requests:,}" in section(page, "charges")


def test_an_empty_ledger_makes_a_page_and_no_ledger(ledger_url: str, tmp_path: Path) -> None:
    page = html(Ledger(ledger_url))
    assert "There is no usage in this ledger yet." in section(page, "charges")
    assert "No engine runs behind this page" in section(page, "now")
    assert "No layer ran" in section(page, "programs")
    assert "nothing bounds what a tenant spends" in section(page, "budgets")
    assert Page(page).open == []
    assert list(tmp_path.iterdir()) == []


def test_only_cancelled_streams_make_a_page(ledger: Ledger) -> None:
    for number in range(3):
        Meter(ledger).emit(usage_record(f"r{number}", path=(0, 1, 4, 5), outcome=Outcome.CANCELLED))
    page = html(ledger)
    assert "3 cancelled" in section(page, "charges")
    assert "run skipped" in section(page, "programs")
    assert section(page, "requests").count("Verify") == 3


def test_what_has_no_price_is_said_and_is_in_no_amount(ledger: Ledger) -> None:
    text = 'id = "later"\ncurrency = "USD"\n[[prices]]\neffective_from = 2027-01-01\nper_request = 1\n'
    book = PriceBook.from_toml(f"{text}tiers = {{ standard = 1 }}")
    Meter(ledger, prices=book).emit(usage_record())
    page = html(ledger)
    assert "1 request unrated , in no amount: price book 'later' has no price until 2027-01-01" in section(
        page, "charges"
    )
    assert "nothing has a price" in words(page)
    assert "– completed Verify" in section(page, "requests")


def test_yesterday_is_not_today_and_a_zone_says_when_that_is(ledger: Ledger) -> None:
    Meter(ledger).emit(usage_record(started_at=NOW.replace(day=14, hour=23)))
    page = html(ledger)
    assert "There are no requests today." in section(page, "charges")
    assert "2026-11-14 23:30:00" in section(page, "requests")
    berlin = dashboard(ledger, zone="Europe/Berlin").answer("").content.decode()
    assert "2026-11-15 to 2026-11-16 (end excluded), Europe/Berlin" in section(berlin, "charges")
    assert "00:30:00 acme" in section(berlin, "requests")
    assert "13:30:00 CET" in words(berlin)
    with pytest.raises(PeriodError, match="unknown"):
        dashboard(ledger, zone="Europe/Nowhere")


def test_what_the_engine_does_is_shown(ledger: Ledger) -> None:
    page = html(ledger, live=ENGINE)
    now, health = section(page, "now"), section(page, "health")
    for said in ("Serving tiny", "111.2", "3 of 32", "12.5 %", "12 of 96 pages"):
        assert said in now
    assert "holds for model" in health
    assert "economy +25.0 %" in health
    assert "at most <2 %> differ" in health
    drained = html(ledger, live=replace(ENGINE, draining=True, unrecorded=2, void="it moved"))
    assert "Draining" in section(drained, "now")
    assert "void : it moved" in section(drained, "health")
    assert "no tier is certified" in section(html(ledger, live=replace(ENGINE, tiers=())), "health")


def test_no_secret_is_on_the_page(ledger: Ledger) -> None:
    key, text = ApiKeys(ledger).create("acme", "search")
    page = html(ledger)
    assert key.key_id in page
    assert text.split("_", 2)[2] not in page
    assert key.secret_hash not in page


def test_a_changed_request_does_not_verify(ledger: Ledger) -> None:
    Meter(ledger).emit(usage_record())
    with ledger.transaction() as connection, unguarded(connection):
        connection.exec_driver_sql("UPDATE polar_usage SET tokens_output = 3")
    page = html(ledger, "requests/1")
    assert 'id="verdict" data-good="no"' in page
    assert "It does not agree." in page


def test_a_page_that_does_not_exist_is_404(ledger: Ledger) -> None:
    Meter(ledger).emit(usage_record())
    page = dashboard(ledger)
    for number in ("", "0", "2", "x", str(9**30), "²"):
        assert page.answer(f"requests/{number}").status == 404
    for path in ("..", "page.py", "é"):
        assert (page.answer(path).status, page.answer(path).kind) == (404, "text/html")


def test_a_ledger_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "l.sqlite3").write_bytes(b"no database" * 100)
    for path in ("", "requests/1"):
        answer = Dashboard(str(tmp_path / "l.sqlite3")).answer(path)
        assert answer.status == 503
        assert "cannot be read" in answer.content.decode()


def test_a_page_is_rendered_once_for_many_readers(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("polar_billing.dashboard.page.time.monotonic", lambda: clock[0])
    page = dashboard(ledger)
    first = page.answer("").content
    Meter(ledger).emit(usage_record())
    assert page.answer("").content is first
    clock[0] += FRESH_S
    assert 'class="verify"' in page.answer("").content.decode()


def test_files_are_named_by_their_content(ledger: Ledger) -> None:
    page = dashboard(ledger)
    for name, kind in (("page.css", "text/css"), ("page.js", "text/javascript"), ("icon.svg", "image/svg+xml")):
        answer = page.answer(name)
        assert (answer.status, answer.kind, answer.keep) == (200, kind, True)
    assert "@import" not in page.answer("page.css").content.decode()
    assert "url(" not in page.answer("page.css").content.decode()


def test_a_missing_extra_is_refused() -> None:
    script = """
import sys
sys.modules["jinja2"] = None
from polar_billing.dashboard.page import open_pages
try:
    open_pages(None)
except ImportError as error:
    print(error)
"""
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert printed.startswith("the operations page needs 'jinja2'. Install the extra report")
