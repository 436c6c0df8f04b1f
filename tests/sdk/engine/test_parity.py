"""Parity: programs against the untouched Hugging Face model, its layers removed and copied by hand.

Tiny random models of every family in float32; on failure the largest and the mean difference are printed.
"""

from __future__ import annotations

import copy
import random
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from torch import nn

from polar_sdk.engine.decoder import build_decoder
from polar_sdk.engine.forward import advance, next_logits
from polar_sdk.engine.row import Row
from polar_sdk.programs.program import Program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from polar_sdk.engine.decoder import Decoder

    TinyFamily = Callable[..., PreTrainedModel]

DEPTH = 6
TOLERANCE = 1e-5
PROGRAMS = ["0-1 3-5", "0 5", "0-2 3x2 4-5", "0-1 2x3 4-5", "0-3 2-5", "5 4 3 2 1 0"]


def assert_close(ours: Tensor, reference: Tensor, what: str) -> None:
    gap = (ours - reference).abs()
    message = f"{what}: largest difference {gap.max():.2e}, mean {gap.mean():.2e}"
    assert gap.max() <= TOLERANCE * max(1.0, float(reference.abs().max())), message


def reference_model(model: PreTrainedModel, program: Program) -> PreTrainedModel:
    """The same model rebuilt with one deep copy of a layer per visit: what a program means, by definition."""
    rebuilt = copy.deepcopy(model)
    path, layers = next((path, module) for path, module in rebuilt.named_modules() if isinstance(module, nn.ModuleList))
    assert len(layers) == DEPTH, path
    copies = [copy.deepcopy(layers[layer]) for layer in program.layers]
    for position, layer in enumerate(copies):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", position)  # noqa: B010 (modules type their attributes as tensors)
    rebuilt.set_submodule(path, nn.ModuleList(copies))
    config: Any = rebuilt.config
    if types := getattr(config, "layer_types", None):
        config.layer_types = [types[layer] for layer in program.layers]
    config.num_hidden_layers = len(copies)
    return rebuilt


def reference_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits


def all_logits(decoder: Decoder, program: Program, tokens: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        return decoder.head(advance(decoder, [Row(decoder, program)], [tokens]))


def random_tokens(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(256) for _ in range(length)]


def random_program(rng: random.Random, depth: int = DEPTH) -> Program:
    """Skips, loops, jumps back: any path of layers."""
    if rng.random() < 0.5:
        return Program.editing(depth, {layer: rng.choice([0, 1, 1, 2, 3]) for layer in range(1, depth)})
    return Program(tuple(rng.randrange(depth) for _ in range(rng.randint(1, depth + 2))))


def test_identity_is_the_untouched_model(variant: str, tiny_family: TinyFamily) -> None:
    model = tiny_family(variant)
    tokens = random_tokens(random.Random(1), 90)
    ours = all_logits(build_decoder(model), Program.identity(DEPTH), tokens)
    assert_close(ours, reference_logits(model, tokens), variant)


@pytest.mark.parametrize("text", PROGRAMS)
def test_program_is_the_model_with_layers_removed_and_copied(variant: str, text: str, tiny_family: TinyFamily) -> None:
    model, program = tiny_family(variant), Program.parse(text)
    tokens = random_tokens(random.Random(2), 40)
    ours = all_logits(build_decoder(model), program, tokens)
    assert_close(ours, reference_logits(reference_model(model, program), tokens), f"{variant}, {text}")


@pytest.mark.parametrize("seed", range(3))
def test_cached_decoding_is_recomputing(family: str, seed: int, tiny_family: TinyFamily) -> None:
    """Prompts of different lengths, one program: every step's logits equal those of the whole sequence from scratch.

    From scratch in the reference, for the first row; from scratch here, for the others.
    """
    rng = random.Random(f"{family} {seed}")
    model = tiny_family(family)
    decoder, program = build_decoder(model), random_program(rng)
    tokens, logits = decode(decoder, [program] * 3, rng)
    whole = [reference_logits(reference_model(model, program), tokens[0])]
    whole += [all_logits(decoder, program, sequence) for sequence in tokens[1:]]
    for steps, sequence in zip(logits, whole, strict=True):
        assert_close(torch.stack(steps), sequence[-len(steps) :], f"{family}, program {program}")


@pytest.mark.parametrize("seed", range(2))
def test_rows_with_different_programs_do_not_touch_each_other(family: str, seed: int, tiny_family: TinyFamily) -> None:
    rng = random.Random(seed)
    decoder = build_decoder(tiny_family(family))
    programs = [random_program(rng) for _ in range(4)]
    tokens, logits = decode(decoder, programs, rng)
    for program, sequence, steps in zip(programs, tokens, logits, strict=True):
        alone = all_logits(decoder, program, sequence)
        assert_close(torch.stack(steps), alone[-len(steps) :], f"{family}, program {program} in a batch")


def test_rows_of_all_lengths_decode_together_as_each_alone(family: str, tiny_family: TinyFamily) -> None:
    """Rows of similar length attend together, padded to the longest of them, which none of them may see."""
    decoder, rng = build_decoder(tiny_family(family)), random.Random(8)
    lengths = [1, 62, 64, 100, 127, 150, 190]
    programs = [Program.identity(DEPTH), Program.parse("0-1 3-5")] * 3 + [Program.identity(DEPTH)]
    tokens, logits = decode(decoder, programs, rng, lengths=lengths)
    for program, length, sequence, steps in zip(programs, lengths, tokens, logits, strict=True):
        alone = all_logits(decoder, program, sequence)
        assert_close(torch.stack(steps), alone[-len(steps) :], f"{family}, {length} tokens among others")


@torch.inference_mode()
def test_nan_of_a_longer_row_does_not_reach_a_shorter_one(family: str, tiny_family: TinyFamily) -> None:
    decoder, identity, rng = build_decoder(tiny_family(family)), Program.identity(DEPTH), random.Random(9)
    rows = [Row(decoder, identity), Row(decoder, identity)]  # the longer one has the first pages of the pool
    prompts = [random_tokens(rng, 100), random_tokens(rng, 5)]
    next_logits(decoder, rows, prompts)
    for block in rows[0].page_table.blocks:
        decoder.pool.stores[0][block] = float("nan")
    logits = next_logits(decoder, rows, [[1], [2]])
    assert_close(logits[1], all_logits(decoder, identity, [*prompts[1], 2])[-1], f"{family}, beside nan")


def decode(
    decoder: Decoder,
    programs: Sequence[Program],
    rng: random.Random,
    steps: int = 4,
    lengths: Sequence[int] | None = None,
) -> tuple[list[list[int]], list[list[Tensor]]]:
    """Prefill ragged prompts together, then feed random tokens; returns whole sequences and logits per step."""
    rows = [Row(decoder, program) for program in programs]
    prompts = [rng.randint(1, 70) for _ in rows] if lengths is None else lengths
    sequences: list[list[int]] = [[] for _ in rows]
    logits: list[list[Tensor]] = [[] for _ in rows]
    for step in range(steps + 1):
        new = [random_tokens(rng, length if step == 0 else 1) for length in prompts]
        with torch.inference_mode():
            out = next_logits(decoder, rows, new)
        for sequence, tokens, kept, row_logits in zip(sequences, new, logits, out, strict=True):
            sequence.extend(tokens)
            kept.append(row_logits)
    return sequences, logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", ["0-1 3-5", "0-2 3x2 4-5"])
def test_ragged_rows_are_the_padded_batch_of_the_reference(
    family: str, side: Literal["left", "right"], text: str, tiny_family: TinyFamily
) -> None:
    """The reference pads; the engine packs. Both padding sides give what the packed rows give."""
    model, program = tiny_family(family), Program.parse(text)
    rng = random.Random(7)
    prompts = [random_tokens(rng, length) for length in (5, 17, 1, 9)]
    ids, mask = pad(prompts, side)
    with torch.inference_mode():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = reference_model(model, program)(
            ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
        decoder = build_decoder(model)
        ours = next_logits(decoder, [Row(decoder, program) for _ in prompts], prompts)
    last = [-1] * len(prompts) if side == "left" else [len(prompt) - 1 for prompt in prompts]
    reference = torch.stack([row[at] for row, at in zip(padded, last, strict=True)])
    assert_close(ours, reference, f"{family}, {side}, {text}")


def pad(prompts: Iterable[Sequence[int]], side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    rows = [torch.tensor(list(prompt)) for prompt in prompts]
    ones = [torch.ones_like(row) for row in rows]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    return ids, nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)


def test_a_prompt_in_pieces_is_the_prompt_at_once(family: str, tiny_family: TinyFamily) -> None:
    decoder = build_decoder(tiny_family(family))
    program, tokens = Program.parse("0-2 3x2 4-5"), random_tokens(random.Random(3), 50)
    row = Row(decoder, program)
    with torch.inference_mode():
        for start, end in ((0, 13), (13, 14), (14, 40), (40, 50)):
            last = next_logits(decoder, [row], [tokens[start:end]])[0]
    assert_close(last, all_logits(decoder, program, tokens)[-1], f"{family}, prompt in four pieces")


def test_decoding_leaves_the_weights_alone(family: str, tiny_family: TinyFamily) -> None:
    model = tiny_family(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    decoder = build_decoder(model)
    decode(decoder, [Program.identity(DEPTH), Program.parse("0 2x2 5")], random.Random(4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
