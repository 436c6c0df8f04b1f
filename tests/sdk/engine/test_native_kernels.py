"""The kernels' own tests, `kernels_test.cpp`: with each library that this processor runs, and on an emulated Arm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from polar_sdk.engine import native as library
from polar_sdk.engine.native.build import FOLDER, build_library

pytestmark = pytest.mark.long

PROGRAM = Path(__file__).with_name("kernels_test.cpp")
ARM = ["neon/neoverse-n1", "neon/max", "i8mm/max"]
"""Kinds of library for Arm, and processors to emulate: one with dot products alone, and one with all that there is."""
CROSS, EMULATOR, SYSTEM = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"


@cache
def _output(kind: str, processor: str = "") -> str:
    """What the program prints with a library of that kind, on a processor that is emulated or on this one."""
    compiler = CROSS if processor else os.environ.get("CXX", "c++")
    if missing := [tool for tool in (compiler, *([EMULATOR] if processor else [])) if not shutil.which(tool)]:
        install = ": apt install g++-aarch64-linux-gnu qemu-user" if processor else ""
        pytest.skip(f"needs {' and '.join(missing)}{install}")
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setenv("CXX", compiler)
        kernels, program = Path(folder, "kernels.so"), Path(folder, "kernels_test")
        build_library(kind, kernels)
        flags = "-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{FOLDER}", "-pthread"
        subprocess.run([compiler, *flags, str(PROGRAM), str(kernels), "-o", str(program)], check=True)
        emulator = [EMULATOR, "-cpu", processor, "-L", SYSTEM] if processor else []
        done = subprocess.run([*emulator, str(program)], capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", library._kinds_of_library())
def test_on_this_processor(kind: str) -> None:
    assert "layers that decode" in _output(kind)


@pytest.mark.parametrize("target", ARM)
def test_on_arm(target: str) -> None:
    assert "layers that decode" in _output(*target.split("/"))


@pytest.mark.skipif("avx2" not in library._kinds_of_library(), reason="this processor has no AVX2")
@pytest.mark.parametrize("target", ARM)
def test_arm_computes_what_avx2_does(target: str) -> None:
    """To the bit: so what is measured and certified on one holds on the other."""
    digests = [re.findall(r"digest (\w+)", _output(*each.split("/"))) for each in ("avx2", target)]
    assert digests[0] == digests[1]
