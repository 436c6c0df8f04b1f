"""From a few metered requests to a bill: usage by tenant and tier, other prices, and a page to print.

Run it with `python examples/billing_report.py [FOLDER]`. The ledger is created in that folder, or in a temporary
one; yours is not touched.
"""

from __future__ import annotations

import sys
import tempfile
from decimal import Decimal
from pathlib import Path

from polar_billing import ALL_TENANTS, Ledger, Meter, PriceBook, Selection, build_report, report_html, usage_rows
from polar_sdk import PolarModel

REQUESTS = (
    ("acme", "economy", "Name three fruits."),
    ("acme", "premium", "Why does ice float on water?"),
    ("globex", "economy", "What is the capital of Italy?"),
    ("globex", "standard", "What is a ledger?"),
)

NEXT_YEAR = """
id = "next-year"
currency = "USD"
decimals = 6

[[prices]]
effective_from = 2024-01-01T00:00:00Z
per_compute_unit = 0.0005
per_request = 0.000002

[prices.tiers]
economy = 0.8
standard = 1.0
premium = 1.3
"""


def main(folder: Path) -> None:
    ledger = Ledger(str(folder / "ledger.sqlite3"))
    model = PolarModel.from_pretrained(sink=Meter(ledger))
    for tenant, tier, prompt in REQUESTS:
        answer = model.generate(prompt, compute=tier, tenant=tenant, max_tokens=16)
        receipt = answer.receipt or {}
        print(f"{tenant:<7} {tier:<9} {receipt['cost']} {receipt['currency']}  {prompt}")

    print("\nWho used what")
    for row in usage_rows(ledger, Selection(ALL_TENANTS), by=["tenant", "tier"]):
        who, on = row.group["tenant"], row.group["tier"]
        tokens = row.tokens_input + row.tokens_output
        saved = row.compute_units_saved / (row.compute_units + row.compute_units_saved)
        less = f"{saved:.1%} less than full depth" if saved >= Decimal("0.0005") else "full depth"
        print(f"  {who:<7} {on:<9} {tokens:>4} tokens  {row.compute_units:.6f} CU, {less}")

    report = build_report(ledger)
    print(f"\nThe bill, {report.currency}")
    for bill in report.tenants:
        for line in bill.lines:
            price = f"{line.quantity:.6f} {line.unit} at {line.unit_price:.5f}"
            print(f"  {bill.tenant:<7} {line.tier:<9} {price:<28} {line.amount}")
        print(f"  {bill.tenant:<7} {'total':<9} {f'rounding {bill.rounding}':<28} {bill.total}")

    again = build_report(ledger, prices=PriceBook.from_toml(NEXT_YEAR))
    print(f"\nThe same usage by the book {again.price_books[0].id!r}: {again.total} {again.currency}")

    page = folder / "report.html"
    page.write_text(report_html(report), encoding="utf-8")
    print(f"\nA page to print: {page} ({page.stat().st_size:,} bytes)")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
