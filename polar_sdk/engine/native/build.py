"""Compiles the kernels to a library that depends on neither Python nor torch.

A library works on every processor with its instruction sets, and with every version of torch. The build of this package
runs this before anything else is installed (`hatch_build.py`), so it needs only the standard library.
`polar models kernels` builds what is missing into an installed package.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent
_SOURCE: Final = "kernels.cpp"
_FLAGS: Final = (
    *("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"),
    # Its own runtime of C++, which nobody else in the process sees.
    *("-static-libstdc++", "-static-libgcc", "-Wl,-s"),
)
_AVX512: Final = ("fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")
KINDS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "x86_64": {
        "avx2": ("avx2", "fma", "f16c"),
        "avxvnni": ("avx2", "fma", "f16c", "avxvnni"),
        "avx512": _AVX512,
        "avx512bf16": (*_AVX512, "avx512bf16"),
        "amx": (*_AVX512, "avx512bf16", "amx-tile", "amx-bf16"),
    },
    "aarch64": {"neon": ("asimddp",), "i8mm": ("asimddp", "i8mm")},
}
"""By machine, the kinds of library, from the oldest processors to the newest, and Linux's names of the instruction sets
of each."""
INSTRUCTIONS: Final = KINDS.get(platform.machine(), {})
"""Those of this machine."""
_EXPORTS: Final = "{ global: polar_*; local: *; };"


class BuildError(Exception):
    """The library cannot be compiled; says why."""


def library_name(kind: str) -> str:
    """Name of the library's file for one of `KINDS`, from all that it is made of."""
    digest = hashlib.sha256(f"{_FLAGS}|{_instruction_flags(kind)}|{_EXPORTS}".encode())
    for file in sorted(FOLDER.glob("*.h")):
        digest.update(file.read_bytes())
    digest.update((FOLDER / _SOURCE).read_bytes())
    return f"kernels-{kind}-{digest.hexdigest()[:16]}.so"


def _compiler() -> str | None:
    return os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)


def compiled_machine() -> str:
    """The machine that the compiler is for, such as `aarch64`: `CXX` may name one for another machine than this."""
    try:
        asked = subprocess.run([_compiler() or "", "-dumpmachine"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return platform.machine()
    return asked.stdout.partition("-")[0]


def _instruction_flags(kind: str) -> tuple[str, ...]:
    sets = next(kinds[kind] for kinds in KINDS.values() if kind in kinds)
    if "asimddp" not in sets:
        return tuple(f"-m{name}" for name in sets)
    # To schedule before registers are given away, as on Arm alone, leaves too few for the sums of a product.
    return f"-march=armv8.2-a+{'+'.join(sets).replace('asimddp', 'dotprod')}", "-fno-schedule-insns"


def is_possible() -> bool:
    """Whether there are kernels for machines of this kind."""
    return sys.platform.startswith("linux") and bool(INSTRUCTIONS)


@cache
def processor() -> str:
    """Vendor and instruction sets of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("vendor_id", "flags", "Features"))}))


def kinds_that_run(kinds: dict[str, tuple[str, ...]]) -> list[str]:
    """Those of the kinds that this processor runs, the fastest first."""
    has = set(processor().replace("_", "").split())
    return [kind for kind in reversed(kinds) if has >= {name.replace("-", "") for name in kinds[kind]}]


def build_library(kind: str, target: Path) -> None:
    """Compile the library for one of `KINDS`; its file appears whole or not at all.

    For another machine than this one, `CXX` must name a compiler for it.

    Raises:
        BuildError: There is no compiler, or it failed.
        OSError: The file cannot be written.
    """
    if (compiler := _compiler()) is None:
        raise BuildError("there is no C++ compiler")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".kernels-") as scratch:
        exports, draft = Path(scratch, "exports"), Path(scratch, target.name)
        exports.write_text(_EXPORTS, encoding="utf-8")
        flags = [*_FLAGS, *_instruction_flags(kind)]
        command = [compiler, *flags, str(FOLDER / _SOURCE), "-o", str(draft), f"-Wl,--version-script={exports}"]
        try:
            ended = subprocess.run([*command, "-ldl"], capture_output=True, text=True, check=False)
        except OSError as error:
            raise BuildError(f"compiler {compiler!r} cannot be started ({error.strerror or error})") from error
        if ended.returncode:
            raise BuildError(ended.stderr.strip() or f"compiler {compiler!r} failed with status {ended.returncode}")
        draft.replace(target)


def missing(machine: str = platform.machine()) -> list[str]:
    """Kinds of library for such machines of which there is none beside this file."""
    kinds = KINDS.get(machine, {}) if sys.platform.startswith("linux") else {}
    return [kind for kind in kinds if not (FOLDER / library_name(kind)).exists()]


def build_missing(machine: str = platform.machine(), *, fastest: bool = False) -> dict[str, str]:
    """Build the libraries that are missing, side by side, and remove those of other sources or for other machines.

    Args:
        machine: What they are for.
        fastest: Whether to build only the fastest that this processor runs, if it is such a machine.

    Returns:
        Why a library could not be built, by its kind.
    """
    kinds = KINDS.get(machine, {})
    for other in set(FOLDER.glob("kernels-*.so")).difference(FOLDER / library_name(kind) for kind in kinds):
        other.unlink()

    def why_not(kind: str) -> str:
        try:
            build_library(kind, FOLDER / library_name(kind))
        except (BuildError, OSError) as error:
            return (str(error).strip().splitlines() or [repr(error)])[0]
        return ""

    wanted = missing(machine)
    if fastest and (own := kinds_that_run(INSTRUCTIONS)) and machine == platform.machine():
        wanted = [kind for kind in wanted if kind == own[0]]
    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        reasons = dict(zip(wanted, compilers.map(why_not, wanted), strict=True))
    return {kind: reason for kind, reason in reasons.items() if reason}
