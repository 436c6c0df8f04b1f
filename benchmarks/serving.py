"""Serving over HTTP: streams equal whole answers, clients that leave are billed what ran, and what HTTP costs.

Run with `make bench-serving`; the last line is one JSON object. Rules are tried on the tiny model, `POLAR_BENCH_TRIALS`
times each; what HTTP and a crowd cost is measured on the default model, or on `--model NAME`; `tiny` is the tiny one,
whose answers cost next to nothing.

    clients_passed        clients that pass their tests, unmodified, of openai-python, ChatOpenAI, OpenAILike, llm, curl
    stream_equal          bodies whose stream joined to the whole answer: text, tokens, finish, usage, FLOPs
    cancel_exact          clients that left at a random moment and whose record has the FLOPs of its tokens, to the FLOP
    idempotent_ok         calls that came twice, were billed once and got the same bytes
    http_over_inprocess   tokens per second of 16 streams over HTTP, by those of 16 streams in this process
    ttft_added_ms         median time to the first token over HTTP, less that in process. Unit: milliseconds
    crowd_cost            processor time of 16 streams beside 1,000 idle connections and 64 readers that read nothing,
                          by that without them; the goal is at most 1.05
    crowd_time            the same in time; of use on a quiet machine only
    crowd_kb              memory of this process that one of those connections takes, both ends of it. Unit: kB
    unrecorded_requests   requests without a record at the end; must be 0
    overspent             budgets overspent by 4 processes × 16 threads that race for 40 % of what they ask for, SQLite
                          and PostgreSQL; must be 0
    false_refusals        requests refused there although a budget had room for them; must be 0
    reserves_per_s        reservations per second there, PostgreSQL, each served one stored as well
    lost, doubled         whole answers without a record, and repeated calls billed twice, of `benchmarks.chaos` run
                          for a minute; must be 0
    fuzz_5xx              kinds of fuzzed calls of which one got a 5xx or showed a traceback; must be 0
    ray_replicas_ok       whether the tests of replicas on Ray pass; null without Ray

    tokens_vs_PEER        tokens per second of 16 streams over HTTP, by those of a peer that serves the same model,
                          `transformers serve`, the same with --continuous-batching, or llama.cpp's server, which
                          answers one at a time; null where it is not installed or does not start
    first_token_vs_PEER   median time to the first token, by that of the peer

`--speed` measures throughput, first token, peers and the crowd alone, `--peers` the peers, `--crowd` the crowd.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import os
import random
import re
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final, Literal

import psutil
import torch

from benchmarks.results import RESULTS, Recorder
from benchmarks.servers import PEERS, Endpoint, Running, events_of, peer
from polar_sdk import ListSink, PolarModel, Program
from polar_sdk.models.aliases import DEFAULT_ALIAS
from polar_sdk.testing import tiny_model

TRIALS: Final = int(os.environ.get("POLAR_BENCH_TRIALS", "50"))
STREAMS: Final = 16
IDLE: Final = 1_000
PAUSED: Final = 64
ROUNDS: Final = 5
TOKENS: Final = 64
PROMPT: Final = [{"role": "user", "content": "Tell me about the moon."}]
SUBJECTS: Final = (
    *("the moon", "Rome", "bread", "whales", "iron", "chess", "rain", "Mozart"),
    *("tea", "bridges", "the heart", "paper", "Norway", "gravity", "honey", "trains"),
)
"""One for each stream."""
NEW: Final = ("Oslo", "salt", "bees", "glass", "opera", "rice", "Mars", "wool", "tides", "jazz", "maps", "ink")
"""Not asked about before, so that nobody has the start of such a prompt."""
PEER_ROUNDS: Final = 3
PEER_NAMES: Final = {
    "transformers": "transformers serve",
    "transformers_batching": "transformers serve --continuous-batching",
    "llamacpp": "llama.cpp's server",
}
Better = Literal["higher", "lower"]
FIGURES: Final[dict[str, tuple[str, str, float | None, Better]]] = {
    "clients_passed": ("clients that pass their tests, unmodified", "clients", 5, "higher"),
    "unrecorded_requests": ("requests without a record", "requests", 0, "lower"),
    "overspent": ("budgets overspent in a race", "budgets", 0, "lower"),
    "false_refusals": ("requests refused wrongly in a race", "requests", 0, "lower"),
    "reserves_per_s": ("reservations a second, PostgreSQL, short race", "1/s", 500, "higher"),
    "lost": ("whole answers lost by kills and an outage", "answers", 0, "lower"),
    "doubled": ("repeated calls billed twice by kills and an outage", "calls", 0, "lower"),
    "fuzz_5xx": ("kinds of fuzzed calls with a 5xx", "kinds", 0, "lower"),
    "http_over_inprocess": ("tokens/s of 16 streams, over in process", "×", 0.9, "higher"),
    "ttft_added_ms": ("first token, added by HTTP", "ms", 10, "lower"),
    "crowd_cost": ("processor time beside a crowd of connections, over alone", "×", 1.05, "lower"),
    "crowd_kb": ("memory of a connection, both ends", "kB", None, "lower"),
}
"""Key → name, unit, goal and whether more is better."""

RACE: Final = "4x16x50"
CHAOS_S: Final = 60
FUZZED: Final = 500
"""Of each kind."""

CLIENTS: Final = ("openai_python", "langchain", "llama_index", "command_llm", "curl")
"""What the tests of each client have in their names."""


def tested(*arguments: str, **environment: str) -> tuple[int, str]:
    """How a run of pytest ends, and what it prints."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    return done.returncode, done.stdout


def passes(client: str) -> bool:
    """Whether the tests of a client pass."""
    return tested("tests/integrations/server/test_clients.py", "-k", client)[0] == 0


def raced() -> dict[str, Any]:
    """What processes do to the budgets for which they race."""
    _, said = tested("-s", "tests/billing/budgets/test_budget_races.py", "-k", "three_levels", POLAR_TEST_RACE=RACE)
    ends = [(int(over), int(wrong)) for over, wrong in re.findall(r"(\d+) budgets overspent, (\d+) refused", said)]
    rate = re.search(r"postgresql: .* (\d+)/s", said)
    if len(ends) < 2 or rate is None:
        raise RuntimeError(f"the race broke off: {said[-2_000:]}")
    return {
        "overspent": sum(over for over, _ in ends),
        "false_refusals": sum(wrong for _, wrong in ends),
        "reserves_per_s": int(rate[1]),
    }


def killed() -> dict[str, Any]:
    """What kills and a database that is away do to bills."""
    command = [sys.executable, "-m", "benchmarks.chaos", "--seconds", str(CHAOS_S)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    *_, last = ["", *done.stdout.splitlines()]
    if not last.startswith("{"):
        raise RuntimeError(f"the chaos broke off: {done.stderr[-2_000:]}")
    figures = json.loads(last)
    return {"lost": figures["lost"] + figures["lost_beyond_a_mark"], "doubled": figures["doubled"]}


def fuzzed() -> int:
    """Kinds of fuzzed calls of which one was answered badly."""
    code, said = tested("tests/integrations/server/test_server_fuzz.py", POLAR_FUZZ=str(FUZZED))
    failed = re.search(r"(\d+) failed", said)
    return int(failed[1]) if failed else int(code != 0)


def replicated() -> bool | None:
    """Whether replicas on Ray pass their tests; None without Ray."""
    if importlib.util.find_spec("ray") is None:
        return None
    return tested("tests/integrations/server/test_ray.py")[0] == 0


def body_of(**fields: Any) -> dict[str, Any]:
    return {"model": "bench", "messages": PROMPT, "max_tokens": TOKENS, **fields}


def is_stream_equal(running: Running, chance: random.Random) -> bool:
    body = body_of(
        n=chance.randint(1, 3),
        temperature=chance.choice([0, 0.8, 1.4]),
        seed=chance.randrange(2**40),
        max_tokens=chance.randint(1, 40),
        **({"stop": chance.sample(["e", "@", " ", "the"], 2)} if chance.random() < 0.5 else {}),
    )
    whole = json.loads(running.post(body))
    events = events_of(running.post({**body, "stream": True, "stream_options": {"include_usage": True}}))
    texts: dict[int, str] = {}
    finish: dict[int, str] = {}
    for event in events[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["delta"].get("content", "")
        if choice["finish_reason"] is not None:
            finish[choice["index"]] = choice["finish_reason"]
    found = [(texts[index], finish[index]) for index in sorted(texts)]
    wanted = [(choice["message"]["content"], choice["finish_reason"]) for choice in whole["choices"]]
    same_usage = events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    return found == wanted and same_usage and events[-1]["polar"]["flops"] == whole["polar"]["flops"]


def is_cancel_exact(running: Running, sink: ListSink, chance: random.Random, letter: int) -> bool:
    stream, before = chance.random() < 0.5, len(sink.records)
    content = json.dumps(body_of(stream=stream, max_tokens=400, logit_bias={str(letter): 100})).encode()
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        time.sleep(chance.random() * 0.2)
    deadline = time.monotonic() + 60
    while len(sink.records) == before:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    record = sink.records[-1]
    if not record.tokens.output:
        return record.flops.layers_decode == 0
    cost = running.server.engine.decoder.cost
    tokens = record.tokens
    executed = cost.request(Program.of(record.program), tokens.input, tokens.output, cached=tokens.cached).total
    return bool(record.flops.total == executed)


def is_idempotent(running: Running, sink: ListSink, number: int) -> bool:
    body = body_of(temperature=1, stream=number % 2 == 0, max_tokens=8)
    before, headers = len(sink.records), {"idempotency-key": f"bench-{number}"}
    first, second = running.post(body, headers), running.post(body, headers)
    return first == second and len(sink.records) == before + 1


def in_threads(call: Any) -> float:
    """Seconds that 16 calls at a time take."""
    threads = [threading.Thread(target=call) for _ in range(STREAMS)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin


def measured(running: Running, engine: PolarModel) -> tuple[float, float]:
    """Throughput over HTTP by that in process, and what HTTP adds to the first token; alternating, medians."""
    options: Any = {"max_tokens": TOKENS}
    inside: list[float] = []
    outside: list[float] = []
    first_inside: list[float] = []
    first_outside: list[float] = []
    for _ in range(5):
        inside.append(in_threads(lambda: list(engine.stream(PROMPT, **options))))
        outside.append(in_threads(lambda: running.post(body_of(stream=True))))
        for _ in range(5):
            begin = time.perf_counter()
            chunks = engine.stream(PROMPT, max_tokens=4)
            next(chunks)
            first_inside.append(time.perf_counter() - begin)
            list(chunks)
            first_outside.append(running.first_token(body_of(max_tokens=4)))
    added = statistics.median(first_outside) - statistics.median(first_inside)
    return statistics.median(inside) / statistics.median(outside), added * 1e3


def beside(running: Running, engine: PolarModel, name: str) -> dict[str, float | None]:
    """Ours by a peer's: tokens per second of 16 streams with prompts of their own, and the first token."""
    figures: dict[str, float | None] = {f"tokens_vs_{name}": None, f"first_token_vs_{name}": None}
    with peer(name, engine.loaded.path) as other:
        if other is None:
            return figures
        both = (Endpoint(running.port, f"{running.model}:exact"), other)
        speeds, waits = [], []
        for round_ in range(PEER_ROUNDS):
            own, theirs = (streamed(endpoint, engine) for endpoint in both)
            speeds.append(own / theirs)
            first = [
                statistics.median(endpoint.first_token(asked(endpoint, subject, 4)) for subject in NEW[round_::3])
                for endpoint in both
            ]
            waits.append(first[0] / first[1])
            print(f"{name}: {own:.0f} and {theirs:.0f} tokens/s; first token {first[0]:.3f} and {first[1]:.3f} s")
    figures[f"tokens_vs_{name}"] = round(statistics.median(speeds), 2)
    figures[f"first_token_vs_{name}"] = round(statistics.median(waits), 2)
    return figures


def asked(endpoint: Endpoint, subject: str, tokens: int) -> dict[str, Any]:
    """A request of its own."""
    messages = [{"role": "user", "content": f"Tell me about {subject}."}]
    return endpoint.body(messages, max_tokens=tokens, temperature=0)


def streamed(endpoint: Endpoint, engine: PolarModel) -> float:
    """Tokens per second of 16 streams."""
    about = iter(SUBJECTS)
    texts: list[str] = []

    def call() -> None:
        texts.append(endpoint.text(asked(endpoint, next(about), TOKENS)))

    seconds = in_threads(call)
    if len(texts) < STREAMS:
        raise RuntimeError(f"{STREAMS - len(texts)} of {STREAMS} streams broke off; see the traceback above.")
    return sum(len(engine.encode(text)) for text in texts) / seconds


def idle_connection(running: Running) -> http.client.HTTPConnection:
    """One that asked something, and stays open."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=600)
    connection.request("GET", "/health")
    connection.getresponse().read()
    return connection


def paused_reader(running: Running, letter: int) -> socket.socket:
    """A client that asked for a long stream, and reads nothing of it."""
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.connect(("127.0.0.1", running.port))
    content = json.dumps(body_of(stream=True, max_tokens=400, logit_bias={str(letter): 100})).encode()
    reader.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n".encode())
    reader.sendall(content)
    return reader


def streams_cost(running: Running) -> tuple[float, float]:
    """Processor time and time of 16 streams: medians. Unit: seconds."""
    costs, times = [], []
    for _ in range(ROUNDS):
        begin = time.process_time()
        times.append(in_threads(lambda: running.post(body_of(stream=True))))
        costs.append(time.process_time() - begin)
    return statistics.median(costs), statistics.median(times)


def crowded(running: Running, sink: ListSink, letter: int) -> dict[str, float]:
    """What 1,000 idle connections and 64 paused readers cost others, once their answers are computed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    streams_cost(running)  # warm
    before, process = streams_cost(running), psutil.Process()
    memory, records = process.memory_info().rss, len(sink.records)
    idle = [idle_connection(running) for _ in range(IDLE)]
    paused = [paused_reader(running, letter) for _ in range(PAUSED)]
    while len(sink.records) < records + PAUSED:
        time.sleep(0.05)
    grown = process.memory_info().rss - memory
    beside = streams_cost(running)
    for connection in idle:
        connection.close()
    for reader in paused:
        reader.close()
    after = streams_cost(running)
    cost, seconds = (beside[place] / ((before[place] + after[place]) / 2) for place in (0, 1))
    kb = grown / (IDLE + PAUSED) / 1e3
    print(
        f"a crowd of {IDLE} + {PAUSED}: {cost:.3f} of the processor time, {seconds:.3f} of the time, {kb:.1f} kB each"
    )
    return {"crowd_cost": round(cost, 3), "crowd_time": round(seconds, 3), "crowd_kb": round(kb, 1)}


def rules(trials: int) -> dict[str, Any]:
    """What must hold of every answer, on the tiny model."""
    passed = sum(map(passes, CLIENTS))
    print(f"{passed} of {len(CLIENTS)} clients pass", flush=True)
    sink, chance = ListSink(), random.Random(7)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its matrices are so small that a second thread only waits
    engine = tiny_model(sink=sink, context_window=2048)
    running, letter = Running(engine), engine.encode("A")[0]
    equal = sum(is_stream_equal(running, chance) for _ in range(trials))
    print(f"{equal} of {trials} streams equal the whole answer", flush=True)
    exact = sum(is_cancel_exact(running, sink, chance, letter) for _ in range(trials))
    print(f"{exact} of {trials} clients that left are billed what ran", flush=True)
    once = sum(is_idempotent(running, sink, number) for number in range(trials))
    print(f"{once} of {trials} repeated calls were billed once and answered alike", flush=True)
    due = len(running.server.sink.due)
    running.close()
    torch.set_num_threads(threads)
    return {
        "trials": trials,
        "clients_passed": passed,
        "stream_equal": equal,
        "cancel_exact": exact,
        "idempotent_ok": once,
        "unrecorded_requests": due,
    }


def speed(name: str, *, only: str | None) -> dict[str, Any]:
    """What HTTP and a crowd cost, and peers beside; or only `crowd` or `peers`."""
    sink = ListSink()
    if name == "tiny":
        torch.set_num_threads(1)
        engine = tiny_model(sink=sink, context_window=2048)
    else:
        engine = PolarModel.from_pretrained(name, sink=sink, compile=True)
    running = Running(engine)
    figures: dict[str, Any] = {"model": engine.name}
    if only is None:
        ratio, added = measured(running, engine)
        print(f"{ratio:.3f} of the throughput in process; {added:+.2f} ms to the first token", flush=True)
        figures |= {"http_over_inprocess": round(ratio, 3), "ttft_added_ms": round(added, 2)}
    if only != "crowd" and name == DEFAULT_ALIAS:
        for other in PEERS:
            figures |= beside(running, engine, other)
    if only != "peers":
        figures |= crowded(running, sink, engine.encode("A")[0])
    running.close()
    return figures


def record(recorder: Recorder, figures: dict[str, Any]) -> None:
    """Keep what was measured, as shares and ratios."""
    for key, name in {
        "stream_equal": "streams that equal the whole answer",
        "cancel_exact": "clients that left and are billed what ran, to the FLOP",
        "idempotent_ok": "calls that came twice, billed once and answered alike",
    }.items():
        if key in figures:
            share, note = 100 * figures[key] / figures["trials"], f"{figures['trials']} trials, tiny model"
            recorder.add(name, share, "%", goal=100, note=note)
    for key, (name, unit, goal, better) in FIGURES.items():
        if figures.get(key) is not None:
            recorder.add(name, float(figures[key]), unit, goal=goal, better=better)
    for other in PEERS:
        if (ratio := figures.get(f"tokens_vs_{other}")) is not None:
            peer_name = PEER_NAMES[other]
            recorder.add(f"tokens/s of 16 streams, over {peer_name}", ratio, "×", goal=1, note="median of rounds")
            recorder.add(
                f"first token, over {peer_name}",
                figures[f"first_token_vs_{other}"],
                "×",
                goal=1,
                better="lower",
                note="median of rounds",
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=DEFAULT_ALIAS, help="alias, hub id, folder or .gguf file, or tiny")
    parser.add_argument("--speed", action="store_true", help="measure what HTTP and a crowd cost alone")
    parser.add_argument("--peers", action="store_const", dest="only", const="peers", help="measure peers alone")
    parser.add_argument("--crowd", action="store_const", dest="only", const="crowd", help="idle and slow clients alone")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the file of figures")
    options = parser.parse_args()
    recorder = Recorder("serving", options.results, model=None if options.model == DEFAULT_ALIAS else options.model)
    figures: dict[str, Any] = {}
    if not (options.speed or options.only):
        figures = {**rules(TRIALS), **raced(), **killed(), "fuzz_5xx": fuzzed(), "ray_replicas_ok": replicated()}
    figures |= speed(options.model, only=options.only)
    record(recorder, figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
