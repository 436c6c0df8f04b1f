"""Fills: keys and values that a map writes for prompt tokens that do not run a segment, and all that is computed after.

The reference is the untouched Hugging Face model with hooks: they replace the outputs of its projections, and undo its
layers, for the tokens that are filled.
"""

from __future__ import annotations

import random
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from polar_sdk.engine.decoder import build_decoder
from polar_sdk.engine.forward import next_logits
from polar_sdk.engine.hashes import hash_maps
from polar_sdk.engine.maps import Bridge, Fill, normalise
from polar_sdk.engine.pack import Question
from polar_sdk.engine.placement import Placement
from polar_sdk.engine.products import Plain, outputs_from
from polar_sdk.engine.row import Row
from polar_sdk.engine.scoring import score_programs
from polar_sdk.errors import MissingMapError
from polar_sdk.model import PolarModel
from polar_sdk.programs.policy import LoopGuard
from polar_sdk.programs.program import Program
from polar_sdk.testing import random_fill, tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.usage import ListSink

    TinyFamily = Callable[..., PreTrainedModel]

DEPTH = 6
SOME = pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "qwen2_moe"])
"""Families of different parts, where a test is not about one: rotary positions and learned ones, windows, experts."""
PROGRAMS = ["0-2 (3-5)", "0-1 (2-3) 4 (5)", "0-3 (4-5:4)", "0 (1-2:3) 3x2 (4:2) 5", "(0) 1-2 (3-4) 5~2"]


def test_keys_and_values_apart_are_those_of_the_whole_projection(variant: str, tiny_family: TinyFamily) -> None:
    decoder = build_decoder(tiny_family(variant))
    positions = torch.arange(30)
    rotary = decoder.rotary(positions, 30)
    x = decoder.embed(positions * 7, positions)
    for layer, kind in enumerate(decoder.family.kinds):
        _, expected_key, expected_value = decoder.project(layer, x, rotary)
        key, value = decoder.keys_values(layer, x)
        key = decoder.family.turn(key, rotary[kind.rope])
        assert torch.allclose(key, expected_key, atol=1e-5), f"{variant}, layer {layer}"
        assert torch.allclose(value, expected_value, atol=1e-5), f"{variant}, layer {layer}"


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_keys_and_values_apart_in_integers(precision: str, tiny_family: TinyFamily) -> None:
    model = tiny_family("llama, wide sides")
    decoder = build_decoder(model, precision=precision)
    positions = torch.arange(40)
    x = decoder.embed(positions, positions)
    _, expected_key, expected_value = decoder.project(2, x, decoder.rotary(torch.zeros_like(positions), 1))
    key, value = decoder.keys_values(2, x)
    assert torch.allclose(key, expected_key, atol=1e-5)
    assert torch.allclose(value, expected_value, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("units", [0, 3])
@pytest.mark.parametrize("token", [0, 4])
def test_a_map_is_affine_in_the_normalised_state_its_units_and_the_embedding(
    rank: int | None, units: int, token: int, tiny_family: TinyFamily
) -> None:
    decoder = build_decoder(tiny_family("llama"))
    fill = random_fill(decoder, (2, 4), rank=rank, units=units, token=token)
    x, embedded = torch.randn(7, decoder.family.hidden), torch.randn(7, decoder.family.hidden)
    found = fill(x, embedded)
    weight = fill.weight[0] if rank is None else fill.weight[0] @ fill.weight[1]
    state, entered = ((each / each.square().mean(-1, keepdim=True).sqrt()).double() for each in (x, embedded))
    if units:
        state = torch.cat((state, (state @ fill.hidden[0].double() + fill.hidden[1].double()).clamp(min=0)), -1)
    expected = state @ weight.double() + fill.bias.flatten().double()
    if token:
        expected += entered @ fill.token[0].double() @ fill.token[1].double()
    assert found.shape == (7, 3, 2, decoder.family.kv_heads, decoder.family.head_dim)
    assert torch.allclose(found.flatten(1).double(), expected, atol=1e-4)
    assert torch.allclose(fill(3 * x, 2 * embedded), found, atol=1e-4)  # the length of a state does not matter
    assert token or torch.equal(fill(x, None), found)
    for layer in range(3):
        assert torch.allclose(fill.layer(layer)(x, embedded), found[:, layer : layer + 1], atol=1e-5)
    assert (fill.rank, fill.units, fill.width) == (rank, units, decoder.family.hidden)
    with FlopCounterMode(display=False) as counted:
        written, after = fill.crossed(x, embedded)
    assert counted.get_total_flops() == 7 * fill.flops
    assert torch.equal(written, found)
    move = state @ fill.carry[0].double() + fill.carry[1].double()
    assert torch.allclose(after.double(), x + x.double().square().mean(-1, keepdim=True).sqrt() * move, atol=1e-4)
    assert torch.equal(fill.carried(x), after)
    assert len({fill.digest, random_fill(decoder, (2, 4), rank=rank).digest}) == (2 if units or token else 1)
    passing = replace(fill, carry=())
    assert passing.carried(x) is x
    assert passing.crossed(x, embedded)[1] is x
    assert passing.digest != fill.digest
    assert passing.flops == fill.flops - 2 * fill.carry[0].numel()
    assert Fill.of(fill.parts).digest == fill.like(fill.parts.values()).digest == fill.digest


def test_states_of_any_size_are_normalised_in_their_own_dtype() -> None:
    x = torch.tensor([[3.0, 4.0], [300.0, 400.0]], dtype=torch.bfloat16)
    assert normalise(x).dtype == torch.bfloat16
    assert torch.equal(normalise(x)[0], normalise(x)[1])


def test_a_fill_counts_and_is_hashed(tiny_family: TinyFamily) -> None:
    decoder = build_decoder(tiny_family("llama"))
    program = Program.parse("0-3 (4-5)")
    with pytest.raises(MissingMapError, match="this model has: none"):
        decoder.fill((4, 5))
    with pytest.raises(MissingMapError):
        hash_maps(decoder, [program])
    fill = random_fill(decoder, (4, 5))
    decoder.set_fills({(4, 5): fill})
    assert decoder.fill((4, 5)).digest == fill.digest
    assert decoder.cost.fills == {(4, 5): fill.flops}
    digest = hash_maps(decoder, [program])
    assert digest
    assert hash_maps(decoder, [Program.identity(DEPTH)]) == ""
    decoder.set_fills({(4, 5): random_fill(decoder, (4, 5), seed=1)})
    assert hash_maps(decoder, [program]) != digest


@contextmanager
def hooked(model: PreTrainedModel, decoder: Decoder, program: Program, prompt: int) -> Iterator[None]:
    """The Hugging Face model with the program's fills. Its loops are not the model's, so it must have none."""
    family = decoder.family
    modules = family.layer_modules(model)
    written: dict[int, Tensor] = {}
    """Keys and values of each filled layer, (T, 2, G, d)."""
    entered: list[Tensor] = []
    """The states before the first layer, (T, E)."""
    with ExitStack() as stack:
        enter = modules[0].register_forward_pre_hook(lambda _, given: entered.append(given[0][0]))
        stack.enter_context(_removed(enter))
        for segment in program.fills:
            for layer in range(segment[0], segment[1] + 1):
                step = next(step for step in program if step.first == layer)
                filled = slice(1, max(1, prompt - step.fill))
                if layer == segment[0]:
                    stack.enter_context(_removed(_write_on_entry(modules[layer], decoder, segment, entered, written)))
                for handle in _replace_keys_values(modules[layer], layer, family, written, filled):
                    stack.enter_context(_removed(handle))
                carry = decoder.fill(segment) if layer == segment[1] else None
                stack.enter_context(_removed(_undo(modules[layer], filled, carry)))
        yield


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    yield
    handle.remove()


def _write_on_entry(
    module: Any, decoder: Decoder, segment: tuple[int, int], entered: list[Tensor], written: dict[int, Tensor]
) -> Any:
    def write(_: Any, given: tuple[Tensor, ...]) -> None:
        for index, each in enumerate(decoder.fill(segment)(given[0][0], entered[-1]).unbind(1)):
            written[segment[0] + index] = each

    return module.register_forward_pre_hook(write)


def _undo(module: Any, filled: slice, carry: Fill | None) -> Any:
    def undo(_: Any, given: tuple[Tensor, ...], out: Any) -> Any:
        states = (out if isinstance(out, torch.Tensor) else out[0]).clone()
        passed = given[0][0, filled]
        states[0, filled] = passed if carry is None else carry.carried(passed)
        return states if isinstance(out, torch.Tensor) else (states, *out[1:])

    return module.register_forward_hook(undo)


def _replace_keys_values(module: Any, layer: int, family: Any, written: dict[int, Tensor], filled: slice) -> list[Any]:
    """Hooks on whatever gives keys (after their norm) and values in this architecture."""
    attention = getattr(module, "self_attn", None) or getattr(module, "attn", None) or module.attention
    heads, groups, size = family.heads, family.kv_heads, family.head_dim

    def replace(which: int) -> Any:
        def hook(_: Any, __: Any, out: Tensor) -> Tensor:
            out = out.clone()
            by_token = out[0].transpose(0, 1) if family.model_types[0] == "gemma3_text" and which == 0 else out[0]
            by_token[filled] = written[layer][filled, which].reshape(by_token[filled].shape)
            return out

        return hook

    def replace_fused(_: Any, __: Any, out: Tensor) -> Tensor:
        by_head = out.clone().view(out.shape[1], heads + 2 * groups, size)
        by_head[filled, heads:] = written[layer][filled].flatten(1, 2)
        return by_head.view(out.shape)

    def replace_neox(_: Any, __: Any, out: Tensor) -> Tensor:
        by_head = out.clone().view(out.shape[1], heads, 3, size)
        by_head[filled, :, 1:] = written[layer][filled].transpose(1, 2)
        return by_head.view(out.shape)

    if hasattr(attention, "query_key_value"):
        return [attention.query_key_value.register_forward_hook(replace_neox)]
    if fused := getattr(attention, "qkv_proj", None) or getattr(attention, "c_attn", None):
        return [fused.register_forward_hook(replace_fused)]
    keys = getattr(attention, "k_norm", None) or attention.k_proj
    return [keys.register_forward_hook(replace(0)), attention.v_proj.register_forward_hook(replace(1))]


def with_fills(decoder: Decoder, program: Program) -> Program:
    """The program, for which the decoder now has random maps."""
    segments = {
        (first, last): random_fill(decoder, (first, last), units=3 * (first % 2), token=2 * (first % 3))
        for first, last in program.fills
    }
    decoder.set_fills({**decoder.fills, **segments})
    return program


def answer(row: Row, prompt: Sequence[int], following: Sequence[int], sizes: Sequence[int] = ()) -> Tensor:
    """Logits after the prompt, run in pieces of these sizes and a last one, and after each following token, (T, V)."""
    row.prompt, start = len(prompt), row.length
    with torch.inference_mode():
        for size in sizes:
            next_logits(row.decoder, [row], [prompt[start : start + size]], [False])
            start += size
        passes = (prompt[start:], *([token] for token in following))
        logits = [next_logits(row.decoder, [row], [tokens])[0] for tokens in passes]
    return torch.stack(logits)


def assert_close(ours: Tensor, reference: Tensor, what: str) -> None:
    gap = (ours - reference).abs()
    message = f"{what}: largest difference {gap.max():.2e}, mean {gap.mean():.2e}"
    assert gap.max() <= 1e-5 * max(1.0, float(reference.abs().max())), message


def some_tokens(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(count)]


@pytest.mark.parametrize("text", ["0-2 (3-5)", "0-1 (2-3) 4 (5)", "0-1 (2-5:4)"])
@pytest.mark.parametrize("length", [2, 6, 40])
def test_a_fill_is_the_reference_with_its_projections_replaced(
    family: str, text: str, length: int, tiny_family: TinyFamily
) -> None:
    model = tiny_family(family)
    decoder = build_decoder(model)
    program = with_fills(decoder, Program.parse(text))
    prompt, following = some_tokens(length, length), some_tokens(length + 1, 3)
    with hooked(model, decoder, program, length), torch.inference_mode():
        reference = model(torch.tensor([prompt + following]), use_cache=False).logits[0][length - 1 :]
    ours = answer(Row(decoder, program), prompt, following)
    assert_close(ours, reference, f"{family}, {text}, {length} tokens")
    if length > 1 + program.tail:
        plain = answer(Row(decoder, Program.identity(DEPTH)), prompt, following)
        assert (ours - plain).abs().max() > 1e-2  # random maps do show


@SOME
@pytest.mark.parametrize("text", PROGRAMS)
def test_a_filled_prompt_in_pieces_is_the_prompt_at_once(name: str, text: str, tiny_family: TinyFamily) -> None:
    decoder = build_decoder(tiny_family(name))
    program = with_fills(decoder, Program.parse(text))
    prompt, following = some_tokens(3, 70), some_tokens(4, 3)
    whole = answer(Row(decoder, program), prompt, following)
    for sizes in ([1], [1, 60], [30, 37], [64, 5], [68, 1]):
        pieces = answer(Row(decoder, program), prompt, following, sizes)
        assert_close(pieces, whole, f"{name}, {text}, {sizes}")


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "phi3", "mixtral", "qwen2_moe"])
def test_keys_and_values_of_one_layer_are_an_affine_map_of_its_state(name: str, tiny_family: TinyFamily) -> None:
    """In families whose layers begin with a root-mean-square norm, and whose keys have none of their own."""
    decoder = build_decoder(tiny_family(name))
    weights, sizes = decoder.layers[4], random_fill(decoder, (4, 4)).bias.shape
    queries = decoder.family.heads * decoder.family.head_dim
    product = outputs_from(weights["qkv"], queries)
    assert isinstance(product, Plain)
    bias = torch.zeros(sizes) if product.bias is None else product.bias.view(sizes)
    decoder.set_fills({(4, 4): Fill(((product.weight * weights["attn_norm"]).T,), bias)})
    prompt, following = some_tokens(7, 40), some_tokens(8, 3)
    ours = answer(Row(decoder, Program.parse("0-3 (4)")), prompt, following)
    assert_close(ours, answer(Row(decoder, Program.parse("0-4")), prompt, following), name)


@SOME
@pytest.mark.parametrize("text", [*PROGRAMS, "0-2 (3) [4-5]"])
@pytest.mark.parametrize("sizes", [(), (1,), (20, 20)])
def test_flops_and_visits_of_a_filled_prompt(
    name: str, text: str, sizes: Sequence[int], tiny_family: TinyFamily
) -> None:
    decoder = build_decoder(tiny_family(name))
    hidden = decoder.family.hidden
    factors = torch.eye(hidden)[:, :5], torch.eye(hidden)[:5]
    decoder.set_bridges({(4, 5): Bridge(factors, torch.zeros(hidden), torch.zeros(hidden))})
    row = Row(decoder, with_fills(decoder, Program.parse(text)))
    with FlopCounterMode(display=False) as counter:
        answer(row, some_tokens(9, 50), some_tokens(10, 2), sizes)
    assert row.work.flops().total == counter.get_total_flops()
    if not sizes:  # the plan's chunks are longer
        assert row.work.flops() == decoder.cost.request(row.program, 50, 3)
    visits, passes = row.work.visits(), 1 + len(sizes)
    fills = tuple(passes * bool(fill) for fill in fills_of(row.program))
    assert visits.prefill_filled == (fills if sizes != (1,) else tuple(fill // 2 for fill in fills))
    assert visits.decode == tuple(2 * count for count in row.program.visits(DEPTH))


def fills_of(program: Program) -> list[int]:
    return [max((step.fill for step in program if step.first == layer), default=0) for layer in range(DEPTH)]


@SOME
def test_rows_with_fills_and_without_share_a_pass(name: str, tiny_family: TinyFamily) -> None:
    """Ragged prompts of different programs together, some in their last piece, some decoding: each as alone."""
    decoder = build_decoder(tiny_family(name))
    programs = [with_fills(decoder, Program.parse(text)) for text in [*PROGRAMS, "0-5", "0-1 3x2 5"]]
    prompts = [some_tokens(row, 9 + 7 * row) for row in range(len(programs))]
    following = some_tokens(11, 2)
    alone = [
        answer(Row(decoder, program), prompt, following) for program, prompt in zip(programs, prompts, strict=True)
    ]
    rows = [Row(decoder, program, prompt=len(prompt)) for program, prompt in zip(programs, prompts, strict=True)]
    cut = 12
    with torch.inference_mode():
        starts = [prompt[:cut] for prompt in prompts]
        ended = [len(prompt) <= cut for prompt in prompts]
        found = [list(next_logits(decoder, rows, starts, ended)) if any(ended) else []]
        rest = [prompt[cut:] or following[:1] for prompt in prompts]
        found.append(list(next_logits(decoder, rows, rest)))
    for row, (short, mine) in enumerate(zip(ended, alone, strict=True)):
        assert_close(found[1][row], mine[1 if short else 0], f"{name}, {programs[row]} among others")


def test_a_guard_watches_a_loop_before_a_fill(tiny_family: TinyFamily) -> None:
    decoder = build_decoder(tiny_family("llama"))
    looping, plain = (with_fills(decoder, Program.parse(text)) for text in ("0-1 2x2 (3-5)", "0-2 (3-5)"))
    prompt = some_tokens(13, 40)
    row = Row(decoder, looping, LoopGuard(max_step=0.0))
    assert_close(answer(row, prompt, [1]), answer(Row(decoder, plain), prompt, [1]), "loop stopped")
    assert row.loops_stopped == 1


def test_a_guard_waits_for_a_token_that_ends_the_last_visit(tiny_family: TinyFamily) -> None:
    """No token of a prompt's first pieces runs the last visit to its end, so there is nothing to judge yet."""
    decoder = build_decoder(tiny_family("llama"))
    row = Row(decoder, Program.parse("0-3 4x2"), LoopGuard(max_step=0.0))
    prompt = some_tokens(14, 40)
    stopped = answer(row, prompt, [1], [20])
    assert row.loops_stopped == 1
    assert_close(stopped, answer(Row(decoder, Program.parse("0-4")), prompt, [1]), "loop stopped at the end")


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_fill_among_integers_is_a_fill_among_their_values(precision: str, tiny_family: TinyFamily) -> None:
    """Fills stay in the model's dtype; pieces, pages and decode steps work as in the other precisions."""
    decoder = build_decoder(tiny_family("llama, wide sides"), precision=precision)
    program = with_fills(decoder, Program.parse("0-1 (2-4:3) 5"))
    prompt, following = some_tokens(15, 70), some_tokens(16, 2)
    whole = answer(Row(decoder, program), prompt, following)
    assert_close(answer(Row(decoder, program), prompt, following, [64]), whole, precision)
    plain = answer(Row(decoder, Program.identity(DEPTH)), prompt, following)
    assert (whole - plain).abs().max() > 1e-2


@SOME
def test_a_segment_crosses_devices(name: str, tiny_family: TinyFamily) -> None:
    """Its map runs where its first layer is, and its layers' pages are where they are."""
    model, cpu, other = tiny_family(name), torch.device("cpu"), torch.device("cpu", 0)
    split = build_decoder(model, placement=Placement(cpu, (cpu,) * 3 + (other,) * 3, other))
    whole = build_decoder(model)
    program = Program.parse("0-1 (2-4) 5")
    prompt, following = some_tokens(17, 50), some_tokens(18, 2)
    found = [answer(Row(decoder, with_fills(decoder, program)), prompt, following, [20]) for decoder in (split, whole)]
    assert torch.equal(*found)


@SOME
@pytest.mark.parametrize("text", [*PROGRAMS, "0-2 (3) [4-5]", "0-5", "0-3 5~2"])
def test_scores_are_those_of_requests(name: str, text: str, tiny_family: TinyFamily) -> None:
    """The question is filled and the choices run: what is scored is what a request would compute."""
    decoder = build_decoder(tiny_family(name))
    hidden = decoder.family.hidden
    decoder.set_bridges({(4, 5): Bridge((torch.eye(hidden),), torch.ones(hidden), torch.zeros(hidden))})
    program = with_fills(decoder, Program.parse(text))
    prompts = [some_tokens(19, 30), some_tokens(20, 2), some_tokens(21, 1)]
    tails = [some_tokens(22, 3), some_tokens(23, 1)]
    questions = [Question(tuple(prompt), tuple(map(tuple, tails))) for prompt in prompts]
    programs = [program, Program.identity(DEPTH), Program.parse("0-2 (3-4) 5")]  # they share starts, not maps
    with_fills(decoder, programs[2])
    for prompt, score in zip(prompts, score_programs(decoder, questions, programs)[program], strict=True):
        for tail, found, greedy in zip(tails, score.loglikelihoods, score.greedy, strict=True):
            logits = answer(Row(decoder, program), prompt, tail[:-1])
            own = logits.log_softmax(-1)[range(len(tail)), tail].sum()
            assert abs(float(own) - found) < 1e-4 * max(1.0, abs(found)), f"{name}, {text}, {len(prompt)} tokens"
            assert list(greedy) == logits.argmax(-1).tolist()


def test_segments_that_begin_alike_have_maps_of_their_own(tiny_family: TinyFamily) -> None:
    decoder = build_decoder(tiny_family("llama"))
    short, long = (with_fills(decoder, Program.parse(text)) for text in ("0-2 (3) 4-5", "0-2 (3-4) 5"))
    decoder.set_fills({(3, 3): random_fill(decoder, (3, 3)), (3, 4): random_fill(decoder, (3, 4), seed=1)})
    question = [Question(tuple(some_tokens(24, 30)), ((1, 2),))]
    together = score_programs(decoder, question, [short, long])
    for program in (short, long):
        assert together[program] == score_programs(decoder, question, [program])[program]


@pytest.mark.parametrize("text", PROGRAMS)
def test_a_row_that_gave_its_pages_up_goes_on_as_before(text: str, tiny_family: TinyFamily) -> None:
    """It runs again what has run, the answer so far in one piece with the end of the prompt: who is filled stays."""
    decoder = build_decoder(tiny_family("llama"))
    program = with_fills(decoder, Program.parse(text))
    prompt, following = some_tokens(25, 50), some_tokens(26, 4)
    undisturbed = answer(Row(decoder, program), prompt, following)
    row = Row(decoder, program)
    answer(row, prompt, following[:2])
    metered = row.work.flops()
    row.drop_pages()
    tokens = [*prompt, *following[:2]]
    with torch.inference_mode():
        for piece in (tokens[:30], tokens[30:]):
            next_logits(decoder, [row], [piece], [False])
            row.note_replay()
        assert row.work.flops() == metered
        rest = torch.stack([next_logits(decoder, [row], [[token]])[0] for token in following[2:]])
    assert_close(rest, undisturbed[3:], text)


class TestRequests:
    """A program with fills named by hand, through the whole of a request."""

    @pytest.fixture
    def model(self, records: ListSink) -> PolarModel:
        model = tiny_model(sink=records)
        decoder = model.decoder
        decoder.set_fills({segment: random_fill(decoder, segment) for segment in ((2, 5), (3, 5))})
        return PolarModel(model.loaded, policy=model.policy, sink=records)  # its costs know the fills

    def test_the_record_is_the_plan(self, model: PolarModel, records: ListSink) -> None:
        done = model.generate("x" * 150, template="raw", program="0-2 (3-5:4)", max_tokens=6)
        (record,) = records.records
        assert record.flops == model.cost("0-2 (3-5:4)", prompt=150, output=len(done.token_ids))
        assert record.program == "0-2 (3-5:4)"
        assert record.flops.total < record.identity_flops == model.cost(prompt=150, output=len(done.token_ids)).total
        assert record.visits.prefill == (1,) * 6
        assert record.visits.prefill_filled == (0, 0, 0, 1, 1, 1)

    def test_a_prompt_too_short_to_fill_costs_what_identity_costs(self, model: PolarModel, records: ListSink) -> None:
        model.generate("x" * 5, template="raw", program="0-2 (3-5:4)", max_tokens=6)
        (record,) = records.records
        assert record.flops.total == record.identity_flops
        assert record.visits.prefill_filled == ()

    def test_a_missing_map_is_an_error_before_compute(self, model: PolarModel, records: ListSink) -> None:
        with pytest.raises(MissingMapError, match=r"no fill for layers 4-5; this model has: \(2-5\), \(3-5\)"):
            model.generate("x", program="0-3 (4-5)")
        assert records.records == []

    @pytest.mark.parametrize("chunk", [48, 512])
    def test_batches_streams_and_cancelling(
        self, model: PolarModel, records: ListSink, chunk: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("polar_sdk.serving.job.CHUNK", chunk)
        programs = ["0-2 (3-5)", "0-5", "0-1 (2-5:40)", "0-2 (3-5)"]
        prompts = ["a" * 130, "b" * 20, "c" * 90, "d" * 3]
        each: list[Any] = [{"program": program} for program in programs]
        together = model.generate_batch(prompts, each=each, template="raw", max_tokens=5)
        for prompt, program, found in zip(prompts, programs, together, strict=True):
            alone = model.generate(prompt, template="raw", program=program, max_tokens=5)
            assert alone.token_ids == found.token_ids
        stream = model.stream("e" * 130, template="raw", program="0-2 (3-5)", max_tokens=50)
        next(stream)
        stream.close()
        assert records.records[-1].outcome == "cancelled"
        assert sum(records.records[-1].visits.prefill_filled) == 3 * -(-130 // chunk)
        assert model.decoder.pool.size - model.decoder.pool.free <= model.decoder.pool.size // 4  # kept starts only
