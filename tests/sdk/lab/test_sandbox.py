"""Code that a model wrote: what it may do, and what it cannot however it tries."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

import pytest

from polar_sdk.errors import SandboxError
from polar_sdk.lab.suites.sandbox import Ended, Limits, require_sandbox, run_code

if TYPE_CHECKING:
    from pathlib import Path

QUICK = Limits(seconds=20, cpu_seconds=1, memory=2**29)


def run(code: str, limits: Limits = QUICK) -> Ended:
    return run_code(code, "", limits=limits)


def test_a_calculation_passes() -> None:
    code = """
import bisect, collections, datetime, decimal, fractions, functools, hashlib, heapq, itertools, json, math, random, re
import statistics, string, typing
assert hashlib.md5(b"a").hexdigest()[:4] == "0cc1"
assert datetime.datetime(2020, 1, 1).year == 2020 and random.random() < 1
print("shown to nobody")
"""
    assert run(code) == Ended(True, "passed")


def test_the_name_of_an_error_is_the_reason() -> None:
    assert run("assert 1 == 2") == Ended(False, "AssertionError")
    assert run("def f(:") == Ended(False, "SyntaxError")


def test_lines_that_are_cut_off_are_left_out_and_tests_come_after() -> None:
    assert run_code("def f():\n    return 2\nx = (1 +", "\nassert f() == 2", head="y = 1\n").passed
    assert not run_code("def f():\n    return 2\nx = (1 +", "\nassert f() == 3").passed


ENDLESS = {
    "loop": "while True: pass",
    "output": "while True: print('x' * 100_000)",
    "deaf to signals": "import signal\n"
    "for number in range(1, 65):\n"
    "    try: signal.signal(number, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\n"
    "while True: pass",
}


@pytest.mark.parametrize("code", ENDLESS.values(), ids=ENDLESS)
def test_time_of_the_processor_is_limited(code: str) -> None:
    assert run(code, QUICK._replace(seconds=120)) == Ended(False, "ended early")


def test_time_by_the_clock_is_limited() -> None:
    begin = time.monotonic()
    assert run("import time\ntime.sleep(60)", Limits(seconds=2, cpu_seconds=30)) == Ended(False, "timeout")
    assert time.monotonic() - begin < 50


@pytest.mark.parametrize("code", ["x = bytearray(2**30)", "x = []\nwhile True: x.append(bytes(2**20))"])
def test_memory_is_limited(code: str) -> None:
    assert run(code, Limits(seconds=60, cpu_seconds=20, memory=2**29)).reason in {"MemoryError", "ended early"}


def test_output_that_nobody_reads_ends_with_the_time() -> None:
    """Whatever is written to whatever is open, this process keeps none of it."""
    flood = """
import os
for descriptor in range(64):
    try: os.write(descriptor, b"x")
    except OSError: continue
    if descriptor > 2:
        while True: os.write(descriptor, b"x" * 1000)
"""
    assert run(flood, Limits(seconds=3, cpu_seconds=30)) == Ended(False, "timeout")


ATTEMPTS = {
    "write": "open({file!r}, 'w')",
    "append": "open({file!r}, 'a')",
    "write what is there": "open({old!r}, 'r+')",
    "write by number": "import os\nos.open({old!r}, os.O_RDWR)",
    "truncate": "import os\nos.truncate({old!r}, 0)",
    "remove": "import os\nos.unlink({old!r})",
    "rename": "import os\nos.rename({old!r}, {file!r})",
    "link": "import os\nos.symlink({old!r}, {file!r})",
    "folder": "import os\nos.mkdir({file!r})",
    "permissions": "import os\nos.chmod({old!r}, 0)",
    "in memory": "import os\nos.memfd_create('x')",
    "temporary": "import tempfile\ntempfile.NamedTemporaryFile()",
    "connect": "import socket\nsocket.create_connection(('127.0.0.1', {port}))",
    "socket pair": "import socket\nsocket.socketpair()",
    "fork": "import os\nos.fork()",
    "fork bomb": "import os\nwhile True: os.fork()",
    "thread": "import threading\nthreading.Thread(target=print).start()",
    "program": "import subprocess\nsubprocess.run(['/bin/true'], check=True)",
    "become a program": "import os\nos.execv('/bin/true', ['true'])",
    "signal": "import os\nos.kill(os.getppid(), 9)",
    "limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    "namespace": "import ctypes\nif ctypes.CDLL(None, use_errno=True).unshare(0x10000000): raise OSError",
    "trace": "import ctypes\nif ctypes.CDLL(None).ptrace(0, 0, 0, 0) < 0: raise OSError",
    "mount": "import ctypes\nif ctypes.CDLL(None).mount(b'none', b'/mnt', b'tmpfs', 0, None) < 0: raise OSError",
}


@pytest.mark.parametrize("code", ATTEMPTS.values(), ids=ATTEMPTS)
def test_nothing_but_calculating_is_allowed(code: str, tmp_path: Path) -> None:
    """Each attempt fails in the sandbox, and leaves nothing behind."""
    old = tmp_path / "old"
    old.write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = server.getsockname()[1]
        ended = run(code.format(file=str(tmp_path / "new"), old=str(old), port=port))
        with pytest.raises(BlockingIOError):
            server.accept()
    assert ended.reason in {"PermissionError", "OSError", "RuntimeError", "ValueError", "FileNotFoundError"}, ended
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert old.read_text() == "kept" and old.stat().st_mode & 0o777


@pytest.mark.parametrize("code", ["import os\nos._exit(0)", "import ctypes\nctypes.string_at(0)"])
def test_who_leaves_before_the_tests_have_ended_has_not_passed(code: str) -> None:
    assert run(code) == Ended(False, "ended early")
    assert run("raise SystemExit(0)") == Ended(False, "SystemExit")


def test_a_pass_that_is_claimed_without_the_secret_is_none() -> None:
    claim = """
import os
for descriptor in range(3, 64):
    try: os.write(descriptor, b'["0", ""]')
    except OSError: pass
os._exit(0)
"""
    assert run(claim) == Ended(False, "ended early")


def test_no_environment_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_OF_MINE", "secret")
    assert run("import os\nassert set(os.environ) <= {'LC_CTYPE'}").passed  # Python's own


def test_other_files_cannot_be_read_where_the_kernel_has_landlock(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("secret")
    if not _has_landlock():
        pytest.skip("this kernel has no Landlock")
    assert run(f"open({str(tmp_path / 'mine')!r}).read()") == Ended(False, "PermissionError")
    assert run(f"open('/proc/{os.getpid()}/environ').read()") == Ended(False, "PermissionError")


def _has_landlock() -> bool:
    import ctypes

    version: int = ctypes.CDLL(None, use_errno=True).syscall(444, None, ctypes.c_size_t(0), 1)
    return version > 0


def test_a_machine_that_cannot_hold_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_sandbox.cache_clear()
    monkeypatch.setattr("sys.platform", "darwin")
    try:
        with pytest.raises(SandboxError, match="darwin"):
            run("pass")
    finally:
        require_sandbox.cache_clear()
