"""`polar chat`: a conversation in the terminal, each turn routed and metered."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from polar_sdk.cli import options as opt
from polar_sdk.cli.run import footer
from polar_sdk.errors import InvalidRequestError
from polar_sdk.show.lines import print_line

if TYPE_CHECKING:
    from polar_sdk.model import PolarModel
    from polar_sdk.request.options import RequestOptions


_LEAVE = frozenset({"/exit", "/quit", "/bye"})


@opt.with_model
def chat(
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    *,
    chosen: opt.Chosen,
) -> None:
    """Talk with the model. Ctrl-C interrupts an answer, /exit or Ctrl-D ends the conversation."""
    engine = chosen.load()
    messages = [] if system is None else [{"role": "system", "content": system}]
    while (line := _read()) is not None:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        answer = _answer(engine, messages, chosen.request)
        if answer is None:
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": answer})


def _read() -> str | None:
    """One line of the user; None at the end of the conversation."""
    try:
        line = input("you> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None
    return None if line.strip() in _LEAVE else line


def _answer(engine: PolarModel, messages: list[dict[str, str]], request: RequestOptions) -> str | None:
    """Stream one answer; None where it was refused. An interrupted one counts as far as it came."""
    shown = ""
    try:
        with closing(engine.stream(messages, **request)) as chunks:
            for chunk in chunks:
                shown += chunk.text
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
                if chunk.generation is not None:
                    typer.echo()
                    print_line(footer(chunk.generation), err=True)
    except KeyboardInterrupt:
        typer.echo()
        print_line("[interrupted]", err=True)
    except InvalidRequestError as error:  # for example, the conversation has outgrown the context window
        print_line(f"error: {error}", err=True)
        return None
    return shown
