"""`polar demo`: a metered LangChain chain on the real model, from prompts to the bill.

Two tenants send nine prompts as chains do (minutes, a letter or retrieved passages with a question, and short ones) on
three tiers; one answer is streamed, one is interrupted. A model without a router for these tiers answers at full
depth. Then the ledger and the report are shown by the commands that a user would type. The demo has a ledger of its
own, created anew each time. It knows no billing: prices come back with the answers, tables come from the commands of
`polar`.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import asdict, dataclass, replace
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
    from polar_sdk import PolarModel


OutOption = Annotated[Path | None, typer.Option(help="Folder for ledger and report; default: the user's data folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
LEDGER: Final = "polar-demo.sqlite3"
REPORT: Final = "polar-demo.html"
"""Created anew each time, so they have names that no ledger or report of the user has."""
MAX_TOKENS: Final = 64
_BREAK_AFTER: Final = 8
"""Pieces of text after which the demo leaves a stream. Unit: chunks."""


@dataclass(frozen=True)
class Question:
    """A prompt, who asks it, and the tier it is asked on."""

    tenant: str
    tier: str
    text: str
    given: str = ""
    """Text before it in the prompt, as from a retriever or a form."""

    @property
    def prompt(self) -> str:
        """The whole prompt."""
        return f"{self.given}\n\n{self.text}".strip()


_MINUTES: Final = """Minutes of the harbour committee, 14 March.

Present: Anna Lind (chair), Marek Novak, Ines Duarte, Tom Hale, and for item four Ravi Menon of the port authority.

1. The minutes of February were read and approved without changes.
2. Ferry timetable. From 2 May the morning ferry leaves at 6:50 instead of 7:10, so that it meets the train to the
city. Marek Novak will tell the schools, and new timetables will hang at all piers by 20 April. The evening ferries do
not change.
3. The crane at pier three has been out of order since January. Two offers came in: Halden Maskin asks for 48,000 for
a repair with two years of guarantee, Nordkran asks for 61,000 for a used crane with one year. Ines Duarte pointed out
that the old crane has failed four times in three years. The committee chose the used crane by three votes to one. Tom
Hale signs the contract by the end of the month, and the crane is to be in place before the fishing season begins on
15 June.
4. Oil spill of 2 March. Ravi Menon reported that some 300 litres of diesel ran out of a leaking hose at the fuel
dock. The barrier was laid within twenty minutes, and water samples of 5 and 9 March were clean. The hose was
replaced; hoses will be checked every month from now on. The cost of 7,400 will be paid by the insurance of the dock,
less 1,000 of its own share.
5. The fee for visiting boats rises from 180 to 195 a night in July and August, and stays as it is in the other
months.
6. The summer festival is on 8 August. The jetty will be closed to traffic from noon to midnight, and the lifeboat
crew shows a rescue at four. Anna Lind asks for volunteers: twelve came last year, and some twenty are needed.
7. The next meeting is on 11 April at 18:00 in the old customs house."""
_COMPLAINT: Final = """\
Dear Sir or Madam,

on 3 September I ordered a washing machine from your shop, model W40, order number 77120, and paid 429 for it and 35
for delivery. It was promised for the 9th between eight and twelve. Nobody came. On the telephone I was told that the
van had broken down, and given the 12th as a new date. I took a second day off work. This time the machine came, but
with a dent in the door and without the hose for the drain, and your drivers said that they were not allowed to take
it back. I have called your service four times since then. Each time somebody else answered, none of them knew of the
calls before, and all of them promised that I would be called back, which has not happened. I have now washed at my
sister's for three weeks.

Please collect the damaged machine and bring a new one with all its parts by 5 October, and return the 35 for
delivery. If that is not possible, I want my money back and will buy elsewhere. You can reach me at 555 0142 on
weekdays after five.

Yours faithfully,
Helen Marsh"""
_PASSAGES: Final = """\
[1] A lock lets boats pass between two levels of water. The boat enters a chamber, the gate behind it is closed, and
water is let in or out until the level in the chamber is that of the water ahead. No pump is needed: the water flows
downhill.
[2] The oldest lock with two gates in Europe was built at Vreeswijk in the Netherlands in 1373. In China such chambers
were known four hundred years earlier, on the Grand Canal, where Qiao Weiyue built the first one in 984 to keep boats
from being robbed at the slipways.
[3] Where one lock would be too deep, several stand in a row and are called a staircase. The one at Neptune's steps in
Scotland has eight chambers and lifts boats by nineteen metres; a passage takes about an hour and a half.
[4] Boat lifts replace staircases where much traffic has to pass. The Falkirk Wheel turns two troughs of water around
an axle. Since a boat pushes away exactly its own weight of water, both troughs always weigh the same, and little
power is needed."""

QUESTIONS: Final = (
    Question("acme", "economy", "Answer from the minutes: which crane did the committee choose?", _MINUTES),
    Question("globex", "economy", "Summarise this letter in one sentence.", _COMPLAINT),
    Question("acme", "economy", "What is the capital of France?"),
    Question("globex", "standard", "Answer from the passages: who built the first lock, and when?", _PASSAGES),
    Question("acme", "standard", "Answer from the minutes: when is the next meeting?", _MINUTES),
    Question("globex", "standard", "What does the customer want? Answer in one sentence.", _COMPLAINT),
    Question("acme", "premium", "A train leaves at 9:40 and arrives at 11:15. How long is the journey?"),
    Question("globex", "premium", "Answer from the passages: why does the Falkirk Wheel need little power?", _PASSAGES),
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
    saved: float
    """Share of full depth's FLOPs."""
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
            saved=1 - call.flops / call.identity_flops,
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
        _make_fresh(folder)
        if as_json:
            typer.echo(json.dumps(_as_json(app, _model(folder / LEDGER), folder), indent=2, ensure_ascii=False))
        else:
            _on_screen(app, folder)


def _on_screen(app: typer.Typer, folder: Path) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print("[bold]A LangChain chain: prompt | ChatPolar | StrOutputParser[/bold]")
    console.print("[dim]Loading the model; the first time it is fetched.[/dim]\n")
    chat = _model(folder / LEDGER)
    if absent := {question.tier for question in QUESTIONS} - {*_engine(chat).tiers}:
        tiers = ", ".join(sorted(absent))
        console.print(f"{_engine(chat).name} has no certified router for {tiers}: asked at full depth instead.\n")
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
    for question in (_offered(question, chat) for question in QUESTIONS):
        chain = prompt | chat.bind(compute=question.tier) | StrOutputParser()
        with get_polar_cost_callback() as costs:
            answer = chain.invoke({"question": question.prompt}, config={"metadata": {"tenant": question.tenant}})
        yield Answered.of(question, answer.strip(), costs.calls[-1])


def _stream(chat: ChatPolar, question: Question) -> Generator[str]:
    config: Any = {"metadata": {"tenant": question.tenant}}
    for chunk in chat.stream(question.text, config=config, compute=_offered(question, chat).tier):
        yield str(chunk.content)


def _offered(question: Question, chat: ChatPolar) -> Question:
    """The question, at full depth where the model has no router for its tier."""
    return question if question.tier in _engine(chat).tiers else replace(question, tier="exact")


def _engine(chat: ChatPolar) -> PolarModel:
    assert chat.engine is not None, "`_model` loads it"
    return chat.engine


def _interrupted(chat: ChatPolar) -> list[str]:
    """Leave a stream after a few pieces."""
    stream = _stream(chat, INTERRUPTED)
    with contextlib.closing(stream):
        return list(islice(stream, _BREAK_AFTER))


def _model(ledger: Path) -> ChatPolar:
    try:
        from langchain_polar import ChatPolar
        from polar_sdk import PolarModel
    except ModuleNotFoundError as error:
        package = (error.name or "langchain_core").partition(".")[0]
        hint = "In a clone: `pip install '.[all]'`."
        raise PolarError(f"the demo needs the package {package!r}.", hint=hint) from error
    engine = PolarModel.from_pretrained(ledger=f"sqlite:///{ledger}")
    return ChatPolar(engine=engine, max_tokens=MAX_TOKENS, stop_repeats=4)


def _show(console: Console, answered: Answered) -> None:
    from rich.padding import Padding
    from rich.text import Text

    price = "no price" if answered.cost is None else f"{answered.cost} {answered.currency}"
    console.print(Text(f"{answered.tenant} · {answered.tier}", style="cyan"))
    console.print(Text(answered.prompt, style="bold"))
    console.print(Padding(Text(answered.answer), (0, 0, 0, 2), expand=False))
    facts = (
        f"program {answered.program} · {answered.tokens} tokens · {answered.flops / 1e9:,.2f} GFLOP, "
        f"{round(answered.saved, 3) + 0.0:+.1%} saved · {answered.compute_units} CU · {price}"
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
