"""Products in every precision against the same sums in float64, and what panels stand for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polar_sdk.engine.panels import Blocks, Packed, PackedInt4, PackedInt8
from polar_sdk.engine.products import (
    INT4_GROUP,
    Int8,
    Plain,
    Product,
    look_up,
    multiply,
    outputs_from,
    pack,
    quantize,
    times,
)
from polar_sdk.errors import DeviceError

SHAPES = st.tuples(
    st.integers(1, 200),  # rows
    st.sampled_from([16, 48, 64, 80, 128]),  # outputs
    st.sampled_from([32, 64, 96]),  # inputs
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def _example(shape: tuple[int, int, int], dtype: torch.dtype, seed: int, biased: bool) -> tuple[torch.Tensor, Plain]:
    rows, outputs, inputs = shape
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=source).to(dtype)
    weight = (torch.randn(outputs, inputs, generator=source) * 0.1).to(dtype)
    bias = torch.randn(outputs, generator=source).to(dtype) if biased else None
    return x, Plain(weight, bias)


@given(rows=st.integers(0, 600), dtype=DTYPES, biased=st.booleans(), seed=st.integers(0, 2**31))
def test_padded_rows_give_the_same_product(rows: int, dtype: torch.dtype, biased: bool, seed: int) -> None:
    x, (weight, bias) = _example((rows, 48, 32), dtype, seed, biased)
    product = times(x, weight.T, bias)
    exact = x.double() @ weight.T.double() + (0 if bias is None else bias.double())
    assert (product.shape, product.dtype) == ((rows, 48), dtype)
    torch.testing.assert_close(product.double(), exact, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)


def test_few_numbers_of_rows_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    addmm = torch.addmm

    def noting(bias: torch.Tensor, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        sizes.append(x.shape[0])
        return addmm(bias, x, factor)

    monkeypatch.setattr(torch, "addmm", noting)
    factor, bias = torch.ones(2, 2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)
    for rows in range(65, 4097):
        assert len(times(torch.ones(rows, 2, dtype=torch.bfloat16), factor, bias)) == rows
        assert rows <= sizes[-1] < rows + max(64, rows / 4)
    assert len(set(sizes)) == 19


def _stored(product: Product) -> torch.Tensor:
    """The matrix that a product stands for, (N, K), in float64, read without the code under test."""
    match product:
        case Plain():
            return product.weight.double()
        case Packed():
            blocks = [panel.T.contiguous().view(product.bias.dtype) for panel in product.panels]
            return torch.cat(blocks)[: product.bias.shape[0]].double()
        case PackedInt8() | Blocks():
            raise AssertionError("compared with the matrix that it was packed from")
        case PackedInt4():
            return _codes_of(product)
        case Int8():
            return product.weight.double() * product.scale.double()[:, None]


def _codes_of(product: PackedInt4) -> torch.Tensor:
    """The matrix that 4-bit panels stand for, read byte by byte as their class describes them."""
    panels, groups, _ = product.panels.shape
    place = torch.arange(256)
    pair, output, number = place // 64, place // 4 % 16, place % 4
    numbers = product.panels[..., 256:].clone().view(product.bias.dtype).view(panels, groups, 16, 2).double()
    scale, zero = (each[..., output] for each in numbers.unbind(-1))  # (panels, groups, 256)
    matrix = torch.empty(panels, 16, groups, INT4_GROUP, dtype=torch.float64)
    for half, codes in enumerate((product.panels[..., :256] & 15, product.panels[..., :256] >> 4)):
        values = (codes.double() - 8) * scale + zero
        matrix[:, output, :, 4 * (2 * pair + half) + number] = values.permute(2, 0, 1)
    return matrix.view(16 * panels, -1)


def _close(got: torch.Tensor, x: torch.Tensor, product: Product) -> None:
    stored = _stored(product)
    expected = x.double() @ stored.T
    if product.bias is not None:
        expected = expected + product.bias.double()
    # What rounding each input, weight, partial sum and result to the dtype may add up to.
    size = x.double().abs() @ stored.abs().T + expected.abs() + 1
    error = (got.double() - expected).abs()
    limit = size * torch.finfo(x.dtype).eps * 4
    assert (error <= limit).all(), f"largest {error.max():.3g}, mean {error.mean():.3g}, allowed {limit.min():.3g}"


@given(SHAPES, DTYPES, st.sampled_from(["fp32", "int8", "int4"]), st.booleans(), st.integers(0, 2**20))
def test_every_precision_gives_the_sums_of_what_it_stores(
    shape: tuple[int, int, int], dtype: torch.dtype, precision: str, biased: bool, seed: int
) -> None:
    x, plain = _example(shape, dtype, seed, biased)
    product = quantize(plain, precision)
    got = multiply(x, product)
    assert got.dtype == dtype
    assert got.shape == (shape[0], shape[1])
    _close(got, x, product)


@given(st.integers(1, 5), st.integers(1, 100), st.integers(1, 70), st.booleans(), st.integers(0, 2**20))
def test_a_packed_matrix_is_the_matrix(rows: int, outputs: int, inputs: int, biased: bool, seed: int) -> None:
    x, plain = _example((rows, outputs, inputs), torch.bfloat16, seed, biased)
    packed = pack(plain)
    assert isinstance(packed, Packed)
    assert torch.equal(packed.unpack(inputs), plain.weight)
    _close(multiply(x, packed), x, plain)
    if inputs % 2 == 0:
        assert torch.equal(_stored(packed), plain.weight.double())
        tokens = torch.arange(outputs).flip(0)
        assert torch.equal(look_up(tokens, packed), look_up(tokens, plain.weight))
    for first in range(0, outputs, 16):
        part = outputs_from(packed, first)
        assert (part is None) == (first % 32 != 0)
        if part is not None:
            _close(
                multiply(x, part),
                x,
                Plain(plain.weight[first:], plain.bias if plain.bias is None else plain.bias[first:]),
            )


@given(st.integers(1, 5), st.integers(1, 100), st.integers(1, 100), st.booleans(), st.integers(0, 2**20))
def test_packed_bytes_are_the_integers(rows: int, outputs: int, inputs: int, biased: bool, seed: int) -> None:
    x, plain = _example((rows, outputs, inputs), torch.bfloat16, seed, biased)
    stored = quantize(plain, "int8")
    packed = pack(stored)
    assert isinstance(packed, PackedInt8)
    _same_matrix(packed, stored, x)


@given(st.integers(1, 5), st.sampled_from([16, 48, 128]), st.integers(1, 4), st.booleans(), st.integers(0, 2**20))
def test_packed_halves_of_bytes_are_the_codes(rows: int, outputs: int, groups: int, biased: bool, seed: int) -> None:
    x, plain = _example((rows, outputs, INT4_GROUP * groups), torch.bfloat16, seed, biased)
    stored = quantize(plain, "int4")
    assert isinstance(stored, PackedInt4)
    _same_matrix(stored, stored, x)


def _same_matrix(packed: PackedInt8 | PackedInt4, stored: Product, x: torch.Tensor) -> None:
    matrix = _stored(stored)
    unpacked = packed.unpack(x.shape[1])
    assert unpacked.shape == matrix.shape
    assert torch.allclose(unpacked.double(), matrix, rtol=2**-8, atol=0.002)  # one rounding, of a zero point besides
    for first in filter(lambda each: each < matrix.shape[0], (0, 1, 16, 32)):
        part = outputs_from(packed, first)
        assert (part is None) == (first == 1)
        if part is not None:
            _close(multiply(x, part), x, Plain(unpacked[first:], packed.bias[first:]))
    again = pack(packed)
    assert again is packed


@given(st.sampled_from([(64, 32), (48, 64), (128, 96)]), st.integers(0, 2**20))
def test_integers_stay_within_half_a_step_of_the_weights(sides: tuple[int, int], seed: int) -> None:
    _, plain = _example((1, *sides), torch.float32, seed, False)
    for precision, steps in (("int8", 127 * 2), ("int4", 15)):
        stored = _stored(quantize(plain, precision))
        spans = plain.weight.abs().amax(1) * 2 if precision == "int8" else None
        if spans is None:
            groups = plain.weight.view(sides[0], -1, INT4_GROUP)
            spans = (groups.amax(-1) - groups.amin(-1)).repeat_interleave(INT4_GROUP, 1)
        else:
            spans = spans[:, None]
        assert ((stored - plain.weight.double()).abs() <= spans * (0.5 / steps) * 1.001 + 1e-6).all()


def test_a_matrix_that_int4_cannot_group_stays_in_int8() -> None:
    assert isinstance(quantize(Plain(torch.randn(16, 40)), "int4"), Int8)
    assert isinstance(quantize(Plain(torch.randn(24, 64)), "int4"), Int8)
    assert isinstance(quantize(Plain(torch.randn(16, 64)), "int4"), PackedInt4)
    assert isinstance(quantize(Plain(torch.randn(16, 64)), "bf16"), Plain)


def test_int4_is_refused_where_there_is_no_kernel() -> None:
    with pytest.raises(DeviceError, match="int4"):
        quantize(Plain(torch.empty(16, 64, device="meta")), "int4")


MANY_LENGTHS = """
import psutil, torch
import polar_sdk.engine
weight, process = torch.randn(3840, 576).bfloat16(), psutil.Process()
for rows in range(1, 701):
    if rows == 101:
        before = process.memory_info().rss
    torch.nn.functional.linear(torch.randn(rows, 576).bfloat16(), weight)
print((process.memory_info().rss - before) // 2**20)
"""


def test_prompts_of_all_lengths_leave_no_code_behind() -> None:
    """Of what torch compiles for each number of rows: 390 MiB for these 600, were all of it kept."""
    done = subprocess.run([sys.executable, "-c", MANY_LENGTHS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 120, f"grew by {done.stdout.strip()} MiB"
