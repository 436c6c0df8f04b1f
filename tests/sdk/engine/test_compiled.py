"""Compiled kernels against the same functions uncompiled, and the packages that store them on disk."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from polar_sdk.engine import native, package
from polar_sdk.engine.compiled import CompiledKernels, load_kernels, parts
from polar_sdk.engine.decoder import Decoder, build_decoder
from polar_sdk.engine.eager import Compiled, EagerKernels
from polar_sdk.engine.package import Part
from polar_sdk.engine.pages import PAGE
from polar_sdk.errors import CompileError
from polar_sdk.programs.program import Program
from polar_sdk.testing import random_fill, tiny_llama

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    LogitsOf = Callable[[Decoder, Sequence[str], Sequence[int], int], torch.Tensor]

LAYERS = 3
PROGRAMS = ("0-2", "0 2", "0 1 1 2", "0-1")


def _decoder(**options: int) -> Decoder:
    return build_decoder(tiny_llama(layers=LAYERS, **options), kv_memory=1 << 24)


@pytest.fixture(scope="module")
def decoder(packages: Path) -> Decoder:
    compiled = _decoder()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in every test of a tiny model; code is compiled for a number of threads
    try:
        kernels = load_kernels(compiled, packages, build=True)
    finally:
        torch.set_num_threads(threads)
    assert isinstance(kernels, CompiledKernels)
    compiled.kernels = kernels
    return compiled


@pytest.fixture(scope="module")
def eager() -> Decoder:
    return _decoder()


@pytest.mark.parametrize(
    ("programs", "prompts", "steps"),
    [
        (PROGRAMS[:1], [5], 3),
        (PROGRAMS[:1], [PAGE - 2], 4),  # grows into a second block
        (PROGRAMS[:1], [3 * PAGE], 2),
        (PROGRAMS[:2], [5, 9], 3),
        (PROGRAMS[:1] * 2, [5, 70], 3),  # two rows through code for one
        (PROGRAMS, [3, PAGE, 2 * PAGE + 1, 1], 4),
        (PROGRAMS[:1] * 6, [4, 5, 6, 7, 8, 150], 2),
    ],
)
def test_compiled_is_eager(
    decoder: Decoder,
    eager: Decoder,
    logits_of: LogitsOf,
    programs: tuple[str, ...],
    prompts: list[int],
    steps: int,
) -> None:
    error = (logits_of(decoder, programs, prompts, steps) - logits_of(eager, programs, prompts, steps)).abs()
    assert error.max() < 1e-3, f"largest {error.max():.2e}, mean {error.mean():.2e}"


@pytest.mark.parametrize("stage", [Compiled.ONE_ROW, Compiled.ROWS])
@pytest.mark.parametrize(
    ("programs", "prompts"),
    [(PROGRAMS[:1], [3 * PAGE]), (PROGRAMS, [3, PAGE, 2 * PAGE + 1, 1]), (PROGRAMS[:1] * 6, [4, 5, 6, 7, 8, 150])],
)
def test_a_stage_is_eager(
    decoder: Decoder,
    eager: Decoder,
    packages: Path,
    tmp_path: Path,
    logits_of: LogitsOf,
    stage: Compiled,
    programs: tuple[str, ...],
    prompts: list[int],
) -> None:
    """What is compiled of a model before all of it is does the same; of a stage that is not whole nothing is used."""
    partly = _decoder()
    needed = list(parts(partly).values())
    there = [part for part in needed if part.stage <= stage]
    for part in needed[: len(there) + 1]:
        (tmp_path / f"{part.key}.pt2").write_bytes((packages / f"{part.key}.pt2").read_bytes())
    assert load_kernels(partly, tmp_path, build=False) is None
    kernels = load_kernels(partly, tmp_path, build=False, partly=True)
    assert kernels is not None
    assert kernels.compiled == stage
    partly.kernels = kernels
    error = (logits_of(partly, programs, prompts, 3) - logits_of(eager, programs, prompts, 3)).abs()
    assert error.max() < 1e-3, f"largest {error.max():.2e}, mean {error.mean():.2e}"


@pytest.mark.parametrize(
    ("programs", "prompts"),
    [
        (("0 (1-2)",), [1]),
        (("0 (1-2)",), [2 * PAGE + 1]),
        (("0 (1-2:40)",), [100]),  # more tokens run than attend by themselves
        (("0 (1:3) 2", "0-2", "0-1 (2)", "0 (1-2:40)"), [PAGE, 9, 70, 90]),
    ],
)
def test_compiled_fills_are_eager_ones(
    decoder: Decoder, eager: Decoder, logits_of: LogitsOf,
    programs: tuple[str, ...], prompts: list[int],
) -> None:  # fmt: skip
    for each in (decoder, eager):
        segments = {segment for text in programs for segment in Program.parse(text).fills}
        each.set_fills({segment: random_fill(each, segment) for segment in segments})
    error = (logits_of(decoder, programs, prompts, 2) - logits_of(eager, programs, prompts, 2)).abs()
    assert error.max() < 1e-3, f"largest {error.max():.2e}, mean {error.mean():.2e}"


def test_only_tokens_that_run_reach_the_compiled_layer(
    decoder: Decoder, logits_of: LogitsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a prompt of 100 tokens, 2 run a filled layer; of the last visit 1 token runs, and the others leave keys."""
    tokens: list[tuple[str, int]] = []

    def counted(name: str) -> None:
        run = getattr(decoder.kernels, name)

        def spy(w: object, x: torch.Tensor, *rest: object) -> object:
            tokens.append((name, x.shape[0]))
            return run(w, x, *rest)

        monkeypatch.setattr(decoder.kernels, name, spy)

    for name in ("project", "keys_values", "finish", "decode"):
        counted(name)
    decoder.set_fills({(1, 1): random_fill(decoder, (1, 1))})
    logits_of(decoder, ["0 (1) 2"], [100], 0)
    assert tokens == [("project", 100), ("finish", 100), ("decode", 2), ("keys_values", 99), ("decode", 1)]


@pytest.mark.parametrize("rows", [1, 2, 3, 17])
@torch.inference_mode()
def test_parts_are_what_the_family_computes(decoder: Decoder, rows: int) -> None:
    eager, weights = EagerKernels(decoder.family), decoder.layers[0]
    x = torch.randn(rows, decoder.family.hidden)
    rotary = decoder.rotary(torch.arange(rows), rows)[0]
    kernels = decoder.kernels
    for ours, theirs in zip(kernels.project(weights, x, rotary), eager.project(weights, x, rotary), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    ours_theirs = zip(kernels.keys_values(weights, x, rotary), eager.keys_values(weights, x, rotary), strict=True)
    for ours, theirs in ours_theirs:
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kernels.finish(weights, x, x), eager.finish(weights, x, x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kernels.head(decoder.ends, x), eager.head(decoder.ends, x), atol=1e-4, rtol=1e-4)


def test_what_is_on_disk_is_not_compiled_again(
    decoder: Decoder, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Part, "compile", lambda self, path: pytest.fail("compiled again"))
    assert load_kernels(_decoder(), packages, build=True) is not None
    assert load_kernels(_decoder(), packages, build=False) is not None


def test_nothing_on_disk_and_no_permission_to_build(tmp_path: Path) -> None:
    assert load_kernels(_decoder(), tmp_path, build=False) is None


OPENING = """
import sys
from pathlib import Path
from polar_sdk.engine.compiled import load_kernels
from tests.sdk.engine.test_compiled import _decoder
print(load_kernels(_decoder(), Path(sys.argv[1]), build=False) is not None)
"""


@pytest.mark.usefixtures("decoder")
def test_a_machine_without_a_compiler_opens_what_another_one_compiled(packages: Path, tmp_path: Path) -> None:
    shutil.copytree(packages, tmp_path, dirs_exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", OPENING, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "CXX": "no-such-compiler", **threads},
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


@pytest.mark.parametrize("damage", [b"", b"not a package", None])
@pytest.mark.usefixtures("decoder")
def test_a_damaged_package_is_rebuilt(packages: Path, tmp_path: Path, damage: bytes | None) -> None:
    decoder = _decoder()
    files = {part.key: packages / f"{part.key}.pt2" for part in parts(decoder).values()}
    for file in files.values():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    head = _head(decoder)
    broken = tmp_path / f"{head.key}.pt2"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert load_kernels(decoder, tmp_path, build=False) is None
    names: list[str] = []
    kernels = load_kernels(decoder, tmp_path, build=True, progress=lambda name, number, count: names.append(name))
    assert kernels is not None
    assert names == ["head 1"]


def test_what_our_headers_break_is_compiled_with_the_standard_ones(
    eager: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of torch may need more than they have."""
    (tmp_path / "regex").write_text("#error not enough")
    monkeypatch.setattr(package, "_RUNTIME", tmp_path)
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", "/nowhere")
    part = replace(_head(eager), assumptions="uncached")
    part.compile(tmp_path / "head.pt2")
    x, ends = torch.randn(1, eager.family.hidden), eager.ends
    (logits,) = package.open_package(tmp_path / "head.pt2").run([x, *package.flat(ends)])
    torch.testing.assert_close(logits, eager.family.logits(x, ends), atol=1e-4, rtol=1e-4)
    assert os.environ["CPLUS_INCLUDE_PATH"] == "/nowhere"
    assert [path.name for path in tmp_path.glob("head*")] == ["head.pt2"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_our_headers_take_the_name_of_a_device_apart_as_the_standard_ones_do(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text(
        r"""#include <iostream>
        #include <regex>
        int main(int count, char** names) {
          std::regex re("(cpu|cuda|xpu|mps)(:([0-9]+))?");
          for (int i = 1; i < count; ++i) {
            const std::string name = names[i];
            std::smatch sm;
            if (!std::regex_match(name, sm, re)) { std::cout << "no\n"; continue; }
            std::cout << sm[1].str() << ' ' << sm[3].matched << ' ' << sm[3].str() << '\n';
          }
          try {
            std::regex other("a+");
            std::cout << "taken";
          } catch (const std::exception&) {
            std::cout << "refused";
          }
        }"""
    )
    names = ["cpu", "cuda:0", "cuda:12", "xpu", "mps:3", "", ":", "cpu:", "cpu:x", "cpu:1x", "cuda:1:2", "tpu", "cpu0"]

    def run(*options: str) -> list[str]:
        program = str(tmp_path / "a.out")
        subprocess.run(["g++", "-std=c++20", *options, str(tmp_path / "a.cpp"), "-o", program], check=True)
        return subprocess.run([program, *names], check=True, capture_output=True, text=True).stdout.splitlines()

    ours, standard = run("-isystem", str(package._RUNTIME)), run()
    assert ours[:-1] == standard[:-1]
    assert (ours[-1], standard[-1]) == ("refused", "taken")


def _keys(decoder: Decoder) -> set[str]:
    return {part.key for part in parts(decoder).values()}


def test_a_key_names_all_that_the_code_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = _keys(_decoder())
    assert keys == _keys(_decoder(seed=1))  # other weights of the same shapes
    assert keys.isdisjoint(_keys(_decoder(intermediate_size=112)))
    assert keys.isdisjoint(_keys(build_decoder(tiny_llama(layers=LAYERS).bfloat16(), kv_memory=1 << 24)))
    assert keys.isdisjoint(_keys(build_decoder(tiny_llama(layers=LAYERS), precision="int8", kv_memory=1 << 24)))
    assert keys.isdisjoint(_keys(_decoder(num_key_value_heads=4)))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "0.0")
        assert keys.isdisjoint(_keys(_decoder()))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_num_threads", lambda: 77)
        assert keys.isdisjoint(_keys(_decoder()))
    with monkeypatch.context() as patched:
        patched.setattr(native, "processor", lambda: "another")
        assert keys.isdisjoint(_keys(_decoder()))
    assert keys == _keys(_decoder())


def _head(decoder: Decoder) -> Part:
    return next(part for part in parts(decoder).values() if part.name == "head 1")


def test_a_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eager: Decoder
) -> None:
    """And torch is not asked to write: where it cannot, it ends the process."""
    built: list[object] = []

    def write_bytes(self: Path, data: bytes) -> int:
        built.append(data)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(CompileError, match="no space left for compiled layers") as caught:
        replace(_head(eager), assumptions="uncached").compile(tmp_path / "head.pt2")
    assert caught.value.hint is not None
    assert "POLAR_CACHE" in caught.value.hint
    assert len(built) == 1
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_the_error_says_so_and_eager_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eager: Decoder, logits_of: LogitsOf
) -> None:
    import torch._inductor.config as options

    monkeypatch.setenv("PATH", "")
    part = replace(_head(eager), assumptions="uncached")
    with (
        options.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(CompileError, match="cannot be compiled") as caught,
    ):
        part.compile(tmp_path / "head.pt2")
    assert caught.value.hint is not None
    assert "compile=False" in caught.value.hint
    assert not list(tmp_path.iterdir())
    assert logits_of(eager, PROGRAMS[:1], [4], 1).isfinite().all()
