"""Speed of answers with drafts, by kind of prompt: the same requests with drafts and without, in turn.

`benchmarks.engine` runs it. Answers are greedy, at full depth, one at a time, and their first token does not count.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Final, NamedTuple

from polar_sdk import Program
from polar_sdk.lab.items import ChoiceItem, PromptItem, builtin_items

if TYPE_CHECKING:
    from polar_sdk import PolarModel
    from polar_sdk.request.generation import Generation
    from polar_sdk.serving.drafts import Speculate

ANSWER: Final = 64
LEAST: Final = 0.97
"""Share of the speed without drafts that every prompt should reach."""
ASKED_BEFORE, ASKED = 80, 24
"""Questions of `measure_questions`: those that may be asked before, and those that are compared."""
_CHATS: Final = ("chat", "how-to")
"""The kinds of the package's own prompts that they are taken from."""
_NOTES: Final = (
    "Notes of the meeting of 12 March. Present: Ana Ruiz, Ben Okafor, Chloe Martin, Dev Patel. The roof of the "
    "east hall leaks above the stage. Dev has two offers: Hartmann Roofing asks 18,400 euros and can begin on 2 "
    "May; Nordbau asks 16,900 euros and can begin on 20 June. The summer concert is on 8 June, and the hall must "
    "be dry by then. Ana moved to accept the offer of Hartmann Roofing. The motion passed with three votes to "
    "one. Chloe will tell the choir that rehearsals move to the library from 2 May to 30 May. Ben reported that "
    "the account holds 41,250 euros, of which 6,000 are set aside for the piano. The next meeting is on 9 April "
    "at 19:00 in the library."
)
_ARTICLE: Final = (
    "The lighthouse on Gull Point was built in 1871, after the loss of the steamer Marianne with all 43 people on "
    "board. For ninety years its keepers lit the lamp by hand, first with rapeseed oil and later with paraffin. "
    "In 1961 the lamp was connected to the mains, and the last keeper, Thomas Hale, moved to the mainland. The "
    "tower stood empty until 1998, when a group of volunteers from the village of Penmarra began to restore it. "
    "They repaired the iron gallery, replaced 212 panes of glass and cleaned the great lens, which weighs two "
    "tonnes. Today the lighthouse is open to visitors from April to October. About 9,000 people climb its 146 "
    "steps every year, and the money from tickets pays for the upkeep of the tower."
)
_CODE: Final = """def total_price(items, tax_rate):
    total = 0
    for item in items:
        price = item["price"]
        quantity = item["quantity"]
        total = total + price * quantity
    tax = total * tax_rate
    return total + tax


def average_price(items):
    total = 0
    count = 0
    for item in items:
        total = total + item["price"] * item["quantity"]
        count = count + item["quantity"]
    return total / count
"""
KINDS: Final[dict[str, tuple[float, tuple[str, ...]]]] = {
    "chat": (
        1.25,
        (
            "What should I cook tonight if I only have rice, eggs and spinach?",
            "Give me three tips for learning a new language.",
            "Why is the sky blue?",
        ),
    ),
    "notes": (
        1.6,
        tuple(
            f"{_NOTES}\n\nAnswer from the notes, in whole sentences: {question}"
            for question in (
                "Which offers did Dev have, and when can each begin?",
                "What was decided about the roof, and why?",
                "What did Ben report about the account?",
            )
        ),
    ),
    "summary": (
        1.7,
        (
            f"Summarize this text in three sentences:\n\n{_ARTICLE}",
            f"Summarize the notes:\n\n{_NOTES}",
            f"List the facts of this text, one per line:\n\n{_ARTICLE}",
        ),
    ),
    "code": (
        1.5,
        (
            f"Rename the variable `total` to `amount` in this code and show the whole code:\n\n```python\n{_CODE}```",
            f"Add type hints to this code and show the whole code:\n\n```python\n{_CODE}```",
            f"Add a docstring to each function and show the whole code:\n\n```python\n{_CODE}```",
        ),
    ),
}
"""Kind of prompt → ratio that is the goal, and prompts."""


class Pair(NamedTuple):
    """One prompt, answered with drafts and without, in one round."""

    drafted: float
    """Unit: tokens per second after the first."""
    plain: float
    tokens_per_pass: float
    same: bool
    """Whether both answers have the same tokens."""


def measure(model: PolarModel, kind: str, rounds: int, speculate: Speculate) -> list[Pair]:
    """Answer the prompts of a kind in turn; every answer runs its prompt anew.

    Args:
        model: What answers.
        kind: Of `KINDS`.
        rounds: Times each prompt is answered either way.
        speculate: How drafts are made.
    """
    return [
        _pair(model, prompt, speculate, f"{kind} {number} {place}", drafts_first=(number + place) % 2 == 0)
        for number in range(rounds)
        for place, prompt in enumerate(KINDS[kind][1])
    ]


def chat_questions() -> list[str]:
    """Chat questions of the package's own prompts."""
    return [item.prompt for item in builtin_items() if isinstance(item, PromptItem) and item.task in _CHATS]


def measure_questions(model: PolarModel, speculate: Speculate, *, after_others: bool) -> list[Pair]:
    """Answer questions of the package's own prompts once each.

    Args:
        model: What answers.
        speculate: How drafts are made.
        after_others: Whether they are all of a tenant that has asked others before, and whose answers may be drafted
            from those; otherwise each is the first one of its tenant.
    """
    questions = chat_questions()
    if after_others:
        for question in questions[:ASKED_BEFORE]:
            _answer(model, question, speculate, f"after others {speculate}")
    return [
        _pair(
            model,
            question,
            speculate,
            "after others" if after_others else f"first {place}",
            drafts_first=place % 2 == 0,
        )
        for place, question in enumerate(questions[ASKED_BEFORE : ASKED_BEFORE + ASKED])
    ]


class Slowest(NamedTuple):
    """The prompt that gains least of many, by its median over the rounds; noise makes the least of many look worse."""

    drafted: list[float]
    """Speed of each round. Unit: tokens per second after the first."""
    plain: list[float]
    chance: float
    """The least median ratio of two answers without drafts to the same prompts: what noise alone makes of the least."""
    below: int
    """Prompts whose median is below `LEAST`."""


def measure_slowest(model: PolarModel, prompts: int, rounds: int, speculate: Speculate) -> Slowest:
    """Answer prompts of all kinds with drafts, and twice without, in turn."""
    runs: list[tuple[list[float], list[float], list[float]]] = []
    asked = [item.prompt for item in builtin_items() if not isinstance(item, ChoiceItem)]  # interleaved by kind
    for place, prompt in enumerate(asked[:prompts]):
        speeds: tuple[list[float], list[float], list[float]] = ([], [], [])
        for number in range(rounds):
            for turn in range(3):  # each way is the first one in a third of the rounds
                way = (number + turn) % 3
                tenant = f"slowest {place} {number} {way}"
                speeds[way].append(_speed(_answer(model, prompt, "off" if way else speculate, tenant)))
        runs.append(speeds)
    drafted, plain, _ = min(runs, key=lambda run: _ratio(run[0], run[1]))
    chance = min(_ratio(again, plain) for _, plain, again in runs)
    return Slowest(drafted, plain, chance, sum(_ratio(run[0], run[1]) < LEAST for run in runs))


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def _pair(model: PolarModel, prompt: str, speculate: Speculate, tenant: str, *, drafts_first: bool) -> Pair:
    modes: tuple[Speculate, Speculate] = (speculate, "off") if drafts_first else ("off", speculate)
    runs = {mode: _answer(model, prompt, mode, f"{tenant} {mode}") for mode in modes}
    plain, drafted = runs["off"], runs[speculate]
    passes = max(drafted.usage.visits.decode, default=0)
    tokens_per_pass = (len(drafted.token_ids) - 1) / max(passes, 1)
    return Pair(_speed(drafted), _speed(plain), tokens_per_pass, drafted.token_ids == plain.token_ids)


def _answer(model: PolarModel, prompt: str, speculate: Speculate, tenant: str) -> Generation:
    program = Program.identity(model.depth)
    return model.generate(prompt, max_tokens=ANSWER, program=program, speculate=speculate, tenant=tenant)


def _speed(answer: Generation) -> float:
    return (len(answer.token_ids) - 1) * 1e9 / max(answer.usage.decode_ns, 1)
