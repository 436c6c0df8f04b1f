"""Prompts made from a grammar: notes or passages with a question, messages, and what chains ask about texts.

They are made up, so that no model can know the answers, and each seed gives different ones; 32 notes, passages and
messages each are among the prompts that come with the package (`shipped/prompts.jsonl`). In notes, the fact in question
is at a known depth, which shows where in a long prompt a program stops finding it. Knows no model.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final, NamedTuple

from polar_sdk.lab.items import AnswerItem, PromptItem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Written(NamedTuple):
    """A prompt made from the grammar."""

    prompt: str
    answer: str
    """The right answer; empty for a message, which has no one right summary."""
    depth: float
    """Position of the asked fact in the text, from 0 (first) to 1 (last)."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_NAMES: Final = _words(
    "Amara Basil Cleo Dmitri Elena Farid Greta Hugo Ines Jonas Keiko Liam Mirela Nadia Oscar Priya Quentin "
    "Rosa Samir Tove Umar Vera Wanda Xavier Yusuf Zofia"
)
_FAMILIES: Final = _words(
    "Adler Bianchi Castro Dahl Eriksen Fischer Grant Hansen Ibarra Jansen Kovacs Lindt Moreau Novak Okafor "
    "Peralta Quinn Rossi Sato Tamm Ueda Varga Weber Yilmaz Zeller"
)
_PROJECTS: Final = _words(
    "Heron Lantern Maple Quartz Harbour Comet Juniper Falcon Pebble Orchard Beacon Saffron Glacier Tulip "
    "Anchor Cedar Meadow Ember Willow Compass Cobalt Sparrow Canyon Velvet"
)
_PLACES: Final = _words(
    "Aldermoor Bellhaven Corrin Dunmere Eastwick Farrow Glenholt Hartley Inverby Jarrowdale Kestrel Lowmarsh "
    "Marrick Northam Oakhurst Penrose Quayside Ravensby Stonebeck Thornley Upwell Westerby"
)
_MONTHS: Final = _words("January February March April May June July August September October November December")
_TEAMS: Final = ("the building team", "customer care", "the research group", "the harbour office", "the school board")
_FILLERS: Final = (
    "Nobody had anything to add to that.",
    "This was discussed at length, and opinions differed.",
    "The slides will be sent round later in the week.",
    "There was a short break for coffee after this point.",
    "Several people asked for more detail, which will follow by mail.",
    "The figures are provisional and may still be corrected.",
    "Everyone agreed that this had gone better than last year.",
    "A longer report is in the shared folder.",
    "The point was moved up because two people had to leave early.",
    "It was noted that the weather had caused some delays.",
)


class _Fact(NamedTuple):
    sentence: str
    question: str
    answer: str


def _person(dice: random.Random) -> str:
    return f"{dice.choice(_NAMES)} {dice.choice(_FAMILIES)}"


def _day(dice: random.Random) -> str:
    return f"{dice.randint(1, 28)} {dice.choice(_MONTHS)}"


def _money(dice: random.Random) -> str:
    return f"{dice.randint(12, 980)},{dice.choice(('000', '200', '450', '500', '800'))} euros"


def _project_fact(dice: random.Random, project: str) -> _Fact:
    """One fact about a project; which one is drawn."""
    person, day, money = _person(dice), _day(dice), _money(dice)
    place, count = dice.choice(_PLACES), str(dice.randint(3, 94))
    facts = (
        _Fact(
            f"The budget of the {project} project was set at {money}.",
            f"What is the budget of the {project} project?",
            money,
        ),
        _Fact(
            f"{person} will lead the {project} project from now on.", f"Who will lead the {project} project?", person
        ),
        _Fact(
            f"The first delivery of the {project} project is due on {day}.",
            f"When is the first delivery of the {project} project due?",
            day,
        ),
        _Fact(
            f"The {project} project moves to the new office in {place}.",
            f"Where does the {project} project move?",
            place,
        ),
        _Fact(
            f"There are {count} open complaints about the {project} project.",
            f"How many open complaints are there about the {project} project?",
            count,
        ),
        _Fact(
            f"After a long search, {person} was hired as a tester for {project}.",
            f"Who was hired as a tester for {project}?",
            person,
        ),
        _Fact(
            f"The supplier for {project} is now a small firm in {place}.",
            f"In which town is the supplier for {project}?",
            place,
        ),
        _Fact(
            f"The contract for {project} ends on {day} and will not be renewed.",
            f"When does the contract for {project} end?",
            day,
        ),
    )
    return dice.choice(facts)


def _place_fact(dice: random.Random, place: str) -> _Fact:
    """One fact about a town."""
    year, count, person = (
        str(dice.randint(1180, 1969)),
        f"{dice.randint(2, 78)},{dice.randint(100, 999)}",
        _person(dice),
    )
    trade = dice.choice(("glass", "salt", "paper", "clocks", "rope", "cheese", "bells", "sails"))
    facts = (
        _Fact(f"{place} was founded in {year} by monks.", f"When was {place} founded?", year),
        _Fact(f"At the last census it had {count} inhabitants.", f"How many inhabitants does {place} have?", count),
        _Fact(
            f"For centuries the town lived on the trade in {trade}.", f"What did {place} trade in for centuries?", trade
        ),
        _Fact(
            f"The bridge over the river was designed by {person}.",
            f"Who designed the bridge over the river in {place}?",
            person,
        ),
        _Fact(
            f"A fire destroyed most of the old quarter in {year}.",
            f"In which year did a fire destroy most of the old quarter of {place}?",
            year,
        ),
        _Fact(
            f"The painter {person} had a studio by the water here.", f"Which painter had a studio in {place}?", person
        ),
    )
    return dice.choice(facts)


_PLACE_FILLERS: Final = (
    "The streets around the market are narrow and mostly closed to cars.",
    "Trains to the coast leave every hour.",
    "The surrounding hills are popular with walkers in spring.",
    "Its small theatre shows plays in summer.",
    "The climate is mild, with rain throughout the year.",
    "Many of the houses are built of grey stone.",
    "A weekly newspaper has been printed here for a long time.",
    "The town hall stands on the site of an older church.",
)
_OPENINGS: Final = (
    "I hope this finds you well, and I am sorry that it has become so long.",
    "I am writing to you because I could not reach anybody by telephone.",
    "Thank you for your last message, which I read with interest.",
    "We have not spoken for a while, so let me start from the beginning.",
)
_CLOSINGS: Final = (
    "Please let me know what you think before the end of the week.",
    "I would be grateful for a short answer, even if you have no solution yet.",
    "If it is easier, call me in the evening.",
    "Thank you in advance for looking into this.",
)
_EVENTS: Final[tuple[Callable[[random.Random], str], ...]] = (
    lambda dice: f"The parcel that I ordered on {_day(dice)} arrived {dice.randint(2, 19)} days late.",
    lambda dice: f"The heating in flat {dice.randint(2, 60)} has not worked since {_day(dice)}.",
    lambda dice: f"The invoice says {_money(dice)}, but we had agreed on {_money(dice)}.",
    lambda dice: f"{_person(dice)} promised to call me back and never did.",
    lambda dice: f"The train to {dice.choice(_PLACES)} was cancelled, so we took a bus for {dice.randint(2, 7)} hours.",
    lambda dice: f"My neighbour, {_person(dice)}, has the same problem and asked me to mention it.",
    lambda dice: f"I have moved the meeting in {dice.choice(_PLACES)} to {_day(dice)}, as you suggested.",
    lambda dice: f"We still need {dice.randint(2, 40)} chairs and a projector for the evening.",
    lambda dice: f"The children enjoyed {dice.choice(_PLACES)}, and the museum more than we had expected.",
    lambda dice: f"Your colleague {_person(dice)} was helpful, but could not say when a part would be available.",
    lambda dice: f"I would prefer a refund of {_money(dice)} to another repair.",
    lambda dice: f"The new timetable starts on {_day(dice)}, and nobody has told the drivers.",
    lambda dice: f"Twice this month the lift stopped between floors {dice.randint(1, 5)} and {dice.randint(6, 9)}.",
    lambda dice: f"The roof has been leaking since the storm of {_day(dice)}, and the carpet is ruined.",
)


def notes(count: int, *, seed: int = 0, facts: tuple[int, int] = (8, 24)) -> list[Written]:
    """Notes of a meeting, and a question about one fact in them.

    Args:
        count: How many.
        seed: Others for each.
        facts: Fewest and most facts in one text, some 30 tokens each with what stands between them.
    """
    return [_note(random.Random(f"notes {seed} {place}"), facts) for place in range(count)]


def _note(dice: random.Random, facts: tuple[int, int]) -> Written:
    size = dice.randint(*facts)
    projects = [_PROJECTS[place % len(_PROJECTS)] for place in range(size)]
    suffix = [f" {2 + place // len(_PROJECTS)}" if place >= len(_PROJECTS) else "" for place in range(size)]
    dice.shuffle(projects)
    entries = [_project_fact(dice, f"{name}{more}") for name, more in zip(projects, suffix, strict=True)]
    at = dice.randrange(size)
    lines = [f"Notes of the meeting of {dice.choice(_TEAMS)}, {_day(dice)}. Present: {_person(dice)}, {_person(dice)}."]
    lines += [f"{fact.sentence} {dice.choice(_FILLERS)}" for fact in entries]
    question = entries[at].question
    style = dice.choice(("{text}\n\nQuestion: {question}", "Read the notes and answer: {question}\n\n{text}"))
    prompt = style.format(text="\n".join(lines), question=question)
    return Written(prompt, entries[at].answer, at / max(size - 1, 1))


def passages(count: int, *, seed: int = 0, most: int = 6) -> list[Written]:
    """Several numbered passages, as a search would return them, and a question that one of them answers.

    Args:
        count: How many.
        seed: Others for each.
        most: Maximum passages in one prompt, some 90 tokens each.
    """
    return [_passages(random.Random(f"passages {seed} {place}"), most) for place in range(count)]


def _passages(dice: random.Random, most: int) -> Written:
    places = dice.sample(_PLACES, dice.randint(2, most))
    asked = dice.randrange(len(places))
    texts, chosen = [], _Fact("", "", "")
    for number, place in enumerate(places):
        facts = list({fact.question: fact for fact in (_place_fact(dice, place) for _ in range(3))}.values())
        sentences = [fact.sentence for fact in facts] + dice.sample(_PLACE_FILLERS, dice.randint(1, 3))
        dice.shuffle(sentences)
        texts.append(f"[{number + 1}] {place} is a town in the north. {' '.join(sentences)}")
        if number == asked:
            chosen = facts[0]
    lead = dice.choice(("Answer the question from the passages.", "Use only these passages to answer.", "Context:"))
    prompt = "\n\n".join([lead, *texts, f"Question: {chosen.question}"])
    return Written(prompt, chosen.answer, asked / (len(places) - 1))


def messages(count: int, *, seed: int = 0, events: tuple[int, int] = (5, 12)) -> list[Written]:
    """A long message, and the request to summarise it or to list what it asks for.

    Args:
        count: How many.
        seed: Others for each.
        events: Fewest and most things that happen in one message, some 25 tokens each.
    """
    return [_message(random.Random(f"messages {seed} {place}"), events) for place in range(count)]


def _message(dice: random.Random, events: tuple[int, int]) -> Written:
    letter = _letter(dice, events)
    task = dice.choice(
        (
            "Summarise this message in two sentences:",
            "What does the writer want? Answer in one sentence.",
            "List the main points of this message:",
            "Write a short, friendly reply to this message:",
        )
    )
    return Written(f"{task}\n\n{letter}", "", 1.0)


def _letter(dice: random.Random, events: tuple[int, int]) -> str:
    happened = [make(dice) for make in dice.sample(_EVENTS, dice.randint(*events))]
    body = " ".join([dice.choice(_OPENINGS), *happened, dice.choice(_CLOSINGS)])
    return f"Dear {_person(dice)},\n\n{body}\n\nBest regards,\n{_person(dice)}"


TASKS: Final = {
    "translation of a text": (
        "Translate this text into French:\n\n{text}",
        "{text}\n\nTranslate the text above into Spanish.",
        "Translate into German:\n\n{text}",
    ),
    "points": (
        "Rewrite this text as a list of short points:\n\n{text}",
        "{text}\n\nList the main points of the text above.",
        "{text}\n\nWhat are the key takeaways? Answer with bullet points.",
    ),
    "title": (
        "{text}\n\nWrite a title for this text.",
        "Suggest a headline for this article:\n\n{text}",
        "{text}\n\nWhat is this text about? Answer in at most five words.",
    ),
    "names": (
        "{text}\n\nList the names of all people and places in this text as a JSON array.",
        "Extract all dates and organisations from this text as JSON:\n\n{text}",
        "{text}\n\nWho and what is named in this text? Write one name per line.",
    ),
    "rewriting": (
        "Rewrite this text in simple words:\n\n{text}",
        "{text}\n\nRewrite the text above in a friendly tone, as an e-mail to a colleague.",
        "Rewrite this text formally and shorten it:\n\n{text}",
    ),
}
"""Tasks that chains give about one text, each in several wordings."""


STEPS: Final = {
    "grading": (
        "Document:\n{text}\n\nQuestion: {question}\n\nDoes the document answer the question? Say yes or no, and why.",
        "{text}\n\nIs the text above relevant to this question? {question} Give a score from 0 to 10 and a reason.",
    ),
    "checking": (
        "{text}\n\nStatement: {statement}\n\nDoes the text support the statement? Quote what shows it.",
        "Sources:\n{other}\n\n{text}\n\nAnswer: {statement}\n\nWhat in this answer do the sources not support?",
    ),
    "merging": (
        "These are parts of one report.\n\n{text}\n\n{other}\n\nWrite one summary of all of it in four sentences.",
        "Summary so far: {other}\n\nNew text: {text}\n\nRewrite the summary so that it covers the new text as well.",
    ),
    "two sources": (
        "Source 1:\n{other}\n\nSource 2:\n{text}\n\nQuestion: {question} Name the source that you used.",
        "{text}\n\n---\n\n{other}\n\nAnswer from these texts, and say so if they do not tell: {question}",
    ),
    "questions": (
        "{text}\n\nWrite three questions that this text answers.",
        "Write five questions and their answers from the following text, as JSON.\n\n{text}",
    ),
    "key words": (
        "Give ten key words for this text, separated by commas.\n\n{text}",
        "{text}\n\nWhich topics does the text above cover? Write them as tags, one per line.",
    ),
    "follow-up": (
        "User: {question}\nAssistant: {answer}\nUser: And what about {name}?\n\nAsk the last question in full.",
        "{text}\n\nUser: {question}\nAssistant: {answer}\nUser: Thank you. What else is said about {name}?\nAssistant:",
    ),
    "tools": (
        "You can call these tools:\n{tools}\n\nRequest: {request}\n\nAnswer with the call only, as JSON.",
        "Tools:\n{tools}\n\nRequest: {request}\n\nWhich tool serves it, and with which arguments? Explain briefly.",
    ),
}
"""Calls that chains and agents make on the way to an answer, each in several wordings."""
_TOOLS: Final = {
    "search_notes(query: str, limit: int = 5)": "What was decided about {name}?",
    "book_room(town: str, day: str, people: int)": "I need a room for {people} people in {place} on {day}.",
    "send_mail(to: str, subject: str, body: str)": "Tell {person} that the delivery for {name} is late.",
    "get_weather(town: str, day: str)": "Will it rain in {place} on {day}?",
    "train_times(start: str, end: str, day: str)": "When can I travel from {place} to Thornley on {day}?",
    "add_task(title: str, owner: str, due: str)": "{person} has to check the budget of {name} before {day}.",
    "convert(amount: float, source: str, target: str)": "How much are {people}00 euros in Swiss francs?",
    "run_sql(query: str)": "How many complaints about {name} are still open?",
}
"""Tools, and for each a request that it serves."""


def task_items(count: int, *, seed: int = 0) -> list[PromptItem]:
    """N prompts of each of `TASKS` and `STEPS`, about letters, notes and passages of several lengths."""
    made = []
    for place in range(count):
        for kind, wordings in (TASKS | STEPS).items():
            dice = random.Random(f"{kind} {seed} {place}")
            parts = step_parts(dice) if kind in STEPS else {"text": _TEXTS[place % len(_TEXTS)](dice)}
            made.append(PromptItem(prompt=wordings[place % len(wordings)].format(**parts), task=kind))
    return made


def step_parts(dice: random.Random) -> dict[str, str]:
    """Parts of a step: two texts, a question that the first answers every other time, and tools for a request."""
    *told, missing, name = dice.sample(_PROJECTS, dice.randint(5, 16))
    facts = [_project_fact(dice, project) for project in told]
    asked = dice.choice((dice.choice(facts), _project_fact(dice, missing)))
    named = {"name": name, "place": dice.choice(_PLACES), "day": _day(dice), "person": _person(dice)}
    tools = dice.sample(sorted(_TOOLS), 4)
    return {
        "text": _minutes(dice, facts),
        "other": dice.choice(_TEXTS)(dice),
        "question": asked.question,
        "answer": asked.answer,
        "statement": asked.sentence,
        "name": name,
        "person": named["person"],
        "tools": "\n".join(f"- {tool}" for tool in tools),
        "request": _TOOLS[dice.choice(tools)].format(people=dice.randint(2, 30), **named),
    }


def _report(dice: random.Random) -> str:
    """Notes without a question."""
    return _minutes(dice, [_project_fact(dice, project) for project in dice.sample(_PROJECTS, dice.randint(4, 16))])


def _minutes(dice: random.Random, facts: Iterable[_Fact]) -> str:
    head = f"Notes of the meeting of {dice.choice(_TEAMS)}, {_day(dice)}."
    return "\n".join([head, *(f"{fact.sentence} {dice.choice(_FILLERS)}" for fact in facts)])


def _guide(dice: random.Random) -> str:
    """A paragraph on each of a few towns."""
    towns = []
    for place in dice.sample(_PLACES, dice.randint(1, 5)):
        facts = dict.fromkeys(_place_fact(dice, place).sentence for _ in range(3))
        towns.append(f"{place} is a town in the north. {' '.join([*facts, dice.choice(_PLACE_FILLERS)])}")
    return "\n\n".join(towns)


_TEXTS: Final[tuple[Callable[[random.Random], str], ...]] = (
    lambda dice: _letter(dice, (2, 12)),
    _report,
    _guide,
    lambda dice: _letter(dice, (8, 14)),
)


class Decision(NamedTuple):
    """What a chain asks in order to go on one way or another; one word or letter answers it."""

    kind: str
    prompt: str
    choices: tuple[str, ...]
    answer: int
    """Index of the right choice."""


def decisions(count: int, *, seed: int = 0, unseen: bool = False) -> list[Decision]:
    """N decisions of each kind, whose right choices are spread evenly; `unseen`: in wordings that no fit has seen."""
    made = []
    for place in range(count):
        for kind, (seen, others, make) in _DECISIONS.items():
            wordings = others if unseen else seen
            turn, wording = divmod(place, len(wordings))
            parts, choices, answer = make(random.Random(f"{kind} {seed} {place}"), turn)
            made.append(Decision(kind, wordings[wording].format(**parts), choices, answer))
    return made


def decision_items(count: int, *, seed: int = 0) -> list[PromptItem]:
    """N decisions of each kind as prompts, which are all of one wide class."""
    return [PromptItem(prompt=one.prompt, task=f"decision, {one.kind}") for one in decisions(count, seed=seed)]


_Parts = tuple[dict[str, str], tuple[str, ...], int]
"""Parts of a decision's prompt, its choices and the index of the right one."""


def _told_or_not(dice: random.Random, turn: int) -> _Parts:
    """Whether notes tell something; what they do not tell is about a project that they name."""
    projects = dice.sample(_PROJECTS, dice.randint(8, 16))
    facts = [_project_fact(dice, project) for project in projects]
    asked = dice.choice(facts)
    while turn % 2 and asked.question in {fact.question for fact in facts}:
        asked = _project_fact(dice, dice.choice(projects))
    parts = {"text": _minutes(dice, facts), "statement": asked.sentence, "question": asked.question}
    return parts, ("Yes", "No"), turn % 2


def _lettered(dice: random.Random, turn: int) -> _Parts:
    """Which of four answers is right; the others stand in the same notes."""
    facts = {fact.answer: fact for fact in (_project_fact(dice, each) for each in dice.sample(_PROJECTS, 12))}
    answers = dice.sample(sorted(facts), 4)
    right = turn % len(answers)
    options = "\n".join(f"{letter}. {answer}" for letter, answer in zip("ABCD", answers, strict=True))
    parts = {
        "text": _minutes(dice, facts.values()),
        "question": facts[answers[right]].question,
        "options": options,
    }
    return parts, ("A", "B", "C", "D"), right


def _tool(dice: random.Random, turn: int) -> _Parts:
    """Which of four tools serves a request."""
    tools = dice.sample(sorted(_TOOLS), 4)
    right = turn % len(tools)
    request = _TOOLS[tools[right]].format(
        name=dice.choice(_PROJECTS),
        place=dice.choice(_PLACES),
        day=_day(dice),
        person=_person(dice),
        people=dice.randint(2, 30),
    )
    names = tuple(tool.split("(")[0] for tool in tools)
    return {"tools": "\n".join(f"- {tool}" for tool in tools), "request": request}, names, right


def _sort(dice: random.Random, turn: int) -> _Parts:
    """Which sort of text something is."""
    sorts: dict[str, Callable[[random.Random], str]] = {"letter": _TEXTS[0], "minutes": _report, "guide": _guide}
    right = turn % len(sorts)
    return {"text": list(sorts.values())[right](dice)}, tuple(sorts), right


_DECISIONS: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[random.Random, int], _Parts]]]] = {
    "support": (
        (
            "{text}\n\nStatement: {statement}\n\nDoes the text support the statement? Answer Yes or No.",
            "Is this statement supported by the notes below? Answer Yes or No.\nStatement: {statement}\n\n{text}",
        ),
        (
            "Notes:\n{text}\n\nClaim: {statement}\n\nDo the notes bear the claim out? Yes or No, without any comment.",
            "You verify claims against notes. Return Yes if the notes say it, else No.\nClaim: {statement}\n\n{text}",
        ),
        _told_or_not,
    ),
    "relevance": (
        (
            "Document:\n{text}\n\nQuestion: {question}\n\nDoes the document answer the question? Answer Yes or No.",
            "{text}\n\nCan this question be answered from the text above? {question} Answer Yes or No.",
        ),
        (
            "{text}\n\nThe user asks: {question}\nIs that told above? (Yes/No)",
            "Judge whether these notes tell what is asked, by one word, Yes or No.\nAsked: {question}\n\n{text}",
        ),
        _told_or_not,
    ),
    "letter": (
        (
            "{text}\n\nQuestion: {question}\n{options}\nAnswer with the letter only.",
            "{question}\n{options}\nAnswer with one letter, from this text:\n\n{text}",
        ),
        (
            "{text}\n\n{question}\n\n{options}\n\nThe right option is:",
            "Choose one option by its letter, without a reason.\n{question}\n{options}\n\nNotes: {text}",
        ),
        _lettered,
    ),
    "tool": (
        (
            "Tools:\n{tools}\n\nRequest: {request}\n\nWhich tool serves it? Answer with its name only.",
            "Name the tool that serves this request, and nothing else: {request}\n\n{tools}",
        ),
        (
            "{request}\n\nWhich one of these functions would you call?\n{tools}\n\nReturn the name of the function.",
            "You dispatch messages to functions.\n\n{tools}\n\nMessage: {request}\nFunction:",
        ),
        _tool,
    ),
    "sort": (
        (
            "{text}\n\nIs the text above a letter, minutes or a guide? Answer with one word.",
            "What is this, a letter, minutes or a guide? Answer with one word.\n\n{text}",
        ),
        (
            "{text}\n\nType of document (letter, minutes, guide):",
            "Classify this document as letter, minutes or guide. Say nothing else.\n\n{text}",
        ),
        _sort,
    ),
}
"""Decisions by kind: wordings of fits, wordings that no fit has seen, and how they are made."""


def long_items(count: int, *, seed: int = 0) -> list[PromptItem | AnswerItem]:
    """Long prompts, N of each of the kinds `notes`, `retrieval` and `message`.

    Those about notes and passages have the text that answers them.
    """
    asked = {"notes": notes(count, seed=seed), "retrieval": passages(count, seed=seed)}
    answered: list[PromptItem | AnswerItem] = [
        AnswerItem(prompt=text.prompt, answer=text.answer, task=kind) for kind, texts in asked.items() for text in texts
    ]
    return [*answered, *(PromptItem(prompt=text.prompt, task="message") for text in messages(count, seed=seed))]
