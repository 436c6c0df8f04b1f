"""The command `polar energy`.

Arguments in, a log out; the counters are read by `metering.energy`.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from polar_billing.errors import OutputError
from polar_sdk.show.lines import print_line


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("energy", epilog="Example: polar energy energy.jsonl --every 10")(energy)


def energy(
    log: Annotated[Path, typer.Argument(help="The log, to which lines are appended.", metavar="FILE")],
    every: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds between two lines.", metavar="SECONDS")] = 10,
    for_: Annotated[
        float | None,
        typer.Option("--for", min=0.1, help="Stop after this many seconds; by default at Ctrl-C.", metavar="SECONDS"),
    ] = None,
) -> None:
    """Log the energy that this machine uses while it serves, from its own counters (RAPL, NVML).

    `polar report --energy-log FILE` shares it out by executed FLOPs.
    """
    from polar_billing.metering.energy import energy_counters, record_energy

    counters = energy_counters()
    try:
        with log.open("a", encoding="utf-8") as file:
            print_line(f"Logging {', '.join(counter.name for counter in counters)} to {log}.", err=True)
            with suppress(KeyboardInterrupt):
                record_energy(file, counters, every, for_)
    except OSError as error:
        raise OutputError(
            f"{str(log)!r} cannot be written ({error.strerror}).", hint="Check that its folder exists."
        ) from error
