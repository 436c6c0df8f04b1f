"""`polar chat`: a conversation in the terminal, each turn routed and metered."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polar_sdk.cli import options as opt
from polar_sdk.cli.run import footer
from polar_sdk.errors import InvalidRequestError

if TYPE_CHECKING:
    from polar_sdk.model import PolarModel


_LEAVE = frozenset({"/exit", "/quit", "/bye"})


def register(app: typer.Typer) -> None:
    """Add `polar chat`."""
    app.command(epilog="Example: polar chat --compute economy --system 'Answer in one sentence.'")(chat)


def chat(
    compute: opt.Compute = None,
    program: opt.ProgramText = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: opt.MaxTokens = None,
    temperature: opt.Temperature = 0.0,
    top_p: opt.TopP = 1.0,
    top_k: opt.TopK = 0,
    seed: opt.Seed = None,
    tenant: opt.Tenant = "default",
    tag: opt.Tags = None,
    model: opt.Model = None,
    device: opt.Device = "auto",
    device_map: opt.DeviceMap = None,
    precision: opt.Precision = "auto",
    policy: opt.PolicyFile = None,
    router: opt.RouterFolder = None,
    ledger: opt.Ledger = None,
    no_ledger: opt.NoLedger = False,
) -> None:
    """Talk with the model. Ctrl-C breaks an answer off, /exit or Ctrl-D ends the conversation."""
    engine = opt.load_model(
        model,
        device=device,
        device_map=device_map,
        precision=precision,
        policy=policy,
        router=router,
        ledger=ledger,
        no_ledger=no_ledger,
        tenant=tenant,
        tags=tag,
    )
    request = {
        "compute": opt.compute_of(compute),
        "program": program,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    messages = [] if system is None else [{"role": "system", "content": system}]
    while (said := _read()) is not None:
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        answer = _answer(engine, messages, request)
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


def _answer(engine: PolarModel, messages: list[dict[str, str]], request: dict[str, Any]) -> str | None:
    """Stream one answer; None where it was refused. An answer broken off counts as far as it came."""
    shown = ""
    try:
        with closing(engine.stream(messages, **request)) as chunks:
            for chunk in chunks:
                shown += chunk.text
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
                if chunk.generation is not None:
                    typer.echo()
                    typer.echo(footer(chunk.generation), err=True)
    except KeyboardInterrupt:
        typer.echo()
        typer.echo("[broken off]", err=True)
    except InvalidRequestError as error:  # for example, the conversation has outgrown the context window
        typer.echo(f"error: {error}", err=True)
        return None
    return shown
