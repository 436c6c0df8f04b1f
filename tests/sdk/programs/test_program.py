"""The program as a value: text round-trips for any sequence, and every mistake is named with its fix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from polar_sdk.errors import ProgramDepthError, ProgramSyntaxError
from polar_sdk.programs.program import Program, Step

if TYPE_CHECKING:
    from collections.abc import Callable

DEPTH = 30
layers = st.integers(0, DEPTH - 1)
# Runs and repeats, so that ranges and loops are met often, and single layers between them.
pieces = st.tuples(layers, st.integers(1, 6), st.integers(1, 120)).map(
    lambda piece: list(range(piece[0], piece[0] + piece[1])) * (piece[2] if piece[2] < 4 else 1)
)
paths = st.one_of(
    st.lists(st.integers(0, 9999), min_size=1, max_size=60),
    st.lists(pieces, min_size=1, max_size=8).map(lambda runs: [layer for run in runs for layer in run]),
    st.tuples(layers, st.integers(1, 4096)).map(lambda loop: [loop[0]] * loop[1]),
)
programs = paths.map(lambda path: Program(tuple(path)))


@st.composite
def any_steps(draw: st.DrawFn) -> Program:
    """Plain and filled visits, damped loops and bridges in any order, at least one of them a visit."""
    steps: list[Step | int] = [draw(st.integers(0, DEPTH - 1))]
    unvisited = draw(st.permutations(range(DEPTH, 2 * DEPTH)))
    for kind in draw(st.lists(st.sampled_from(["visit", "damped", "bridge", "fill", "fills"]), max_size=12)):
        first = draw(st.integers(0, DEPTH - 1))
        if kind == "visit":
            steps.append(first)
        elif kind == "damped":
            parts = draw(st.integers(2, 4))
            steps += [Step(first, first, parts)] * parts
        elif kind == "fill":
            steps.append(Step(unvisited[0], unvisited.pop(0), fill=draw(st.integers(1, 3))))
        elif kind == "fills":
            start, tail = len(steps) * 100 + 100, draw(st.integers(1, 3))
            steps += [Step(layer, layer, fill=tail) for layer in range(start, start + draw(st.integers(1, 5)))]
        else:
            steps.append(Step(first, draw(st.integers(first, DEPTH - 1)), bridge=True))
    return Program(steps)


@given(any_steps() | programs)
def test_the_text_of_any_program_reads_back(program: Program) -> None:
    assert Program.parse(program.text) == program
    assert Program.parse(program.text).text == program.text


def test_bridges_and_damped_loops_in_text() -> None:
    program = Program.parse("0-2 5~2 [6-8] 9 [10]")
    assert program.layers == (0, 1, 2, 5, 5, 9)
    assert program.bridges == ((6, 8), (10, 10))
    assert [step.parts for step in program.steps if not step.bridge] == [1, 1, 1, 2, 2, 1]
    assert program.text == "0-2 5~2 [6-8] 9 [10]"
    assert not program.is_identity(11)
    assert Program.bridging(12, [(3, 4), (6, 9)]).text == "0-2 [3-4] 5 [6-9] 10-11"


def test_half_a_damped_loop_is_no_program() -> None:
    with pytest.raises(ProgramSyntaxError, match="1 visits damped to 1/2"):
        Program([0, Step(1, 1, 2)])


def test_fills_in_text() -> None:
    program = Program.parse("0-17 (18-19) 20 (21-29:8)")
    assert program.fills == ((18, 19), (21, 29))
    assert program.layers == tuple(range(30))
    assert program.visits(30) == (1,) * 30
    assert program.tail == 8
    assert program.last_visit == 29
    assert [step.fill for step in program][17:22] == [0, 1, 1, 0, 8]
    assert not program.is_identity(30)
    assert program.text == "0-17 (18-19) 20 (21-29:8)"
    assert Program.filling(30, [(20, 29)]).text == "0-19 (20-29)"
    assert Program.filling(30, [(27, 29), (3, 3)], tail=4).text == "0-2 (3:4) 4-26 (27-29:4)"


def test_one_segment_has_one_way_to_write_it() -> None:
    assert Program.parse("0-19 (20) (21-29:1)").text == "0-19 (20-29)"
    assert Program.parse("0-19 (20:2) (21-29)").fills == ((20, 20), (21, 29))
    assert Program.parse("0-1 (2) (4)").fills == ((2, 2), (4, 4))


def test_fills_that_no_text_could_name() -> None:
    for step in (Step(1, 1, fill=-1), Step(1, 1, fill=10_000), Step(1, 1, 2, fill=1), Step(1, 2, bridge=True, fill=1)):
        with pytest.raises(ProgramSyntaxError, match="filled"):
            Program([0, step, step])
    with pytest.raises(ProgramSyntaxError, match="tail=0"):
        Program.filling(6, [(2, 3)], tail=0)


@pytest.mark.parametrize("make", [Program.filling, Program.bridging])
@pytest.mark.parametrize("segments", [[(3, 12)], [(5, 4)], [(2, 5), (5, 7)]])
def test_segments_lie_inside_the_model_and_apart(
    make: Callable[[int, list[tuple[int, int]]], Program], segments: list[tuple[int, int]]
) -> None:
    with pytest.raises(ProgramDepthError):
        make(12, segments)


@given(programs)
def test_commas_spaces_and_blank_ends_read_the_same(program: Program) -> None:
    spread = "  " + program.text.replace(" ", " ,\n ") + ", "
    assert Program.parse(spread) == program


@given(programs)
def test_json_form_is_the_text(program: Program) -> None:
    adapter = TypeAdapter(Program)
    assert str(program) == program.text
    assert adapter.dump_python(program, mode="json") == program.text
    assert adapter.validate_json(adapter.dump_json(program)) == program


@given(st.dictionaries(layers, st.integers(0, 3)))
def test_editing_sets_visits_in_place(visits: dict[int, int]) -> None:
    if [visits.get(layer, 1) for layer in range(DEPTH)] == [0] * DEPTH:
        return
    program = Program.editing(DEPTH, visits)
    assert program.visits(DEPTH) == tuple(visits.get(layer, 1) for layer in range(DEPTH))
    assert program.skips(DEPTH) == tuple(sorted(layer for layer, count in visits.items() if count == 0))
    assert list(program) == sorted(program)
    assert len(program) == sum(program.visits(DEPTH))
    assert program.most_visits == max(program.visits(DEPTH))


@given(programs)
def test_visits_count_every_visit(program: Program) -> None:
    depth = max(program.layers) + 1
    visits = program.visits(depth)
    assert sum(visits) == len(program)
    assert set(program.skips(depth)) == set(range(depth)) - set(program.layers)
    assert program.is_identity(depth) == (program.layers == tuple(range(depth)))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ([0], "0"),
        (range(30), "0-29"),
        ([*range(12), 15, 15, *range(18, 30)], "0-11 15x2 18-29"),
        ([12, 13, 14, 12, 13, 14], "12-14x2"),
        ([*range(15), 15, 15, *range(16, 30)], "0-14 15x2 16-29"),
        ([2, 1, 0], "2 1 0"),
        ([5] * 100, "5x100"),
        ([9999], "9999"),
    ],
)
def test_written_forms(path: list[int], text: str) -> None:
    assert Program.of(path).text == text
    assert Program.parse(text).layers == tuple(path)


def test_shorthands() -> None:
    assert Program.skipping(6, [2, 3]).text == "0-1 4-5"
    assert Program.looping(6, {3: 2}).text == "0-2 3x2 4-5"
    assert Program.identity(6) == Program.of("0-5") == Program.of(range(6))
    program = Program.identity(3)
    assert Program.of(program) is program


def test_programs_are_values() -> None:
    program, same = Program.parse("0-3"), Program.of([0, 1, 2, 3])
    assert program == same
    assert {program: "found"}[same] == "found"
    with pytest.raises(AttributeError):
        program.steps = ()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", "empty"),
        (" , ", "empty"),
        ("0-", "'0-'"),
        ("0 1 banana 3", "'banana'"),
        ("-1", "'-1'"),
        ("1.5", "'1.5'"),
        ("0-3x", "'0-3x'"),
        ("0x-1", "'0x-1'"),
        ("12345", "'12345'"),
        ("٣", "'٣'"),  # a digit, but none that the canonical text has
        ("5-3", "'5-3'"),
        ("7x0", "'7x0'"),
        ("0-29x999", "4096"),
        ("0-2000 0-2000 0-2000", "4096"),
        ("[3-1]", "backwards"),
        ("[0-5]", "visits no layer"),
        ("0 [1", "[1"),
        ("1-2~2", "1-2~2"),
        ("0 3~0", "0 times"),
        ("0-2 (5-3)", "backwards"),
        ("0-2 (3-5:0)", "1 or more"),
        ("0-2 (3-5", "'(3-5'"),
        ("0-2 ()", "'()'"),
        ("0-2 (3-5)x2", "'(3-5)x2'"),
        ("0-3 (3-5)", "layer 3 is filled and visited 2 times"),
        ("0-2 (3) (3)", "layer 3 is filled and visited 2 times"),
        ("0-2 (3-5) 4~2", "layer 4 is filled and visited 3 times"),
    ],
)
def test_a_text_that_does_not_parse(text: str, value: str) -> None:
    with pytest.raises(ProgramSyntaxError) as caught:
        Program.parse(text)
    assert value in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("value", [5, None, 1.5, [0, 1.5], ["0", "1"], {"a": 1}])
def test_neither_program_nor_text_nor_path(value: object) -> None:
    with pytest.raises(ProgramSyntaxError):
        Program.of(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "value"), [((), "empty"), ((0, -3), "-3"), ((10_000,), "9999"), ((0,) * 4097, "4097.*4096")]
)
def test_paths_that_no_text_could_name(path: tuple[int, ...], value: str) -> None:
    with pytest.raises(ProgramSyntaxError, match=value):
        Program(path)


def test_layers_beyond_the_model() -> None:
    with pytest.raises(ProgramDepthError, match=r"'0-30'.*layer 30 .*0 to 29"):
        Program.parse("0-30").check_depth(30)
    with pytest.raises(ProgramDepthError, match="layer 30 "):
        Program.parse("0-19 (20-30)").check_depth(30)
    Program.parse("0-29").check_depth(30)
    with pytest.raises(ProgramDepthError, match="layer 6 "):
        Program.skipping(6, [6])
    with pytest.raises(ProgramDepthError, match="layer -1 "):
        Program.looping(6, {-1: 2})


def test_editing_refuses_a_negative_count() -> None:
    with pytest.raises(ProgramSyntaxError, match=r"layer 2 .*-1"):
        Program.editing(6, {2: -1})
