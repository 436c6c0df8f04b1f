"""Matrices in the formats of GGUF files: packed, looked up and multiplied, on every instruction set that is here."""

from __future__ import annotations

from dataclasses import replace
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st

from polar_sdk.engine import native
from polar_sdk.engine.large_pages import LargePages
from polar_sdk.engine.panels import Blocks, StoredMatrix
from polar_sdk.engine.products import Plain, multiply, multiply_wide, outputs_from, pack
from tests.sdk.engine.test_native import KIND, KINDS, RUN_HERE, every, using  # noqa: F401

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMS = native.FORMS[4:]
_SCALES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
"""Where in a block its scales of 16 bits are; the other bytes may be any."""

pytestmark = pytest.mark.usefixtures("every")


def some_rows(form: str, outputs: int, inputs: int, seed: int) -> NDArray[np.uint8]:
    """Random rows of a matrix in a format."""
    random, (block, size) = np.random.default_rng(seed), gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form]]
    blocks = random.integers(0, 256, (outputs, inputs // block, size), dtype=np.uint8)
    for place in _SCALES.get(form, (size - 2,)):
        scales = random.normal(0, 0.01, blocks.shape[:2]).astype(np.float16)
        blocks[:, :, place : place + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(outputs, -1)


def _stored(form: str, rows: NDArray[np.uint8], inputs: int, order: torch.Tensor | None = None) -> StoredMatrix:
    def fill(panels: torch.Tensor) -> None:
        with TemporaryFile(buffering=0) as file:
            file.write(b"before" + rows.tobytes())
            native.pack(form, file.fileno(), len(b"before"), order, inputs, len(rows), panels)

    return StoredMatrix(form, inputs, len(rows), fill, LargePages())


def _numbers(form: str, rows: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(dequantize(rows, gguf.GGMLQuantizationType[form]))


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """Rows in 8-bit integers, 16 to a scale, as they are multiplied; float64."""
    groups = x.float().view(x.shape[0], -1, 16).numpy()
    most = np.abs(groups).max(-1, keepdims=True)
    integers = np.rint(
        groups * (np.float32(127) / most)
    )  # torch divides by way of a reciprocal, which is another number
    return torch.from_numpy(integers.astype(np.float64) * (most / np.float32(127))).flatten(1)


@given(
    kind=KINDS,
    form=st.sampled_from(FORMS),
    rows=st.sampled_from([1, 2, 3, 7, 8, 9, 17, 40]),
    outputs=st.integers(1, 70),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
def test_rows_and_blocks(kind: str, form: str, rows: int, outputs: int, blocks: int, seed: int) -> None:
    """Weights are those of the file to the bit; a product is that of rounded rows with them, to float32's own error."""
    inputs = 256 * blocks
    file, bias = some_rows(form, outputs, inputs, seed), torch.randn(outputs).bfloat16()
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).bfloat16()
    with using(kind), torch.inference_mode():
        matrix = Blocks.of([_stored(form, file, inputs)], bias)
        got, rounded, unpacked = multiply_wide(x, matrix), multiply(x, matrix), matrix.unpack(inputs)
    weight = _numbers(form, file)
    assert torch.equal(unpacked, weight.bfloat16())
    near = _rounded(x)
    expected = near @ weight.double().T + bias.double()
    size = near.abs() @ weight.double().abs().T
    assert ((got - expected).abs() <= size * 2**-18 + expected.abs() * 2**-20).all()
    assert torch.equal(got.bfloat16(), rounded)
    with using(kind), torch.inference_mode():
        fine = multiply_wide(x, replace(matrix, fine=True))
    expected = x.double() @ weight.double().T + bias.double()
    greatest, least = fine.amax(1, keepdim=True), fine.amin(1, keepdim=True)
    bound = torch.where(fine >= greatest - (greatest - least) / 20, 2.0**-13, 2.0**-6)
    assert ((fine - expected).abs() <= size * bound).all()
    assert (
        expected.gather(1, fine.argmax(1, keepdim=True))
        >= expected.amax(1, keepdim=True) - size.amax(1, keepdim=True) * 2**-12
    ).all()


@pytest.mark.parametrize("form", FORMS)
def test_all_instruction_sets_compute_the_same(form: str) -> None:
    file, x = some_rows(form, 48, 512, 0), torch.randn(21, 512).bfloat16()
    results = []
    for kind in RUN_HERE:
        with using(kind), torch.inference_mode():
            results.append(multiply_wide(x, Blocks.of([_stored(form, file, 512)], None)))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fine", [False, True])
def test_a_row_is_the_same_whatever_rows_are_beside_it(form: str, fine: bool) -> None:
    x = torch.randn(300, 2048).bfloat16()
    with torch.inference_mode():
        matrix = replace(Blocks.of([_stored(form, some_rows(form, 32, 2048, 0), 2048)], None), fine=fine)
        whole = multiply_wide(x, matrix)
        for count in (1, 2, 3, 4, 5, 8, 9, 120, 257):
            assert torch.equal(multiply_wide(x[:count], matrix), whole[:count]), count
        assert torch.equal(multiply_wide(x[7:], matrix), whole[7:])


def test_outputs_in_several_formats_and_in_another_order() -> None:
    x, order = torch.randn(5, 256).bfloat16(), torch.randperm(32)
    forms = {"Q4_K": 32, "Q6_K": 16, "Q8_0": 20}
    files = {form: some_rows(form, outputs, 256, 1) for form, outputs in forms.items()}
    stored = [_stored(form, file, 256, order if form == "Q4_K" else None) for form, file in files.items()]
    parts = [_numbers(form, file) for form, file in files.items()]
    weight = torch.cat((parts[0][order], *parts[1:])).bfloat16()
    with torch.inference_mode():
        matrix, bias = Blocks.of(stored, None), torch.randn(68).bfloat16()
        assert torch.equal(matrix.unpack(256), weight)
        assert torch.equal(matrix.look_up(torch.tensor([67, 0, 33])), weight[[67, 0, 33]])
        whole = multiply(x, Blocks.of(stored, bias))
        for first in (16, 32, 48):
            assert torch.equal(multiply(x, _part(Blocks.of(stored, bias), first)), whole[:, first:]), first
        assert outputs_from(matrix, 20) is None
    with pytest.raises(IndexError):
        matrix.look_up(torch.tensor([68]))


def test_outputs_that_are_numbers_stand_between_others() -> None:
    x, numbers = torch.randn(5, 256).bfloat16(), torch.randn(64, 256).bfloat16()
    ends = [_stored(form, some_rows(form, 32, 256, 1), 256) for form in ("Q4_K", "Q6_K")]
    with torch.inference_mode():
        matrix = Blocks.of([ends[0], numbers, ends[1]], None)
        apart = [multiply(x, each.alone) for each in ends]
        whole = torch.cat((apart[0], multiply(x, pack(Plain(numbers))), apart[1]), 1)
        assert torch.equal(multiply(x, matrix), whole)
        for first in (32, 64, 96):
            assert torch.equal(multiply(x, _part(matrix, first)), whole[:, first:]), first
        assert outputs_from(matrix, 48) is None
        assert torch.equal(matrix.look_up(torch.arange(32, 96)), numbers)


def test_gradients_pass() -> None:
    matrix = Blocks.of([_stored("Q4_K", some_rows("Q4_K", 16, 256, 0), 256)], None)
    x = torch.randn(3, 256).bfloat16().requires_grad_()
    (gradient,) = torch.autograd.grad(multiply(x, matrix).sum(), x)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_in_weights_and_kept_in_rows(form: str, bad: float) -> None:
    file, x = some_rows(form, 20, 512, 0), torch.randn(3, 512).bfloat16()
    x[1, 300] = bad
    with torch.inference_mode():
        got = multiply(x, Blocks.of([_stored(form, file, 512)], None))
    assert not got[1].isfinite().any()
    assert got[[0, 2]].isfinite().all()
    for place in _SCALES.get(form, (208,)):
        broken = file.reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form]][1]).copy()
        broken[-1, place : place + 2] = np.array([bad], np.float16).view(np.uint8)
        with pytest.raises(ArithmeticError):
            Blocks.of([_stored(form, broken.reshape(20, -1), 512)], None)


def _part(matrix: Blocks, first: int) -> Blocks:
    part = matrix.outputs_from(first)
    assert part is not None
    return part
