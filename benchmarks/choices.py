"""How often programs prefer the same choice as full depth, and the right one, on any JSONL of choice questions.

    python benchmarks/choices.py questions.jsonl --limit 200 --program "0-16 18-29" --program "0-15 18-29"

Rows: `{"question": …, "choices": […], "answer": index}`. Without --program it measures the programs of the
model's tiers. Prints Markdown, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from polar_sdk import PolarModel, Program
from polar_sdk.lab.items import read_items
from polar_sdk.lab.layer_scan import Scanner


def main() -> None:
    args = _arguments()
    model = PolarModel.from_pretrained(args.model, precision=args.precision, ledger=None)
    tiers = [tier.program.text for tier in model.policy.tiers.values()]
    texts = [Program.identity(model.depth).text, *(args.program or tiers)]
    programs = list(dict.fromkeys(map(Program.parse, texts)))
    items = read_items(args.file, args.limit)
    scores = Scanner(model, items).measure(programs)
    print(f"{model.name}, {model.dtype}, first {len(items)} rows of {args.file.name}\n")
    print("| program | FLOPs | same choice as full depth | right choice |")
    print("|---|---|---|---|")
    for program in programs:
        score = scores[program]
        print(f"| `{program}` | {score.flops_ratio:.1%} | {score.same_choice:.1%} | {score.accuracy:.1%} |")
    print("\n" + json.dumps([scores[program].model_dump(mode="json") for program in programs]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--program", action="append")
    parser.add_argument("--model")
    parser.add_argument("--precision", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    main()
