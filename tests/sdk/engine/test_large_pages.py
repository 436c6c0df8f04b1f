"""Weights in large pages: the same numbers, in memory that asks for them and is given back."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polar_sdk.engine.large_pages import LargePages
from polar_sdk.engine.products import Int8, Plain

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has them")


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=6))
def test_matrices_are_the_same(shapes: list[tuple[int, int]]) -> None:
    memory, norm = LargePages(), torch.ones(3)
    for outputs, inputs in shapes:
        weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
        integers = Int8(torch.ones(outputs, inputs, dtype=torch.int8), torch.randn(outputs).bfloat16(), None)
        placed = memory.place({"a": Plain(weight, bias), "b": integers, "norm": norm, "none": None})
        assert torch.equal(placed["a"].weight, weight)
        assert torch.equal(placed["a"].bias, bias)
        assert torch.equal(placed["b"].weight, integers.weight)
        assert placed["b"].bias is None
        assert placed["norm"] is norm
        assert placed["none"] is None
        assert all(part.data_ptr() % 64 == 0 for part in placed["a"])


def test_a_matrix_on_another_device_stays_there() -> None:
    plain = Plain(torch.empty(3, 4, device="meta"), None)
    assert LargePages().place({"a": plain})["a"].weight is plain.weight


@linux
def test_the_memory_asks_for_large_pages() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has none")
    weight = LargePages().place({"a": Plain(torch.ones(1024, 1024))})["a"].weight
    assert "hg" in _flags(weight.data_ptr())


def _flags(address: int) -> list[str]:
    """Flags of the mapping that holds an address, from the kernel."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(number, 16) for number in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("no mapping holds the address")


@linux
def test_memory_is_given_back_with_its_last_matrix() -> None:
    memory, process = LargePages(), psutil.Process()
    kept = [memory.place({"a": Plain(torch.ones(1 << 12, 1 << 12))}) for _ in range(4)]  # 64 MiB each
    before = process.memory_info().rss
    del kept[:3]
    assert before - process.memory_info().rss > 150 << 20
    assert bool((kept[0]["a"].weight == 1).all())
