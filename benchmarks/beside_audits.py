"""Requests beside audits: their latency in one engine that audits in some phases and not in others.

    python -m benchmarks.beside_audits [--model NAME] [--tier economy] [--share 0.1] [--minutes 6] [--results FOLDER]

Phases of a few seconds come in pairs with the same prompts at the same times, one of them with audits, in random order.
Requests arrive by chance, whether earlier ones have ended or not, and load the engine to half of what it can answer.
Audits of a phase run in its gaps, and those that are left run before the next one. A ratio is that of all latencies
with audits to all without, and its interval comes from drawing pairs anew, so that a slow moment of the machine widens
it and seldom shifts it. By default the share is twenty times the usual one, which changes too little to be seen: at the
usual share, a twentieth of the requests come as beside twenty times as many audits, and the others as without. Beside
the ratios stand what an audit costs, on its own bill, and how often its second run found the start of the prompt. Needs
a quiet machine.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import fmean, quantiles
from typing import TYPE_CHECKING, Any, Final

from benchmarks.results import Recorder, arguments
from polar_sdk import PolarModel
from polar_sdk.lab.items import ChoiceItem, builtin_items
from polar_sdk.request.selection import DEFAULT_SHARE
from polar_sdk.router.learned import LearnedRouter
from polar_sdk.usage import AUDIT_TAG, ListSink

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from polar_sdk.promises.audit import PromiseStanding

REQUESTS: Final = 16
"""Of a phase."""
NEW: Final = 24
"""Tokens of an answer."""
LONGEST: Final = 300
"""Tokens of a prompt."""
LOAD: Final = 0.5
DRAWS: Final = 2_000


class Facts(ListSink):
    """Keeps records and audits; no promise is ever at risk, so that all phases are served alike."""

    def standings(self) -> Mapping[str, PromiseStanding]:
        """None."""
        return {}


@dataclass
class Pair:
    """The latencies of the same requests without and with audits. Unit: seconds."""

    off: list[float] = field(default_factory=list)
    on: list[float] = field(default_factory=list)


def audited_model(name: str | None, tier: str, sink: ListSink) -> PolarModel:
    """The model with audits, of which nothing but the share decides."""
    router = PolarModel.from_pretrained(name, ledger=None).router
    assert isinstance(router, LearnedRouter), "the model has no certified router"
    assert router.certificate is not None
    plain = router.with_certificate(router.certificate.model_copy(update={"usual": {}}))
    return PolarModel.from_pretrained(name, router=plain, sink=sink, audit_share={tier: 1.0})


def phase(model: PolarModel, tier: str, prompts: Sequence[str], gaps: Sequence[float], name: str) -> list[float]:
    """Send requests at their times, each from a tenant of its own, so that none finds another one's start."""

    def ask(place: int, due: float) -> float:
        model.generate(
            prompts[place], compute=tier, max_tokens=NEW, tenant=f"{name} {place}", request_id=f"{name} {place}"
        )
        return time.perf_counter() - due

    waiting, due = [], time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        for place, gap in enumerate(gaps):
            due += gap
            time.sleep(max(0.0, due - time.perf_counter()))
            waiting.append(pool.submit(ask, place, due))
        return [each.result() for each in waiting]


def drain(model: PolarModel) -> None:
    """Wait until no audit waits or runs."""
    auditor = model.auditor
    assert auditor is not None
    while len(auditor) or auditor.judging:
        time.sleep(0.01)


def ratio(pairs: Sequence[Pair], figure: Callable[[list[float]], float], rarer: int) -> tuple[float, float, float]:
    """A figure with audits over that without, and its 95 % interval over pairs drawn anew.

    Audits are as rare as if one phase with audits came with `rarer` − 1 phases without.
    """
    dice = random.Random(5)

    def of(chosen: Sequence[Pair]) -> float:
        off = [t for pair in chosen for t in pair.off]
        # Both samples have one size: a quantile between two numbers depends on how many there are.
        return figure([t for pair in chosen for t in pair.on] + off * (rarer - 1)) / figure(off * rarer)

    drawn = sorted(of(dice.choices(pairs, k=len(pairs))) for _ in range(DRAWS))
    value = of(pairs)
    return value, min(value, drawn[DRAWS // 40]), max(value, drawn[-DRAWS // 40])


def p95(latencies: list[float]) -> float:
    """The latency that 95 % do not exceed."""
    return quantiles(latencies, n=20)[-1]


def main() -> None:
    """Read the command line, measure and record."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default=None)
    parser.add_argument("--tier", default="economy")
    parser.add_argument("--share", type=float, default=20 * DEFAULT_SHARE)
    parser.add_argument("--minutes", type=float, default=6.0)
    options = parser.parse_args()
    sink, tier = Facts(), options.tier
    model = audited_model(options.model, tier, sink)
    auditor = model.auditor
    assert auditor is not None
    texts = [item.prompt for item in builtin_items() if not isinstance(item, ChoiceItem)]
    texts = [text for text in texts if len(model.prompt_tokens(text)) <= LONGEST]
    dice = random.Random(3)
    auditor.shares[tier] = 0.0
    alone = fmean(phase(model, tier, dice.sample(texts, REQUESTS), [0.5] * REQUESTS, "alone"))
    pairs, ends = list[Pair](), time.monotonic() + 60 * options.minutes
    while time.monotonic() < ends:
        prompts = dice.sample(texts, REQUESTS)
        gaps = [dice.expovariate(LOAD / alone) for _ in prompts]
        pair = Pair()
        for audits in dice.sample((False, True), 2):
            auditor.shares[tier] = options.share if audits else 0.0
            measured = phase(model, tier, prompts, gaps, f"{len(pairs)} {audits}")
            drain(model)
            (pair.on if audits else pair.off).extend(measured)
        pairs.append(pair)
    report(Recorder("drift", options.results, model=options.model), tier, options.share, pairs, sink)


def report(recorder: Recorder, tier: str, share: float, pairs: Sequence[Pair], sink: ListSink) -> None:
    """Record the ratios, and what audits cost."""
    how = f"{share:.1%} audited; {len(pairs)} pairs of phases of {REQUESTS} requests; {len(sink.audits)} audits"
    facts: dict[str, Any] = {"unit": "×", "interval": "95%", "better": "lower", "note": how}
    usual = max(1, round(share / DEFAULT_SHARE))
    for where, rarer, goal in (("beside audits", 1, None), ("at the usual share", usual, 1.02)):
        for name, figure in (("p95", p95), ("mean", fmean)):
            value, low, high = ratio(pairs, figure, rarer)
            recorder.add(
                f"{tier}, {where}: {name}", value, low=low, high=high, goal=goal if name == "p95" else None, **facts
            )
    own = [record for record in sink.records if AUDIT_TAG in record.tags]
    served = [record for record in sink.records if AUDIT_TAG not in record.tags and record.tier == tier]
    if not sink.audits:
        return
    cost = fmean(audit.flops for audit in sink.audits) / fmean(record.flops.executed for record in served)
    recorder.add(f"{tier}: an audit over a request", cost, "×", better="lower", note="FLOPs, on their own bills")
    second = [record for record in own if record.request_id.endswith(".tier")]
    if second:
        found = fmean(record.tokens.cached > 0 for record in second)
        recorder.add(f"{tier}: second runs on a kept start", 100 * found, "%", note=f"of {len(second)}")


if __name__ == "__main__":
    main()
