"""The inside of the sandbox: a separate script that confines itself, then runs code that nobody has reviewed.

`sandbox.py` starts it as `python -I -S` with an order on standard input; it needs only the standard library. It
confines itself with what the kernel offers any user: resource limits, a system-call filter that allows what a
calculation needs and refuses everything else, and, if the kernel has Landlock, rights to read only Python's own files.
None of this can be undone by the process or by what it runs.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import sys
from contextlib import suppress
from typing import Any, Final, NamedTuple

_AUDIT: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""How the kernel names the processor in a filter."""
_CALLS: Final[dict[str, tuple[int | None, int | None]]] = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, None),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "exit": (60, 93),
    "uname": (63, 160),
    "getcwd": (79, 17),
    "readlink": (89, None),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "time": (201, None),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "getdents64": (217, 61),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "newfstatat": (262, 79),
    "readlinkat": (267, 78),
    "faccessat": (269, 48),
    "set_robust_list": (273, 99),
    "getrandom": (318, 278),
    "membarrier": (324, 283),
    "statx": (332, 291),
    "rseq": (334, 293),
    "faccessat2": (439, 439),
}
"""System calls that a calculation needs, by number on x86-64 and on Arm; none of them leaves the process."""
_OPEN: Final = {"x86_64": ((257, 2), (2, 1)), "aarch64": ((56, 2),)}
"""Calls that open a file, and which argument says what for."""
_WRITES: Final = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000 | 0o20000000
"""Flags of opening to write, create, truncate, append, or make a nameless file."""
_LOAD, _EQUAL, _ANY, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
"""Verdicts of a filter; a refused call fails with EPERM."""
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
"""Places in what the kernel shows a filter. Unit: bytes."""
_OTHER_NUMBERS: Final = 0x40000000
"""From here on, x86-64 counts its calls a second time."""
_NO_NEW_PRIVILEGES, _SET_FILTER, _FILTER_MODE = 38, 22, 2
_CREATE_RULES, _ADD_RULE, _OBEY_RULES = 444, 445, 446
_READ_RIGHTS, _ALL_RIGHTS = 0b1101, (1 << 13) - 1
"""Landlock's rights to execute, read a file and list a folder; and all that its first version knows."""


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))


class _Instruction(NamedTuple):
    code: int
    value: int
    yes: int = 0
    no: int = 0

    @property
    def packed(self) -> bytes:
        return self.code.to_bytes(2, sys.byteorder) + bytes((self.yes, self.no)) + self.value.to_bytes(4, sys.byteorder)


def main() -> None:
    """Follow the order on standard input: lock the process in, run the code, and say how that ended."""
    order = json.loads(sys.stdin.buffer.read())
    result = os.dup(1)
    for stream, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        os.dup2(os.open(os.devnull, flags), stream)
    _limit(order["cpu_seconds"], order["memory"])
    _lock_in()
    ended = _run(order["head"], order["answer"], order["tests"])
    os.write(result, json.dumps([order["secret"], ended]).encode())
    os._exit(0)


def _run(head: str, answer: str, tests: str) -> str:
    """Run the answer and its tests; the name of the error that ended them, or nothing."""
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(compile(head + _whole_lines(head, answer) + tests, "<answer>", "exec"), names)
    except BaseException as error:  # whatever it raises, SystemExit too
        return type(error).__name__[:80]
    return ""


def _whole_lines(head: str, answer: str) -> str:
    """The answer without last lines that were cut off in the middle of a statement."""
    lines = answer.split("\n")
    for end in range(len(lines), 0, -1):
        with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            shorter = "\n".join(lines[:end])
            compile(head + shorter, "<answer>", "exec")
            return shorter
    return answer


def _limit(cpu_seconds: int, memory: int) -> None:
    for what, most in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(what, (most, most))


def _lock_in() -> None:
    library = ctypes.CDLL(None, use_errno=True)
    _check(library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _read_python_only(library)
    code = b"".join(instruction.packed for instruction in _filter(platform.machine()))
    held = ctypes.create_string_buffer(code, len(code))
    rules = _Filter(len(code) // 8, ctypes.cast(held, ctypes.c_void_p))
    _check(library.prctl(_SET_FILTER, _FILTER_MODE, ctypes.byref(rules), 0, 0))


def _check(status: int) -> None:
    if status < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _filter(machine: str) -> list[_Instruction]:
    column = list(_AUDIT).index(machine)
    numbers = sorted(number for pair in _CALLS.values() if (number := pair[column]) is not None)
    code = [
        _Instruction(_LOAD, _ARCHITECTURE),
        _Instruction(_EQUAL, _AUDIT[machine], yes=1),
        _Instruction(_RETURN, _KILL),
        _Instruction(_LOAD, _NUMBER),
        _Instruction(_AT_LEAST, _OTHER_NUMBERS, no=1),
        _Instruction(_RETURN, _REFUSE),
    ]
    for number, argument in _OPEN[machine]:  # the low half of an argument is where a flag is
        code += [
            _Instruction(_EQUAL, number, no=4),
            _Instruction(_LOAD, _ARGUMENTS + 8 * argument),
            _Instruction(_ANY, _WRITES, no=1),
            _Instruction(_RETURN, _REFUSE),
            _Instruction(_RETURN, _ALLOW),
        ]
    for allowed in numbers:
        code += [_Instruction(_EQUAL, allowed, no=1), _Instruction(_RETURN, _ALLOW)]
    return [*code, _Instruction(_RETURN, _REFUSE)]


def _read_python_only(library: ctypes.CDLL) -> None:
    """With Landlock, refuse to read anything but Python and the libraries of the system; without it, change nothing."""
    handled = ctypes.c_uint64(_ALL_RIGHTS)
    rules = library.syscall(_CREATE_RULES, ctypes.byref(handled), ctypes.c_size_t(8), 0)
    if rules < 0:
        return
    places = {sys.base_prefix, sys.prefix, *sys.path, "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache"}
    places |= {"/usr/share/zoneinfo", "/dev/null", "/dev/urandom"}
    for place in places:
        with suppress(OSError):
            opened = os.open(place, os.O_PATH | os.O_CLOEXEC)
            rights = _READ_RIGHTS if os.path.isdir(place) else _READ_RIGHTS & 0b101  # noqa: PTH112  (pathlib is slow)
            rule = rights.to_bytes(8, sys.byteorder) + opened.to_bytes(4, sys.byteorder)
            _check(library.syscall(_ADD_RULE, rules, 1, rule, 0))
            os.close(opened)
    _check(library.syscall(_OBEY_RULES, rules, 0))
    os.close(rules)


if __name__ == "__main__":
    main()
