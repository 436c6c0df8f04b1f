"""The operations page in Chromium: usable by everybody, at any width, in both colours, without a script, and alive.

Skipped where there is no browser: `apt-get install chromium`.
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from polar_billing.access.keys import ApiKeys
from polar_billing.budgets.budget import Budget
from polar_billing.budgets.enforcement import Budgets
from polar_billing.dashboard.page import Dashboard
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.metering.meter import Meter
from polar_billing.testing import usage_record
from tests.billing.dashboard.test_dashboard_page import HOSTILE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polar_billing.ledger.ledger import Ledger
    from tests.integrations.server.conftest import Served

playwright = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is not installed: a group of dependencies, dev"
)
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")
WCAG = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}
WAIT_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for all of these tests; it may reach nothing but what they serve."""
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def served(serve: Callable[..., Served], ledger: Ledger) -> Served:
    """A server with something of everything on its page."""
    now = datetime.now(UTC)
    keys, meter = ApiKeys(ledger), Meter(ledger)
    keys.create("acme", "search", expires_in=timedelta(days=30))
    Budgets(ledger).set(Budget("acme", "0.01", "CU"))  # type: ignore[arg-type]  # text is checked there
    tenants, paths = ["acme", *HOSTILE], [(0, 1, 4, 5), (0, 1, 2, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5)]
    meter.emit_many(
        usage_record(
            f"r{number}",
            tenant=tenants[number % len(tenants)],
            tier=("economy", "premium", "exact")[number % 3],
            path=paths[number % 3],
            started_at=now - timedelta(seconds=number),
        )
        for number in range(40)
    )
    return serve(pages=Dashboard(ledger))


def opened(browser: Any, served: Served, **context: Any) -> tuple[Any, list[str]]:
    """A tab with the page, and a list of what goes wrong in it or leaves this machine."""
    page, wrong = browser.new_context(**context).new_page(), list[str]()
    page.set_default_timeout(WAIT_MS)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type in {"error", "warning"} else None)
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(served.url) else None)
    page.goto(f"{served.url}/polar/")
    return page, wrong


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_everybody_can_use_it(browser: Any, served: Served, colours: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page, wrong = opened(browser, served, color_scheme=colours, viewport={"width": 1280, "height": 900})
    for address in ("", "requests/1"):
        page.goto(f"{served.url}/polar/{address}")
        for part in page.locator("details").all():
            part.evaluate("part => { part.open = true; }")
        # The page refuses inline scripts; what looks at it comes in by the browser's own way.
        found = axe.run(page, options=WCAG)
        assert found.violations_count == 0, found.generate_report()
    assert wrong == []


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits_every_width(browser: Any, served: Served, width: int) -> None:
    page, _ = opened(browser, served, viewport={"width": width, "height": 800})
    for address in ("", "requests/1"):
        page.goto(f"{served.url}/polar/{address}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_new_requests_show_by_themselves_and_nothing_leaves_the_host(
    browser: Any, served: Served, ledger: Ledger
) -> None:
    page, wrong = opened(browser, served)
    assert page.get_by_role("link", name="Verify").count() == 40
    Meter(ledger).emit(usage_record(tenant="newcomer", started_at=datetime.now(UTC)))
    page.locator("#requests").get_by_text("newcomer").wait_for()
    page.locator("#charges").get_by_text("newcomer").wait_for()
    assert wrong == []


def test_it_can_be_paused(browser: Any, served: Served, ledger: Ledger) -> None:
    page, _ = opened(browser, served)
    page.get_by_role("button", name="Pause").click()
    page.get_by_text("Paused", exact=True).wait_for()
    Meter(ledger).emit(usage_record(tenant="newcomer", started_at=datetime.now(UTC)))
    page.wait_for_timeout(3_000)
    assert page.get_by_text("newcomer").count() == 0
    page.get_by_role("button", name="Go on").click()
    page.locator("#requests").get_by_text("newcomer").wait_for()


def test_a_receipt_is_verified_where_it_stands_and_the_verdict_stays(
    browser: Any, served: Served, ledger: Ledger
) -> None:
    page, wrong = opened(browser, served)
    newest = next(ledger.read(Selection(ALL_TENANTS), newest=1)).seq
    link = page.locator(f"#r{newest}")
    link.click()
    page.get_by_text("verified", exact=True).wait_for()
    assert "Verified." in page.locator("#heard").inner_text()
    assert page.evaluate("document.activeElement.id") == f"r{newest}"
    Meter(ledger).emit(usage_record(tenant="newcomer", started_at=datetime.now(UTC)))
    page.locator("#requests").get_by_text("newcomer").wait_for()
    page.get_by_text("verified", exact=True).wait_for()
    assert page.evaluate("document.activeElement.id") == f"r{newest}"
    link.click()
    page.get_by_role("heading", name=f"Request {newest}").wait_for()
    assert wrong == []


def test_it_works_without_a_script(browser: Any, served: Served) -> None:
    page, _ = opened(browser, served, java_script_enabled=False)
    assert page.locator("#requests tbody tr").count() == 40
    page.get_by_role("link", name="Reload").wait_for()
    page.locator("#r1").click()
    page.get_by_role("heading", name="Request 1").wait_for()
    page.get_by_text("Verified.").wait_for()
    page.get_by_role("link", name="Back to operations").click()
    page.get_by_role("heading", name="Cost today").wait_for()


def test_the_keyboard_reaches_everything(browser: Any, served: Served) -> None:
    """In order, seen where it is, and while the page is kept up to date."""
    page, _ = opened(browser, served)
    page.get_by_text("Live,").wait_for()
    reached: list[str] = []
    while not document_left(reached):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        assert page.evaluate("document.activeElement.getBoundingClientRect().width") > 0
    assert reached[:3] == ["Skip to the figures", "Pause", "Now"]
    links = [f"r{number}" for number in range(1, 41)]
    assert [name for name in reached if name in links] == links  # the latest first, as they are stored
    assert {"scroll-charges-USD", "scroll-requests", "scroll-keys", "layers-1-title"} <= set(reached)
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def document_left(reached: list[str]) -> bool:
    """Whether the focus went on to the browser itself, or begins anew."""
    return len(reached) > 1 and (reached[-1] == reached[0] or "PoLar operations" in reached[-1])


def test_a_page_that_cannot_be_updated_says_so(browser: Any, served: Served) -> None:
    page, _ = opened(browser, served)
    page.get_by_text("Live,").wait_for()
    served.close()
    page.get_by_text("Not up to date").wait_for()
