"""Assemble the command `polar`, and turn every error a user can cause into one line and an exit code.

Exit codes: 0 done; 1 a store, a model or the disk failed; 2 the caller's mistake; 3 over a budget; 130 interrupted.
Commands of other parts (`usage`, `report`, `demo`) come from the entry point group `polar_sdk.commands`; each says
itself which extra it needs.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperGroup

from polar_sdk.cli import models
from polar_sdk.cli.calibrate import calibrate
from polar_sdk.cli.drafts import drafts
from polar_sdk.cli.evaluate import evaluate
from polar_sdk.cli.fit import fit
from polar_sdk.cli.heal import heal
from polar_sdk.cli.recalibrate import recalibrate
from polar_sdk.cli.redteam import redteam
from polar_sdk.cli.run import chat, run
from polar_sdk.cli.search import search
from polar_sdk.cli.train import train
from polar_sdk.errors import PolarError
from polar_sdk.reading import shown
from polar_sdk.show.lines import print_line, survive_encodings

if TYPE_CHECKING:
    from collections.abc import Callable

_GROUP = "polar_sdk.commands"
_INTERRUPTED = 130


class _Group(TyperGroup):
    """Commands whose errors are one line on standard error."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PolarError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt as interrupt:
            _fail("; ".join(("interrupted", *map(str, interrupt.args))) + ".", _INTERRUPTED)
        except UnicodeDecodeError as error:  # standard input in a strict locale
            _fail(f"standard input is not valid {error.encoding} (byte {error.start}); pass valid text.", 2)
        except UnicodeEncodeError as error:  # bytes of an argument that are no text in the locale's encoding
            _fail(f"{shown(error.object)} is not valid {error.encoding}; pass valid text.", 2)
        except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  (or the interpreter complains when it exits)
            raise typer.Exit(0) from None
        except OSError as error:
            where = f" {error.filename!r}" if error.filename else ""
            _fail(f"{error.strerror or error}{where}.", 1)


def _fail(message: str, code: int) -> None:
    print_line(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)


app = typer.Typer(
    cls=_Group,
    name="polar",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Run a local LLM along a program of layers, and account for the compute that was executed.",
    epilog="Start with: polar demo",
)


laboratory = typer.Typer(
    name="lab",
    no_args_is_help=True,
    help="Make a model cheaper: fit maps, search programs, train and calibrate routers, train draft heads.",
    epilog="Example: polar lab search --budgets 0.9,0.8 --out menu.json",
)


_EXAMPLES: Final[dict[Callable[..., None], str]] = {
    run: "polar run 'What is the capital of France?' --compute economy --stream",
    chat: "polar chat --compute economy --system 'Answer in one sentence.'",
    evaluate: "polar evaluate --data questions.jsonl --compute economy --html evaluation.html",
    recalibrate: "polar recalibrate --model smollm2-135m-instruct",
    redteam: "polar redteam --attempts 500 --policy floors.toml",
    fit: "polar fit qwen2.5-coder-0.5b-instruct --data prompts.jsonl --hours 1",
    models.export: "polar export --program '0-20 25-29' --out ./smaller",
    heal: 'polar lab heal --segments "12-15,17-20" --out bridges --distil 200',
    search: "polar lab search --data prompts.jsonl --budgets 0.9,0.8,0.7 --menu 12 --out menu.json",
    train: "polar lab train --rewards menu.rewards.safetensors --kind menu --out router",
    calibrate: "polar lab calibrate --router router --data prompts.jsonl --tier economy=0.1",
    drafts: "polar lab drafts --data prompts.jsonl",
}
"""Every command with an example of its use; those of `polar lab` belong to the laboratory."""


def _show_version(show: bool) -> None:
    if show:
        from polar_sdk import __version__

        print_line(f"polar {__version__}")
        raise typer.Exit


@app.callback()
def polar(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run a local LLM along a program of layers, and account for the compute that was executed."""


def _register_all() -> None:
    for command, example in _EXAMPLES.items():
        group = laboratory if example.startswith("polar lab ") else app
        group.command(epilog=f"Example: {example}")(command)
    app.add_typer(laboratory)
    app.add_typer(models.app)
    for entry in sorted(entry_points(group=_GROUP), key=lambda entry: entry.name):
        try:
            entry.load()(app)
        except Exception as error:  # another package must not break `polar run`
            print_line(f"warning: commands of {entry.value!r} are missing: {error!r}", err=True)


_register_all()


def main() -> None:
    """Entry point of the command `polar`."""
    # Threads that wait for work should spin for a moment and then sleep: those that sleep at once halve the speed of
    # decoding, those that spin for long ruin it for a second process on the same cores (benchmarks/LOG.md). Read
    # when torch is first imported, which has not happened yet.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "600")
    atexit.register(gc.freeze)  # the last to run: the interpreter would look for garbage for a second before it ends
    # Unwind instead of dying at once, so that a request in progress leaves its usage record.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    survive_encodings()
    app()
