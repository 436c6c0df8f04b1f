"""`polar run` and `polar chat`: one answer, or a conversation in the terminal, and what each answer cost."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polar_sdk.cli import options as opt
from polar_sdk.errors import EmptyPromptError, InvalidRequestError
from polar_sdk.reading import Unreadable, read_text
from polar_sdk.show.lines import print_line

if TYPE_CHECKING:
    from polar_sdk.model import PolarModel
    from polar_sdk.request.generation import Generation
    from polar_sdk.request.options import RequestOptions


_LEAVE = frozenset({"/exit", "/quit", "/bye"})


@opt.with_model
def run(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads it from standard input.")],
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it is generated.")] = False,
    as_json: opt.AsJson = False,
    raw: Annotated[bool, typer.Option("--raw", help="Use no chat template: the model continues the text.")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")] = None,
    schema: Annotated[
        Path | None,
        typer.Option(help="File with a JSON schema that the answer must match; needs the extra structured."),
    ] = None,
    regex: Annotated[str | None, typer.Option(help="Regular expression that the whole answer must match.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="Text that the answer may be; may be repeated.")] = None,
    request_id: Annotated[str | None, typer.Option(help="Idempotency key of the usage record.")] = None,
    *,
    chosen: opt.Chosen,
) -> None:
    """Answer one prompt; the answer goes to standard output, its cost to standard error."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():  # before seconds are spent on loading
        raise EmptyPromptError(f"the prompt is empty ({len(text)} characters); give it some text.")
    text_of_schema = None if schema is None else _read_schema(schema)
    engine = chosen.load()
    request: RequestOptions = {
        **chosen.request,
        "template": "raw" if raw else "auto",
        "stop": stop,
        "request_id": request_id,
        "schema": text_of_schema,
        "regex": regex,
        "choice": choice or None,
    }
    if stream:
        _print_stream(engine, text, request, as_json=as_json)
    else:
        generation = engine.generate(text, **request)
        _print_answer(generation, as_json=as_json)
        _refuse_incomplete(generation)


def _read_schema(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, Unreadable) as error:
        raise InvalidRequestError(f"the schema {str(path)!r} cannot be read: {error}.") from error


def _refuse_incomplete(generation: Generation) -> None:
    """End with an error where the answer was to match a schema and was cut off."""
    if generation.complete is False:
        generation.json()


def _print_answer(generation: Generation, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_facts(generation), indent=2))
    else:
        typer.echo(generation.text)
        print_line(footer(generation), err=True)


def _print_stream(engine: PolarModel, text: str, request: RequestOptions, *, as_json: bool) -> None:
    """Text as it comes, or with --json one object per line, the last with the usage record."""
    with closing(engine.stream(text, **request)) as chunks:  # however the loop ends, the record is stored first
        for chunk in chunks:
            if as_json:
                if chunk.text:
                    typer.echo(json.dumps({"text": chunk.text}))
            else:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
            if chunk.generation is not None:
                typer.echo(json.dumps(_facts(chunk.generation)) if as_json else "")
                if not as_json:
                    print_line(footer(chunk.generation), err=True)
                _refuse_incomplete(chunk.generation)


def _facts(generation: Generation) -> dict[str, Any]:
    return {
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        "usage": generation.usage.model_dump(mode="json"),
        "receipt": None if generation.receipt is None else dict(generation.receipt),
    }


def footer(generation: Generation) -> str:
    """One line: tier, program, tokens, FLOPs of prompt and answer, saving, and the price where the sink gave one."""
    usage = generation.usage
    saved = usage.flops_saved / usage.identity_flops if usage.identity_flops else 0.0
    parts = [
        usage.tier or usage.router,
        f"program {usage.program}",
        f"{usage.tokens.input}+{usage.tokens.output} tokens"
        + (f", {usage.tokens.cached} of them cached" if usage.tokens.cached else ""),
        f"{usage.flops.total / 1e9:,.2f} GFLOP (prompt {usage.flops.prompt / 1e9:,.2f}, "
        f"answer {usage.flops.answer / 1e9:,.2f}; {saved:+z.1%} saved)",
        f"{usage.compute_units:.6f} CU",
    ]
    if usage.tokens.drafted:
        extra = usage.flops.drafts / 1e9
        parts.insert(3, f"{usage.tokens.accepted} of {usage.tokens.drafted} drafts kept (+{extra:,.2f} GFLOP)")
    if generation.receipt is not None and generation.receipt.get("cost") is not None:
        parts.append(f"{generation.receipt['cost']} {generation.receipt.get('currency', '')}".strip())
    return "[" + " · ".join(parts) + "]"


@opt.with_model
def chat(
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    *,
    chosen: opt.Chosen,
) -> None:
    """Talk with the model. Ctrl-C interrupts an answer, /exit or Ctrl-D ends the conversation."""
    engine = chosen.load()
    messages = [] if system is None else [{"role": "system", "content": system}]
    while (line := _read_line()) is not None:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        answer = _answer(engine, messages, chosen.request)
        if answer is None:
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": answer})


def _read_line() -> str | None:
    """One line of the user; None at the end of the conversation."""
    try:
        line = input("you> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None
    return None if line.strip() in _LEAVE else line


def _answer(engine: PolarModel, messages: list[dict[str, str]], request: RequestOptions) -> str | None:
    """Stream one answer; None if it was refused. An interrupted one counts as far as it came."""
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
