"""The commands that billing adds to `polar`, one module per subject.

Heavy imports wait until a command runs, so that `polar --help` stays quick and works without the billing extra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_billing.cli import budget, drift, export_billing, key, ledger, price, report, statement, upstream, usage

if TYPE_CHECKING:
    import typer


def register(app: typer.Typer) -> None:
    """Add the commands of this package to the `polar` program."""
    for subject in (usage, report, drift, upstream, ledger, price, statement, export_billing, budget, key):
        subject.register(app)
