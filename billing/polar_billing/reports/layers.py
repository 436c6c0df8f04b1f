"""What a program makes of each layer of a model, and which programs some requests ran. Knows no visits that ran."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from polar_sdk.errors import ProgramError
from polar_sdk.programs.program import Program

Kind = Literal["run", "skipped", "looped", "bridged", "filled"]
KINDS: Final[tuple[Kind, ...]] = ("run", "skipped", "looped", "bridged", "filled")
WORDS: Final[dict[Kind, str]] = {
    "run": "run",
    "skipped": "skipped",
    "looped": "looped",
    "bridged": "crossed by a bridge",
    "filled": "filled for the prompt, run by the answer",
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class LayerState(_Part):
    """What became of one layer of the model in a program."""

    layer: int
    kind: Kind
    visits: int
    """Of one token that takes the whole program."""


class ProgramUse(_Part):
    """One program, and how many requests ran it."""

    program: str
    requests: int
    layers: tuple[LayerState, ...]
    """Empty where the text is no program."""


def layers_of(program: Program, depth: int) -> tuple[LayerState, ...]:
    """What a program makes of each layer of a model."""
    bridged = {layer for first, last in program.bridges for layer in range(first, last + 1)}
    filled = {step.first for step in program if step.fill}

    def kind(layer: int, visits: int) -> Kind:
        if visits > 1:
            return "looped"
        if visits:
            return "filled" if layer in filled else "run"
        return "bridged" if layer in bridged else "skipped"

    visits = program.visits(depth)
    return tuple(LayerState(layer=n, kind=kind(n, count), visits=count) for n, count in enumerate(visits))


def read_layers(text: str, depth: int) -> tuple[LayerState, ...]:
    """The same of a program in a usage record, which may be of another version; empty where it cannot be read."""
    try:
        return layers_of(Program.parse(text), depth) if text and depth else ()
    except ProgramError:
        return ()
