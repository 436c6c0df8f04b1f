"""`polar demo`: a metered LangChain chain on the real model, from prompts to the bill.

Two tenants ask nine questions of rising difficulty on three tiers, one answer is streamed, one is interrupted; then the
ledger and the report are shown by the commands that a user would type. It has a ledger of its own, created anew each
time. Knows no billing: prices come back with the answers, tables come from the commands of `polar`.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from platformdirs import user_data_path

from polar_sdk.errors import PolarError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from rich.console import Console

    from langchain_polar import ChatPolar
    from langchain_polar.callbacks import PolarCall


OutOption = Annotated[Path | None, typer.Option(help="Folder for ledger and report; default: the user's data folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
LEDGER: Final = "polar-demo.sqlite3"
REPORT: Final = "polar-demo.html"
"""Created anew each time, so they have names that no ledger or report of the user has."""
MAX_TOKENS: Final = 32
_BREAK_AFTER: Final = 8
"""Pieces of text after which the demo leaves a stream. Unit: chunks."""


@dataclass(frozen=True)
class Question:
    """A prompt, who asks it, and the tier it is asked on."""

    tenant: str
    tier: str
    text: str


QUESTIONS: Final = (
    Question("acme", "economy", "What is the capital of France?"),
    Question("globex", "economy", "What colour is the sky on a clear day?"),
    Question("acme", "economy", "Name three fruits."),
    Question("globex", "standard", "Give the opposite of each word: hot, early, expensive."),
    Question("acme", "standard", "Explain in one sentence why ice floats on water."),
    Question("globex", "standard", "Turn this into a polite request: Send me the report now."),
    Question("acme", "premium", "A train leaves at 9:40 and arrives at 11:15. How long is the journey?"),
    Question("globex", "premium", "Summarise in one sentence how a bill differs from a receipt."),
    Question("acme", "premium", "Write a two-line poem about a lighthouse in fog."),
)
STREAMED: Final = Question("globex", "standard", "Tell me about the moon in two sentences.")
INTERRUPTED: Final = Question("acme", "premium", "Tell me a long story about a clockmaker.")


@dataclass(frozen=True)
class Answered:
    """One line of the demo's own table."""

    tenant: str
    tier: str
    prompt: str
    answer: str
    program: str
    tokens: int
    flops: int
    compute_units: str
    cost: str | None
    currency: str | None

    @classmethod
    def of(cls, question: Question, answer: str, call: PolarCall) -> Answered:
        """A question with its answer and the bill."""
        return cls(
            tenant=call.tenant,
            tier=question.tier,
            prompt=question.text,
            answer=answer,
            program=call.program,
            tokens=call.input_tokens + call.output_tokens,
            flops=call.flops,
            compute_units=f"{call.compute_units:f}",
            cost=None if call.cost is None else f"{call.cost:f}",
            currency=call.currency,
        )


def register(app: typer.Typer) -> None:
    """Add `polar demo`; it runs further commands of `app` at its end."""

    @app.command(epilog="Example: polar demo --out ./polar-demo")
    def demo(out: OutOption = None, as_json: JsonOption = False) -> None:
        """Run a metered LangChain chain on the real model: two tenants, three tiers, the bill at the end."""
        folder = (out or user_data_path("polar", appauthor=False) / "demo").expanduser().absolute()
        chat = _model(folder / LEDGER)
        _make_fresh(folder)
        if as_json:
            typer.echo(json.dumps(_as_json(app, chat, folder), indent=2, ensure_ascii=False))
        else:
            _on_screen(app, chat, folder)


def _on_screen(app: typer.Typer, chat: ChatPolar, folder: Path) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print("[bold]A LangChain chain: prompt | ChatPolar | StrOutputParser[/bold]")
    console.print("[dim]Loading the model; the first time it is fetched and converted.[/dim]\n")
    for answered in _answers(chat):
        _show(console, answered)
    console.print("[bold]Streamed[/bold]  ", STREAMED.text)
    console.print("  ", end="")
    for piece in _stream(chat, STREAMED):
        sys.stdout.write(piece.replace("\n", "\n  "))
        sys.stdout.flush()
    console.print(f"\n\n[bold]Interrupted[/bold]  {INTERRUPTED.text}")
    console.print(f"  {''.join(_interrupted(chat))}… [dim]left; compute stops and the record says so[/dim]\n")
    ledger = str(folder / LEDGER)
    console.print("[bold]The ledger[/bold]  [dim]$ polar usage --requests --ledger FILE[/dim]")
    _polar(app, "usage", "--requests", "--ledger", ledger)
    console.print("\n[bold]The report by tier[/bold]  [dim]$ polar report --ledger FILE[/dim]")
    _polar(app, "report", "--ledger", ledger)
    report = _write_report(app, folder)
    console.print(f"\nThe same as a page: [bold]{report}[/bold]", soft_wrap=True)
    console.print(f"The ledger of this demo: {ledger}", soft_wrap=True)


def _as_json(app: typer.Typer, chat: ChatPolar, folder: Path) -> dict[str, Any]:
    ledger = str(folder / LEDGER)
    answers = [asdict(answered) for answered in _answers(chat)]
    streamed, broken_off = "".join(_stream(chat, STREAMED)), "".join(_interrupted(chat))
    return {
        "answers": answers,
        "streamed": {**asdict(STREAMED), "answer": streamed},
        "broken_off": {**asdict(INTERRUPTED), "answer": broken_off},
        "requests": json.loads(_captured(app, "usage", "--requests", "--json", "--ledger", ledger)),
        "report": json.loads(_captured(app, "report", "--json", "--ledger", ledger)),
        "html": str(_write_report(app, folder)),
        "ledger": ledger,
    }


def _answers(chat: ChatPolar) -> Iterator[Answered]:
    """Ask every question through one chain; tier and tenant travel with the call."""
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate

    from langchain_polar import get_polar_cost_callback

    prompt = ChatPromptTemplate.from_messages([("human", "{question}")])
    for question in QUESTIONS:
        chain = prompt | chat.bind(compute=question.tier) | StrOutputParser()
        with get_polar_cost_callback() as costs:
            answer = chain.invoke({"question": question.text}, config={"metadata": {"tenant": question.tenant}})
        yield Answered.of(question, answer.strip(), costs.calls[-1])


def _stream(chat: ChatPolar, question: Question) -> Generator[str]:
    config: Any = {"metadata": {"tenant": question.tenant}}
    for chunk in chat.stream(question.text, config=config, compute=question.tier):
        yield str(chunk.content)


def _interrupted(chat: ChatPolar) -> list[str]:
    """Leave a stream after a few pieces."""
    stream = _stream(chat, INTERRUPTED)
    with contextlib.closing(stream):
        return list(islice(stream, _BREAK_AFTER))


def _model(ledger: Path) -> ChatPolar:
    try:
        from langchain_polar import ChatPolar
    except ModuleNotFoundError as error:
        package = (error.name or "langchain_core").partition(".")[0]
        hint = "In a clone: `pip install '.[all]'`."
        raise PolarError(f"the demo needs the package {package!r}.", hint=hint) from error
    return ChatPolar(max_tokens=MAX_TOKENS, ledger=f"sqlite:///{ledger}")


def _show(console: Console, answered: Answered) -> None:
    from rich.padding import Padding
    from rich.text import Text

    price = "no price" if answered.cost is None else f"{answered.cost} {answered.currency}"
    console.print(Text(f"{answered.tenant} · {answered.tier}", style="cyan"))
    console.print(Text(answered.prompt, style="bold"))
    console.print(Padding(Text(answered.answer), (0, 0, 0, 2), expand=False))
    facts = (
        f"program {answered.program} · {answered.tokens} tokens · {answered.flops / 1e9:,.2f} GFLOP · "
        f"{answered.compute_units} CU · {price}"
    )
    console.print(Text(f"  {facts}\n", style="dim"), soft_wrap=True)


def _polar(app: typer.Typer, *arguments: str) -> None:
    """Run a command of `polar` in this process."""
    typer.main.get_command(app).main([*arguments], prog_name="polar", standalone_mode=False)


def _captured(app: typer.Typer, *arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        _polar(app, *arguments)
    return text.getvalue()


def _write_report(app: typer.Typer, folder: Path) -> Path:
    path = folder / REPORT
    with contextlib.redirect_stderr(io.StringIO()):  # the demo names the file itself
        _polar(app, "report", "--html", str(path), "--ledger", str(folder / LEDGER))
    return path


def _make_fresh(folder: Path) -> None:
    """Create the folder, and remove the ledger and the report of the last run from it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (LEDGER, f"{LEDGER}-wal", f"{LEDGER}-shm", REPORT):
        (folder / name).unlink(missing_ok=True)
