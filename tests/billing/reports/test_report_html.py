from __future__ import annotations

import re
import subprocess
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from io import StringIO
from typing import TYPE_CHECKING

import pytest
from rich.console import Console, Group

from polar_billing.ledger.records import Selection
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.reports.html import report_html
from polar_billing.reports.report import Questions, Report, build_report
from polar_billing.reports.text import Amounts
from polar_billing.reports.usage_tables import report_view
from polar_billing.testing import audit, usage_record
from polar_billing.values.money import plain
from polar_sdk.show.tables import add_numbers, add_row, new_table, show
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from polar_billing.ledger.ledger import Ledger

NOW = datetime(2026, 12, 1, tzinfo=UTC)
NASTY = "<script>alert('1')</script>&amp;\"'"
VOID = {"meta", "link", "img", "br", "input", "hr"}
RIGHT_TO_LEFT = "שלום עולם"
LONG = "x" * 200


class Page(HTMLParser):
    """Collects what a page refers to, and whether its elements nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in {"src", "href", "xlink:href", "data", "action", "srcset", "poster"}:
                self.links.append(value or "")
            if value and "url(" in value:
                self.links += re.findall(r"url\(([^)]*)\)", value)
            if name == "aria-labelledby":
                self.links.append(f"#{value}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def report(ledger: Ledger) -> Report:
    """Three tenants, one of them with a nasty name, and an unrated tier."""
    meter = Meter(ledger)
    paths = {"economy": (0, 1, 4, 5), "premium": (0, 1, 2, 2, 3, 4, 5), "gold": (0, 5), None: (0, 1, 2)}
    for tenant in ("acme", "globex", NASTY):
        for tier, path in paths.items():
            for outcome in Outcome:
                meter.emit(usage_record(tenant=tenant, tier=tier, path=path, outcome=outcome))
    meter.emit(usage_record(model="another <model>", layers=2, path=(0, 1)))
    for n in range(12):
        meter.audited(audit(lost=n > 0, tier=NASTY))
    return build_report(ledger, now=NOW)


def test_the_page_fetches_nothing(report: Report) -> None:
    html = report_html(report)
    page = Page(html)
    assert "://" not in html.replace(report.ledger, "")
    assert "@import" not in html
    assert not page.tags & {"link", "img", "iframe", "object", "embed", "video", "audio", "base", "form"}
    assert all(link.startswith("#") for link in page.links)
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)


def test_the_page_is_well_formed_and_every_id_unique(report: Report) -> None:
    page = Page(report_html(report))
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert {"caption", "thead", "th", "figcaption", "main", "header", "h1"} <= page.tags


def test_names_are_escaped_everywhere(report: Report) -> None:
    html = report_html(report)
    assert html.count("<script") == 1  # our own, which holds no names
    assert html.index("<script") > html.rindex("</section>")
    assert "".join(Page(html).text).count(NASTY) >= 2  # in its row, and over its statement


def test_the_page_holds_the_figures(report: Report) -> None:
    text = " ".join("".join(Page(report_html(report)).text).split())
    unit = Amounts.of(report).charges
    assert unit.name == "µUSD"
    assert unit.show(report.total) in text
    for tenant in report.tenants:
        assert tenant.tenant in text
        for line in tenant.lines:
            assert f"{plain(line.amount)} USD" in text
            assert unit.show(line.amount) in text
    assert "has no price for tier 'gold'" in text
    assert "by hand" in text
    assert "another <model>" in text


def test_promises_beside_their_audits_are_for_the_operator_alone(ledger: Ledger, report: Report) -> None:
    (promise,) = report.audited
    assert (promise.state, promise.audits, promise.losses) == ("at risk", 12, 11)
    assert "at risk" in report_html(report)
    console = Console(width=200, file=StringIO())
    console.print(report_view(report))
    assert "at risk" in console.file.getvalue()  # type: ignore[attr-defined]
    assert build_report(ledger, Selection("acme"), now=NOW).audited == ()


def test_charts_are_boxes_with_text_and_words_for_who_cannot_see_them(report: Report) -> None:
    html = report_html(report)
    assert html.count('class="columns answers" role="img" aria-label="Visits of answers per layer') == 5
    assert html.count('class="strip" role="img" aria-label="Layers of program') == 5
    assert "<svg" not in html
    assert "layer 2: 0 visits by prompts, 0 by answers" in html
    widths = [float(width) for width in re.findall(r'style="width:([\d.]+)%"', html)]
    assert max(widths) == 100
    assert all(0 <= width <= 100 for width in widths)


def test_every_link_of_a_line_leads_to_how_its_amount_comes_about(report: Report) -> None:
    html = report_html(report)
    for place, tenant in enumerate(report.tenants, start=1):
        for number, line in enumerate(tenant.lines, start=1):
            assert f'<a href="#line-{place}-{number}">' in html
            explained = html[html.index(f'<li id="line-{place}-{number}">') :].partition("</li>")[0]
            assert f"= {plain(line.exact)} USD" in explained
            assert line.exact == line.quantity * line.unit_price
            assert f"{line.amount.normalize():f} USD" in explained


def test_one_tenant_needs_no_comparison_of_tenants(ledger: Ledger, report: Report) -> None:
    html = report_html(build_report(ledger, Selection("acme"), now=NOW))
    assert 'id="tenants"' not in html
    assert "globex" not in html


def test_empty_and_unrated_reports_render(ledger: Ledger) -> None:
    assert "There is no usage in this period." in report_html(build_report(ledger))
    Meter(ledger).emit(usage_record(tier="gold", outcome=Outcome.CACHED))
    html = report_html(build_report(ledger))
    assert 'id="charges"' not in html
    assert 'id="tenants"' not in html
    assert "1 request unrated" in html
    assert Page(html).open == []


def test_only_cancelled_streams_make_a_page_without_latencies(ledger: Ledger) -> None:
    for number in range(3):
        Meter(ledger).emit(usage_record(f"r{number}", outcome=Outcome.CANCELLED))
    report = build_report(ledger, questions=Questions(promises={"standard": 100}))
    html = report_html(report)
    assert report.promises == ()
    assert "3 cancelled" in html
    assert report.figures.latency_ns_p50 is None
    assert Page(html).open == []


def test_a_month_without_a_price_says_so_and_charges_nothing(ledger: Ledger) -> None:
    book = PriceBook.from_toml(
        'id = "later"\ncurrency = "USD"\n[[prices]]\neffective_from = 2027-01-01\nper_request = 1\n'
        "tiers = { standard = 1 }"
    )
    Meter(ledger, prices=book).emit(usage_record())
    report = build_report(ledger)
    html = report_html(report)
    assert "has no price until 2027-01-01" in html
    assert report.figures.charge is None
    assert 'id="charges"' not in html
    assert Page(html).open == []


def test_long_and_right_to_left_names_stay_in_their_place(ledger: Ledger) -> None:
    for tenant in (RIGHT_TO_LEFT, LONG):
        Meter(ledger).emit(usage_record(tenant=tenant, tier="economy"))
    html = report_html(build_report(ledger))
    for tenant in (RIGHT_TO_LEFT, LONG):
        assert html.count(f"<bdi>{tenant}</bdi>") >= 3
        shown = html.replace(f"<bdi>{tenant}</bdi>", "").replace(f'title="{tenant}"', "")
        assert tenant not in shown


def test_every_sortable_table_has_one_body_of_whole_rows(report: Report) -> None:
    for table in re.findall(r'<table class="sortable">.*?</table>', report_html(report), re.DOTALL):
        assert table.count("<tbody>") == 1
        assert "rowspan" not in table
        names = table.partition("</thead>")[0].count("<th")
        body = table.partition("<tbody>")[2].partition("</tbody>")[0]
        for row in body.split("</tr>")[:-1]:
            assert len(re.findall(r"<t[hd][ >]", row)) == names - 1 or len(re.findall(r"<t[hd][ >]", row)) == names


def test_a_missing_extra_is_refused() -> None:
    script = """
import sys
sys.modules["jinja2"] = None
from polar_billing.errors import MissingExtraError
from polar_billing.ledger.ledger import Ledger
from polar_billing.reports.html import report_html
from polar_billing.reports.report import build_report
try:
    report_html(build_report(Ledger()))
except MissingExtraError as error:
    print(error, error.exit_code)
"""
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    hint = "Install the extra report of polar-llm, in a clone: `pip install '.[report]'`."
    assert printed == f"the HTML report needs 'jinja2'. {hint} 2\n"


NAME = "a-company-with-a-long-name"
FIGURES = ("123,456", "0.000123456789")


def printed(width: int) -> list[str]:
    table = new_table("Usage", ["tenant", "tier"])
    add_numbers(table, "requests", "cost\nUSD")
    table.add_column("not completed", overflow="fold", min_width=13)
    add_numbers(table, "saved")
    add_row(table, NAME, "standard", *FIGURES, "10 cancelled, 16 error", "+46.1 %")
    file = StringIO()
    show(Group(Group(table)), Console(file=file, width=width))
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [20, 60, 74, 80, 120, 200])
def test_no_width_loses_a_digit_or_a_heading(width: int) -> None:
    text = "\n".join(printed(width))
    for expected in (*FIGURES, "+46.1 %", "tenant", "requests", "not completed"):
        assert expected in text
    letters = "".join(line[: line.find("standard")] if "standard" in line else line[:26] for line in printed(width)[4:])
    assert NAME in letters.replace(" ", "")


def test_texts_fold_to_the_width_and_no_further() -> None:
    assert max(map(len, printed(74))) <= 74
    assert any(NAME in line for line in printed(120))
    assert len(printed(120)) == 5  # title, two lines of headings, a rule, one row
