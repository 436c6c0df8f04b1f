"""Lines for people and JSON for programs: no name can control the terminal or begin a line.

Every command prints through here; tables do in `tables`. Knows no commands.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from typing import Any, Final

import typer

_NOT_ASCII: Final = re.compile(r"[\x7f-\U0010ffff]")


def printable(text: str) -> str:
    """The text on one line, with a replacement character for each one that shows nothing or steers a terminal."""
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    shows = character.isprintable() or unicodedata.category(character) == "Zs"
    return character if shows else "\N{REPLACEMENT CHARACTER}"


def print_line(text: str = "", *, err: bool = False) -> None:
    """Print one line of plain text, on standard output or standard error."""
    typer.echo(printable(text), err=err)


def print_json(data: object) -> None:
    """Print JSON to standard output, readable, with control characters escaped: a reader gets the names as they are."""
    typer.echo(_NOT_ASCII.sub(_escaped, json.dumps(data, indent=2, ensure_ascii=False)))


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    if _shown(character) == character:
        return character
    return "\\u007f" if character == "\x7f" else json.dumps(character)[1:-1]  # json leaves the one as it is


def survive_encodings() -> None:
    """Let standard output and error write what their encoding lacks, as under LANG=C, instead of failing at it."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
