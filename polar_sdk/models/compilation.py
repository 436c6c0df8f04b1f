"""Compiling in the background: a process of its own, one per machine and model, and what others see of it.

The first model object on a machine runs uncompiled at once and starts `compiler.py`, which outlives it: a command that
ends after one answer has still made the next one fast. Whoever loads the model meanwhile, in whatever process, asks at
each request whether it is done. Nothing here raises, or waits for long: without compiled layers the service goes on
uncompiled, and one line in the log says why. Importing this imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing.spawn
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from filelock import FileLock, Timeout
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from polar_sdk.errors import CompileError
from polar_sdk.locks import renewed_in_child
from polar_sdk.models.paths import CACHE_VARIABLE, cache_folder
from polar_sdk.reading import Unreadable, parse_json, read_bytes
from polar_sdk.writing import replacing

if TYPE_CHECKING:
    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.eager import Kernels


COMPILE_VARIABLE: Final = "POLAR_COMPILE"
MODULE: Final = "polar_sdk.models.compiler"
BUSY, DISK_FULL, NOT_WRITABLE, FAILED = 3, 4, 5, 6
"""Exit codes of the process: another one is at it, and why it gave up, which a full disk cannot hold."""
IDLE = True
"""Whether the process only uses time that nobody else wants."""
LOCK_SECONDS: Final = 20.0
"""How long the process waits for its lock, which others hold for a moment when they look."""
PATIENCE_SECONDS: Final = 5.0
"""How long requests may leave the process too little time before it is given a share of it."""
ENOUGH: Final = 0.3
"""Share of a core that is not too little."""
RETRY: Final = timedelta(hours=1)
"""How long nobody tries what has failed here: programs that start often must not all fail at it."""
_LOOK_SECONDS: Final = 1.0
"""How often a request may look whether compiling has ended."""
_MOMENT_SECONDS: Final = 1.0
"""How long a request may wait for a process that was killed."""
REASONS: Final = {
    DISK_FULL: "the disk of the cache folder is full",
    NOT_WRITABLE: "the cache folder cannot be written",
    FAILED: "the compiler failed",
}
"""What the exit codes of a process that gave up mean."""
_log: Final = logging.getLogger(__name__)
_starting: Final = renewed_in_child(threading.Lock())
_said: Final[set[str]] = set()
"""What has been said in this process, and need not be said for every model."""


class Status(BaseModel):
    """How far the process is, or how it ended; in a file beside the packages."""

    model_config = ConfigDict(frozen=True)

    model: str
    """Name that the model was loaded by."""
    fingerprint: str
    precision: str
    """`bfloat16`, `float32`, …, `int8` or `int4`."""
    state: Literal["compiling", "compiled", "failed"]
    done: int = 0
    """Number of parts that are compiled."""
    total: int = 0
    """Number of parts; 0 = not known yet."""
    reason: str = ""
    """Why it failed."""
    made_with: str
    """Versions of this package and of torch."""
    at: AwareDatetime

    @property
    def percent(self) -> int:
        """Share of the parts that are compiled."""
        return 100 * self.done // max(self.total, 1)

    @property
    def text(self) -> str:
        """For people: `compiled`, `compiling, 40 %`, `failed (…)`."""
        if self.state == "compiling":
            return f"compiling, {self.percent} %"
        return f"failed ({self.reason})" if self.state == "failed" else "compiled"


class Order(BaseModel):
    """What the process is to compile; it reads this from standard input, and no weights."""

    model_config = ConfigDict(frozen=True)

    model: str
    fingerprint: str
    config: dict[str, Any]
    """The model's configuration."""
    dtype: str
    """Of activations, such as `bfloat16`."""
    precision: str
    """How matrices are stored: `bf16`, `int8`, …"""
    threads: int
    """Number of threads that the code is compiled for."""
    environment: str
    """What else the code depends on: our source, torch and the machine."""
    idle: bool = True
    """Whether the process only uses time that nobody else wants; else it gets half of what others get."""

    @property
    def key(self) -> str:
        """Names lock, status and log of the process."""
        text = self.model_dump_json(exclude={"model", "fingerprint", "idle"})
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def status(self, state: Literal["compiling", "compiled", "failed"], **facts: Any) -> Status:
        """The status of this order now."""
        precision = self.precision if self.precision.startswith("int") else self.dtype
        return Status(
            model=self.model,
            fingerprint=self.fingerprint,
            precision=precision,
            state=state,
            made_with=_versions(),
            at=datetime.now(UTC),
            **facts,
        )


def packages_folder() -> Path:
    """Where compiled packages are kept."""
    return cache_folder() / "compiled"


def lock_of(key: str) -> FileLock:
    """The lock that the process holds as long as it compiles."""
    return FileLock(cache_folder() / "locks" / f"compile-{key}.lock")


def is_held(key: str) -> bool:
    """Whether a process is compiling this now, in whatever process it was started."""
    lock = lock_of(key)
    if not Path(lock.lock_file).exists():
        return False
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


def write_status(key: str, status: Status) -> None:
    """Replace the status, as far as the disk allows."""
    path = packages_folder() / f"{key}.json"
    with suppress(OSError), replacing(path) as draft:
        draft.write_text(status.model_dump_json() + "\n", encoding="utf-8")


def read_status(path: Path) -> Status | None:
    """The status in a file; None where there is none that can be read."""
    try:
        return Status.model_validate(parse_json(read_bytes(path)))
    except (OSError, Unreadable, ValidationError):
        return None


def statuses() -> dict[str, list[Status]]:
    """By fingerprint of the model, the latest status of each precision that these versions have compiled or do."""
    latest: dict[tuple[str, str], Status] = {}
    for path in sorted(packages_folder().glob("*.json")):
        status = None if "." in path.stem else read_status(path)  # else it is a draft
        if status is None or status.made_with != _versions():
            continue
        if status.state == "compiling" and not is_held(path.stem):
            status = status.model_copy(update={"state": "failed", "reason": "it was interrupted"})
        known = latest.get((status.fingerprint, status.precision))
        if known is None or known.at < status.at:
            latest[status.fingerprint, status.precision] = status
    by_model: dict[str, list[Status]] = {}
    for (fingerprint, _), status in sorted(latest.items()):
        by_model.setdefault(fingerprint, []).append(status)
    return by_model


def is_wanted() -> bool:
    """What `POLAR_COMPILE` says.

    Raises:
        CompileError: It says neither `background` nor `off`.
    """
    value = os.environ.get(COMPILE_VARIABLE) or "background"
    if value not in ("background", "off"):
        raise CompileError(f"{COMPILE_VARIABLE}={value!r} is unknown; use background or off.")
    return value == "background"


class _Detached(subprocess.Popen[bytes]):
    """A process that may outlive this one, so that its end need not be waited for, nor warned about."""

    def __del__(self) -> None:
        pass


class Background:
    """Compiled layers of a decoder, on their way: called at each request, it returns them whenever there are more.

    Args:
        decoder: Whose layers.
        order: What to compile.
    """

    def __init__(self, decoder: Decoder, order: Order) -> None:
        self._decoder, self._order = decoder, order
        self._process: _Detached | None = None
        self._owner = os.getpid()
        self._looked = self._began = time.monotonic()
        self._window = self._began, 0.0
        """When the process was last found to get enough time, and its processor time by then."""
        self._parts = 0, 0
        """How many parts of how many were there when it was last looked for them."""
        self._looking = renewed_in_child(threading.Lock())

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The process, if this one started it."""
        return self._process

    def start(self) -> bool:
        """Start the process, unless one is at it already; False where that cannot be done, which is then said."""
        order = self._order
        obstacle = _no_compiler() or _no_interpreter() or _has_failed(order)
        if obstacle is not None:
            _say_once(f"{obstacle}: layers run uncompiled")
            return False
        try:
            for folder in (packages_folder(), cache_folder() / "locks"):
                folder.mkdir(parents=True, exist_ok=True)
            if not is_held(order.key):
                with (packages_folder() / f"{order.key}.log").open("wb") as log:
                    self._process = _spawn(order, log)
        except OSError as error:
            _say_once(
                f"cache folder {str(cache_folder())!r} cannot be used ({error.strerror or error}): layers run "
                f"uncompiled; make it writable, or set {CACHE_VARIABLE} to another folder"
            )
            return False
        _log.info("compiling the layers of %s in the background; `polar models` shows how far it is", order.model)
        return True

    def __call__(self) -> Kernels | None:
        """Compiled layers, where more is compiled than what the decoder has; raises nothing."""
        if time.monotonic() - self._looked < _LOOK_SECONDS or not self._looking.acquire(blocking=False):
            return None
        try:
            self._looked = time.monotonic()
            return self._finish() if self._has_ended() else self._go_on()
        except Exception as error:  # torch raises errors of any class, and the request can do without
            self._give_up(" ".join(str(error).split())[:200])
            return None
        finally:
            self._looking.release()

    def _has_ended(self) -> bool:
        process = self._process
        if process is not None and os.getpid() == self._owner:  # a fork cannot wait for its parent's child
            code = process.poll()
            if code is None:
                if self._order.idle and self._is_starved(process.pid):
                    self._start_again(process)
                return False
            if code != BUSY:
                return True
            self._process = None
        return not is_held(self._order.key)

    def _is_starved(self, process: int) -> bool:
        """Whether the process has got too little time since the last time that it was looked at, some seconds ago."""
        began, before = self._window
        seconds = time.monotonic() - began
        if seconds < PATIENCE_SECONDS:
            return False
        used = _processor_seconds(process)
        self._window = time.monotonic(), used
        return used - before < ENOUGH * seconds

    def _start_again(self, process: subprocess.Popen[bytes]) -> None:
        """Exchange a process that only gets idle time, of which there is none, for one that gets a share of the time.

        Requests that keep all cores busy, or threads that spin while they wait, would keep it from ending for ever.
        What it has compiled is on disk; and a process cannot leave idle scheduling without privileges.
        """
        if not hasattr(os, "killpg"):
            return
        with suppress(OSError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(_MOMENT_SECONDS)  # else the next one waits for the lock
        self._order = self._order.model_copy(update={"idle": False})
        with (packages_folder() / f"{self._order.key}.log").open("ab") as log:
            self._process = _spawn(self._order, log)

    def _go_on(self) -> Kernels | None:
        """What the process has compiled by now."""
        status = read_status(packages_folder() / f"{self._order.key}.json")
        if status is None or status.state != "compiling" or (status.done, status.total) == self._parts:
            return None
        from polar_sdk.engine.compiled import load_kernels

        self._parts = status.done, status.total
        kernels = load_kernels(self._decoder, packages_folder(), build=False, partly=True)
        if kernels is None or kernels.compiled <= self._decoder.kernels.compiled:
            return None
        seconds = time.monotonic() - self._began
        _log.debug(
            "%s: %s runs compiled, %.0f s after it was loaded", self._order.model, kernels.compiled.name, seconds
        )
        return kernels

    def _finish(self) -> Kernels | None:
        from polar_sdk.engine.compiled import load_kernels

        kernels = load_kernels(self._decoder, packages_folder(), build=False)
        if kernels is None:
            self._give_up(self._reason())
            return None
        self._decoder.renewal = None
        seconds = time.monotonic() - self._began
        _log.info(
            "requests to %s run compiled layers from now on, %.0f s after it was loaded", self._order.model, seconds
        )
        return kernels

    def _give_up(self, reason: str) -> None:
        self._decoder.renewal = None
        _log.warning(
            "the layers of %s could not be compiled in the background (%s): what is missing runs uncompiled; "
            "`polar models compile` goes on with what is missing",
            self._order.model,
            reason,
        )

    def _reason(self) -> str:
        status = read_status(packages_folder() / f"{self._order.key}.json")
        if status is not None and status.state == "failed" and status.reason:
            return status.reason
        code = self._process.returncode if self._process is not None else None
        if code in REASONS:
            return REASONS[code]
        done = f" after {status.done} of {status.total} parts" if status is not None and status.total else ""
        return f"it was interrupted{done}"


def compile_in_background(decoder: Decoder, config: Any, name: str, fingerprint: str) -> None:
    """Let a decoder run compiled layers as soon as a process of its own has compiled them; returns at once.

    Args:
        decoder: On a CPU, of a family that can be compiled.
        config: The configuration of its Hugging Face model.
        name: Of the model, for people.
        fingerprint: Of the model.
    """
    import torch

    from polar_sdk.engine.package import environment

    with _starting:
        if decoder.renewal is not None:
            return
        order = Order(
            model=name,
            fingerprint=fingerprint,
            config=config_of(config),
            dtype=str(decoder.dtype).removeprefix("torch."),
            precision=decoder.precision,
            threads=torch.get_num_threads(),
            environment=hashlib.sha256(environment(shared=True).encode()).hexdigest(),
            idle=IDLE,
        )
        background = Background(decoder, order)
        if background.start():
            decoder.renewal = background


def config_of(config: Any) -> dict[str, Any]:
    """A configuration of transformers as JSON has it."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return values


def _spawn(order: Order, log: Any) -> _Detached:
    """Start the process: in a session of its own, so that no Ctrl-C reaches it, and with no output but its log."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        COMPILE_VARIABLE: "off",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    flags = getattr(subprocess, "IDLE_PRIORITY_CLASS", 0) | getattr(subprocess, "DETACHED_PROCESS", 0)
    process = _Detached(
        [os.fsdecode(multiprocessing.spawn.get_executable()), "-m", MODULE],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=os.name == "posix",
        creationflags=flags,
    )
    assert process.stdin is not None
    with suppress(OSError), process.stdin as pipe:  # if it has died, its exit code says why
        pipe.write(order.model_dump_json().encode())
    return process


def _no_compiler() -> str | None:
    """What to say where there is no C++ compiler."""
    name = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return None if shutil.which(name) else f"there is no C++ compiler ({name}) on this machine"


def _no_interpreter() -> str | None:
    """What to say where Python cannot be started again, as in a frozen program or one that embeds it."""
    executable = multiprocessing.spawn.get_executable()
    name = Path(os.fsdecode(executable)).name.lower() if executable else ""
    if getattr(sys, "frozen", False) or not name.startswith(("python", "pypy")):
        return "this program cannot start Python to compile in the background"
    return None


def _processor_seconds(process: int) -> float:
    """Processor time of a process and the compilers that it has started; infinite where that cannot be known."""
    import psutil

    try:
        root = psutil.Process(process)
        times = [each.cpu_times() for each in (root, *root.children(recursive=True))]
    except psutil.Error:
        return math.inf
    return float(sum(sum(time[:4]) for time in times))  # user, system, and the same of children that have ended


def _has_failed(order: Order) -> str | None:
    """What to say where this failed a short time ago."""
    status = read_status(packages_folder() / f"{order.key}.json")
    if status is None or status.state != "failed" or not timedelta() <= datetime.now(UTC) - status.at < RETRY:
        return None
    return (
        f"compiling {order.model} failed at {status.at:%H:%M} UTC ({status.reason}), `polar models compile` tries again"
    )


def _say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        _log.warning("%s", line)


def _versions() -> str:
    texts = []
    for name in ("polar-llm", "torch"):
        try:
            texts.append(version(name))
        except PackageNotFoundError:
            texts.append("unknown")
    return " ".join(texts)
