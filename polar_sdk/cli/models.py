"""`polar models` lists the models on this host, fetches one before it is needed, removes one; `polar export` makes one.

Prints what `polar_sdk.models` knows.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from polar_sdk.cli import options as opt
from polar_sdk.models.aliases import ALIASES, DEFAULT_ALIAS, Alias, find_alias, resolve
from polar_sdk.models.find import obtain
from polar_sdk.models.paths import models_folder
from polar_sdk.models.store import Manifest, list_stored, remove_stored
from polar_sdk.programs.program import Program
from polar_sdk.show.lines import print_line
from polar_sdk.show.progress import interruptible, stage

app = typer.Typer(name="models", invoke_without_command=True, no_args_is_help=False)


@app.callback(epilog="Example: polar models --json")
def models(context: typer.Context, as_json: opt.AsJson = False) -> None:
    """List the aliases and the models in the cache."""
    if context.invoked_subcommand is not None:
        return
    rows = _rows()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        _print_table(rows)


@app.command(epilog="Example: polar models fetch smollm2-135m-instruct")
def fetch(
    name: Annotated[str, typer.Argument(help="Alias, hub id or `.gguf` file.")] = DEFAULT_ALIAS,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Fetch and check a model, so that it loads without a network afterwards."""
    source = resolve(name)
    local = obtain(source, revision, refresh=True)
    size = sum(path.stat().st_size for path in local.folder.rglob("*") if path.is_file())
    if as_json:
        facts = {
            "name": source.name,
            "folder": str(local.folder),
            "bytes": size,
            "fingerprint": local.fingerprint,
        }
        typer.echo(json.dumps(facts, indent=2))
    else:
        print_line(f"{source.name} is ready: {_megabytes(size)} in {local.folder}")


@app.command(epilog="Example: polar models kernels")
def kernels() -> None:
    """Build the native kernels into the installed package, if they are missing; needs a C++ compiler."""
    from polar_sdk.engine.native.build import build_missing, is_possible, missing

    if not is_possible():
        print_line("there are no native kernels for this kind of machine: layers run by torch", err=True)
        raise typer.Exit(1)
    kinds = ", ".join(missing())
    with (
        interruptible("libraries that are built stay; the same command builds the others"),
        stage(f"compiling native kernels ({kinds}), a minute or two") if kinds else nullcontext(),
    ):
        failures = build_missing()
    for kind, reason in failures.items():
        print_line(f"native kernels for {kind} cannot be built: {reason}", err=True)
    if failures:
        raise typer.Exit(1)
    print_line("native kernels are built: models loaded from now on use them")


@app.command(epilog="Example: polar models remove smollm2-135m-instruct")
def remove(
    name: Annotated[str, typer.Argument(help="Alias, or name of a `.gguf` file that was loaded.")],
    as_json: opt.AsJson = False,
) -> None:
    """Remove a model from the cache; your own `.gguf` files are not removed."""
    alias = find_alias(name)
    name = name if alias is None else alias.name
    freed = remove_stored(name)
    typer.echo(
        json.dumps({"name": name, "freed_bytes": freed}) if as_json else f"removed {name}: {_megabytes(freed)} freed"
    )


def export(
    program: Annotated[str, typer.Option("--program", "-p", help="Layers to keep, each once, e.g. '0-20 25-29'.")],
    out: Annotated[Path, typer.Option(help="Folder to write; its parents are created.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is already stored there.")] = False,
    as_json: opt.AsJson = False,
    model: opt.Model = None,
    policy: opt.PolicyFile = None,
) -> None:
    """Write the layers that a program visits as a separate model, which transformers and other servers can run."""
    chosen = Program.parse(program)  # before seconds are spent on loading
    engine = opt.load_model(model, device="cpu", precision="auto", policy=policy, no_ledger=True)
    folder = engine.export(chosen, out, force=force)
    size = sum(path.stat().st_size for path in folder.iterdir())
    if as_json:
        facts = {"folder": str(folder), "program": chosen.text, "layers": len(chosen), "bytes": size}
        typer.echo(json.dumps(facts, indent=2))
    else:
        print_line(f"{chosen.text} of {engine.name} is now a model of {size / 1e6:,.1f} MB in {folder}")


def _rows() -> list[dict[str, Any]]:
    stored = list_stored()
    keys = {manifest.made_from.key for manifest in stored}
    absent = [alias for alias in ALIASES if alias.key not in keys]
    return [*map(_absent_row, absent), *map(_stored_row, stored)]


def _absent_row(alias: Alias) -> dict[str, Any]:
    return {
        "name": alias.name,
        "default": alias.name == DEFAULT_ALIAS,
        "cached": False,
        "bytes": alias.bytes,
        "source": alias.origin,
        "licence": alias.licence,
        "fingerprint": None,
        "folder": None,
    }


def _stored_row(manifest: Manifest) -> dict[str, Any]:
    recipe = manifest.made_from
    return {
        "name": recipe.name,
        "default": recipe.name == DEFAULT_ALIAS,
        "cached": True,
        "bytes": manifest.bytes,
        "source": recipe.origin,
        "licence": recipe.licence,
        "fingerprint": manifest.fingerprint,
        "folder": str(models_folder() / recipe.key),
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    from polar_sdk.show.tables import add_labels, add_numbers, add_row, new_table, show

    table = new_table(f"Models in {models_folder()}", ["model"])
    add_numbers(table, "size")
    add_labels(table, "source", "licence", "fingerprint")
    for row in rows:
        add_row(
            table,
            f"{row['name']} (default)" if row["default"] else row["name"],
            _megabytes(row["bytes"]),
            row["source"],
            row["licence"] or "unknown",
            row["fingerprint"][:12] if row["cached"] else "not fetched",
        )
    show(table)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
