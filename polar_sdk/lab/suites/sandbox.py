"""Runs Python code that a model wrote, in a process that can do nothing but calculate.

The process has limits of time and memory, starts no other process or thread, opens no socket, and writes, creates and
removes no file; `sandboxed.py` says how this is enforced, and `docs/router.md` what is not prevented. It is ended with
SIGKILL when its time is up. Nothing runs before a trial has shown that this machine's kernel enforces it.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from polar_sdk.errors import SandboxError

_SCRIPT: Final = Path(__file__).with_name("sandboxed.py")
_MAX_RESULT: Final = 4096
"""Unit: bytes; a pipe holds more, so that who writes more waits until its time is up."""
_TRIAL: Final = """
import os, socket, tempfile
signal = lambda: os.kill(os.getppid(), 0)
for attempt in (os.fork, socket.socket, tempfile.TemporaryFile, signal, lambda: os.mkdir("x")):
    try:
        attempt()
    except OSError:
        continue
    raise SystemExit(1)
"""
"""Code that ends well only where everything it attempts is refused."""


class Limits(NamedTuple):
    """Limits of one run."""

    seconds: float = 15.0
    """Time by the clock."""
    cpu_seconds: int = 5
    """Time of the processor."""
    memory: int = 2**30
    """Address space. Unit: bytes."""


DEFAULT_LIMITS: Final = Limits()


class Ended(NamedTuple):
    """How a run ended."""

    passed: bool
    reason: str
    """`passed`, the name of the error that ended it, `timeout`, or `ended early`: it was killed, or left by itself."""


def run_code(answer: str, tests: str, head: str = "", limits: Limits = DEFAULT_LIMITS) -> Ended:
    """Run an answer, then its tests, all in one module.

    Args:
        answer: Python code; last lines that are cut off in the middle of a statement are left out.
        tests: Code that raises an error if the answer is wrong.
        head: Code before the answer.
        limits: Of the run.

    Raises:
        SandboxError: This machine cannot hold the code.
    """
    require_sandbox()
    return _run(answer, tests, head, limits)


@cache
def require_sandbox() -> None:
    """Check that code can be held on this machine, by trying.

    Raises:
        SandboxError: It cannot.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in {"x86_64", "aarch64"}:
        raise SandboxError(
            f"code cannot be run safely on {sys.platform} ({machine}); use Linux on x86-64 or Arm, or a suite that "
            "runs no code."
        )
    if not (ended := _run(_TRIAL, "", "", DEFAULT_LIMITS)).passed:
        raise SandboxError(
            f"this kernel does not confine code as needed (the trial: {ended.reason}); use one with seccomp filters, "
            "outside containers that forbid them."
        )


def _run(answer: str, tests: str, head: str, limits: Limits) -> Ended:
    secret = secrets.token_hex(16)
    order = {
        "head": head,
        "answer": answer,
        "tests": tests,
        "secret": secret,
        "cpu_seconds": limits.cpu_seconds,
        "memory": limits.memory,
    }
    ours, theirs = os.pipe()
    try:
        with tempfile.TemporaryFile() as file:
            file.write(json.dumps(order).encode())
            file.seek(0)
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-B", str(_SCRIPT)],
                    stdin=file,
                    stdout=theirs,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env={},
                    start_new_session=True,
                )
            finally:
                os.close(theirs)
        with process:
            try:
                process.wait(limits.seconds)
            except subprocess.TimeoutExpired:
                return Ended(False, "timeout")
            finally:
                process.kill()
        os.set_blocking(ours, False)
        return _read(os.read(ours, _MAX_RESULT), secret)
    finally:
        os.close(ours)


def _read(result: bytes, secret: str) -> Ended:
    """The output of the process; code that ends the process before its tests have ended does not know the secret."""
    try:
        said, error = json.loads(result)
    except (ValueError, TypeError):
        return Ended(False, "ended early")
    if said != secret or not isinstance(error, str):
        return Ended(False, "ended early")
    return Ended(not error, error or "passed")
