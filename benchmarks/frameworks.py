"""Chains: what many calls gain by running together, and how long a call holds up the event loop.

    python -m benchmarks.frameworks [--model NAME] [--rounds 5]

Sixteen chat calls one after another, beside the same in sixteen threads, by `ChatPolar.batch` and by `abatch`. A tick
of a millisecond beside `ainvoke`, `astream` and LlamaIndex's `achat` finds the longest stall of the event loop, and
beside nothing what the machine alone makes of it. Prints a Markdown table and writes the figures to `--results`.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from llama_index.core.llms import ChatMessage

from benchmarks.fairness import random_prompt
from benchmarks.peers import alternate, apart, timed
from benchmarks.results import Recorder, arguments
from langchain_polar import ChatPolar
from llama_index_polar import PolarLLM
from polar_sdk import PolarModel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

CALLS, NEW, PROMPT_WORDS = 16, 48, 30
TICK = 0.001
"""Unit: seconds."""
IN_SEQUENCE, IDLE = "one after another", "nothing running"
"""Peers of calls that run together, and of stalls."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    recorder = Recorder("frameworks", args.results, model=args.model, device=args.device)
    model = apart(lambda: PolarModel.from_pretrained(args.model, device=args.device, ledger=None, speculate="off"))
    _throughput(recorder, model, args.rounds, goal=3.0)
    asyncio.run(_stalls(recorder, model, args.rounds))
    print(f"\nwrote {recorder.path}")


def _prompts() -> list[str]:
    return [random_prompt(PROMPT_WORDS) for _ in range(CALLS)]


def _throughput(recorder: Recorder, model: PolarModel, rounds: int, *, goal: float) -> None:
    chat = ChatPolar(engine=model, compute="exact", max_tokens=NEW, temperature=0.0)

    def in_threads(prompts: list[str]) -> None:
        with ThreadPoolExecutor(CALLS) as callers:
            list(callers.map(chat.invoke, prompts))

    def in_sequence(prompts: list[str]) -> None:
        for prompt in prompts:
            chat.invoke(prompt)

    ways: dict[str, Callable[[list[str]], object]] = {
        "16 chat calls in threads": in_threads,
        "ChatPolar.batch of 16": lambda prompts: chat.batch([*prompts]),
        "ChatPolar.abatch of 16": lambda prompts: asyncio.run(chat.abatch([*prompts])),
        IN_SEQUENCE: in_sequence,
    }

    def speed(run: Callable[[list[str]], object]) -> float:
        prompts = _prompts()
        return CALLS * NEW / timed(lambda: run(prompts))

    speeds = alternate(rounds, *(partial(speed, run) for run in ways.values()))
    for name, own in list(zip(ways, speeds, strict=True))[:-1]:
        recorder.compare(f"{name}", own, speeds[-1], "tokens/s", peer=IN_SEQUENCE, goal=goal)


async def _stalls(recorder: Recorder, model: PolarModel, rounds: int) -> None:
    chat = ChatPolar(engine=model, compute="exact", max_tokens=NEW, temperature=0.0)
    llama = PolarLLM(engine=model, compute="exact", max_tokens=NEW, temperature=0.0)

    async def stream(prompt: str) -> None:
        async for _ in chat.astream(prompt):
            pass

    ways: dict[str, Callable[[str], Awaitable[object]]] = {
        "ainvoke": chat.ainvoke,
        "astream": stream,
        "LlamaIndex achat": lambda prompt: llama.achat([ChatMessage(content=prompt)]),
    }
    longest: dict[str, list[float]] = {name: [] for name in (*ways, IDLE)}
    for index in range(rounds + 1):
        for name, call in ways.items():
            begin = time.perf_counter()
            stall = await _longest_stall(call(_prompts()[0]))
            if index:
                longest[name].append(stall)
        if index:
            longest[IDLE].append(await _longest_stall(asyncio.sleep(time.perf_counter() - begin)))
    alone = longest.pop(IDLE)
    for name, stalls in longest.items():
        recorder.add_rounds(
            f"longest stall of the event loop during {name}",
            [1000 * stall for stall in stalls],
            "ms",
            peer=IDLE,
            peer_value=1000 * statistics.median(alone),
            goal=20,
            better="lower",
        )


async def _longest_stall(call: Awaitable[object]) -> float:
    """The longest oversleep of a task while a call ran. Unit: seconds."""
    task = asyncio.ensure_future(call)
    longest = 0.0
    while not task.done():
        begin = time.perf_counter()
        await asyncio.sleep(TICK)
        longest = max(longest, time.perf_counter() - begin - TICK)
    await task
    return longest


if __name__ == "__main__":
    main()
