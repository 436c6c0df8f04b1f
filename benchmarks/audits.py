"""Latency of tenants beside audits: the same requests, at the same moments, with and without audits in idle time.

    python -m benchmarks.audits [--seconds N] [--rounds N] [--rate R]

Requests arrive at random, whether or not earlier ones are answered, at a rate that leaves the engine idle about half of
the time. Each round has the same arrivals without audits, with the default share and with the share that a suspicion
raises it to, in changing order. FLOPs of audits are those of the provider's own usage records.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from statistics import quantiles
from typing import TYPE_CHECKING

from benchmarks.results import Recorder, arguments
from polar_sdk import PolarModel
from polar_sdk.lab.items import builtin_items
from polar_sdk.request.auditor import RAISED
from polar_sdk.request.selection import DEFAULT_SHARE as SHARE
from polar_sdk.usage import AUDIT_TAG, UsageSink

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.usage import UsageRecord

_SHARES = {"none": 0.0, "1 %": SHARE, "10 %": SHARE * RAISED}


class _Records(UsageSink):
    """Adds up FLOPs, of audits and of the others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.flops = {"audits": 0, "others": 0}

    def check(self, *_: object) -> None:
        """Admit everything."""

    def emit(self, record: UsageRecord) -> None:
        with self._lock:
            self.flops["audits" if AUDIT_TAG in record.tags else "others"] += record.flops.executed


async def _round(model: PolarModel, prompts: Sequence[str], moments: Sequence[float]) -> list[float]:
    """Seconds from the moment that each request was due to its answer."""
    start = time.perf_counter()

    async def ask(prompt: str, due: float) -> float:
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        await model.agenerate(prompt, max_tokens=16)
        return time.perf_counter() - start - due

    return await asyncio.gather(*map(ask, prompts, moments))


def main() -> None:
    """Measure, print and record."""
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of three parts of a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--rate", type=float, default=0.0, help="requests per second; 0 = half of what one can be served"
    )
    options = parser.parse_args()
    prompts = [item.prompt for item in builtin_items() if len(item.prompt) < 300]  # type: ignore[union-attr]
    records = {name: _Records() for name in _SHARES}
    models = {
        name: PolarModel.from_pretrained(sink=records[name], audit_share=share, tenant="bench")
        for name, share in _SHARES.items()
    }
    for model in models.values():
        asyncio.run(_round(model, prompts[:4], [0.0] * 4))
    begin = time.perf_counter()
    asyncio.run(_round(models["none"], prompts[:8], [0.0] * 8))
    rate = options.rate or 4 / (time.perf_counter() - begin)
    found: dict[str, list[list[float]]] = {name: [] for name in _SHARES}
    for turn in range(options.rounds):
        for name in [*_SHARES][turn % 3 :] + [*_SHARES][: turn % 3]:
            dice = random.Random(turn)
            moments: list[float] = []
            while (after := (moments[-1] if moments else 0.0) + dice.expovariate(rate)) < options.seconds:
                moments.append(after)
            asked = dice.choices(prompts, k=len(moments))
            found[name].append(asyncio.run(_round(models[name], asked, moments)))
            _drain(models[name])
    recorder = Recorder("drift", options.results)
    base = [_p95(each) for each in found["none"]]
    for name in ("1 %", "10 %"):
        own = [_p95(each) for each in found[name]]
        goal = {"goal": 1.02, "better": "lower"} if name == "1 %" else {"better": "lower"}
        note = f"{sum(map(len, found[name]))} requests, {rate:.1f} a second"
        label = f"{name} beside audits: p95"
        recorder.compare(label, own, base, "s", peer="without audits", note=note, **goal)
        flops = records[name].flops
        recorder.add(f"{name} audited: FLOPs of audits", 100 * flops["audits"] / flops["others"], "%", better="lower")


def _drain(model: PolarModel, seconds: float = 10.0) -> None:
    """Wait until the audits of a round have run, so that none is beside the next one."""
    end = time.perf_counter() + seconds
    while model.auditor is not None and len(model.auditor) and time.perf_counter() < end:
        time.sleep(0.1)
    time.sleep(1.0)


def _p95(seconds: Sequence[float]) -> float:
    return quantiles(seconds, n=20)[-1]


if __name__ == "__main__":
    main()
