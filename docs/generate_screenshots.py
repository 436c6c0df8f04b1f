"""Take the picture of the operations page, on a light and a dark screen: `python docs/generate_screenshots.py`.

The usage is invented, of today, and in a ledger that is gone afterwards. Needs Chromium (`apt-get install
chromium`). Fonts differ between machines, so nothing compares the files with what is drawn.
"""

from __future__ import annotations

import random
import shutil
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from playwright.sync_api import sync_playwright

from polar_billing.dashboard.page import Dashboard
from polar_billing.ledger.ledger import Ledger
from polar_billing.metering.meter import Meter
from polar_billing.testing import usage_record
from polar_sdk.engine_state import Look, TierLook

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polar_sdk.usage import UsageRecord

FOLDER: Final = Path(__file__).with_name("images")
NOW: Final = datetime.now(UTC)
MIDNIGHT: Final = NOW.replace(hour=0, minute=0, second=0, microsecond=0)
_ADDRESS: Final = "http://localhost/polar/"
_PROGRAMS: Final = {
    "economy": ["0-23 (24-29)", "0-19 (20-29)", "0-13 [14-18] 19-29"],
    "standard": ["0-29", "0-23 (24-29)"],
    "premium": ["0-29", "0-14 15x2 16-29"],
    "exact": ["0-29"],
}
_SKIPPED: Final = {"0-13 [14-18] 19-29": range(14, 19)}
_FILLED: Final = {"0-23 (24-29)": 6, "0-19 (20-29)": 10}
ENGINE: Final = Look(
    model="smollm2-135m-instruct",
    tokens_per_second=184.6,
    running=7,
    places=32,
    waiting=2,
    pages_used=412,
    pages=3_072,
    answers=9,
    unrecorded=0,
    unusual=False,
    unaudited=0,
    draining=False,
    router="menu 5d1f3c0a92be",
    void=None,
    tiers=(TierLook("economy", "…", 0.4), TierLook("standard", "…", 0.35)),
)


def usage() -> Iterator[UsageRecord]:
    """A day of three tenants."""
    chance = random.Random(11)
    for number in range(600):
        tier = chance.choices(list(_PROGRAMS), [45, 35, 12, 8])[0]
        program = chance.choices(_PROGRAMS[tier], [6, 3, 1][: len(_PROGRAMS[tier])])[0]
        skipped, filled = _SKIPPED.get(program, range(0)), _FILLED.get(program, 0)
        path = [layer for layer in range(30) if layer not in skipped] + ([15] if "x2" in program else [])
        record = usage_record(
            f"0193e1a2-{number:04d}",
            tenant=chance.choices(["acme", "globex", "initech"], [5, 3, 2])[0],
            tier=tier,
            program=program,
            path=path,
            layers=30,
            prompt=chance.choice([60, 150, 380, 600]),
            output=chance.randint(8, 120),
            model=ENGINE.model,
            started_at=max(NOW - timedelta(seconds=chance.expovariate(1 / 9_000)), MIDNIGHT),
        )
        saved = record.flops.layers_prefill * filled // 32
        flops = record.flops.model_copy(
            update={"layers_prefill": record.flops.layers_prefill - saved, "total": record.flops.total - saved}
        )
        yield record.model_copy(update={"flops": flops})


def main() -> None:
    """Draw both."""
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("there is no Chromium; apt-get install chromium")
    with TemporaryDirectory() as folder, Ledger(f"{folder}/ledger.sqlite3") as ledger:
        Meter(ledger).emit_many(usage())
        dashboard = Dashboard(ledger, clock=lambda: NOW)

        def answer(route: Any) -> None:
            path = urlsplit(route.request.url).path.removeprefix("/polar/")
            page = dashboard.answer(path, ENGINE)
            body = page.content.replace(folder.encode(), b"/var/lib/polar")
            route.fulfill(status=page.status, content_type=f"{page.kind}; charset=utf-8", body=body)

        with sync_playwright() as running:
            browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for colours in ("light", "dark"):
                page = browser.new_page(viewport={"width": 1280, "height": 1040}, color_scheme=colours)
                page.route("**/*", answer)
                page.goto(_ADDRESS)
                page.get_by_text("Live,").wait_for()
                file = FOLDER / f"dashboard-{colours}.png"
                page.screenshot(path=file)
                print(f"wrote {file}")
            browser.close()


if __name__ == "__main__":
    main()
