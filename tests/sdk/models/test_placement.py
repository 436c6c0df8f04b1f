"""Device and precision by name."""

from __future__ import annotations

import pytest
import torch

from polar_sdk.engine import native
from polar_sdk.errors import DeviceError
from polar_sdk.models.placement import choose_device, choose_precision

CPU = torch.device("cpu")


def test_auto_device_is_one_that_computes() -> None:
    device = choose_device("auto")
    assert torch.ones(2, device=device).sum().item() == 2
    if not torch.accelerator.is_available():
        assert device == CPU


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_cpu_has_one_spelling(name: str) -> None:
    assert str(choose_device(name)) == "cpu"


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "meta", "tpu", "cuda:x"])
def test_device_that_is_not_here(name: str) -> None:
    with pytest.raises(DeviceError, match="choose from: auto, cpu") as raised:
        choose_device(name)
    assert repr(name) in str(raised.value)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "short", "dtype"),
    [
        ("float32", "fp32", torch.float32),
        ("fp32", "fp32", torch.float32),
        ("bfloat16", "bf16", torch.bfloat16),
        ("bf16", "bf16", torch.bfloat16),
        ("float16", "fp16", torch.float16),
        ("fp16", "fp16", torch.float16),
    ],
)
def test_plain_precisions(name: str, short: str, dtype: torch.dtype) -> None:
    assert choose_precision(name, CPU) == (short, dtype)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_integer_precisions_compute_in_the_devices_own_dtype(name: str) -> None:
    assert choose_precision(name, CPU) == (name, choose_precision("auto", CPU)[1])


def test_int4_needs_a_kernel() -> None:
    with pytest.raises(DeviceError, match="'int4' is not available on 'cuda:0'; choose int8"):
        choose_precision("int4", torch.device("cuda:0"))


def test_auto_precision_is_never_half_on_a_cpu() -> None:
    assert choose_precision("auto", CPU) in {("fp32", torch.float32), ("bf16", torch.bfloat16)}


def test_auto_precision_where_native_kernels_came_along(monkeypatch: pytest.MonkeyPatch) -> None:
    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: False)
    monkeypatch.setattr(native, "comes_along", lambda: True)
    assert choose_precision("auto", CPU) == ("bf16", torch.bfloat16)


def test_auto_precision_without_bfloat16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "comes_along", lambda: False)
    # The processor cannot be changed in a test; what torch reports about it can.
    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: False, raising=False)
    assert choose_precision("auto", CPU) == ("fp32", torch.float32)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert choose_precision("auto", CPU) == ("bf16", torch.bfloat16)


@pytest.mark.parametrize("name", ["int3", "float64", "FLOAT32", "half", ""])
def test_unknown_precision(name: str) -> None:
    with pytest.raises(DeviceError, match="choose from: auto, bf16, fp16, fp32, int8, int4") as raised:
        choose_precision(name, CPU)
    assert repr(name) in str(raised.value)
