"""`polar fit` of a model, on prompts made from the sets in POLAR_DATA, and its tiers on prompts that are held back.

Writes `fit.jsonl` and `held.jsonl`, fits the first with a fit's own defaults (a finished fit is taken as it is), and
evaluates the tiers on the second. No passage stands in two prompts. Of the kinds in `HELD` nothing is fitted, tuned or
calibrated on, nor of every other subject of MMLU: `mmlu.jsonl` has the questions of those, for `benchmarks.problems`.
"""

from __future__ import annotations

import ast
import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.problems import in_percent
from benchmarks.results import Recorder, arguments
from benchmarks.router_texts import COMPARISON, TASKS, library_functions, rows
from polar_sdk import PolarModel, lab
from polar_sdk.errors import DataError
from polar_sdk.lab.evaluation.judge import Judge
from polar_sdk.lab.evaluation.results import Evaluation
from polar_sdk.lab.fit.plan import SHARES
from polar_sdk.lab.fit.prompts import fact_items, prompts_of
from polar_sdk.lab.fit.summary import of_choices
from polar_sdk.lab.fit.synthetic import STEPS, decision_items, notes
from polar_sdk.lab.items import item_id, kind_of, split_of
from polar_sdk.lab.suites.letters import Mmlu, MmluProblem
from polar_sdk.router.artifact import load_router
from polar_sdk.router.learned import LearnedRouter
from polar_sdk.show.progress import ProgressBars

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polar_sdk.lab.fit.fit import FitResult
    from polar_sdk.lab.suites.suite import Asked

HELD = ("choice of a text", "comparison")
LETTERED = ("arc_easy", "arc_challenge", "openbookqa")
"""Sets of questions with choices, which are shown under letters."""
MMLU = "mmlu"
_OWN = 520
"""Prompts of the package's own."""
_COMPLETE = (
    "Complete this Python function:\n\n```python\n{function}\n```",
    "{function}\n\nWrite the body of this function.",
    "Implement this function. Answer with the code only.\n```python\n{function}\n```",
)
_ASKED = ("grading", "checking", "merging", "two sources", "questions", "key words")
"""Those of `STEPS` that are about texts."""
CHOICES = 670
"""Questions of each of `LETTERED`, and of MMLU, that a choice answers: premium takes 459 for its calibration alone."""
_LINES = range(4, 24)
"""Of a function that is to be written, docstring included."""
TIMED = 24
"""Prompts held back that are timed."""
_FITTED = 28
"""Prompts of each task of `TASKS` to fit on, the others of which are held back, and of each of `STEPS`."""

Row = dict[str, Any]


class _Sets:
    """The sets in one shuffled order, from which each text is taken once."""

    def __init__(self, seed: int) -> None:
        dice = random.Random(seed)
        passages: dict[str, Row] = {}
        for row in rows("passages.train"):
            passages.setdefault(row["passage"], row)
        self._left = {
            "passages": list(passages.values()),
            "abstracts": rows("abstracts.train"),
            "trivia": rows("trivia.train"),
            "sums": rows("gsm8k.train"),
            **{name: rows(f"{name}.train") for name in LETTERED},
            MMLU: _mmlu(held=False),
        }
        if not all(self._left.values()):
            raise DataError(f"POLAR_DATA names no folder with all of {', '.join(self._left)}.")
        for each in self._left.values():
            dice.shuffle(each)
        self.dice = dice

    def take(self, name: str, count: int = 1) -> list[Row]:
        """The next rows of a set."""
        left = self._left[name]
        taken, self._left[name] = left[:count], left[count:]
        return taken

    def text(self, name: str, count: int, between: str = "\n\n") -> str:
        """The next passages of a set, as one text."""
        return between.join(row["passage"] for row in self.take(name, count))


def kinds(sets: _Sets) -> Iterator[Row]:
    """Questions about texts and facts, summaries, extraction, sums, lettered choices, and functions to write."""
    for _ in range(70):
        found = sets.take("passages", 5)
        asked = sets.dice.randrange(5)
        text = "\n\n".join(f"[{number}] {row['passage']}" for number, row in enumerate(found, 1))
        yield {"prompt": f"{text}\n\nQuestion: {found[asked]['question']}?", "task": "passages"}
    for _ in range(90):
        (row,) = sets.take("passages")
        yield {"prompt": f"{row['passage']}\n\nQuestion: {row['question']}?", "task": "passage"}
    for place in range(80):
        text = sets.text("passages", (1, 1, 1, 4)[place % 4])
        yield {"prompt": f"Summarise this text in two sentences:\n\n{text}", "task": "summaries"}
    for _ in range(90):
        (row,) = sets.take("abstracts")
        yield {"prompt": f"{row['passage']}\n\nQuestion: {row['question']}", "task": "abstract"}
    for place in range(80):
        text = sets.text("abstracts", (1, 1, 1, 2)[place % 4])
        asked_for = "List the numbers in this text and what each of them counts."
        yield {"prompt": f"{text}\n\n{asked_for}", "task": "extraction of numbers"}
    for name, kind in (("trivia", "facts"), ("sums", "sums")):
        yield from ({"prompt": row["question"], "task": kind} for row in sets.take(name, 90))
    for name in LETTERED:
        yield from ({"prompt": _lettered(row).text, "task": f"letters, {name}"} for row in sets.take(name, 60))
        bare = (_lettered(row).text.removesuffix("Answer:") for row in sets.take(name, 30))
        yield from ({"prompt": f"{text}Answer with the letter only.", "task": "decision, letters"} for text in bare)
    found = sets.take("passages", 40)
    for turn, row in enumerate(found):
        question = found[turn - turn % 2]["question"]  # every other one is about the passage before
        asked_for = f"Does the text answer this question: {question}? Answer Yes or No."
        yield {"prompt": f"{row['passage']}\n\n{asked_for}", "task": "decision, passages"}
    yield from ({"prompt": item.prompt, "task": item.task} for item in decision_items(40, seed=5))
    yield from ({"prompt": text.prompt, "task": "facts in notes"} for text in notes(90, seed=5))
    for turn, function in enumerate(sets.dice.sample(sorted(_functions()), 90)):
        yield {"prompt": _COMPLETE[turn % len(_COMPLETE)].format(function=function), "task": "functions to write"}


def _mmlu(*, held: bool) -> list[Row]:
    """The questions of every other subject of MMLU, by name: of those that are held back, or of the others."""
    found = rows("mmlu.test-open")
    subjects = sorted({row["subject"] for row in found})[not held :: 2]
    return [row for row in found if row["subject"] in subjects]


def choices(sets: _Sets, count: int) -> Iterator[Row]:
    """Questions whose right letter is known, that many of each set."""
    for name in (*LETTERED, MMLU):
        for row in sets.take(name, count):
            asked, right = _lettered(row), row["answer"]
            yield {"question": asked.text, "choices": asked.choices, "answer": right, "task": f"choices, {name}"}


def _lettered(row: Row) -> Asked:
    """A question of `LETTERED` as a chat shows it, and the letters of its choices."""
    return Mmlu().ask(MmluProblem(**{"subject": "science"} | row), (), chat=True)


def _functions() -> Iterator[str]:
    """Functions of Python's own library up to the end of their docstrings, which say what the rest is to do."""
    for function, lines in library_functions(_LINES):
        if ast.get_docstring(function):
            yield "\n".join(lines[: (function.body[0].end_lineno or 0) - function.lineno + 1])


def tasks(sets: _Sets) -> Iterator[Row]:
    """Tasks about one text or two, of one passage or of three."""
    for turn in range(40):
        for kind, wordings in (TASKS | COMPARISON).items():
            wording = wordings[turn % len(wordings)]
            sizes = {"text": (1, 3)[turn % 2], "other": 1}
            parts = {
                name: sets.text("passages", size, "\n") for name, size in sizes.items() if f"{{{name}}}" in wording
            }
            yield {"prompt": wording.format(**parts), "task": kind}


def steps(sets: _Sets) -> Iterator[Row]:
    """Calls on the way to an answer about one text or two; every other one asks for what the text does not tell."""
    for turn in range(_FITTED):
        for kind in _ASKED:
            row, other = (
                sets.take(name)[0] for name in (("passages", "abstracts"), ("abstracts", "passages"))[turn % 2]
            )
            asked = (row, other)[turn // 2 % 2]
            wording = STEPS[kind][turn % len(STEPS[kind])]
            prompt = wording.format(
                text=row["passage"],
                other=other["passage"],
                question=f"{asked['question'].rstrip('?')}?",
                statement=f"{max(asked['passage'].split('. ')[:4], key=len).rstrip('.')}.",
            )
            yield {"prompt": prompt, "task": kind}


def prompts(folder: Path, questions: int = CHOICES) -> tuple[Path, Path]:
    """Write the prompts to fit on, and those that are held back."""
    sets = _Sets(seed=5)
    fitted = [*kinds(sets), *choices(sets, questions)]
    by_kind: dict[str, list[Row]] = defaultdict(list)
    for row in tasks(sets):
        by_kind[row["task"]].append(row)
    own = [{"prompt": item.prompt, "task": item.task} for item in prompts_of(None)[:_OWN]]  # type: ignore[union-attr]
    named = [kind for kind in by_kind if kind not in HELD]
    fitted += [row for kind in named for row in by_kind[kind][:_FITTED]] + [*steps(sets)] + own
    held = [row for kind in HELD for row in by_kind[kind]] + [row for kind in named for row in by_kind[kind][_FITTED:]]
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("fit", fitted), ("held", held), (MMLU, _mmlu(held=True))):
        text = "".join(json.dumps(row) + "\n" for row in chosen)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder / "fit.jsonl", folder / "held.jsonl"


def record(recorder: Recorder, made: FitResult, evaluation: Evaluation) -> None:
    """The plan, and per tier what is saved and kept, of the fit's own test prompts and of those held back."""
    plan = made.facts.plan
    recorder.add("planned", sum(plan.minutes.values()), "min", note=f"{plan.prompts} prompts, {plan.hours:g} h allowed")
    own = Evaluation.model_validate_json((made.folder / "evaluation.json").read_bytes())
    for start, found in (("", own), ("held back, ", evaluation)):
        for tier, whole in found.texts.items():
            kinds = {f"kind {kind}": part for kind, part in whole.by_kind.items()} if start else {}
            for name, part in {"all": whole, **whole.by_length, **kinds}.items():
                note = f"{part.prompts} prompts"
                for what, share in (
                    ("FLOPs saved", part.flops_saved),
                    ("tokens kept", part.tokens_kept),
                    ("95 % kept", part.strict_kept),
                ):
                    recorder.add(f"{start}{tier}, {name}: {what}", 100 * share, "%", note=note)
    for tier in own.texts:
        if (chosen := of_choices(own, tier)) is not None and (lost := chosen.accuracy_drop) is not None:
            recorder.add(f"{tier}, choices: FLOPs saved", 100 * chosen.flops_saved.total, "%")
            recorder.add(f"{tier}, choices: lost", 100 * lost.value, "points", **in_percent(lost))
    full, *tiers = (system for system in evaluation.sets[0].systems if system.ms_per_token is not None)
    for system in tiers:
        assert system.ms_per_token is not None
        assert full.ms_per_token is not None
        share = 1 - system.flops_saved.total
        recorder.add(
            f"held back, {system.name}: time of a request over full depth's",
            system.ms_per_token / full.ms_per_token,
            "×",
            goal=1.08 * share,
            better="lower",
            note=f"medians of {TIMED} prompts and 16 tokens each; FLOPs {share:.3f} ×",
        )


def main() -> None:
    """Read the command line and run."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--limit", type=int, default=3000, help="maximum prompts, questions with choices included")
    parser.add_argument("--choices", type=int, default=CHOICES, help="questions with choices of each set")
    parser.add_argument("--distil", type=int, help="training steps of the maps; by default as many as fit")
    parser.add_argument("--work", type=Path, default=Path("out/fit"), help="folder of the prompts and of the fit")
    options = parser.parse_args()
    fitted, held = prompts(options.work, options.choices)
    model = PolarModel.from_pretrained(options.model, ledger=None)
    recorder = Recorder("fit", options.results, model=options.model)
    with ProgressBars(quiet=False) as show:
        folder = options.work / model.fingerprint[:12]
        made = lab.fit(
            model,
            lab.read_items(fitted),
            hours=options.hours,
            limit=options.limit,
            distil=options.distil,
            out=folder,
            on_progress=show,
        )
        evaluation = lab.evaluate(model, lab.read_items(held), router=folder / "router", timed=TIMED, on_progress=show)
    record(recorder, made, evaluation)
    router = load_router(folder / "router")
    assert isinstance(router, LearnedRouter)
    assert router.certificate is not None
    used = prompts_of(lab.read_items(fitted), options.limit)[: made.facts.plan.prompts]
    left = Counter(kind_of(item) for item in used if split_of(item_id(item), SHARES) in ("calibration", "test"))
    tiers = {
        tier: promise.asked
        for tier, promise in router.certificate.tiers.items()
        if all(promise.asked.fewest(kind, 0.1) <= n / 2.5 for kind, n in left.items())  # as chance may have it
    }
    judge = Judge(model, router, facts=fact_items(made.facts.plan.facts))
    for row in judge.resplit(used, tiers=tiers):
        name, note = f"{row.tier}, {row.kind}: promises broken", f"{row.times} promises made on a random half"
        facts: dict[str, Any] = {"goal": 10, "better": "lower"} if row.kind == "any" else {}
        recorder.add(f"{name} on the other half", 100 * row.other_half / row.times, "%", note=note, **facts)
        recorder.add(f"{name} on both together", 100 * row.pooled / row.times, "%", note=note)
    print("\n".join(made.facts.sentences))


if __name__ == "__main__":
    main()
