"""The commands that billing adds to `polar`, one module per topic.

Heavy imports wait until a command runs, so that `polar --help` stays quick and works without the billing extra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_billing.cli import budget, energy, explain, export_billing, key, ledger, price, proof, statement, usage

if TYPE_CHECKING:
    import typer


_TOPICS = (usage, explain, proof, ledger, price, statement, export_billing, energy, budget, key)


def register(app: typer.Typer) -> None:
    """Add the commands of this package to the `polar` program."""
    for topic in _TOPICS:
        topic.register(app)
