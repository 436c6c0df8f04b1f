"""`polar export`: a program as a Hugging Face folder of its own, for other servers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from polar_sdk.cli import options as opt
from polar_sdk.programs.program import Program
from polar_sdk.show.lines import print_line


def export(
    program: Annotated[str, typer.Option("--program", "-p", help="Layers to keep, each once, e.g. '0-20 25-29'.")],
    out: Annotated[Path, typer.Option(help="Folder to write; its parents are created.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is stored there already.")] = False,
    as_json: opt.AsJson = False,
    model: opt.Model = None,
    policy: opt.PolicyFile = None,
) -> None:
    """Write the layers that a program visits as a model of its own, which transformers and other servers run."""
    chosen = Program.parse(program)  # before seconds are spent on loading
    engine = opt.load_model(model, device="cpu", precision="auto", policy=policy, no_ledger=True)
    folder = engine.export(chosen, out, force=force)
    size = sum(path.stat().st_size for path in folder.iterdir())
    if as_json:
        facts = {"folder": str(folder), "program": chosen.text, "layers": len(chosen), "bytes": size}
        typer.echo(json.dumps(facts, indent=2))
    else:
        print_line(f"{chosen.text} of {engine.name} is now a model of {size / 1e6:,.1f} MB in {folder}")
