"""The native kernels in the package: what a wheel holds with a compiler and without, and what the library needs."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from polar_sdk.engine.native.build import INSTRUCTIONS, KINDS, BuildError, build_library, is_possible, library_name

ROOT = Path(__file__).parents[3]
NATIVE = ROOT / "polar_sdk" / "engine" / "native"
CROSS, ARM = "aarch64-linux-gnu-g++", 183
"""A compiler for 64-bit Arm, and that machine's number in the head of a library."""
NOT_IN_A_PACKAGE = shutil.ignore_patterns("*.so", "__pycache__", "compiled")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of the package, as somebody unpacks them."""
    root = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    for name in ("polar_sdk", "billing", "integrations"):
        shutil.copytree(ROOT / name, root / name, ignore=NOT_IN_A_PACKAGE)
    return root


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Those that the installation built of these sources, where it did; else new ones."""
    if not is_possible():
        pytest.skip("there are no kernels for machines of this kind")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("libraries")
    paths = [folder / library_name(kind) for kind in INSTRUCTIONS]
    for kind, path in zip(INSTRUCTIONS, paths, strict=True):
        if (built := NATIVE / path.name).exists():
            shutil.copy(built, path)
        else:
            build_library(kind, path)
    return paths


def wheel(tree: Path, folder: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=tree, env=os.environ | environment, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_a_wheel_brings_the_kernels(tree: Path, libraries: list[Path], tmp_path: Path) -> None:
    stale = tree / "polar_sdk" / "engine" / "native" / "kernels-0000000000000000.so"
    stale.write_bytes(b"of another state of the sources")
    built = wheel(tree, tmp_path)
    assert built.stem.endswith(f"-py3-none-linux_{platform.machine()}")
    with zipfile.ZipFile(built) as archive:
        brought = {Path(name).name: name for name in archive.namelist() if name.endswith(".so")}
        assert sorted(brought) == sorted(library.name for library in libraries)
        assert all(archive.read(brought[library.name]) == library.read_bytes() for library in libraries)


def test_what_a_compiler_does_not_know_is_left_out(tree: Path, libraries: list[Path], tmp_path: Path) -> None:
    newest = list(INSTRUCTIONS)[-1]
    there = tree / "polar_sdk" / "engine" / "native"
    for made in there.glob("*.so"):
        made.unlink()
    for library in libraries:
        if newest not in library.name:
            shutil.copy(library, there)
    older = tmp_path / "older"
    older.write_text(f'#!/bin/sh\ncase "$*" in */kernels-{newest}-*) exit 1 ;; esac\nexec c++ "$@"\n')
    older.chmod(0o755)
    with zipfile.ZipFile(wheel(tree, tmp_path, CXX=str(older))) as archive:
        brought = {Path(name).name for name in archive.namelist() if name.endswith(".so")}
    assert brought == {library.name for library in libraries if newest not in library.name}


@pytest.mark.long
@pytest.mark.skipif(shutil.which(CROSS) is None, reason=f"needs {CROSS}: apt install g++-aarch64-linux-gnu")
def test_a_compiler_for_arm_makes_a_wheel_for_arm(tree: Path, tmp_path: Path) -> None:
    built = wheel(tree, tmp_path, CXX=CROSS)
    assert built.stem.endswith("-py3-none-linux_aarch64")
    with zipfile.ZipFile(built) as archive:
        brought = {Path(name).name: archive.read(name) for name in archive.namelist() if name.endswith(".so")}
    assert brought.keys() == {library_name(kind) for kind in KINDS["aarch64"]}
    assert all(library[18] == ARM for library in brought.values())


def test_without_a_compiler_a_wheel_is_for_all_machines(tree: Path, tmp_path: Path) -> None:
    for made in (tree / "polar_sdk" / "engine" / "native").glob("*.so"):
        made.unlink()
    built = wheel(tree, tmp_path, CXX="no-such-compiler")
    assert built.stem.endswith("-py3-none-any")
    with zipfile.ZipFile(built) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]


def test_a_library_needs_nothing_but_the_system(libraries: list[Path]) -> None:
    """Neither torch nor a runtime of C++ or OpenMP: so one build serves all versions of them."""
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).polar_product; print(open('/proc/self/maps').read())"
    for library in libraries:
        command = [sys.executable, "-S", "-c", code, str(library)]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        assert library.name in ended.stdout
        for other in ("torch", "libstdc++", "libgomp"):
            assert other not in ended.stdout


def test_a_library_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BuildError, match="compiler 'false' failed with status 1"):
        build_library("avx512", tmp_path / "kernels.so")
    assert not list(tmp_path.iterdir())
