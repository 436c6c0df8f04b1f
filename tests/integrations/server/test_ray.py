"""Replicas on Ray Serve, on this machine: answers, who gets which call, updates under load, clients that leave."""

from __future__ import annotations

import http.client
import json
import pickle
import socket
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from polar_billing import Meter
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.proof.verify import verify_ledger
from polar_sdk import PolarModel
from polar_sdk.errors import InvalidRequestError
from polar_sdk.router.artifact import save_router
from polar_sdk.testing import tiny_llama, tiny_policy, tiny_tokenizer
from polar_server.deployment.launch import Launch
from tests.integrations.server.conftest import JSON
from tests.sdk.promises.test_fallback import put_at_risk
from tests.sdk.router.conftest import certified_router, known_router

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from polar_sdk import UsageRecord

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.long]
WAIT_S = 120.0


def imported() -> tuple[Any, Any]:
    """Ray and our module on it: seconds that no other test should wait for when it is collected."""
    with warnings.catch_warnings(action="ignore"):  # Ray's own, of which there are many
        import ray
        import ray.serve

        from polar_server.deployment import ray_serve
    return ray, ray_serve


LONG = "Once upon a time there was a fox who counted stars. " * 6
"""Longer than a page of keys and values, so that its start can be shared."""


def test_the_configuration_file_is_one_that_ray_takes() -> None:
    _, ray_serve = imported()
    from ray.serve.schema import ServeDeploySchema

    launch = Launch(model="tiny", backend=["economy=http://a:8000"], drain=45.0)
    config = json.loads(json.dumps(ray_serve.config(launch, ray_serve.Replicas.of("1-4", cpus=2, gpus=1), port=8000)))
    read = ServeDeploySchema.model_validate(config)
    (application,) = read.applications
    assert application.args == {
        "launch": {"host": "0.0.0.0", "model": "tiny", "drain": 45.0, "backend": ["economy=http://a:8000"]}
    }
    (deployment,) = config["applications"][0]["deployments"]
    assert deployment["max_ongoing_requests"] > 5
    assert deployment["graceful_shutdown_timeout_s"] > 45
    assert deployment["autoscaling_config"]["max_replicas"] == 4
    assert deployment["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 1}
    module, _, name = application.import_path.partition(":")
    assert getattr(__import__(module, fromlist=[name]), name) is ray_serve.app
    assert ray_serve.app(dict(application.args)) is not None


@pytest.mark.parametrize("options", [{"require_keys": False}, {"no_ledger": True}])
def test_a_cluster_is_never_open_to_the_network(options: dict[str, Any]) -> None:
    _, ray_serve = imported()
    with pytest.raises(InvalidRequestError, match="network"):
        ray_serve.config(Launch(**options), ray_serve.Replicas(), port=8000)


@pytest.mark.parametrize("text", ["", "0", "3-2", "a", "-1", "1-2-3"])
def test_numbers_of_replicas_that_cannot_be(text: str) -> None:
    _, ray_serve = imported()
    with pytest.raises(InvalidRequestError, match="--ray"):
        ray_serve.Replicas.of(text, cpus=1, gpus=0)


def test_calls_that_belong_together() -> None:
    _, ray_serve = imported()
    key, session = {b"authorization": b"Bearer pk_a"}, {b"x-session-id": b"s1"}
    found = {ray_serve.affinity_of(headers) for headers in (key, session, {**key, **session}, {b"host": b"x"})}
    assert len(found) == 4
    assert None in found
    assert ray_serve.affinity_of({**session, **key}) == ray_serve.affinity_of({**key, **session, b"host": b"y"})

    class Call:
        def __init__(self) -> None:
            from ray.serve._private.common import StreamingHTTPRequest

            scope = {"headers": [(b"Authorization", b"Bearer pk_a")]}
            self.args = [pickle.dumps(StreamingHTTPRequest(scope, proxy_actor_name="x"))]

    assert ray_serve._headers(Call()) == key


class Cluster:
    """A local Ray with our deployment."""

    def __init__(self, folder: Path, ledger: str) -> None:
        self.ray, self.on_ray = imported()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        tiny_llama(max_position_embeddings=2048).save_pretrained(folder / "tiny")
        tiny_tokenizer().save_pretrained(folder / "tiny")
        (folder / "policy.json").write_text(tiny_policy(6).model_dump_json())
        self.launch = Launch(
            name="tiny",
            model=str(folder / "tiny"),
            policy=str(folder / "policy.json"),
            precision="fp32",
            device="cpu",
            ledger=ledger,
            tenant="acme",
            drain=240.0,  # a busy machine
        )
        self.ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        self.on_ray.start("127.0.0.1", self.port)
        self.deploy(self.launch, 2)

    def deploy(self, launch: Launch, count: int) -> None:
        """Run so many replicas with these options, brought to them one after the other."""
        replicas = self.on_ray.Replicas(least=count, most=count, cpus=0.1)
        bound = self.on_ray._bound(launch, replicas)
        self.ray.serve.run(bound, name=self.on_ray.APPLICATION, route_prefix="/")

    def call(self, body: dict[str, Any], headers: dict[str, str] | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {**JSON, **(headers or {})})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        is_json = not body.get("stream") and answer.status == 200  # Ray's own errors are text
        return answer.status, json.loads(text) if is_json else text


@pytest.fixture(scope="module")
def ledger_of_cluster(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('ray') / 'ledger.sqlite3'}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, ledger_of_cluster: str) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        for limit in ("READY_CHECK", "HEALTH_CHECK"):  # a busy machine takes longer than Ray's seconds
            patched.setenv(f"RAY_SERVE_PROXY_{limit}_TIMEOUT_S", "180")
        for limit in ("raylet_start_wait_time_s", "worker_register_timeout_seconds"):
            patched.setenv(f"RAY_{limit}", "300")
        patched.setenv("RAY_worker_niceness", "0")
        patched.setenv("POLAR_SPOOL", str(tmp_path_factory.mktemp("spool")))
        cluster = Cluster(tmp_path_factory.mktemp("model"), ledger_of_cluster)
        yield cluster
        cluster.ray.serve.shutdown()
        cluster.ray.shutdown()


def body(text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}


def records(ledger: str, count: int) -> list[UsageRecord]:
    """The stored records, once there are so many."""
    deadline = time.monotonic() + WAIT_S
    while True:
        with Ledger(ledger) as store:
            found = [stored.record for stored in store.read(Selection(ALL_TENANTS))]
        if len(found) >= count:
            return found
        assert time.monotonic() < deadline, f"{len(found)} of {count}"
        time.sleep(0.2)


def test_whole_and_streamed_answers_are_alike(cluster: Cluster) -> None:
    status, whole = cluster.call(body(seed=3, temperature=1))
    assert status == 200, whole
    status, text = cluster.call(body(seed=3, temperature=1, stream=True))
    assert (status, text.endswith(b"data: [DONE]\n\n")) == (200, True)
    events = [json.loads(line[6:]) for line in text.split(b"\n") if line.startswith(b"data: {")]
    said = "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])
    assert said == whole["choices"][0]["message"]["content"]
    assert events[-1]["polar"]["flops"] > 0


def test_a_session_stays_where_the_start_of_its_prompts_is(cluster: Cluster) -> None:
    for session in range(4):
        cached = []
        for turn in range(4):
            text = f"{session} {LONG}" + "and then " * turn
            status, answer = cluster.call(body(text, max_tokens=2), {"x-session-id": f"s{session}"})
            assert status == 200
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert all(count > 0 for count in cached[1:]), "a later turn ran elsewhere"


def test_a_client_that_leaves_is_billed_what_ran(cluster: Cluster, ledger_of_cluster: str) -> None:
    before = len(records(ledger_of_cluster, 0))
    content = json.dumps(body(stream=True, max_tokens=1_500, logit_bias={"65": 100})).encode()
    with socket.create_connection(("127.0.0.1", cluster.port), timeout=WAIT_S) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        received = b""
        while received.count(b"data: ") < 3:
            received += connection.recv(4096)
    found = records(ledger_of_cluster, before + 1)[-1]
    assert (found.outcome, found.finish_reason) == ("cancelled", "cancelled")
    assert 1 < found.tokens.output < 1_500


def test_a_rolling_update_loses_no_call(cluster: Cluster, ledger_of_cluster: str) -> None:
    before, found, stop = len(records(ledger_of_cluster, 0)), [], threading.Event()

    def ask() -> None:
        while not stop.is_set():
            found.append(cluster.call(body(max_tokens=20, stream=True))[0:2])

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    cluster.deploy(replace(cluster.launch, tenant="globex"), 2)
    stop.set()
    for thread in asking:
        thread.join(WAIT_S)
    assert {status for status, _ in found} == {200}
    assert all(text.endswith(b"data: [DONE]\n\n") for _, text in found)
    assert cluster.call(body())[1]["polar"]["tenant"] == "globex", "the new options are in force"
    assert len(records(ledger_of_cluster, before + len(found) + 1)) == before + len(found) + 1


SESSIONS, TURNS = 8, 10
REPLICAS, CALLERS = 4, 24


def test_a_replica_that_ends_stops_and_records_what_outlasts_the_drain(
    cluster: Cluster, ledger_of_cluster: str
) -> None:
    """Ray waits for the last call to end, or kills the replica with all that runs; it ends one after the other."""
    cluster.deploy(replace(cluster.launch, drain=0.0), 2)
    before, begun = len(records(ledger_of_cluster, 0)), threading.Semaphore(0)
    try:
        with ThreadPoolExecutor(SESSIONS) as pool:
            reading = [pool.submit(read_long, cluster, number, begun) for number in range(SESSIONS)]
            for _ in reading:
                assert begun.acquire(timeout=WAIT_S)
            cluster.deploy(cluster.launch, 2)
            texts = [one.result() for one in reading]
        stopped = [text for text in texts if b'"code":"shutting_down"' in text]
        assert stopped, "answers of some seconds were left to run"
        assert all(text in stopped or text.endswith(b"data: [DONE]\n\n") for text in texts)
        found = records(ledger_of_cluster, before + SESSIONS)[before:]
        assert len([one for one in found if one.outcome == "cancelled"]) == len(stopped)
    finally:
        cluster.deploy(cluster.launch, 2)


def read_long(cluster: Cluster, number: int, begun: threading.Semaphore) -> bytes:
    """All of a long stream; `begun` is released when its first event is there."""
    content = json.dumps(body(stream=True, max_tokens=1_500, logit_bias={"65": 100}))
    connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=WAIT_S)
    connection.request("POST", "/v1/chat/completions", content, {**JSON, "x-session-id": f"long-{number}"})
    answer = connection.getresponse()
    text = answer.readline()
    begun.release()
    text += answer.read()
    connection.close()
    return text


def conversation(session: int, ask: Callable[[list[dict[str, str]]], tuple[str, int]]) -> int:
    """Chat for some turns; returns how many tokens of its prompts were there already."""
    messages: list[dict[str, str]] = []
    cached = 0
    for turn in range(TURNS):
        messages.append({"role": "user", "content": f"{session} {LONG if turn == 0 else 'and then?'}"})
        answer, tokens = ask(messages)
        messages.append({"role": "assistant", "content": answer})
        cached += tokens
    return cached


def test_four_replicas_keep_the_starts_of_prompts_as_one_does(cluster: Cluster) -> None:
    cluster.deploy(cluster.launch, 4)

    def ask(session: int, messages: list[dict[str, str]]) -> tuple[str, int]:
        sent = {"model": "tiny", "messages": messages, "max_tokens": 12}
        status, answer = cluster.call(sent, {"x-session-id": f"chat-{session}"})
        assert status == 200, answer
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return answer["choices"][0]["message"]["content"], cached

    alone = PolarModel.from_pretrained(
        cluster.launch.model, policy=cluster.launch.policy, precision="fp32", ledger=None
    )

    def ask_alone(messages: list[dict[str, str]]) -> tuple[str, int]:
        answer = alone.generate(messages, max_tokens=12)
        return answer.text, answer.usage.tokens.cached

    with ThreadPoolExecutor(SESSIONS) as pool:
        found = list(pool.map(lambda session: conversation(session, partial(ask, session)), range(SESSIONS)))
    wanted = [conversation(session, ask_alone) for session in range(SESSIONS)]
    print(f"cached tokens: {sum(found)} on four replicas, {sum(wanted)} on one")
    assert sum(found) >= 0.8 * sum(wanted)


def test_fewer_replicas_cut_no_stream(cluster: Cluster, ledger_of_cluster: str) -> None:
    before, begun = len(records(ledger_of_cluster, 0)), threading.Semaphore(0)

    with ThreadPoolExecutor(SESSIONS) as pool:
        reading = [pool.submit(read_long, cluster, number, begun) for number in range(SESSIONS)]
        for _ in reading:
            assert begun.acquire(timeout=WAIT_S)
        cluster.deploy(cluster.launch, 1)
        texts = [one.result() for one in reading]
    assert all(text.endswith(b"data: [DONE]\n\n") for text in texts)
    found = records(ledger_of_cluster, before + SESSIONS)[before:]
    assert [one.outcome for one in found] == ["completed"] * SESSIONS


def test_replicas_fall_back_together_while_one_is_killed(
    cluster: Cluster, ledger_of_cluster: str, tmp_path: Path
) -> None:
    """The callers reach every replica; each falls back, and of the killed one only running calls fail."""
    model = PolarModel.from_pretrained(cluster.launch.model, precision="fp32", device="cpu", ledger=None)
    certified = certified_router(known_router(model))
    save_router(certified, tmp_path / "router")
    routed = replace(cluster.launch, router=str(tmp_path / "router"), policy=None)
    cluster.deploy(routed, REPLICAS)
    before, replicas = len(records(ledger_of_cluster, 0)), replica_processes()
    assert len(replicas) == REPLICAS

    def call(session: int) -> tuple[int, dict[str, Any]]:
        status, answer = cluster.call(body(compute="economy", max_tokens=2), {"x-session-id": f"falls-{session}"})
        return status, answer["polar"] if status == 200 else {}

    def until_fallen(session: int) -> tuple[list[int], float]:
        """Statuses of a caller's calls, and when one of them was first served by a safer tier."""
        statuses = []
        while True:
            status, polar = call(session)
            statuses.append(status)
            if polar.get("fallback_from") == "economy":
                return statuses, time.monotonic()
            assert time.monotonic() < asked + WAIT_S, "a replica never fell back"

    with ThreadPoolExecutor(CALLERS) as pool:
        served = list(pool.map(call, range(CALLERS)))
        assert {(status, polar["tier"]) for status, polar in served} == {(200, "economy")}
        asked = time.monotonic()
        falling = [pool.submit(until_fallen, session) for session in range(CALLERS)]
        time.sleep(1)
        replicas[0].kill()
        known = time.monotonic()
        with Meter(ledger_of_cluster) as meter:
            put_at_risk(meter, certified, "economy")
        found = [one.result() for one in falling]
    seconds = sorted(at - known for _, at in found)
    statuses = Counter(status for statuses, _ in found for status in statuses)
    print(f"fallen back after {seconds[0]:.2f} to {seconds[-1]:.2f} s; answers by status: {dict(statuses)}")
    assert set(statuses) <= {200, 500, 503}
    stored = records(ledger_of_cluster, before + CALLERS + statuses[200])[before:]
    answered = [one for one in stored if one.outcome == "completed"]
    assert len(answered) >= CALLERS + statuses[200], "what was answered is on record"
    with Ledger(ledger_of_cluster) as ledger:
        assert verify_ledger(ledger).sound


def replica_processes() -> list[psutil.Process]:
    """The replicas that run on this machine."""
    names = {process: " ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)}
    return [process for process, name in names.items() if "ServeReplica" in name]
