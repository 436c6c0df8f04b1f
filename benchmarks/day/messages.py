"""Messages: short phrases, idioms and long texts, to be translated or answered, made by a seeded generator.

Texts are put together from the lists below, so that a day has few copies; all are made up. A prompt is an instruction
with the text. Knows no tenants, no times and no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from random import Random

Kind = Literal["phrase", "idiom", "message"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
Use = Literal["translate", "chat"]
"""The service's use of a text."""
MAX_TOKENS: Final[dict[Kind, int]] = {"phrase": 10, "idiom": 16, "message": 24}
"""Maximum length of an answer. Unit: tokens."""


class Message(NamedTuple):
    """A prompt and the maximum length of its answer."""

    prompt: str
    max_tokens: int


def make_message(kind: Kind, use: Use, random: Random) -> Message:
    """A message of a kind; the same state of `random` makes the same one."""
    text = _TEXTS[kind](random)
    if kind == "idiom":
        form = random.choice(_OF_IDIOMS[use])
    elif use == "translate":
        form = f"Translate into {random.choice(_LANGUAGES)}: {{}}"
    else:
        form = random.choice(_REPLIES) if kind == "message" else "{}"
    return Message(form.format(text), MAX_TOKENS[kind])


def _phrase(random: Random) -> str:
    form = random.choice(_PHRASES)
    return form.format(
        place=random.choice(_PLACES),
        thing=random.choice(_THINGS),
        time=random.choice(_TIMES),
        name=random.choice(_NAMES),
        number=random.randint(2, 12),
    )


def _idiom(random: Random) -> str:
    return random.choice(_IDIOMS)


def _message(random: Random) -> str:
    name, sender = random.sample(_NAMES, 2)
    body = [
        random.choice(_SUBJECTS),
        *random.sample(_DETAILS, random.randint(1, 4)),
        random.choice(_REQUESTS),
    ]
    filled = " ".join(body).format(
        thing=random.choice(_THINGS),
        place=random.choice(_PLACES),
        time=random.choice(_TIMES),
        number=random.randint(2, 90),
        code=random.randint(10_000, 99_999),
    )
    return f"Hi {name}, {filled} {random.choice(_CLOSINGS)} {sender}"


_TEXTS: Final = {"phrase": _phrase, "idiom": _idiom, "message": _message}
_LANGUAGES: Final = ("French", "Spanish", "German", "Italian", "Portuguese")
_REPLIES: Final = (
    "Reply to this message in one short sentence: {}",
    "Say in a few words what this person wants: {}",
    "What is this message about? {}",
)
_OF_IDIOMS: Final[dict[Use, tuple[str, ...]]] = {
    "translate": ("Say in plain words: {}", "Translate the meaning, not the words, into French: {}"),
    "chat": ('What does "{}" mean?', 'When do people say "{}"?'),
}
_NAMES: Final = (
    *("Amara", "Basil", "Cleo", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Keiko", "Liam"),
    *("Mirela", "Nadia", "Oscar", "Priya", "Rosa", "Samir", "Tove", "Umar", "Vera", "Yusuf", "Zofia"),
)
_PLACES: Final = (
    *("the station", "the market", "the school", "the bakery", "the harbour", "the library", "the office"),
    *("the bus stop", "the hotel", "the pharmacy", "the museum", "the town hall", "the airport", "the cinema"),
)
_THINGS: Final = (
    *("the keys", "the tickets", "the parcel", "the umbrella", "the invoice", "the bread", "the car", "the book"),
    *("the charger", "the dog", "the contract", "the photos", "the lamp", "the jacket", "the medicine", "the cake"),
)
_TIMES: Final = (
    *("tonight", "tomorrow", "on Monday", "at noon", "at half past six", "this weekend", "in an hour", "next week"),
    *("before lunch", "after work", "on Friday evening", "at nine"),
)
_PHRASES: Final = (
    "Where is {place}?",
    "How far is it to {place}?",
    "I am at {place}.",
    "See you at {place} {time}.",
    "Are you coming {time}?",
    "Can you bring {thing}?",
    "I forgot {thing}.",
    "Thank you for {thing}.",
    "Who has {thing}?",
    "Please send {thing} {time}.",
    "I will be {number} minutes late.",
    "Call me {time}.",
    "{name} is waiting at {place}.",
    "Did {name} find {thing}?",
    "A table for {number}, please.",
    "How much is {thing}?",
    "Happy birthday, {name}!",
    "Good morning, {name}.",
    "Is {place} open {time}?",
    "We need {number} more.",
)
_IDIOMS: Final = (
    *("It is raining cats and dogs.", "Break a leg!", "That is a piece of cake.", "He let the cat out of the bag."),
    *("She hit the nail on the head.", "Do not beat around the bush.", "We are in the same boat.", "Bite the bullet."),
    *("Time flies.", "The ball is in your court.", "It costs an arm and a leg.", "Once in a blue moon."),
    *("I am all ears.", "He pulled my leg.", "Under the weather.", "Better late than never.", "Back to square one."),
    *(
        "That rings a bell.",
        "Cut corners.",
        "Speak of the devil.",
        "The early bird catches the worm.",
        "Hold your horses.",
    ),
    *("Every cloud has a silver lining.", "It takes two to tango.", "Spill the beans.", "A blessing in disguise."),
    *("Call it a day.", "Out of the blue.", "On thin ice.", "Burn the midnight oil.", "Throw in the towel."),
    *("Read between the lines.", "The tip of the iceberg.", "Jump on the bandwagon.", "By the skin of your teeth."),
    *(
        "Bend over backwards.",
        "Steal someone's thunder.",
        "Sit on the fence.",
        "Let sleeping dogs lie.",
        "Face the music.",
    ),
)
_SUBJECTS: Final = (
    "I ordered {thing} two weeks ago under the number {code} and it has still not arrived.",
    "we are planning to meet at {place} {time} and you are very welcome to join us.",
    "I left {thing} at {place} yesterday and nobody there has seen it since.",
    "thank you for {thing}, it arrived {time} and everybody here is happy with it.",
    "the meeting at {place} has been moved, it now begins {time}.",
    "my booking {code} shows the wrong date and I cannot change it on the website.",
    "I would like to return {thing}, because it is not what the picture showed.",
    "there is a problem with the heating again and the flat is cold {time}.",
)
_DETAILS: Final = (
    "I have called {number} times and nobody could help me.",
    "The man at {place} said that it would be ready {time}.",
    "There are {number} of us, and two of the children do not eat meat.",
    "It was raining the whole day, so we stayed in and played cards.",
    "The bill says {number}, but I was told that it would be less.",
    "I can be reached by phone in the morning and by mail at any time.",
    "The last train leaves early, so we should not begin too late.",
    "I have already filled in the form and sent a copy of it {time}.",
    "My neighbour had the same trouble last year and it took months.",
    "The weather should be fine, but take a warm coat with you.",
)
_REQUESTS: Final = (
    "Could you please let me know what I should do next?",
    "Please tell me {time} whether that suits you.",
    "Can you look into it and call me back?",
    "Would it be possible to get my money back?",
    "Who else should I ask about this?",
    "Please confirm that you have received this message.",
)
_CLOSINGS: Final = ("Best wishes,", "Thanks,", "Many thanks,", "See you soon,", "Kind regards,")
