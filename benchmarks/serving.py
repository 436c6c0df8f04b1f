"""Serving over HTTP: streams equal whole answers, clients that leave are billed what ran, and what HTTP costs.

Run with `make bench-serving`. Rules are tried on the tiny model, `--trials` times each, and by the tests of
clients, races, fuzz and Ray and by `benchmarks.chaos` for a minute. The cost of HTTP and of a crowd, and peers that
serve the same model (`transformers serve`, the same with --continuous-batching, llama.cpp's server, where they are
installed) are measured on the default model, or on `--model NAME`; `tiny` is the tiny one, whose answers cost next to
nothing. `--speed` measures these alone, `--peers` the peers, `--crowd` the crowd.
"""

from __future__ import annotations

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
from typing import Any, Final

import psutil
import torch

from benchmarks.peers import alternate, plain_folder, timed
from benchmarks.results import Recorder, arguments
from benchmarks.servers import PEERS, Endpoint, Running, events_of, peer
from polar_sdk import ListSink, PolarModel, Program
from polar_sdk.models.aliases import DEFAULT_ALIAS
from polar_sdk.testing import tiny_model

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
"""Subjects, one for each stream."""
NEW: Final = ("Oslo", "salt", "bees", "glass", "opera", "rice", "Mars", "wool", "tides", "jazz", "maps", "ink")
"""Not asked about before, so that nobody has the start of such a prompt."""
PEER_ROUNDS: Final = 3
PEER_NAMES: Final = {
    "transformers": "transformers serve",
    "transformers_batching": "transformers serve --continuous-batching",
    "llamacpp": "llama.cpp's server",
}
CHAOS_S: Final = 60
NONE: Final[dict[str, Any]] = {"goal": 0, "better": "lower"}

CLIENTS: Final = ("openai_python", "langchain", "llama_index", "command_llm", "curl")
"""Parts of the names of each client's tests."""


def tested(*arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of a run of pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    return done.returncode, done.stdout


def raced(recorder: Recorder) -> None:
    """Four processes × 16 threads that race for 40% of what they ask for, on both stores."""
    _, said = tested("-s", "tests/billing/budgets/test_budget_races.py", "-k", "three_levels", "-m", "long")
    ends = [(int(over), int(wrong)) for over, wrong in re.findall(r"(\d+) budgets overspent, (\d+) refused", said)]
    rate = re.search(r"postgresql: .* (\d+)/s", said)
    if len(ends) < 2 or rate is None:
        raise RuntimeError(f"the race broke off: {said[-2_000:]}")
    over, wrong = (sum(counts) for counts in zip(*ends, strict=True))
    recorder.add("budgets overspent in a race", over, "budgets", **NONE)
    recorder.add("requests refused wrongly in a race", wrong, "requests", **NONE)
    recorder.add("reservations a second, PostgreSQL, short race", int(rate[1]), "1/s", goal=500)


def killed(recorder: Recorder) -> None:
    """Kills under load, and a database that is away for a while."""
    command = [sys.executable, "-m", "benchmarks.chaos", "--seconds", str(CHAOS_S)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    *_, last = ["", *done.stdout.splitlines()]
    if not last.startswith("{"):
        raise RuntimeError(f"the chaos broke off: {done.stderr[-2_000:]}")
    figures = json.loads(last)
    lost = figures["lost"] + figures["lost_beyond_a_mark"]
    recorder.add("whole answers lost by kills and an outage", lost, "answers", **NONE)
    recorder.add("repeated calls billed twice by kills and an outage", figures["doubled"], "calls", **NONE)


def tests_pass(recorder: Recorder) -> None:
    """Tests of clients, of fuzzed calls and, where it is installed, of replicas on Ray."""
    passed = sum(tested("tests/integrations/server/test_clients.py", "-k", client)[0] == 0 for client in CLIENTS)
    recorder.add("clients that pass their tests, unmodified", passed, "clients", goal=len(CLIENTS))
    code, said = tested("tests/integrations/server/test_server_fuzz.py", "-m", "long")
    failed = re.search(r"(\d+) failed", said)
    recorder.add("kinds of fuzzed calls with a 5xx", int(failed[1]) if failed else code != 0, "kinds", **NONE)
    if importlib.util.find_spec("ray") is not None and tested("tests/integrations/server/test_ray.py", "-m", "long")[0]:
        raise RuntimeError("replicas on Ray do not pass their tests")


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


def _head(content: bytes) -> bytes:
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode()


def is_cancel_exact(running: Running, sink: ListSink, chance: random.Random, letter: int) -> bool:
    stream, before = chance.random() < 0.5, len(sink.records)
    content = json.dumps(body_of(stream=stream, max_tokens=400, logit_bias={str(letter): 100})).encode()
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as connection:
        connection.sendall(_head(content) + content)
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


def measured(recorder: Recorder, running: Running, engine: PolarModel) -> None:
    """Throughput over HTTP by that in process, and what HTTP adds to the first token; in turn, medians."""
    options: Any = {"max_tokens": TOKENS}

    def first_inside() -> float:
        chunks = engine.stream(PROMPT, max_tokens=4)
        seconds = timed(lambda: next(chunks))
        list(chunks)
        return seconds

    inside, outside = alternate(
        ROUNDS,
        lambda: in_threads(lambda: list(engine.stream(PROMPT, **options))),
        lambda: in_threads(lambda: running.post(body_of(stream=True))),
    )
    first, over_http = alternate(5 * ROUNDS, first_inside, lambda: running.first_token(body_of(max_tokens=4)))
    ratio = statistics.median(inside) / statistics.median(outside)
    added = statistics.median(over_http) - statistics.median(first)
    recorder.add("tokens/s of 16 streams, over in process", ratio, "×", goal=0.9)
    recorder.add("first token, added by HTTP", 1e3 * added, "ms", goal=10, better="lower")


def beside(recorder: Recorder, running: Running, engine: PolarModel, name: str) -> None:
    """Ours by a peer's: tokens per second of 16 streams with prompts of their own, and the first token."""
    with peer(name, plain_folder(engine)) as other:
        if other is None:
            return
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
    recorder.add_rounds(f"tokens/s of 16 streams, over {PEER_NAMES[name]}", speeds, "×", goal=1)
    recorder.add_rounds(f"first token, over {PEER_NAMES[name]}", waits, "×", goal=1, better="lower")


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
    """A connection that asked something, and stays open."""
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
    reader.sendall(_head(content) + content)
    return reader


def streams_cost(running: Running) -> tuple[float, float]:
    """Processor time and time of 16 streams: medians. Unit: seconds."""
    costs, times = [], []
    for _ in range(ROUNDS):
        begin = time.process_time()
        times.append(in_threads(lambda: running.post(body_of(stream=True))))
        costs.append(time.process_time() - begin)
    return statistics.median(costs), statistics.median(times)


def crowded(recorder: Recorder, running: Running, sink: ListSink, letter: int) -> None:
    """Cost of 1,000 idle connections and 64 paused readers to others, once their answers are computed."""
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
    name, note = "processor time beside a crowd of connections, over alone", f"{seconds:.3f} of the time"
    recorder.add(name, cost, "×", goal=1.05, better="lower", note=note)
    recorder.add("memory of a connection, both ends", grown / (IDLE + PAUSED) / 1e3, "kB", better="lower")


def rules(recorder: Recorder, trials: int) -> None:
    """Rules that hold of every answer, on the tiny model."""
    sink, chance = ListSink(), random.Random(7)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its matrices are so small that a second thread only waits
    engine = tiny_model(sink=sink, context_window=2048)
    running, letter = Running(engine), engine.encode("A")[0]
    running.post(body_of(max_tokens=1))  # from now on all have the start of their prompts, and so the same FLOPs
    for name, holds in {
        "streams that equal the whole answer": lambda _: is_stream_equal(running, chance),
        "clients that left and are billed what ran, to the FLOP": lambda _: is_cancel_exact(
            running, sink, chance, letter
        ),
        "calls that came twice, billed once and answered alike": lambda number: is_idempotent(running, sink, number),
    }.items():
        share = 100 * sum(map(holds, range(trials))) / trials
        recorder.add(name, share, "%", goal=100, note=f"{trials} trials, tiny model")
    recorder.add("requests without a record", len(running.server.sink.due), "requests", **NONE)
    running.close()
    torch.set_num_threads(threads)


def speed(recorder: Recorder, name: str, *, only: str | None) -> None:
    """Cost of HTTP and of a crowd, and peers beside; or only `crowd` or `peers`."""
    sink = ListSink()
    if name == "tiny":
        torch.set_num_threads(1)
        engine = tiny_model(sink=sink, context_window=2048)
    else:
        engine = PolarModel.from_pretrained(name, sink=sink)
    running = Running(engine)
    if only is None:
        measured(recorder, running, engine)
    if only != "crowd" and name == DEFAULT_ALIAS:
        for other in PEERS:
            beside(recorder, running, engine, other)
    if only != "peers":
        crowded(recorder, running, sink, engine.encode("A")[0])
    running.close()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default=DEFAULT_ALIAS, help="alias, hub id, folder or .gguf file, or tiny")
    parser.add_argument("--trials", type=int, default=50, help="streams, clients that leave and repeated calls to try")
    parser.add_argument("--speed", action="store_true", help="measure HTTP, peers and a crowd alone")
    parser.add_argument("--peers", action="store_const", dest="only", const="peers", help="measure peers alone")
    parser.add_argument("--crowd", action="store_const", dest="only", const="crowd", help="idle and slow clients alone")
    options = parser.parse_args()
    recorder = Recorder("serving", options.results, model=None if options.model == DEFAULT_ALIAS else options.model)
    if not (options.speed or options.only):
        tests_pass(recorder)
        rules(recorder, options.trials)
        raced(recorder)
        killed(recorder)
    speed(recorder, options.model, only=options.only)


if __name__ == "__main__":
    main()
