"""Right answers to long prompts: a fact asked for in made-up notes of over 500 tokens, at full depth and by every tier.

    python -m benchmarks.right_answers [--model NAME] [--prompts N] [--program PROGRAM…] [--results FOLDER]

An answer is right if it holds the fact; otherwise its overlap of words with the fact counts. No router, map or
certificate has seen the prompts. Programs given by hand run for all prompts: the frontier that no router chose. A busy
machine changes the time that the run takes, and no figure.
"""

from __future__ import annotations

import sys
from statistics import fmean
from typing import TYPE_CHECKING, Final

from benchmarks.results import Recorder, arguments
from polar_sdk import PolarModel, Program
from polar_sdk.lab.evaluation.text_answers import f1
from polar_sdk.lab.fit.synthetic import Written, notes
from polar_sdk.router.base import IdentityRouter, Router, StaticRouter
from polar_sdk.router.exact_tests import mean_difference
from polar_sdk.router.learned import LearnedRouter
from polar_sdk.show.progress import ProgressBars

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FULL: Final = "exact"
_FACTS: Final = (17, 21)
"""Facts in the notes: some 470 to 630 tokens, of which the longer ones are asked."""
_SHORTEST: Final = 500
_SEED: Final = 97
_NEW: Final = 32
_AT_ONCE: Final = 64
_PARTS: Final = 5
"""Of the notes, by where the fact stands."""
_ALLOWED: Final = 2.0
"""Points that a tier may lose."""


def systems(model: PolarModel, programs: Sequence[str]) -> Iterator[tuple[str, Router]]:
    """Full depth, the tiers of the model's certified router that leave layers out, and programs by hand."""
    yield FULL, IdentityRouter(model.depth)
    router = model.router
    if isinstance(router, LearnedRouter) and router.certificate is not None:
        for tier, promise in router.certificate.tiers.items():
            if promise.setting.text:
                yield tier, router.at(promise.setting)
    for text in programs:
        yield text, StaticRouter(Program.parse(text))


def rightness(written: str, right: str) -> float:
    """1 if the right answer stands in the text, else the overlap of words."""
    return 1.0 if right.casefold() in written.casefold() else f1(written, right)


def _flops(model: PolarModel, router: Router, prompts: Sequence[tuple[int, ...]], answers: Sequence[int]) -> int:
    """FLOPs of all requests, the router's included, for answers of full depth's lengths."""
    routes = [router.route(prompt) for prompt in prompts]
    cost = model.decoder.cost
    return sum(
        route.flops + cost.request(route.program, len(prompt), length).total
        for route, prompt, length in zip(routes, prompts, answers, strict=True)
    )


def main() -> None:
    """Measure, print and record."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--prompts", type=int, default=1_000)
    parser.add_argument("--program", nargs="*", default=[], help="that runs for all prompts")
    options = parser.parse_args()
    model = PolarModel.from_pretrained(options.model, ledger=None, speculate="off")
    made = notes(3 * options.prompts, seed=_SEED, facts=_FACTS)
    tokens = {text.prompt: tuple(model.prompt_tokens(text.prompt)) for text in made}
    asked = [text for text in made if len(tokens[text.prompt]) > _SHORTEST][: options.prompts]
    prompts = [tokens[text.prompt] for text in asked]
    recorder = Recorder("problems", options.results, model=options.model)
    exact, lengths, full = list[float](), list[int](), 0
    with ProgressBars(quiet=not sys.stderr.isatty()) as show:
        for name, router in systems(model, options.program):
            answers = list[tuple[int, ...]]()
            for start in range(0, len(prompts), _AT_ONCE):
                answers += model.greedy_answers(prompts[start : start + _AT_ONCE], max_tokens=_NEW, router=router)
                show(name, len(answers), len(prompts))
            found = [rightness(model.decode(ids), text.answer) for ids, text in zip(answers, asked, strict=True)]
            exact, lengths = exact or found, lengths or [len(ids) for ids in answers]  # full depth is first
            spent = _flops(model, router, prompts, lengths)
            full = full or spent
            _record(recorder, name, asked, exact, found, 1 - spent / full)


def _record(
    recorder: Recorder, name: str, asked: Sequence[Written], exact: list[float], found: list[float], saved: float
) -> None:
    row, topic = f"notes, {name}", "right-answers"
    recorder.add(f"{row}: right", 100 * fmean(found), "%", topic=topic, note=f"{len(found)} prompts")
    for part in range(_PARTS):
        within = [
            score for score, text in zip(found, asked, strict=True) if min(int(_PARTS * text.depth), _PARTS - 1) == part
        ]
        recorder.add(f"{row}: right, fact in part {part + 1} of {_PARTS}", 100 * fmean(within), "%", topic=topic)
    if name == FULL:
        return
    recorder.add(f"{row}: FLOPs saved", 100 * saved, "%", topic=topic)
    drop = mean_difference(exact, found)
    facts = {"low": 100 * drop.low, "high": 100 * drop.high, "interval": "95%", "goal": _ALLOWED, "better": "lower"}
    recorder.add(f"{row}: drop", 100 * drop.value, "points", topic=topic, **facts)


if __name__ == "__main__":
    main()
