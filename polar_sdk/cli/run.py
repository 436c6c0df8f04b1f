"""`polar run`: one prompt, one answer, and what it cost."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polar_sdk.cli import options as opt
from polar_sdk.errors import EmptyPromptError

if TYPE_CHECKING:
    from polar_sdk.model import PolarModel
    from polar_sdk.request.generation import Generation


def register(app: typer.Typer) -> None:
    """Add `polar run`."""
    app.command(epilog="Example: polar run 'What is the capital of France?' --compute economy --stream")(run)


def run(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads it from standard input.")],
    compute: opt.Compute = None,
    program: opt.ProgramText = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it comes.")] = False,
    as_json: opt.AsJson = False,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: the model continues the text.")] = False,
    max_tokens: opt.MaxTokens = None,
    temperature: opt.Temperature = 0.0,
    top_p: opt.TopP = 1.0,
    top_k: opt.TopK = 0,
    seed: opt.Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")] = None,
    tenant: opt.Tenant = "default",
    tag: opt.Tags = None,
    request_id: Annotated[str | None, typer.Option(help="Idempotency key of the usage record.")] = None,
    model: opt.Model = None,
    device: opt.Device = "auto",
    device_map: opt.DeviceMap = None,
    precision: opt.Precision = "auto",
    policy: opt.PolicyFile = None,
    router: opt.RouterFolder = None,
    ledger: opt.Ledger = None,
    no_ledger: opt.NoLedger = False,
) -> None:
    """Answer one prompt; the answer goes to standard output, what it cost to standard error."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():  # before seconds are spent on loading
        raise EmptyPromptError(f"the prompt is empty ({len(text)} characters); give it some text.")
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
        "template": "raw" if raw else "auto",
        "compute": opt.compute_of(compute),
        "program": program,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop,
        "request_id": request_id,
    }
    if stream:
        _stream(engine, text, request, as_json=as_json)
    else:
        _whole(engine.generate(text, **request), as_json=as_json)


def _whole(done: Generation, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_facts(done), indent=2))
    else:
        typer.echo(done.text)
        typer.echo(footer(done), err=True)


def _stream(engine: PolarModel, text: str, request: dict[str, Any], *, as_json: bool) -> None:
    """Text as it comes, or with --json one object per line, the last with the usage record."""
    with closing(engine.stream(text, **request)) as chunks:  # whatever breaks the loop off, the record is stored first
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
                    typer.echo(footer(chunk.generation), err=True)


def _facts(done: Generation) -> dict[str, Any]:
    return {
        "text": done.text,
        "finish_reason": done.finish_reason,
        "usage": done.usage.model_dump(mode="json"),
        "receipt": None if done.receipt is None else dict(done.receipt),
    }


def footer(done: Generation) -> str:
    """One line: tier, program, tokens, FLOPs and saving, and the price where the sink named one."""
    usage = done.usage
    saved = usage.flops_saved / usage.identity_flops if usage.identity_flops else 0.0
    parts = [
        usage.tier or usage.router,
        f"program {usage.program}",
        f"{usage.tokens.input}+{usage.tokens.output} tokens",
        f"{usage.flops.total / 1e9:,.2f} GFLOP ({saved:+.1%} saved)",
        f"{usage.compute_units:.6f} CU",
    ]
    if done.receipt is not None and done.receipt.get("cost") is not None:
        parts.append(f"{done.receipt['cost']} {done.receipt.get('currency', '')}".strip())
    return "[" + " · ".join(parts) + "]"
