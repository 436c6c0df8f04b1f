"""Tiers on problems with right answers: MMLU, ARC, GSM8K, HumanEval, decisions, beside full depth on the same problems.

    python -m benchmarks.problems SUITE [FILE] [--model NAME] [--limit N] [--program PROGRAM…] [--results FOLDER]

The problems are spread over the file, so that all subjects of a sorted one take part. Besides the tiers, programs by
hand may run for all problems: the frontier that no router chose. Answers are kept in the model's cache, so that a run
that was interrupted goes on where it stopped; a busy machine changes the time that it takes, and no figure.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.results import Recorder, arguments
from polar_sdk import PolarModel, lab
from polar_sdk.show.progress import ProgressBars

if TYPE_CHECKING:
    from polar_sdk.lab.suites.results import SuiteEvaluation
    from polar_sdk.router.exact_tests import Interval

SUITES: Final = ("mmlu", "arc", "gsm8k", "humaneval", "decisions")
_DROP: Final = {"mmlu": 1.0, "humaneval": 1.5, "gsm8k": 2.0, "formats": 2.0, "refusals": 2.0, "decisions": 2.0}
"""Points that standard may lose."""


def spread(file: Path, limit: int) -> str:
    """At most so many lines of a file, at equal distances."""
    with file.open(encoding="utf-8") as rows:  # by their ends alone: a text may hold other breaks of lines
        lines = [row for row in rows if row.strip()]
    chosen = min(limit, len(lines))
    return "".join(lines[number * len(lines) // chosen] for number in range(chosen))


def in_percent(value: Interval) -> dict[str, Any]:
    """The ends of an interval as facts of a figure. Unit: percent, or points."""
    return {"low": 100 * value.low, "high": 100 * value.high, "interval": "95%"}


def record_suite(recorder: Recorder, found: SuiteEvaluation, topic: str | None = None) -> None:
    """Record what full depth gets right, and what each tier saves and loses; `topic` as in `Recorder.add`."""
    right = found.baseline.accuracy
    recorder.add(
        f"{found.suite}, exact: right",
        100 * right.value,
        "%",
        topic=topic,
        **in_percent(right),
        note=f"{found.problems} problems of {found.prompt_tokens:.0f} tokens",
    )
    for tier in found.tiers[1:]:
        drop, note = tier.accuracy_drop, f"McNemar p = {tier.mcnemar_p:.2g}"
        allowed = _DROP.get(found.suite) if tier.name == "standard" else None
        goal: dict[str, Any] = {} if allowed is None else {"goal": allowed, "better": "lower"}
        recorder.add(
            f"{found.suite}, {tier.name}: drop",
            100 * drop.value,
            "points",
            topic=topic,
            **in_percent(drop),
            note=note,
            **goal,
        )
        saved = tier.flops_saved, tier.same_tokens_flops_saved
        note = f"{100 * saved[1]:.3g} % of what its own answers would take"
        recorder.add(f"{found.suite}, {tier.name}: FLOPs saved", 100 * saved[0], "%", topic=topic, note=note)


def main() -> None:
    """Measure, print and record."""
    parser = arguments(__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("file", type=Path, nargs="?", help="JSONL of the data set's own fields; not for decisions")
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--limit", type=int, default=1_500, help="maximum problems")
    parser.add_argument("--program", nargs="*", default=[], help="that runs for all problems")
    options = parser.parse_args()
    model = PolarModel.from_pretrained(options.model, ledger=None)
    recorder = Recorder("problems", options.results, model=options.model)
    tiers = [name for name in ("standard", "economy") if name in model.tiers]
    with tempfile.TemporaryDirectory() as folder, ProgressBars(quiet=False) as show:
        data = None
        if options.file is not None:
            data = Path(folder, "problems.jsonl")
            data.write_text(spread(options.file, options.limit), encoding="utf-8")
        found = lab.evaluate_suite(
            model,
            options.suite,
            data,
            limit=options.limit,
            compute=tiers,
            programs=options.program,
            run_code=options.suite == "humaneval",
            on_progress=show,
        )
    record_suite(recorder, found)


if __name__ == "__main__":
    main()
