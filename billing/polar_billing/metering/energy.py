"""Measures the energy of a machine while it serves: counters of processors (RAPL) and of NVIDIA devices (NVML).

The counters cover whole packages and devices, so they include idle parts and other programs. A log has one JSON line
per interval; `polar report --energy-log FILE` distributes it by executed FLOPs. Knows no usage.

Processors are read from the kernel's powercap files, with the zones of packages and of memory; devices through
nvidia-ml-py, the extra `energy`. Cloud machines often have no counters.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from polar_billing.errors import QueryError
from polar_sdk import reading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import TextIO


POWERCAP: Final = Path("/sys/class/powercap")
_ZONES: Final = ("package", "dram")
"""By the beginning of a zone's name; `psys` holds the package, and `core` is within it."""
_MAX_UJ: Final = 10**18
"""Maximum microjoules of an interval; more is not a measurement."""
_NO_COUNTERS: Final = (
    "this machine has no energy counters that can be read: none under {folder} (RAPL; some kernels let only root read "
    "it), and no NVIDIA device through NVML{reason}."
)


@dataclass(frozen=True)
class EnergyCounter:
    """A counter that only rises, but for starting again at 0 beyond its range."""

    name: str
    read: Callable[[], int]
    """Unit: microjoules."""
    range_uj: int | None = None
    """The largest value; None if it does not start again."""

    def used(self, before: int, now: int) -> int:
        """The use between two readings, of which the counter started again at most once."""
        if now >= before or self.range_uj is None:
            return max(now - before, 0)
        return now + self.range_uj - before


@dataclass(frozen=True)
class Interval:
    """The energy measured between two moments."""

    since: datetime
    until: datetime
    microjoules: dict[str, int]
    """By counter."""

    @property
    def line(self) -> str:
        """The interval as a line of a log."""
        facts = {"since": self.since.isoformat(), "until": self.until.isoformat(), "microjoules": self.microjoules}
        return json.dumps(facts) + "\n"


def energy_counters(folder: Path = POWERCAP) -> list[EnergyCounter]:
    """Every counter of this machine.

    Raises:
        QueryError: There is none, or none may be read.
    """
    devices, reason = _devices()
    found = [*_packages(folder), *devices]
    if not found:
        raise QueryError(
            _NO_COUNTERS.format(folder=folder, reason=reason),
            hint="Model it from executed FLOPs: polar report --flops-per-joule NUMBER --energy-source TEXT.",
        )
    return found


def _packages(folder: Path) -> Iterator[EnergyCounter]:
    for zone in sorted(folder.glob("*rapl*:*")):
        try:
            name = (zone / "name").read_text().strip()
            most = int((zone / "max_energy_range_uj").read_text())
            int((zone / "energy_uj").read_text())
        except (OSError, ValueError):
            continue
        if name.startswith(_ZONES) and "mmio" not in zone.name:  # the same packages by another way
            yield EnergyCounter(f"rapl {zone.name} {name}", _reader(zone / "energy_uj"), most)


def _reader(file: Path) -> Callable[[], int]:
    return lambda: int(file.read_text())


def _devices() -> tuple[list[EnergyCounter], str]:
    """NVIDIA's devices; where there are none, the reason in brackets."""
    try:
        import pynvml
    except ImportError:
        return [], " (nvidia-ml-py is not installed: the extra energy of polar-llm)"
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
        return [_device(pynvml, number, handle) for number, handle in enumerate(handles)], ""
    except pynvml.NVMLError as error:
        return [], f" ({error})"


def _device(nvml: Any, number: int, handle: Any) -> EnergyCounter:
    nvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # raises where the device does not count
    name = nvml.nvmlDeviceGetName(handle)
    # Millijoules since the driver was loaded.
    return EnergyCounter(f"nvml {number} {name}", lambda: 1_000 * int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)))


def record_energy(
    file: TextIO,
    counters: Sequence[EnergyCounter],
    every_s: float,
    for_s: float | None = None,
    *,
    sleep: Callable[[float], object] = time.sleep,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> int:
    """Append a line per interval until the time is over; for ever without one.

    Args:
        file: An open log; each line is flushed.
        counters: What to read.
        every_s: Length of an interval. Unit: seconds.
        for_s: How long to go on; the last interval ends then.
        sleep: Waits.
        now: Tells the time, UTC.

    Returns:
        The number of lines.
    """
    begun = since = now()
    before = [counter.read() for counter in counters]
    lines = 0
    while for_s is None or since < begun + timedelta(seconds=for_s):
        sleep(every_s)
        until, read = now(), [counter.read() for counter in counters]
        used = {counter.name: counter.used(old, new) for counter, old, new in zip(counters, before, read, strict=True)}
        file.write(Interval(since, until, used).line)
        file.flush()
        since, before, lines = until, read, lines + 1
    return lines


def read_energy_log(path: Path) -> list[Interval]:
    """The intervals of a log, by time.

    Raises:
        QueryError: The file cannot be read, or a line is not an interval; or two overlap.
    """
    try:
        lines = reading.read_text(path).splitlines()
    except (OSError, reading.Unreadable) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise QueryError(f"energy log {str(path)!r} cannot be read ({reason}).") from error
    intervals = [_interval(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    intervals.sort(key=lambda interval: interval.since)
    for earlier, later in pairwise(intervals):
        if later.since < earlier.until:
            raise QueryError(
                f"energy log {str(path)!r} has two intervals over {later.since.isoformat()}.",
                hint="Use a separate file for each machine, and for each of several recordings at the same time.",
            )
    return intervals


def _interval(path: Path, number: int, line: str) -> Interval:
    try:
        facts = reading.parse_object(line)
        since, until = (datetime.fromisoformat(facts[name]).astimezone(UTC) for name in ("since", "until"))
        used = dict(facts["microjoules"])
        valid = all(type(value) is int and 0 <= value <= _MAX_UJ for value in used.values())
    except (reading.Unreadable, KeyError, TypeError, ValueError, OverflowError):
        valid = False
    if not valid or since >= until:
        raise QueryError(
            f"energy log {str(path)!r}, line {number}: {reading.shown(line)} is not an interval.",
            hint="Write it with `polar energy FILE`.",
        )
    return Interval(since, until, used)
