"""What runs where: plans, maps by parts, and keys of the prefix cache. These need no vLLM."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polar_sdk.engine.maps import Fill
from polar_sdk.programs.cost import CostModel, LayerCost, Piece, layer_tokens, pieces, size
from polar_sdk.programs.program import Program
from polar_vllm.cache_keys import program_keys
from polar_vllm.counts import Counts, End
from polar_vllm.fills import Fills
from polar_vllm.plan import Stretch, Turn, UnsupportedProgramError, program_of, stretches
from polar_vllm.settings import KEY, WORKER, Settings

if TYPE_CHECKING:
    from pathlib import Path

DEPTH = 8
TEXTS = ("0-7", "0-4 (5-7:3)", "0-1 (2-3:2) 4 (5-6:4) 7", "0 (1-7)", "0-6 (7:2)")
SEGMENTS = {segment for text in TEXTS for segment in Program.parse(text).fills}


@st.composite
def schedules(draw: st.DrawFn) -> list[dict[str, Turn]]:
    """Passes of a batch of requests, each of whose prompts is cut at random and then decodes two tokens."""
    passes: list[dict[str, Turn]] = []
    rows = []
    for text in draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4)):
        prompt = draw(st.integers(1, 24))
        cuts = sorted(draw(st.sets(st.integers(1, prompt), max_size=3)) | {prompt, prompt + 1, prompt + 2})
        rows.append((Program.parse(text), prompt, [0, *cuts]))
    for number in range(max(len(cuts) for _, _, cuts in rows) - 1):
        turns = {}
        for name, (program, prompt, cuts) in enumerate(rows):
            if number + 1 < len(cuts):
                start, end = cuts[number], cuts[number + 1]
                wanted = max(start, end - 1) if end >= prompt else end
                turns[str(name)] = Turn(program, Piece(start, end, prompt, wanted))
        passes.append(turns)
    return passes


def written(plan: list[Stretch]) -> Counter[tuple[int, int, int]]:
    """How often a plan writes keys and values, by row, position and layer."""
    found: Counter[tuple[int, int, int]] = Counter()
    for stretch in plan:
        parts = [(stretch.first, stretch.after, span) for span in (*stretch.running, *stretch.leaving)]
        parts += [(first, last + 1, span) for (first, last), spans in stretch.filled.items() for span in spans]
        for first, after, (row, start, end) in parts:
            found.update((row, position, layer) for position in range(start, end) for layer in range(first, after))
    return found


@given(schedules())
def test_every_token_leaves_keys_and_values_once_in_every_layer(passes: list[dict[str, Turn]]) -> None:
    for turns in map(list, map(dict.values, passes)):
        plan = stretches(turns, DEPTH)
        assert [plan[0].first, *(stretch.after for stretch in plan)] == sorted({s.first for s in plan} | {DEPTH})
        once = {
            (row, position, layer): 1
            for row, (_, piece) in enumerate(turns)
            for position in range(piece.start, piece.end)
            for layer in range(DEPTH)
        }
        assert written(plan) == once
        assert all(
            any(span.row == row and span.end == piece.end for span in plan[-1].running)
            for row, (_, piece) in enumerate(turns)
            if piece.wanted < piece.end
        )


def count(counts: Counts, turns: dict[str, Turn], known: list[int], always: bool = False) -> None:
    """Count a pass as a worker does."""
    plan = stretches(list(turns.values()), DEPTH)
    is_planned = always or any(stretch.filled for stretch in plan)
    counts.add(list(turns), list(turns.values()), known, plan if is_planned else None)


@given(schedules(), st.booleans())
def test_counts_are_those_of_the_formula_however_a_prompt_was_cut(passes: list[dict[str, Turn]], always: bool) -> None:
    counts, cost = Counts(DEPTH), CostModel((LayerCost(2, 1, 1),) * DEPTH, 1, fills=dict.fromkeys(SEGMENTS, 1))
    needed = Counter(executed=0, filled=0)
    for turns in passes:
        count(counts, turns, [max(piece.end, piece.prompt) for _, piece in turns.values()], always)
        for program, piece in turns.values():
            whole = pieces(piece.prompt) if piece.start == 0 else [piece] if piece.start >= piece.prompt else []
            for share in (share for each in whole for share in cost.shares(program, each)):
                needed["executed"] += size(share.parts.running)
                needed["filled"] += size(share.parts.filled)
    requests = {name: turn for turns in passes for name, turn in turns.items()}
    assert needed["executed"] == sum(layer_tokens(turn.program, turn.piece.prompt, 3) for turn in requests.values())
    assert counts.running == len(requests)
    counts.end({name: End(3, is_cut=False) for name in requests})
    assert counts.running == 0
    sums = counts.as_dict()
    assert sums["replayed"] == sums["rejected"] == sums["late"] == sums["cut"] == 0
    assert (sums["executed"] - sums["unread"], sums["filled"]) == (needed["executed"], needed["filled"])


@given(st.sampled_from(TEXTS), st.integers(1, 20), st.booleans(), st.data())
def test_what_an_answer_did_not_need_is_told_apart(text: str, prompt: int, is_cut: bool, data: st.DataObject) -> None:
    counts, program, wrong = Counts(DEPTH), Program.parse(text), 0
    known, at, most = prompt, 0, 0
    while known < prompt + 4:
        if at and data.draw(st.booleans()) and most < 3:  # preempted: what is known runs again, without drafts
            at, most = 0, most + 1
        drafts = data.draw(st.integers(0, 3)) if at == known - 1 >= prompt else 0
        end = known + drafts if drafts else data.draw(st.integers(at + 1, known))
        wanted = max(at, known - 1) if end >= known else end
        count(counts, {"a": Turn(program, Piece(at, end, prompt, wanted))}, [known])
        taken = data.draw(st.integers(0, drafts))
        wrong, at = wrong + drafts - taken, end - drafts + taken
        known = max(known, at + 1) if end >= known else known
    late = data.draw(st.booleans())
    if late:  # scheduled before the last token was seen to be the last
        count(counts, {"a": Turn(program, Piece(known - 1, known, prompt, known - 1))}, [known])
    counts.end({"a": End(known - prompt, is_cut=is_cut), "never began": End(0, is_cut=True)})
    sums, needed = counts.as_dict(), layer_tokens(program, prompt, known - prompt)
    assert sums["rejected"] == DEPTH * wrong
    assert sums["late"] == DEPTH * late
    assert sums["cut"] == needed * is_cut
    assert sums["executed"] - sum(sums[kind] for kind in ("replayed", "rejected", "unread", "late")) == needed


def test_what_runs_again_after_a_preemption_is_counted_as_replayed() -> None:
    counts, program = Counts(2), Program.parse("0-1")
    for piece, known in ((Piece(0, 10, 10, 9), 10), (Piece(10, 11, 10, 10), 11), (Piece(0, 12, 10, 11), 12)):
        counts.add(["a"], [Turn(program, piece)], [known], None)
    none = dict.fromkeys(("left", "filled", "rejected", "late", "cut"), 0)
    assert counts.as_dict() == {"executed": 46, "replayed": 22, "unread": 9, **none}
    counts.end({"a": End(0, is_cut=True)})  # it was sent nothing
    assert counts.as_dict()["late"] == 46 - 22 - 9


@pytest.mark.parametrize(
    ("text", "part"), [("0-6", "0 to 7"), ("0-7x2", "0 to 7"), ("0-3 [4-7]", "0 to 7"), ("0-3 (4-7)", "4 to 7")]
)
def test_programs_that_vllm_cannot_run_are_refused(text: str, part: str) -> None:
    with pytest.raises(UnsupportedProgramError, match=part):
        program_of(text, DEPTH, SEGMENTS)


@pytest.mark.parametrize("factors", [1, 2])
def test_workers_of_a_group_compute_their_heads_of_the_whole_map(factors: int) -> None:
    inner = [12, 5, 3 * 2 * 4 * 2] if factors == 2 else [12, 3 * 2 * 4 * 2]
    weight = tuple(torch.randn(a, b) for a, b in itertools.pairwise(inner))
    hidden, carry = (torch.randn(8, 4), torch.randn(4)), (torch.randn(12, 8), torch.randn(8))
    token = (torch.randn(8, 3), torch.randn(3, 48))
    fills = Fills({(1, 3): Fill(weight, torch.randn(3, 2, 4, 2), hidden, carry, token)}, "", "")
    states, embedded = torch.randn(6, 8), torch.randn(6, 8)
    whole, carried = fills.maps[1, 3].crossed(states, embedded)
    device = torch.device("cpu")
    parts = [fills.part(slice(at, at + 2), torch.float32, device)[1, 3].crossed(states, embedded) for at in (0, 2)]
    assert torch.allclose(torch.cat([part for part, _ in parts], 3), whole, atol=1e-5)
    assert all(torch.equal(other, carried) for _, other in parts)


def test_maps_of_another_size_are_refused() -> None:
    fills = Fills({(1, 3): Fill((torch.zeros(8, 48),), torch.zeros(3, 2, 4, 2))}, "", "")
    fills.check(DEPTH, 8, 4, 2)
    for sizes in ((3, 8, 4, 2), (DEPTH, 9, 4, 2), (DEPTH, 8, 2, 4)):
        with pytest.raises(ValueError, match="1-3"):
            fills.check(*sizes)


def keys(text: str, prompt: int, blocks: int = 4, length: int = 10) -> list[tuple[tuple[str, str], ...]]:
    starts = range(0, blocks * length, length)
    return [tuple(program_keys(text, prompt, start, start + length)) for start in starts]


def test_no_program_hits_blocks_of_another_and_a_longer_prompt_none_that_ran() -> None:
    full, one, other = (keys(text, 32) for text in ("0-7", "0-4 (5-7:3)", "0 (1-7)"))
    assert full == [()] * 4  # as stock: full depth shares blocks with requests that name no program
    assert one[0] != other[0] != ()
    # 29 to 31 run: a block that holds one of them is only for prompts of this length.
    assert one[1] == () != one[2]
    assert keys("0-4 (5-7:3)", 42)[2] == () != keys("0-4 (5-7:3)", 42)[3]
    assert keys("0-4 (5-7:3)", 33)[2:] != one[2:]


def configured(folder: str | None, **changed: Any) -> Any:
    parallel = dict.fromkeys(("pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size"), 1)
    return SimpleNamespace(
        additional_config={} if folder is None else {KEY: {"fills": [folder]}},
        parallel_config=SimpleNamespace(worker_cls=WORKER, use_ubatching=False, **parallel),
        model_config=SimpleNamespace(architectures=["LlamaForCausalLM"], enable_prompt_embeds=False, model="nowhere"),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        **{"speculative_config": None, "lora_config": None, "kv_transfer_config": None, "use_v2_model_runner": False}
        | changed,
    )


def test_a_server_without_fills_names_what_it_wants(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--additional-config"):
        Settings.of(configured(None)).check_server(configured(None))
    with pytest.raises(ValueError, match=str(tmp_path)):
        Settings.of(configured(str(tmp_path)))
    params = SimpleNamespace(extra_args={KEY: "0-7"}, prompt_logprobs=None)
    with pytest.raises(ValueError, match=WORKER):
        Settings(None).check_request(params, DEPTH)


def test_requests_and_options_that_cannot_be_are_refused() -> None:
    settings = Settings(Fills({(5, 7): Fill((torch.zeros(8, 48),), torch.zeros(3, 2, 4, 2))}, "", ""))
    for given_args, scored in (({KEY: 7}, None), ({KEY: "0-x"}, None), ({KEY: "0-7x2"}, None), ({KEY: "0-4 (5-7)"}, 1)):
        with pytest.raises(ValueError, match=r"polar|0-x|0-7x2|prompt_logprobs"):
            settings.check_request(SimpleNamespace(extra_args=given_args, prompt_logprobs=scored), DEPTH)
    settings.check_request(SimpleNamespace(extra_args={KEY: "0-4 (5-7)"}, prompt_logprobs=None), DEPTH)
    settings.check_request(SimpleNamespace(extra_args=None, prompt_logprobs=1), DEPTH)
    with pytest.raises(ValueError, match="foreign"):
        settings.check_request(
            SimpleNamespace(extra_args={KEY: "0-7", "polar_fills": "foreign"}, prompt_logprobs=None), DEPTH
        )
    with pytest.raises(ValueError, match="--enable-lora"):
        settings.check_server(configured(None, lora_config=object()))
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        settings.check_server(configured(None, use_v2_model_runner=True))
