"""Servers that answer chats over HTTP: ours in a thread of this process, and peers in processes of their own.

Used by `serving.py`. A peer serves the same model on the same processor, in bfloat16 (`transformers serve`) or Q4_1
(llama.cpp's server); where one is not installed, or does not start, nothing is compared with it.
"""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from benchmarks.chaos import free_port
from polar_server import Settings, build
from polar_server.deployment.uvicorn_server import UvicornServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from polar_sdk import PolarModel

__all__ = ["PEERS", "Endpoint", "Running", "events_of", "peer", "served"]

_START_S: Final = 120
_TIMEOUT_S: Final = 600


class Endpoint:
    """A server with OpenAI's API on a port of this machine."""

    def __init__(self, port: int, model: str) -> None:
        self.port, self.model = port, model

    def body(self, messages: list[dict[str, str]], **fields: Any) -> dict[str, Any]:
        """A request."""
        return {"model": self.model, "messages": messages, **fields}

    def post(self, body: dict[str, Any], headers: dict[str, str] | None = None) -> bytes:
        """The body of an answer.

        Raises:
            RuntimeError: The server answered with an error.
        """
        connection, answer = self._ask(body, headers or {})
        content = answer.read()
        connection.close()
        return content

    def first_token(self, body: dict[str, Any]) -> float:
        """Seconds until the first event with text; the rest is read as well.

        Raises:
            RuntimeError: The server answered with an error.
        """
        begin = time.perf_counter()
        connection, answer = self._ask({**body, "stream": True}, {})
        while (line := answer.readline()) and not any(map(_text_of, events_of(line.strip()))):
            pass
        seconds = time.perf_counter() - begin
        answer.read()
        connection.close()
        return seconds

    def text(self, body: dict[str, Any]) -> str:
        """Text of a stream."""
        return "".join(map(_text_of, events_of(self.post({**body, "stream": True}))))

    def _ask(
        self, body: dict[str, Any], headers: dict[str, str]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_TIMEOUT_S)
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json", **headers}
        )
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {answer.read()[:300]!r}")
        return connection, answer


def events_of(content: bytes) -> list[Any]:
    """The events of a stream."""
    lines = [line[6:] for line in content.replace(b"\r\n", b"\n").split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def _text_of(event: Any) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


class Running(Endpoint):
    """Ours, in a thread of this process."""

    def __init__(self, engine: PolarModel, **settings: Any) -> None:
        self.app = build(Settings(engine=engine, name="bench", drain=0.0, **settings))
        self.server = self.app.state.server
        self.uvicorn = UvicornServer(self.app, host="127.0.0.1", port=0)
        started = threading.Event()
        self.uvicorn.on_start = lambda _: started.set()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.uvicorn.serve()), daemon=True)
        self.thread.start()
        started.wait(60)
        super().__init__(int(self.uvicorn.url.rpartition(":")[2]), "bench")

    def close(self) -> None:
        """End it."""
        self.uvicorn.handle_exit(15, None)
        self.uvicorn.handle_exit(15, None)
        self.thread.join(60)


PEERS: Final = ("transformers", "transformers_batching", "llamacpp")


@contextmanager
def peer(name: str, folder: Path) -> Iterator[Endpoint | None]:
    """One of `PEERS`, for as long as the block runs; None if it is not installed or does not start.

    Args:
        name: Which.
        folder: Of the model, as Hugging Face stores it; the default model's for llama.cpp.
    """
    endpoint = Endpoint(free_port(), str(folder))
    with tempfile.TemporaryDirectory(prefix="polar-bench-") as work:
        command = _command(name, folder, endpoint.port, Path(work))
        if command is None:
            yield None
            return
        log = Path(work, "log")
        with log.open("wb") as output, served(command, lambda: _answers(endpoint), _START_S, output) as starts:
            if not starts:
                print(f"{name} does not start: {log.read_text(errors='replace')[-500:]}", flush=True)
            yield endpoint if starts else None


@contextmanager
def served(command: Sequence[str], answers: Callable[[], bool], within_s: float, output: IO[Any]) -> Iterator[bool]:
    """A server in a process of its own, which ends with the block; whether it has begun to answer.

    Args:
        command: What starts it.
        answers: Whether it answers.
        within_s: How long it may take to start. Unit: seconds.
        output: Takes what it prints.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # its weights are on the disk
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        until = time.monotonic() + within_s
        while not (started := answers()) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.5)
        yield started
    finally:
        process.terminate()
        process.wait(60)


def is_found(url: str) -> bool:
    """Whether a server answers with success at a URL."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return int(answer.status) == 200
    except OSError:
        return False


def _command(name: str, folder: Path, port: int, work: Path) -> list[str] | None:
    if name.startswith("transformers"):
        script = Path(sys.executable).with_name("transformers")
        if not script.is_file() or importlib.util.find_spec("fastapi") is None:
            return None
        batching = ["--continuous-batching"] if name.endswith("batching") else []
        address = ["--port", str(port), "--host", "127.0.0.1"]
        return [str(script), "serve", str(folder), *address, "--device", "cpu", *batching]
    if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("sse_starlette") is None:
        return None
    from polar_sdk.models.aliases import ALIASES
    from polar_sdk.models.find import obtain

    options = {"model": obtain(ALIASES[0]).weights[0], "n_ctx": 2048, "n_threads": os.cpu_count(), "port": port}
    options["interrupt_requests"] = "false"  # else each request cuts off the one before
    named = [text for option, value in options.items() for text in (f"--{option}", str(value))]
    return [sys.executable, "-m", "llama_cpp.server", *named]


def _answers(endpoint: Endpoint) -> bool:
    try:
        endpoint.text(endpoint.body([{"role": "user", "content": "Hello"}], max_tokens=2))
    except (OSError, RuntimeError, http.client.HTTPException):
        return False
    return True
