"""Drift: streams of requests drawn from measured losses, and how soon a promise that broke is not served any more.

Each stream draws requests, with what the router read of them and what each tier lost, from the prompts that
`drift_losses.py` measured. At some request between 500 and 2,500 the prompts change: a flood of another kind, another
kind that slowly takes over, other languages, longer prompts, or prompts of which twice the allowed share is lost; or
they never change. The monitor sees the losses of the audited requests only, the detector what the router reads of all.

Audits alone, the detector alone, and both together, where a suspicion of the detector has more requests audited as a
doubt of a monitor does, are compared on the same streams; beside them the number of requests that no method can do
without whose evidence is audits at the usual share (ln 1/δ over the divergence of the losses from what is promised).
"""

from __future__ import annotations

import json
import math
import random
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from benchmarks.drift_losses import RECORDED, read, recorded
from benchmarks.results import Recorder, Results, arguments
from polar_sdk.promises.losses import is_lost
from polar_sdk.promises.monitor import Monitor, State
from polar_sdk.promises.novelty import Novelty, Usual, Usualness
from polar_sdk.request.auditor import RAISED
from polar_sdk.request.selection import DEFAULT_SHARE as SHARE
from polar_sdk.router.artifact import load_router
from polar_sdk.router.learned import LearnedRouter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.promises.audit import AuditedLoss

Row = dict[str, Any]
ROUTERS: Final = Path(__file__).parents[1] / "polar_sdk" / "shipped" / "routers"
SLOW: Final = 1500
"""Requests in which another kind takes over."""
FIRST: Final = 500
LAST: Final = 2500
LONGER: Final = 500
"""Requests that the detector is watched for after it first finds prompts unusual: does it keep to that?"""
LAG: Final = 3
"""Requests after which it is known what an audit found: it runs when nobody else has anything to run."""
AFTER: Final = 300
"""Requests after the change at which streams are counted whose promise is still in force."""


ELSEWHERE: Final = {
    "p95_ratio": ("drift", "at the usual share: p95", max),
    "redteam_fewer": ("trust", ": fewer", min),
    "refusal_drop": ("trust", "refusals, standard: drop", max),
}
"""Figures of the last line that are measured by other commands: file, end of the name, and the worst of several."""


class Promised(NamedTuple):
    """A promise of a tier about texts."""

    tier: str
    loss: AuditedLoss
    alpha: float
    delta: float

    def lost(self, row: Row) -> bool:
        """Whether the answer of a measured prompt is lost."""
        return is_lost(row["kept"][self.tier], self.loss)

    def chance(self, rows: Sequence[Row]) -> float:
        """Share of answers lost."""
        return fmean(map(self.lost, rows))

    @property
    def name(self) -> str:
        """The tier, and the share of tokens that its answers are to keep."""
        return f"{self.tier} {'95 %' if self.loss == 'strict' else 'three quarters'}"


@dataclass
class Stream:
    """Rows in order, the request at which they change, and what the detector says after each.

    Attributes:
        rows: Of the requests.
        begins: First request that differs; the number of requests where none does.
        chances: Of each request, the share of rows of the other prompts that it was drawn with.
        draws: A number from 0 to 1 for each request: it is audited where the share in force is larger.
        said: The detector's findings.
    """

    rows: list[Row]
    begins: int
    chances: list[float]
    draws: list[float]
    said: list[Usualness] = field(default_factory=list)

    def first(self, *levels: Usualness) -> int | None:
        """The first request after which the detector says one of these."""
        return next((place for place, each in enumerate(self.said) if each in levels), None)


class Found(NamedTuple):
    """What became of a promise in one stream: requests after which it was out of force, None = never."""

    audits: int | None
    detector: int | None
    both: int | None
    audited: int
    """Requests audited, with both, while it was in force."""
    spent: int
    """Executed by these audits. Unit: FLOPs."""


def draw(usual: Sequence[Row], other: Sequence[Row], dice: random.Random, requests: int, *, slow: int = 0) -> Stream:
    """A stream whose prompts change; no other prompts: never."""
    begins = dice.randint(FIRST, LAST) if other else requests
    after = [max(0, place + 1 - begins) for place in range(requests)]
    chances = [min(1.0, count / slow if slow else count) for count in after]
    rows = [dice.choice(other if chance and dice.random() < chance else usual) for chance in chances]
    return Stream(rows, begins, chances, [dice.random() for _ in rows])


def watch(stream: Stream, usual: Usual) -> None:
    """Let the detector read a stream, to its end or to some time after it first finds the prompts unusual."""
    novelty, end = Novelty(usual), len(stream.rows)
    for place, row in enumerate(stream.rows):
        if place == end:
            break
        stream.said.append(novelty.observe(read(row)))
        if stream.said[-1] is Usualness.UNUSUAL and end == len(stream.rows):
            end = min(end, place + 1 + LONGER)


def follow(stream: Stream, promised: Promised, of_tier: Sequence[Promised]) -> Found:
    """Judge one promise on a stream, whose audits are of all promises of its tier."""
    alone, _ = _monitored(stream, promised, of_tier, watched=False)
    closely, audited = _monitored(stream, promised, of_tier, watched=True)
    unusual = stream.first(Usualness.UNUSUAL)
    known = [place for place in (closely, unusual) if place is not None]
    spent = sum(cost_of_audit(stream.rows[place], promised.tier) for place in audited)
    return Found(alone, unusual, min(known, default=None), len(audited), spent)


def cost_of_audit(row: Row, tier: str) -> int:
    """FLOPs of auditing an answer that was greedy; nothing where full depth had served it."""
    if row["flops"][tier] == row["exact"]:
        return 0
    return int(row["exact"] + row["again"][tier] * (row["kept"][tier] < 1))


def _monitored(
    stream: Stream, promised: Promised, of_tier: Sequence[Promised], *, watched: bool
) -> tuple[int | None, list[int]]:
    """The request at which an audit put a promise at risk, and those audited until then or until a fall-back."""
    monitors = {each: Monitor(each.alpha, each.delta) for each in of_tier}
    unusual = stream.first(Usualness.UNUSUAL) if watched else None
    audited, waiting, closer = list[int](), deque[int](), False
    for place in range(len(stream.rows) if unusual is None else unusual + 1):
        if stream.draws[place] < (RAISED if closer and not waiting else SHARE):
            audited.append(place)
            waiting.append(place)
        while waiting and waiting[0] + LAG <= place:
            row = stream.rows[waiting.popleft()]
            monitors = {each: monitor.observe(each.lost(row)) for each, monitor in monitors.items()}
            if monitors[promised].state is State.AT_RISK:
                return place, audited
        suspect = watched and stream.said[place] is not Usualness.USUAL
        closer = suspect or any(monitor.doubtful for monitor in monitors.values())
    return None, audited


def limit(alpha: float, lost: float, delta: float) -> float:
    """Requests that audits at the default share need on average to tell these shares apart."""
    kept = (1 - lost) * math.log((1 - lost) / (1 - alpha)) if lost < 1 else 0.0
    return math.log(1 / delta) / (lost * math.log(lost / alpha) + kept) / SHARE


@dataclass
class Simulation:
    """All streams of one model.

    Attributes:
        rows: Measured prompts, by pool.
        centres: Number of the router's.
        promises: Of the tiers.
        streams: Number of streams of each change.
        requests: Of each stream.
        recorder: Takes the figures.
    """

    rows: dict[str, list[Row]]
    centres: int
    promises: list[Promised]
    streams: int
    requests: int
    recorder: Recorder

    def run(self) -> dict[str, float]:
        """Simulate every change; returns the figures of the last line."""
        quiet = self._drawn("none", [])
        summary = self._none(quiet)
        broken, delays = [], []
        changes = {pool: (rows, 0) for pool, rows in self.rows.items() if pool not in ("usual", "calibration")}
        flood = max(changes, key=lambda pool: max(p.chance(changes[pool][0]) / p.alpha for p in self.promises))
        changes["slow mix"] = (changes[flood][0], SLOW)
        for change, (other, slow) in changes.items():
            streams = self._drawn(change, other, slow)
            self._detected(change, streams)
            hit = [promised for promised in self.promises if promised.chance(other) > promised.alpha]
            broken += [self._broken(change, promised, other, streams)[0] for promised in hit]
        for promised in self.promises:
            if (other := self._doubled(promised)) and promised.alpha < 0.5:
                streams = self._drawn(f"twice the loss of {promised.name}", other)
                share, delay = self._broken("twice the allowed loss", promised, other, streams)
                broken.append(share)
                delays.append(delay)
        delta = max(promised.delta for promised in self.promises)
        worst = {"broken_in_force": max(broken, default=0.0), "delta": delta, "median_delay": median(delays or [0.0])}
        return worst | summary

    def _drawn(self, name: str, other: Sequence[Row], slow: int = 0) -> list[Stream]:
        drawn = []
        for place in range(self.streams):
            dice = random.Random(f"{name} {place}")
            drawn.append(draw(self.rows["usual"], other, dice, self.requests, slow=slow))
            usual = Usual.of([*map(read, dice.choices(self.population, k=self.calibrated))], self.centres)
            pairs = zip(drawn[-1].rows, drawn[-1].chances, strict=True)
            own = [chance < 1 and row["pool"] == "usual" for row, chance in pairs]
            rows = zip(drawn[-1].rows, own, strict=True)
            drawn[-1].rows = [row | dice.choice(self.population) if each else row for row, each in rows]
            watch(drawn[-1], usual)
        return drawn

    @property
    def calibrated(self) -> int:
        """Number of prompts of the calibration."""
        return len(self.rows["calibration"])

    @cached_property
    def population(self) -> list[Row]:
        """What the router read of usual prompts, those of the calibration included.

        Streams and, for each of them, a calibration of its own are drawn from these: of streams that repeat a few other
        prompts the detector would rightly say that they are unusual.
        """
        return [read(row)._asdict() for pool in ("calibration", "usual") for row in self.rows[pool]]

    def _doubled(self, promised: Promised) -> list[Row]:
        """Prompts of all other pools, of which twice the allowed share is lost; none where too few are lost at all."""
        rows = [row for pool, each in self.rows.items() if pool != "calibration" for row in each]
        lost, kept = [[row for row in rows if promised.lost(row) is fate] for fate in (True, False)]
        if len(lost) < 5 or not kept:
            return []
        total, double = 1000, round(1000 * min(1.0, 2 * promised.alpha))
        dice = random.Random(promised.name)
        return dice.choices(lost, k=double) + dice.choices(kept, k=total - double)

    def _none(self, streams: list[Stream]) -> dict[str, float]:
        """Where nothing changes: false alarms, and what audits cost."""
        found = [[self._follow(stream, promised) for promised in self.promises] for stream in streams]
        alarms = {
            "audits": [any(each.audits is not None for each in of) for of in found],
            "detector": [of[0].detector is not None for of in found],
            "both": [any(each.both is not None for each in of) for of in found],
        }
        for method, each in alarms.items():
            facts: dict[str, Any] = {
                "goal": 5,
                "better": "lower",
                "note": f"{len(each)} streams of {self.requests:,} requests",
            }
            self.recorder.add(f"no change: {method}", 100 * fmean(each), "%", **facts)
        suspected = fmean(stream.first(Usualness.SUSPECT, Usualness.UNUSUAL) is not None for stream in streams)
        self.recorder.add("no change: suspected", 100 * suspected, "%")
        costs = []
        for tier in dict.fromkeys(promised.tier for promised in self.promises):
            place = next(p for p, promised in enumerate(self.promises) if promised.tier == tier)
            audited = fmean(of[place].audited for of in found) / self.requests
            served = sum(row["flops"][tier] for stream in streams for row in stream.rows)
            costs.append(sum(of[place].spent for of in found) / served)
            name, how = f"audits of its compute: {tier}", f"{100 * audited:.2f} % of its requests"
            self.recorder.add(name, 100 * costs[-1], "%", goal=1.5, better="lower", note=how)
        return {"false_alarms": fmean(alarms["both"]), "audit_share_of_compute": max(costs)}

    def _follow(self, stream: Stream, promised: Promised) -> Found:
        return follow(stream, promised, [each for each in self.promises if each.tier == promised.tier])

    def _detected(self, change: str, streams: list[Stream]) -> None:
        """How soon the detector alone sees a change."""
        for name, levels in (
            ("suspected", (Usualness.SUSPECT, Usualness.UNUSUAL)),
            ("unusual", (Usualness.UNUSUAL,)),
        ):
            delays = [_delay(stream.first(*levels), stream) for stream in streams]
            self._delays(f"{change}: {name}", delays, goal=100.0 if name == "unusual" else None)
        later = [each for stream in streams for each in stream.said[-LONGER:] if Usualness.UNUSUAL in stream.said]
        if later:
            back = 100 * fmean(each is not Usualness.UNUSUAL for each in later)
            self.recorder.add(f"{change}: served again", back, "%", note=f"of {LONGER} requests after", better="lower")

    def _delays(self, name: str, delays: list[float], **facts: Any) -> float:
        """Record a median; where a change was not seen in most streams, the length of a stream."""
        seen = f"seen in {100 * fmean(delay < math.inf for delay in delays):.0f} % of the streams"
        note = "; ".join(filter(None, (seen, facts.pop("note", ""))))
        value = min(median(delays), float(self.requests))
        self.recorder.add(name, value, "requests", better="lower", note=note, **facts)
        return value

    def _broken(self, change: str, promised: Promised, other: list[Row], streams: list[Stream]) -> tuple[float, float]:
        """How long a promise that the change breaks is in force; share of streams where it was served broken, delay."""
        usual, lost = promised.chance(self.rows["usual"]), promised.chance(other)
        found = [self._follow(stream, promised) for stream in streams]
        starts = [_breaks(stream, usual, lost, promised.alpha) for stream in streams]
        name, value = f"{change}, {promised.name}", 0.0
        self.recorder.add(f"{name}: lost", 100 * lost, "%", note=f"{100 * promised.alpha:g} % are promised")
        least = limit(promised.alpha, lost, promised.delta)
        self.recorder.add(f"{name}: least by audits", least, "requests", note="on average, by information")
        for method in ("audits", "detector", "both"):
            pairs = zip((getattr(each, method) for each in found), starts, strict=True)
            late = [math.inf if end is None else max(0.0, end + 1 - start) for end, start in pairs]
            value = self._delays(f"{name}: {method}", late, goal=300.0 if method == "both" else None)
        after = 100 * fmean(delay > AFTER for delay in late)
        self.recorder.add(f"{name}: in force after {AFTER}", after, "%", better="lower")
        broken = [
            _served_broken(stream, each.both, usual, lost, promised.alpha)
            for stream, each in zip(streams, found, strict=True)
        ]
        facts: dict[str, Any] = {
            "goal": 100 * promised.delta,
            "better": "lower",
            "note": "by the mean chance of all answers so far",
        }
        self.recorder.add(f"{name}: served broken", 100 * fmean(broken), "%", **facts)
        return fmean(broken), value


def _delay(end: int | None, stream: Stream) -> float:
    """Requests from the change to what ended something; before the change counts as at once."""
    return math.inf if end is None else max(0, end + 1 - stream.begins)


def _breaks(stream: Stream, usual: float, lost: float, alpha: float) -> int:
    """The first request whose chance to be lost is above what is promised."""
    return next(place for place, chance in enumerate(stream.chances) if usual + chance * (lost - usual) > alpha)


def _served_broken(stream: Stream, end: int | None, usual: float, lost: float, alpha: float) -> bool:
    """Whether the mean chance of the answers served so far was ever above what is promised while in force."""
    total = 0.0
    for place, chance in enumerate(stream.chances[: None if end is None else end + 1], 1):
        total += usual + chance * (lost - usual)
        if total > alpha * place:
            return True
    return False


def promises_of(router: LearnedRouter) -> list[Promised]:
    """The promises of a router's tiers about texts."""
    assert router.certificate is not None
    made = []
    for tier, promise in router.certificate.tiers.items():
        made.append(Promised(tier, "differs", promise.alpha, promise.delta))
        if promise.strict is not None:
            made.append(Promised(tier, "strict", promise.strict.alpha, promise.delta))
    return made


def main() -> None:
    """Read the command line and simulate."""
    parser = arguments(__doc__)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--recorded", type=Path, default=RECORDED, help="folder of the measured losses")
    options = parser.parse_args()
    lines: dict[str, dict[str, float]] = {}
    for folder in sorted(ROUTERS.iterdir()):
        path = options.recorded / f"{folder.name}.jsonl"
        if not path.is_file():
            continue
        router, rows = load_router(folder), recorded(path)
        assert isinstance(router, LearnedRouter)
        model = None if folder.name.startswith("smollm2") else folder.name
        recorder = Recorder("drift", options.results, model=model)
        simulation = Simulation(rows, router.centres, promises_of(router), options.streams, options.requests, recorder)
        lines[folder.name] = simulation.run()
    for line in lines.values():  # the default model's comes last
        print(json.dumps(line | elsewhere(options.results)))


def elsewhere(results: Path) -> dict[str, float | None]:
    """The figures of the last line that other commands measure; None = not measured yet."""
    found: dict[str, float | None] = {}
    for key, (file, end, worst) in ELSEWHERE.items():
        path = results / f"{file}.json"
        figures = Results.read(path).figures if path.is_file() else ()
        own = [
            figure.value if figure.ratio is None else figure.ratio for figure in figures if figure.name.endswith(end)
        ]
        found[key] = worst(own) if own else None
    return found


if __name__ == "__main__":
    main()
