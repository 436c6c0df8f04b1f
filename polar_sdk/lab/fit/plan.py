"""The plan of a fit: how many prompts, which cuts and how much training the given hours allow.

It follows from a minute's measurement of the model on this machine, from the model's depth and from the prompts.
Nothing is tuned to a family. Knows no files.
"""

from __future__ import annotations

from collections import Counter
from statistics import fmean
from time import perf_counter
from typing import TYPE_CHECKING, Final, NamedTuple

from pydantic import BaseModel

from polar_sdk.engine.pack import Question
from polar_sdk.engine.scoring import score_questions
from polar_sdk.errors import DataError
from polar_sdk.lab.fit.prompts import fact_items
from polar_sdk.lab.healing.fills import CHOICE_HELD_OUT, CHOICE_PROMPTS
from polar_sdk.lab.items import ChoiceItem, Shares, kind_of, text_of
from polar_sdk.programs.program import TAIL, Program
from polar_sdk.promises.losses import ANSWER_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.lab.items import Item
    from polar_sdk.model import PolarModel
    from polar_sdk.show.progress import Progress

SHARES: Final = Shares(0.35, 0.25, 0.25, 0.15)
"""Shares of the prompts: maps are fitted on the first, the menu is chosen on the second; then calibration and test."""
_CUT_SHARES: Final = (0.08, 0.125, 0.17, 0.21, 0.25, 0.29, 0.33, 0.38, 0.42, 0.46, 0.52, 0.58)
"""Shares of the layers that are filled: close together, since a promise stops at the first program that breaks it."""
_MAX_PROMPTS: Final = 3000
_MIN_TOKENS: Final = 5
"""Tokens per number that a map reads, below which its closed form would fit noise."""
_MEASURED_PROMPTS: Final = 16
"""Prompts that the pace is measured on, …"""
_MEASURED_ANSWER: Final = 64
"""… and tokens of an answer."""
_RESERVE: Final = 0.8
"""Share of the hours that is planned; the rest is for what the measurement cannot know."""
_DISTIL_STEPS: Final = 400
"""Maximum training steps by default."""
_FEWEST_STEPS: Final = 50
"""Minimum training steps by default: fewer are not worth the prompts that they take the place of."""
_DISTIL_TOKENS: Final = 2048
_DISTIL_PASSES: Final = 1.5
"""Duration of a training step in passes of full depth over its tokens: one of them where they are new, and a few
programs that run little above their cuts, forward and backward (Qwen2.5-Coder-0.5B: 1.45, 1.5B: 0.7 to 0.8)."""
_DISTIL_SHARE: Final = 0.35
"""Share of the hours that is kept for training, where it is enough."""
_FACTS: Final = 200
"""Questions about facts in long notes by default, …"""
_FACTS_SHARE: Final = 0.2
"""… share of the hours that they may take, …"""
_FEWEST_FACTS: Final = 40
"""… and minimum number: of fewer, standard may lose one."""
_PASSES_OF_FACT: Final = 5.0
"""Passes over such a prompt: to answer it, and to score all programs and write the answers that these would change, for
half of the questions before maps are trained and for all of them in the end."""
_SEEK_SHARE: Final = 0.2
"""Share of the hours that a search for layers to spare may take."""
_CHOICE_TOKENS: Final = 8
"""Tokens of a question's choices."""
_PASS_OF_FIT: Final = 1.25
"""A pass that collects the sums of all cuts, over one that does not."""


class Pace(BaseModel, frozen=True):
    """How fast a model is on this machine. Unit: tokens per second."""

    read: float
    """Prompts, in one pass at full depth."""
    write: float
    """Answers of several prompts at once."""


class Workload(NamedTuple):
    """The prompts of a fit."""

    prompts: int
    """Distinct prompts that are there."""
    tokens: float
    """Mean length of a prompt that is answered in text, as the model reads it."""
    answered: float = 0.0
    """Share of the prompts whose right answers in text count, for which every program writes its own."""
    choices: float = 0.0
    """Share of the prompts that are questions with choices."""
    choice_tokens: float = 0.0
    """Mean length of those."""
    fact_tokens: float = 0.0
    """Mean length of a question about a fact; 0 where such questions do not fit the model's context window."""


class Plan(BaseModel, frozen=True):
    """The plan of a fit."""

    hours: float
    pace: Pace
    prompts: int
    """Prompts that are used, of all splits together."""
    tokens: int
    """Their tokens."""
    cuts: tuple[int, ...]
    """First layers of what candidate programs fill up to the last layer."""
    seek: bool
    """Whether programs are tried as well that run some layers above a cut, those that a map replaces worst."""
    distil: int
    """Training steps of the maps after their closed form."""
    facts: int
    """Questions about facts in long notes; 0 where the hours or the context window are too small."""
    minutes: dict[str, float]
    """Expected time of each step."""

    @property
    def lines(self) -> list[str]:
        """The plan in words."""
        parts = ", ".join(f"{name} {value:.0f} min" for name, value in self.minutes.items())
        layers = ", ".join(map(str, self.cuts))
        sparing = ", and some that run the layers that maps replace worst" if self.seek else ""
        trained = f", then {self.distil} training steps of the maps that decide what tiers save" if self.distil else ""
        return [
            f"{self.prompts:,} prompts of {self.tokens / self.prompts:.0f} tokens on average; maps that fill from "
            f"layer {layers} on{sparing}, in closed form{trained}.",
            f"About {sum(self.minutes.values()):.0f} minutes: {parts} (reads {self.pace.read:.0f} and writes "
            f"{self.pace.write:.0f} tokens/s here).",
        ]


def measure_pace(model: PolarModel, items: Sequence[Item], on_progress: Progress) -> Pace:
    """Measure how fast a model reads prompts, and how fast it answers the shortest of them, together.

    Short ones, since what reading them takes is subtracted: of long prompts it would hide what the answers take.
    """
    texts = [text_of(item) for item in items if not isinstance(item, ChoiceItem)] or list(map(text_of, items))
    step = max(1, len(texts) // _MEASURED_PROMPTS)
    chosen = texts[::step][:_MEASURED_PROMPTS]
    questions = [Question(tuple(model.prompt_tokens(text)), ((0,),)) for text in chosen]
    short = sorted(texts, key=len)[:_MEASURED_PROMPTS]
    identity = Program.identity(model.depth)
    score_questions(model.decoder, questions[:1], identity)  # the first pass ever is slower
    on_progress("measuring the pace", 0, 2)
    begun = perf_counter()
    score_questions(model.decoder, questions, identity)
    reading = perf_counter() - begun
    on_progress("measuring the pace", 1, 2)
    read = sum(question.tokens for question in questions) / reading
    again = sum(len(model.prompt_tokens(text)) for text in short) / read
    begun = perf_counter()
    answers = model.greedy_answers(short, max_tokens=_MEASURED_ANSWER)
    writing = max(perf_counter() - begun - again, 0.1 * again)
    on_progress("measuring the pace", 2, 2)
    return Pace(read=read, write=max(1, sum(map(len, answers))) / writing)


def cuts_of(depth: int) -> tuple[int, ...]:
    """First layers of the candidate fills, from few to many filled layers; at least one layer runs below them."""
    return tuple(sorted({depth - max(1, round(share * depth)) for share in _CUT_SHARES} - {0}, reverse=True))


def make_plan(model: PolarModel, workload: Workload, pace: Pace, hours: float, distil: int | None = None) -> Plan:
    """Plan a fit within the hours, with that many training steps or, where that is None, as many as they allow.

    Raises:
        DataError: The model is too shallow, or prompts or hours are too few to fit a map.
    """
    cuts = cuts_of(model.depth)
    if not cuts:
        raise DataError(f"a model of {model.depth} layer has nothing to fill; polar fit needs at least 2 layers.")
    per_prompt = _seconds(model, workload, pace, cuts)
    seconds = hours * 3600 * _RESERVE
    facts, asking = _facts(workload.fact_tokens, pace, seconds)
    seconds -= asking
    step = _DISTIL_PASSES * _DISTIL_TOKENS / pace.read
    training = min(_DISTIL_STEPS * step, _DISTIL_SHARE * seconds) if distil is None else distil * step
    most = min(workload.prompts, _MAX_PROMPTS)
    # Where a few layers are what no map replaces, finding them is worth more than the last prompts.
    seeking = _seek_seconds(model, workload.tokens + ANSWER_TOKENS, most, pace)
    seeking = seeking if seeking <= _SEEK_SHARE * seconds else 0.0
    prompts = min(most, int(max(0.0, seconds - training - seeking) / sum(per_prompt.values())))
    inputs = 2 * model.decoder.family.hidden  # the state, and the embedding of the token
    needed = _MIN_TOKENS * inputs
    written = 1 - workload.choices
    if not written:
        raise DataError("prompts that are answered in text are needed, but there are none; give some as well.")
    length = written * (workload.tokens + ANSWER_TOKENS) + workload.choices * (workload.choice_tokens + _CHOICE_TOKENS)
    enough = int(needed / SHARES.train / length) + 1
    if distil is None and (prompts < enough or training < _FEWEST_STEPS * step):
        training, prompts = 0.0, min(most, int(seconds / sum(per_prompt.values())))
    if prompts < enough:
        wanted = enough * sum(per_prompt.values()) + training
        advice = (
            f"give more or longer prompts: there are {workload.prompts:,}"
            if prompts == most
            else f"about {wanted / _RESERVE / (1 - _FACTS_SHARE) / 3600:.2g} hours are needed here"
        )
        raise DataError(
            f"maps of {inputs:,} inputs need {needed:,} tokens to be fitted on, some {enough:,} "
            f"prompts of {length:.0f} tokens in all; {advice}."
        )
    left = seconds - prompts * sum(per_prompt.values())
    seek = 0 < seeking <= left - training
    left -= seeking if seek else 0.0
    if distil is None:
        allowed = min(_DISTIL_STEPS, int(left / step))
        distil = allowed if allowed >= _FEWEST_STEPS else 0
    minutes = {name: prompts * value / 60 for name, value in per_prompt.items()}
    if seek:
        minutes["seeking"] = seeking / 60
    if distil:
        minutes["training"] = distil * step / 60
    if facts:
        minutes["facts"] = asking / 60
    return Plan(
        hours=hours,
        pace=pace,
        prompts=prompts,
        tokens=round(prompts * (written * workload.tokens + workload.choices * workload.choice_tokens)),
        cuts=cuts,
        seek=seek,
        distil=distil,
        facts=facts,
        minutes=minutes,
    )


def _seconds(model: PolarModel, workload: Workload, pace: Pace, cuts: Sequence[int]) -> dict[str, float]:
    """Seconds of each step per prompt: programs share what they begin with; above a cut only a prompt's end runs."""
    filled = sum((model.depth - cut) / model.depth for cut in cuts)

    def measured(length: float, answer: float, tail: int) -> float:
        run = min(tail, length) + answer
        return (1 - SHARES.train + SHARES.dev) * (length + answer + 1.3 * filled * run) / pace.read

    written, asked = 1 - workload.choices, workload.choice_tokens + _CHOICE_TOKENS
    read = written * (workload.tokens + ANSWER_TOKENS) + workload.choices * asked
    answering = workload.tokens / pace.read + ANSWER_TOKENS / pace.write
    return {
        "answers": written * answering,
        "fitting": SHARES.train * read / pace.read * _PASS_OF_FIT,
        "measuring": written * measured(workload.tokens, ANSWER_TOKENS, TAIL)
        + workload.choices * measured(workload.choice_tokens, 2 * _CHOICE_TOKENS, TAIL + 1)
        + workload.answered * (SHARES.dev + SHARES.calibration) * (len(cuts) + 1) * answering,
    }


def _facts(tokens: float, pace: Pace, seconds: float) -> tuple[int, float]:
    """How many questions about facts there is time for, and the seconds that they take."""
    each = _PASSES_OF_FACT * tokens / pace.read + ANSWER_TOKENS / pace.write
    count = min(_FACTS, int(_FACTS_SHARE * seconds / each)) if tokens else 0
    return (count, count * each) if count >= _FEWEST_FACTS else (0, 0.0)


def _seek_seconds(model: PolarModel, tokens: float, prompts: int, pace: Pace) -> float:
    """Seconds of a search for layers to spare: two passes that fit, and one that measures each layer alone.

    The latter begins at the layer, so that half of the layers run on average, and as many groups run besides.
    """
    fitted = 2 * min(CHOICE_PROMPTS, SHARES.train * prompts) * tokens * 2
    measured = min(CHOICE_HELD_OUT, SHARES.dev * prompts) * tokens * (model.depth / 2 + 6)
    return (fitted + measured) / pace.read


def workload_of(model: PolarModel, items: Sequence[Item]) -> Workload:
    """Number of the prompts, their mean length by a sample of them, and how many have right answers that count."""
    kinds = Counter(map(kind_of, items))

    def mean_length(*, choices: bool) -> float:
        texts = [text_of(item) for item in items if isinstance(item, ChoiceItem) == choices]
        sample = texts[:: max(1, len(texts) // 200)]
        return fmean(len(model.prompt_tokens(text)) for text in sample) if sample else 0.0

    facts = [len(model.prompt_tokens(text_of(item))) for item in fact_items(_MEASURED_PROMPTS)]
    fit = max(facts) + ANSWER_TOKENS <= model.context_window
    return Workload(
        prompts=len(items),
        tokens=mean_length(choices=False),
        answered=kinds["answer"] / len(items),
        choices=kinds["choice"] / len(items),
        choice_tokens=mean_length(choices=True),
        fact_tokens=fmean(facts) if fit else 0.0,
    )
