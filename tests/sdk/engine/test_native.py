"""Native kernels against the same sums in float64, and what happens where they cannot be compiled or used."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polar_sdk.engine import native as library
from polar_sdk.engine.attention import attend_row, write_pages
from polar_sdk.engine.decoder import Decoder, build_decoder
from polar_sdk.engine.forward import next_logits
from polar_sdk.engine.kernels import NativeLayers, TorchKernels
from polar_sdk.engine.native import build
from polar_sdk.engine.pages import PAGE
from polar_sdk.engine.panels import Packed, PackedInt4, PackedInt8
from polar_sdk.engine.products import Int8, Plain, multiply, multiply_wide, pack, quantize, times
from polar_sdk.engine.row import Row
from polar_sdk.engine.types import AttentionKind
from polar_sdk.errors import DeviceError
from polar_sdk.model import PolarModel
from polar_sdk.programs.cost import pieces
from polar_sdk.programs.program import Program
from polar_sdk.testing import random_fill, tiny_llama, tiny_tokenizer
from tests.sdk.paged import paged_decode

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from polar_sdk.engine.types import Visits

    LogitsOf = Callable[[Decoder, Sequence[str], Sequence[int], int], torch.Tensor]

HALF, CPU = torch.bfloat16, torch.device("cpu")
ATTENTION = st.builds(
    AttentionKind,
    scale=st.sampled_from([0.125, 0.3]),
    window=st.sampled_from([None, 1, 5, 64, 100]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
)
HEADS = st.tuples(st.integers(1, 3), st.integers(1, 6), st.sampled_from([32, 64, 96, 128]))
"""Groups, heads that share them, and their size."""


RUN_HERE = library._kinds_of_library()
"""Libraries that this processor can run; the first is the one that is used."""
KIND = RUN_HERE[0] if RUN_HERE else None
KINDS = st.sampled_from(RUN_HERE or [""])
MANY, BY_NUMBERS = 32, ("amx", "avxvnni", "avx2", "neon", "i8mm")
"""Rows up to which integer weights stay integers, also in the libraries that make numbers of them for more rows."""
_every: dict[str, ctypes.CDLL] = {}


@pytest.fixture(scope="session")
def every(native: None) -> None:
    """The libraries for older processors as well."""
    used = dict(library._loaded)
    for kind in RUN_HERE:
        library._loaded.clear()
        library._load(build.FOLDER / build.library_name(kind))
        (_every[kind],) = library._loaded.values()
    library._loaded.clear()
    library._loaded.update(used)


@contextmanager
def using(kind: str) -> Iterator[None]:
    """Within the block, calls go to the library of that kind."""
    used = dict(library._loaded)
    library._loaded.clear()
    library._loaded[kind] = _every[kind]
    try:
        yield
    finally:
        library._loaded.clear()
        library._loaded.update(used)


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(HALF)


def _assert_close(got: torch.Tensor, expected: torch.Tensor, size: torch.Tensor) -> None:
    """As close as one rounding of the result and float32 sums of terms of this size allow."""
    assert got.dtype == HALF
    error = (got.double() - expected).abs()
    limit = expected.abs() * 2**-8 + size * 2**-18 + 1e-30
    assert (error <= limit).all(), f"largest {error.max():.3g}, mean {error.mean():.3g}, allowed {limit.min():.3g}"


def _product(x: torch.Tensor, plain: Plain, pairs: bool, team: bool = True) -> torch.Tensor:
    packed = pack(plain)
    assert isinstance(packed, Packed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(library, "pairs", lambda: pairs)
        patched.setattr(library, "shared_by", lambda _: library._sharing(torch.get_num_threads(), team))
        return library.product(x, packed.matrix(x.shape[1]))


@pytest.mark.usefixtures("every")
@given(
    kind=KINDS,
    rows=st.integers(1, 70),
    outputs=st.integers(1, 100),
    inputs=st.integers(1, 130),
    pairs=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_a_product_is_rounded_once(
    kind: str, rows: int, outputs: int, inputs: int, pairs: bool, biased: bool, seed: int
) -> None:
    x, weight = _random(seed, rows, inputs), _random(seed + 1, outputs, inputs)
    bias = _random(seed + 2, outputs) if biased else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    with using(kind):
        got = _product(x, Plain(weight, bias), pairs)
    _assert_close(got, expected, x.double().abs() @ weight.double().abs().T + 1)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize(("rows", "inputs"), [(300, 1536), (513, 2049), (25, 40_000)])
def test_a_product_of_many_rows(rows: int, inputs: int, pairs: bool) -> None:
    """More words than a block of rows holds."""
    x, weight = _random(0, rows, inputs), _random(1, 65, inputs)
    got = _product(x, Plain(weight), pairs)
    _assert_close(got, x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("inputs", [576, 600])
def test_a_row_is_the_same_whatever_rows_are_beside_it(pairs: bool, inputs: int) -> None:
    """To the bit."""
    x, weight = _random(0, 40, inputs), _random(1, 72, inputs)
    whole = _product(x, Plain(weight), pairs)
    for count in (1, 2, 3, 4, 5, 8, 9, 11, 13, 16, 17, 24, 25, 32, 33):
        assert torch.equal(_product(x[:count], Plain(weight), pairs), whole[:count]), count


@pytest.mark.usefixtures("native")
def test_a_factor_is_not_taken_for_one_that_had_its_place_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of a factor is forgotten with it, unless a signal cuts that off."""
    monkeypatch.setattr(weakref, "finalize", lambda *_: None)
    x = torch.eye(64, dtype=HALF)
    with torch.inference_mode():
        for number in range(20):
            factor = torch.full((64, 48), float(number), dtype=HALF)
            assert torch.equal(times(x, factor), factor)
            del factor


@pytest.mark.usefixtures("native")
def test_a_product_of_what_does_not_lie_together() -> None:
    x, weight = _random(0, 7, 80)[:, ::2], _random(1, 40, 50).T
    _assert_close(_product(x, Plain(weight), True), x.double() @ weight.double().T, torch.full((7, 50), 100.0))


@pytest.mark.usefixtures("native")
@given(st.integers(1, 90), st.integers(1, 40), st.lists(st.integers(0, 999), min_size=1, max_size=50))
def test_rows_are_looked_up(outputs: int, half: int, wanted: list[int]) -> None:
    """Few of them by the library, many by torch; to the bit."""
    weight, which = _random(0, outputs, 2 * half), torch.tensor(wanted) % outputs
    assert torch.equal(Packed.of(weight, None).look_up(which), weight[which])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("output", [-1, 64])
def test_no_row_is_looked_up_beyond_the_last(output: int) -> None:
    with pytest.raises(IndexError, match="out of range"):
        Packed.of(_random(0, 64, 32), None).look_up(torch.tensor([3, output]))


LOGITS = st.tuples(st.integers(1, 2500), st.integers(0, 2**20), st.floats(0.1, 40), st.floats(0, 0.9)).map(
    lambda drawn: _logits(*drawn)
)


def _logits(size: int, seed: int, spread: float, forbidden: float) -> torch.Tensor:
    """Of which some are −inf, but never the first."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, generator=generator) * spread
    struck = torch.rand(size, generator=generator) < forbidden
    struck[0] = False
    return logits.masked_fill(struck, -torch.inf)


def _weights(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return ((logits.double() - logits.double().max()) / temperature).exp()


@pytest.mark.usefixtures("every")
@given(kind=KINDS, logits=LOGITS, temperature=st.floats(0.01, 100))
def test_tokens_are_weighed(kind: str, logits: torch.Tensor, temperature: float) -> None:
    with using(kind):
        weights, sums = library.weigh(logits, temperature)
    assert torch.allclose(weights.double(), _weights(logits, temperature), rtol=3e-5, atol=1e-37)
    assert (weights[logits == -torch.inf] == 0).all()
    blocks = torch.stack([block.double().sum() for block in torch.split(weights, library.BLOCK)])
    assert torch.allclose(sums, blocks, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("every")
@given(kind=KINDS, logits=LOGITS, temperature=st.floats(0.01, 100), least=st.sampled_from([1e-35, 1e-5, 1e-2, 1.0]))
def test_likely_tokens_are_picked(kind: str, logits: torch.Tensor, temperature: float, least: float) -> None:
    with using(kind):
        weights, sums = library.weigh(logits, temperature)
        picked, tokens, total = library.pick(logits, temperature, least)
    likely = (weights >= least).nonzero().flatten()
    assert tokens.tolist() == likely.tolist()
    assert torch.equal(picked, weights[likely])
    assert total == pytest.approx(float(sums.sum()), rel=1e-12)


@pytest.mark.usefixtures("native")
def test_many_threads_at_once_and_after_a_fork() -> None:
    """One of them has the team, the others work alone; a child has threads of its own. To the bit."""
    x, plain = _random(0, 5, 576), Plain(_random(1, 1536, 576))
    expected = _product(x, plain, True, team=False)

    def all_equal(_: int) -> bool:
        return all(torch.equal(_product(x, plain, True), expected) for _ in range(200))

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(all_equal, range(4)))
    child = os.fork()
    if child == 0:  # pragma: no cover
        os._exit(0 if all_equal(0) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    """More of them than cores, too; to the bit."""
    x, plain = _random(0, 3, 64), Plain(_random(1, 200, 64))
    expected, before = _product(x, plain, True, team=False), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(300):
            assert torch.equal(_product(x, plain, True), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("native")
def test_keys_and_values_are_written_to_their_places() -> None:
    key, value = (_random(seed, 5, 3, 96)[:, :, :64] for seed in (0, 1))  # not contiguous, as a layer leaves them
    pages, offsets = torch.tensor([3, 3, 0, 1, 3]), torch.tensor([0, 63, 7, 1, 2])
    written, expected = (torch.zeros((4, 2, 3, PAGE, 64), dtype=HALF) for _ in range(2))
    library.write_pages(written, pages, offsets, key, value)
    expected[pages, :, :, offsets] = torch.stack((key, value), dim=1)
    assert torch.equal(written, expected)
    with pytest.raises(IndexError, match="out of range"):
        library.write_pages(written, pages + 1, offsets, key, value)


def _spread(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """For each output, what an error as large as a group's largest input would make of it at most, four times."""
    groups = torch.nn.functional.pad(x.double().abs(), (0, -x.shape[1] % 32)).view(x.shape[0], -1, 32)
    largest = groups.amax(-1, keepdim=True).expand_as(groups).flatten(1)[:, : x.shape[1]]
    return 4 * largest @ weight.double().abs().T + 1


def _uneven(seed: int, rows: int, inputs: int) -> torch.Tensor:
    """Rows whose largest inputs are a thousand times the others, as in real models."""
    x = _random(seed, rows, inputs)
    x[:, ::37] *= 1000
    return x


def _bytes_of(plain: Plain) -> tuple[PackedInt8, torch.Tensor]:
    """The matrix in 8-bit panels, and what it stands for in float64."""
    stored = quantize(plain, "int8")
    packed = pack(stored)
    assert isinstance(packed, PackedInt8)
    assert isinstance(stored, Int8)
    return packed, stored.weight.double() * packed.scale.double()[:, None]


def _codes_of(plain: Plain) -> tuple[PackedInt4, torch.Tensor]:
    """The matrix in 4-bit panels, and what it stands for in float64, read without the code under test."""
    packed = quantize(plain, "int4")
    assert isinstance(packed, PackedInt4)
    # Rounded as `quantize` does, from scales before they are rounded themselves.
    groups = plain.weight.float().view(plain.weight.shape[0], -1, 32)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-12)
    codes = ((groups - low) / scale).round().clamp(0, 15)
    weight = (codes.double() - 8) * scale.to(HALF).double() + (low + 8 * scale).to(HALF).double()
    return packed, weight.flatten(1)


@pytest.mark.usefixtures("every")
@given(
    kind=KINDS,
    rows=st.sampled_from([1, 2, 3, 7, 8, 9, 16, 17, 33, 50, 65]),
    outputs=st.integers(1, 100),
    inputs=st.integers(1, 200),
    biased=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_rows_and_8_bit_integers(kind: str, rows: int, outputs: int, inputs: int, biased: bool, seed: int) -> None:
    bias = _random(seed + 2, outputs) if biased else None
    x, (packed, weight) = _uneven(seed, rows, inputs), _bytes_of(Plain(_random(seed + 1, outputs, inputs), bias))
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    with using(kind):
        got = library.product(x, packed.matrix(inputs))
    _assert_close(got, expected, _spread(x, weight) + expected.abs())


@pytest.mark.usefixtures("every")
@given(
    kind=KINDS,
    rows=st.sampled_from([1, 2, 3, 7, 8, 9, 16, 17, 33, 50, 65]),
    blocks=st.integers(1, 4),
    groups=st.integers(1, 9),
    biased=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_rows_and_4_bit_integers(kind: str, rows: int, blocks: int, groups: int, biased: bool, seed: int) -> None:
    bias = _random(seed + 2, 64 * blocks) if biased else None
    plain = Plain(_random(seed + 1, 64 * blocks, 32 * groups), bias)
    x, (packed, weight) = _uneven(seed, rows, 32 * groups), _codes_of(plain)
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    with using(kind):
        got = library.product(x, packed.matrix(32 * groups))
    rounding = x.double().abs() @ weight.abs().T * (2**10 if kind in BY_NUMBERS and rows > MANY else 0)  # of weights
    _assert_close(got, expected, _spread(x, weight) + expected.abs() + rounding)


@pytest.mark.usefixtures("every")
@pytest.mark.parametrize("kind", RUN_HERE)
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 7, MANY + 1, 300])
def test_logits_are_not_rounded(kind: str, precision: str, rows: int) -> None:
    """What rounding them to bfloat16 gives is the product that is rounded; what is rounded off is there."""
    x, product = _random(0, rows, 96), pack(quantize(Plain(_random(1, 80, 96), _random(2, 80)), precision))
    assert isinstance(product, Packed | PackedInt8 | PackedInt4)
    with using(kind), torch.inference_mode():
        wide, rounded = multiply_wide(x, product), multiply(x, product)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.to(HALF), rounded)
    assert not torch.equal(wide, rounded.float())


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("precision", ["int8", "int4"])
@torch.inference_mode()  # with gradients, torch multiplies
def test_a_row_of_integers_is_the_same_whatever_rows_are_beside_it(precision: str) -> None:
    """To the bit, with more rows than are rounded together, too. Some multiply few rows and many in two ways."""
    x, plain = _uneven(0, 300, 576), Plain(_random(1, 192, 576))
    packed = pack(quantize(plain, precision))
    assert isinstance(packed, PackedInt8 | PackedInt4)
    few, many = multiply(x[:MANY], packed), multiply(x, packed)
    for count in (1, 2, 3, 4, 8, 9, 16):
        assert torch.equal(multiply(x[:count], packed), few[:count]), count
    for count in (MANY + 1, 256, 257):
        assert torch.equal(multiply(x[:count], packed), many[:count]), count
    assert torch.equal(multiply(x[300 - MANY - 1 :], packed), many[300 - MANY - 1 :])
    if KIND not in BY_NUMBERS:
        assert torch.equal(few, many[:MANY])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [3, MANY + 1])
def test_what_is_no_number_stays_none(bad: float, rows: int) -> None:
    x, plain = _random(0, rows, 64), Plain(_random(1, 64, 64))
    x[1, 40] = bad
    for packed in (_bytes_of(plain)[0], _codes_of(plain)[0], Packed.of(*plain)):
        got = library.product(x, packed.matrix(64))
        assert not got[1].isfinite().any()
        assert got[torch.arange(rows) != 1].isfinite().all()


@pytest.mark.usefixtures("every")
@given(
    which=KINDS,
    shape=HEADS,
    lengths=st.lists(st.integers(1, 3 * PAGE), min_size=1, max_size=5),
    kind=ATTENTION,
    seed=st.integers(0, 99),
)
def test_attention_over_pages(
    which: str, shape: tuple[int, int, int], lengths: list[int], kind: AttentionKind, seed: int
) -> None:
    groups, sharing, size = shape
    rows, blocks = len(lengths), 3
    store = torch.full((rows * blocks + 1, 2, groups, PAGE, size), float("nan"), dtype=HALF)
    table = torch.randperm(rows * blocks, generator=torch.Generator().manual_seed(seed)).view(rows, blocks) + 1
    for row, length in enumerate(lengths):  # what lies past a row's end stays no number
        at = torch.arange(length)
        keys, values = _random(seed + row, length, groups, size), _random(seed - 9 - row, length, groups, size)
        write_pages(store, table[row][at // PAGE], at % PAGE, keys, values)
    # Heads of a larger tensor, as a layer has them.
    query = _random(seed, rows, groups * (sharing + 2), size)[:, : groups * sharing]
    positions = torch.tensor(lengths) - 1
    with using(which):
        got = library.attend_pages(query, store, table, positions, kind)
    expected = paged_decode(query.double(), store.nan_to_num().double(), table, positions, kind)
    _assert_close(got, expected, torch.full_like(expected, 4))


@pytest.mark.usefixtures("every")
@given(
    which=KINDS,
    shape=HEADS,
    tokens=st.integers(1, 150),
    before=st.integers(0, 150),
    kind=ATTENTION,
    seed=st.integers(0, 99),
)
def test_attention_of_a_prompt(
    which: str, shape: tuple[int, int, int], tokens: int, before: int, kind: AttentionKind, seed: int
) -> None:
    groups, sharing, size = shape
    query = _random(seed, tokens, groups * (sharing + 2), size)[:, : groups * sharing]
    keys = _random(seed + 1, before + tokens, groups, size).transpose(0, 1)
    values = _random(seed + 2, groups, before + tokens, size)
    chosen = torch.arange(tokens)[torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.6]
    with using(which):
        got = library.attend_prompt(query, keys, values, kind)
        some = library.attend_prompt(query[chosen], keys, values, kind, before + chosen)
    wide = query.double(), keys.double()
    expected = attend_row(*wide, values.double(), kind)
    # Weights may be rounded to bfloat16, each by at most 2⁻⁹ of itself, and so may their sum.
    rounded = 2.0**10 * attend_row(*wide, values.double().abs(), kind)
    _assert_close(got, expected, 4 + rounded)
    # Of some of the tokens: what each of them has among all of them, to the bit.
    assert torch.equal(some, got[chosen])


def _decoder(precision: str = "bf16") -> Decoder:
    """A head is 32 wide, which the kernels for attention take."""
    model = tiny_llama(layers=3, hidden_size=128).bfloat16()
    return build_decoder(model, precision=precision, kv_memory=1 << 24)


def _native(precision: str = "bf16") -> Decoder:
    """The same, run by the library."""
    decoder = _decoder(precision)
    decoder.use_library()
    assert isinstance(decoder.kernels, NativeLayers)
    return decoder


@pytest.mark.usefixtures("every")
@pytest.mark.parametrize("kind", RUN_HERE)
@pytest.mark.parametrize("wide", [False, True], ids=["", "heads of 32"])
def test_native_layers_are_as_close_to_float32_as_torch(
    variant: str, kind: str, wide: bool, tiny_family: Callable[..., PreTrainedModel], logits_of: LogitsOf
) -> None:
    """Where heads are a multiple of 32 wide, the library attends as well."""
    model = copy.deepcopy(tiny_family(variant)).bfloat16()  # others use the same one
    if wide:
        model = _with_wide_heads(model)
    ours, torchs = (build_decoder(model, kv_memory=1 << 24) for _ in range(2))
    exact = build_decoder(_in_float32(model), kv_memory=1 << 24)
    last = ours.depth - 1
    rows: tuple[list[str], list[int]] = ([f"0-{last}", f"0 1 1 3 {last}", f"0-{last}"], [70, 3, 17])
    with using(kind):
        ours.use_library()
        assert isinstance(ours.kernels, NativeLayers) == (ours.family.plan is not None)
        assert ours.kernels.decodes == (ours.family.head_dim % 32 == 0)
        own = (logits_of(ours, *rows, 3) - logits_of(exact, *rows, 3)).abs()
    theirs = (logits_of(torchs, *rows, 3) - logits_of(exact, *rows, 3)).abs()
    assert own.mean() < 1.3 * theirs.mean(), f"mean {own.mean():.3g} of ours, {theirs.mean():.3g} of torch"
    assert own.max() < 2 * theirs.max(), f"largest {own.max():.3g} of ours, {theirs.max():.3g} of torch"


def _with_wide_heads(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same kind whose heads are 32 wide."""
    config = copy.deepcopy(model.config)
    heads = config.num_attention_heads
    config.hidden_size = 32 * heads
    if hasattr(config, "head_dim"):
        config.head_dim = 32
    if hasattr(config, "query_pre_attn_scalar"):
        config.query_pre_attn_scalar = 32
    if hasattr(config, "word_embed_proj_dim"):
        config.word_embed_proj_dim = config.hidden_size
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        wide: PreTrainedModel = type(model)(config)
        for value in wide.parameters():
            if value.dim() == 1:
                value.add_(0.3 * torch.randn_like(value))
    wide.train(False)
    return wide.bfloat16()


def _in_float32(model: PreTrainedModel) -> PreTrainedModel:
    exact: Any = copy.deepcopy(model)
    result: PreTrainedModel = exact.float()
    return result


@pytest.mark.usefixtures("native")
@torch.inference_mode()
def test_what_a_row_decodes_does_not_depend_on_the_rows_beside_it() -> None:
    """To the bit, alone or beside rows of other lengths and programs."""
    decoder = _native()
    programs, lengths = ["0-2", "0 2", "0 1 1 2", "0-2", "0-1"], [70, 3, 130, 64, 1]
    prompts = [[(7 * place + row) % 256 for place in range(length)] for row, length in enumerate(lengths)]

    def run(chosen: Sequence[int]) -> torch.Tensor:
        rows = [Row(decoder, Program.parse(programs[index])) for index in chosen]
        for row, index in zip(rows, chosen, strict=True):
            next_logits(decoder, [row], [prompts[index]])
        steps = [[[index + step] for index in chosen] for step in range(4)]
        return torch.stack([next_logits(decoder, rows, tokens) for tokens in steps], dim=1)

    together = run(range(5))
    for row in range(5):
        assert torch.equal(run([row])[0], together[row]), f"row {row}"


STARTS = [
    *(("bf16", program, 41, shared) for program in ("0-2", "0 1x2 2") for shared in (16, 24, 30, 40)),
    ("bf16", "0-2", 17, 16),
    ("bf16", "0-2", 530, 528),
    ("int8", "0-2", 60, 26),
    ("int4", "0-2", 60, 26),
]
"""Precision, program, length of a prompt, and how many of its tokens another row has run."""


def _assert_a_start_changes_nothing(decoder: Decoder, program: str, length: int, shared: int) -> None:
    prompt = [7 * place % 256 for place in range(length)]

    def run(row: Row) -> torch.Tensor:
        for piece in pieces(length, row.length):
            logits = next_logits(decoder, [row], [prompt[piece.start : piece.end]])
        return torch.stack([logits, next_logits(decoder, [row], [[3]])])

    alone, other = (Row(decoder, Program.parse(program), prompt=length) for _ in range(2))
    expected = run(alone)
    whole = shared // PAGE
    other.page_table.adopt(alone.page_table.blocks[:whole])
    other.page_table.copy(alone.page_table.blocks[whole], shared % PAGE)
    assert other.length == shared
    assert torch.equal(run(other), expected)


@pytest.mark.usefixtures("every")
@pytest.mark.parametrize("kind", RUN_HERE)
@pytest.mark.parametrize(("precision", "program", "length", "shared"), STARTS)
@torch.inference_mode()
def test_a_start_that_another_row_has_run_changes_nothing(
    kind: str, precision: str, program: str, length: int, shared: int
) -> None:
    """To the bit, however few tokens are left to run."""
    with using(kind):
        _assert_a_start_changes_nothing(_native(precision), program, length, shared)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("programs", "prompts"),
    [
        (("0 (1-2)",), [1]),
        (("0 (1-2)",), [2 * PAGE + 1]),
        (("0 (1-2:40)",), [100]),  # more tokens run than attend by themselves
        (("0 (1:3) 2", "0-2", "0-1 (2)", "0 (1-2:40)"), [PAGE, 9, 70, 90]),
    ],
)
def test_native_layers_fill(logits_of: LogitsOf, programs: tuple[str, ...], prompts: list[int]) -> None:
    exact = build_decoder(_in_float32(tiny_llama(layers=3, hidden_size=128).bfloat16()), kv_memory=1 << 24)
    decoders = [exact, _decoder(), _native()]
    segments = {segment for text in programs for segment in Program.parse(text).fills}
    for each in decoders:
        each.set_fills({segment: random_fill(each, segment) for segment in segments})
    expected, theirs, ours = (logits_of(each, programs, prompts, 2) for each in decoders)
    assert (ours - expected).abs().mean() < 1.3 * (theirs - expected).abs().mean()


@pytest.mark.usefixtures("native")
def test_only_tokens_that_run_reach_a_layer(logits_of: LogitsOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt of 100 tokens, 2 run a filled layer; of the last visit 1 token runs, and the others leave keys."""
    decoder, tokens = _native(), list[tuple[str, int]]()

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


@pytest.mark.usefixtures("native")
def test_packing_takes_no_memory() -> None:
    """And an embedding that is the head's matrix stays it."""
    model = tiny_llama(layers=3, hidden_size=128, tie_word_embeddings=True).bfloat16()
    decoder = build_decoder(model, kv_memory=1 << 24)
    tokens = torch.arange(decoder.vocab)
    before, embedded = _bytes(decoder), decoder.embed(tokens, tokens)
    decoder.use_library()
    assert isinstance(decoder.start["embedding"], Packed)
    assert decoder.start["embedding"] is decoder.ends["head"]
    assert torch.equal(decoder.embed(tokens, tokens), embedded)
    assert _bytes(decoder) <= before + 2 * 32 * 128 + 1000 * sum(map(len, [*decoder.layers, decoder.ends]))


def _bytes(decoder: Decoder) -> int:
    """Of all weights, each counted once; zeros for a missing bias and the rest of a panel are small."""
    values = [value for weights in [decoder.start, *decoder.layers, decoder.ends] for value in weights.values()]
    tensors = [part for value in values for part in ([value] if isinstance(value, torch.Tensor) else value or ())]
    return sum({part.data_ptr(): part.nbytes for part in tensors if part is not None}.values())


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_layers_at_once_compute_what_they_do_one_by_one(precision: str) -> None:
    """To the bit, for rows with other programs beside each other, and for several tokens of a row."""
    decoder = _native(precision)
    programs, prompts = ["0-2", "0 2", "0 1 1 2"], [[5, 6, 7], list(range(70)), [9]]

    def run() -> list[torch.Tensor]:
        rows = [Row(decoder, Program.parse(text)) for text in programs]
        steps = [prompts, [[1], [2], [3]], [[4, 5, 6], [7], [8, 9]]]
        return [next_logits(decoder, rows, tokens) for tokens in steps]

    assert decoder.kernels.at_once
    together = run()
    decoder.kernels.at_once = False
    assert all(map(torch.equal, run(), together))


@pytest.mark.usefixtures("native")
def test_of_layers_at_once_those_before_a_failure_are_counted() -> None:
    decoder = _native()
    row = Row(decoder, Program.parse("0-2"))
    next_logits(decoder, [row], [[1, 2, 3]])
    before, kernels = row.work.total, decoder.kernels
    run = kernels.decode_layers

    def missing(x: torch.Tensor, visits: Visits, *rest: Any) -> torch.Tensor:
        """The last layer is one that the model does not have."""
        return run(x, visits._replace(layers=torch.tensor([*visits.layers[:-1].tolist(), 99])), *rest)

    kernels.decode_layers = missing  # type: ignore[method-assign, assignment]
    with pytest.raises(IndexError):
        next_logits(decoder, [row], [[4]])
    visits = row.work.visits().decode
    assert visits == (1, 1, 0)
    assert before < row.work.total < before + row.work.next_token(4)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_native_layers_of_integers_compute_what_torch_does(precision: str, logits_of: LogitsOf) -> None:
    torchs, ours = _decoder(precision), _native(precision)
    got, expected = (logits_of(decoder, ["0 2 1"], [70], 4) for decoder in (ours, torchs))
    error = (got - expected).abs().mean()  # both round in bfloat16, torch after each operation
    assert error < 0.05 * expected.std(), f"mean {error:.3g}, spread {expected.std():.3g}"


@pytest.mark.usefixtures("native")
def test_gradients_pass_layers_in_panels() -> None:
    decoder = _native()
    x = torch.randn(3, 128, dtype=HALF, requires_grad=True)
    rotary = decoder.rotary(torch.arange(3), 3)[0]
    query, _, value = decoder.kernels.project(decoder.layers[0], x, rotary)
    (query.sum() + value.sum()).backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.usefixtures("native")
def test_a_model_uses_the_library_from_its_first_answer() -> None:
    model = PolarModel.from_hf(tiny_llama(layers=3, hidden_size=128).bfloat16(), tiny_tokenizer(), ledger=None)
    assert isinstance(model.decoder.kernels, NativeLayers)
    assert len(model.generate("hello", max_tokens=3, compute="exact").token_ids) > 0


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a process that has not loaded the library, which did not come with the package, and could run it."""
    library._warn_once.cache_clear()
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    monkeypatch.setattr(library, "_kinds_of_library", lambda: ("avx512",))


@pytest.mark.usefixtures("fresh")
def test_without_a_library_layers_run_by_torch_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert not library.load_library(HALF, CPU)
    assert len(caplog.records) == 1
    decoder = _decoder()
    decoder.use_library()
    assert type(decoder.kernels) is TorchKernels


@pytest.mark.usefixtures("fresh")
def test_a_damaged_library_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / build.library_name("avx512")).write_bytes(b"no library")
    assert not library.load_library(HALF, CPU)
    assert len(caplog.records) == 1


def test_other_processors_and_dtypes_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_loaded", {})
    assert not library.load_library(torch.float32, CPU)
    assert not library.load_library(HALF, torch.device("meta"))
    monkeypatch.setattr(library, "_kinds_of_library", lambda: ())
    assert not library.load_library(HALF, CPU)


OLDEST = next(iter(build.INSTRUCTIONS), "none")
"""Kind of library for the oldest processors of this machine's kind."""


@pytest.mark.parametrize(("limit", "newest"), [(OLDEST, OLDEST), ("none", None), ("sse9", DeviceError)])
def test_the_environment_restricts_the_instruction_set(limit: str, newest: object) -> None:
    code = "from polar_sdk.engine import native; print(*native._kinds_of_library())"
    command, environment = [sys.executable, "-c", code], os.environ | {library.ISA_VARIABLE: limit}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if newest is DeviceError:
        assert done.returncode
        assert limit in done.stderr
        assert all(kind in done.stderr for kind in build.INSTRUCTIONS)
    else:
        assert set(done.stdout.split()) <= {newest}


@pytest.mark.parametrize(
    ("features", "limit", "kinds"),
    [
        ("fp asimd crc32 atomics", "", ()),
        ("fp asimd asimdhp asimddp sve", "", ("neon",)),
        ("fp asimd asimddp bf16 i8mm", "", ("i8mm", "neon")),
        ("fp asimd asimddp bf16 i8mm", "neon", ("neon",)),
    ],
)
def test_what_a_processor_of_arm_runs(
    features: str, limit: str, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "INSTRUCTIONS", build.KINDS["aarch64"])
    monkeypatch.setattr(library, "is_possible", lambda: True)
    monkeypatch.setattr(build, "processor", lambda: f"Features\t: {features}")
    monkeypatch.setenv(library.ISA_VARIABLE, limit)
    assert library._kinds_of_library.__wrapped__() == kinds
