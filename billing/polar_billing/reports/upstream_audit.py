"""Work that a vLLM worker executed, compared with what the records of its answers need. Makes no requests.

Both are tokens by layers: a worker counts them as it runs (`polar_vllm.counts`), and `layer_tokens` of a record's
program, prompt and answer is what is billed. A record names its worker in a tag, so that neither restarts nor other
workers on the same ledger mix with it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt, computed_field

from polar_billing.errors import QueryError
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_sdk.programs.cost import layer_tokens
from polar_sdk.programs.program import Program
from polar_sdk.show.tables import add_numbers, add_row, new_table
from polar_sdk.usage import WORKER_TAG

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.table import Table

    from polar_billing.ledger.ledger import Ledger
    from polar_sdk.usage import UsageRecord

_SAMPLE: Final = re.compile(
    r'^polar_upstream_(layer_tokens_total|requests_running)\{worker="(\w+)"(?:,kind="(\w+)")?\} (\d+)$', re.MULTILINE
)


class WorkerCounts(BaseModel):
    """What a worker has counted since it started. Unit: tokens by layers, but for `running`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    worker: str
    running: NonNegativeInt
    """Requests that have begun and not ended."""
    executed: NonNegativeInt
    replayed: NonNegativeInt
    """Ran again after a preemption."""
    rejected: NonNegativeInt
    """Drafts that answers did not take."""
    unread: NonNegativeInt
    """Ran the last layer, though nothing reads their state."""
    late: NonNegativeInt
    """Ran for answers that had ended, or had not begun."""
    cut: NonNegativeInt
    """Needed by answers that were cut: their records may need less."""

    @classmethod
    def parse(cls, text: str, where: str) -> Self:
        """Read the metrics of a vLLM.

        Args:
            text: In Prometheus's format.
            where: Where they come from, for errors.

        Raises:
            QueryError: They are not those of one vLLM that runs programs.
        """
        found: dict[str, str | int] = {}
        for name, worker, kind, value in _SAMPLE.findall(text):
            key = "running" if name == "requests_running" else kind
            if found.setdefault("worker", worker) != worker or key in found:
                raise QueryError(f"{where} has counts of several workers.", hint="Give each worker's own URL.")
            found[key] = int(value)
        wanted = {name: found[name] for name in cls.model_fields if name in found}
        if missing := cls.model_fields.keys() - wanted.keys():
            raise QueryError(
                f"{where} has no count of {sorted(missing)[0]!r}, so it is not a vLLM that runs programs.",
                hint="Start it with polar_vllm, as described in docs/serving.md.",
            )
        return cls.model_validate(wanted)


class UpstreamAudit(BaseModel):
    """The counts of a worker beside the records of its answers."""

    model_config = ConfigDict(frozen=True)

    url: str
    counts: WorkerCounts
    requests: NonNegativeInt
    """Records that name the worker."""
    needed: NonNegativeInt
    """What they need by the formula, and were billed for. Unit: tokens by layers."""

    @classmethod
    def of(cls, url: str, counts: WorkerCounts, records: Iterable[UsageRecord]) -> Self:
        """Sum the records."""
        requests = needed = 0
        for record in records:
            requests += 1
            if record.tokens.output:
                program, tokens = Program.parse(record.program), record.tokens
                needed += layer_tokens(program, tokens.input, tokens.output, cached=tokens.cached)
        return cls(url=url, counts=counts, requests=requests, needed=needed)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def unsent(self) -> int:
        """What answers needed beyond their records: tokens that clients had left without. Negative: billed, not run."""
        counts = self.counts
        return counts.executed - counts.replayed - counts.rejected - counts.unread - counts.late - self.needed

    @computed_field  # type: ignore[prop-decorator]
    @property
    def closes(self) -> bool:
        """Whether nothing ran that is not accounted for, and nothing was billed that did not run."""
        return self.counts.running == 0 and 0 <= self.unsent <= self.counts.cut

    @property
    def verdict(self) -> str:
        """Why it closes or does not, in a line."""
        counts = self.counts
        if counts.running:
            return f"{self.url}: {counts.running:,} requests run there; audit it when none does."
        if self.closes:
            return f"{self.url}: closes over {self.requests:,} requests."
        amount = f"{abs(self.unsent):,} tokens by layers"
        if self.unsent < 0:
            return f"{self.url}: {amount} were billed and not executed."
        most = f", and answers that were cut needed {counts.cut:,}" if counts.cut else ""
        return f"{self.url}: {amount} were executed for answers and are in no record of this ledger{most}."


def audit(store: Ledger, url: str, counts: WorkerCounts) -> UpstreamAudit:
    """Hold a worker's counts against a ledger."""
    stored = store.read(Selection(ALL_TENANTS, tags={WORKER_TAG: counts.worker}))
    return UpstreamAudit.of(url, counts, (each.record for each in stored))


def audits_view(audits: Sequence[UpstreamAudit]) -> Table:
    """The parts of what was executed, one worker a column."""
    table = new_table("Executed by workers of vLLM, tokens by layers", ["part"])
    add_numbers(table, *(one.url for one in audits))
    rows = {
        "needed by records": [one.needed for one in audits],
        "replayed after preemptions": [one.counts.replayed for one in audits],
        "rejected drafts": [one.counts.rejected for one in audits],
        "unread states of the last layer": [one.counts.unread for one in audits],
        "after an answer's end": [one.counts.late for one in audits],
        "not sent, since its client had left": [one.unsent for one in audits],
        "executed": [one.counts.executed for one in audits],
        "requests": [one.requests for one in audits],
    }
    for name, values in rows.items():
        add_row(table, name, *(f"{value:,}" for value in values))
    return table
