"""A newcomer's first minutes: a model object where nothing is compiled yet, and work that goes on meanwhile.

    python -m benchmarks.first_answer [--model NAME] [--limit 600]

Runs in a process of its own, over a cache of compiled layers that is empty, torch's own and its folder for temporary
files included. Prints one JSON object; speeds are tokens per second after the first token, at batch 1 and full depth.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from polar_sdk.models.paths import cache_folder

if TYPE_CHECKING:
    from polar_sdk import PolarModel

NEW, PROMPT = 64, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--limit", type=float, default=600, help="seconds to wait for compiled layers")
    args = parser.parse_args()
    print(json.dumps(first_minutes(args.model, args.limit)))


def apart(model: str | None) -> dict[str, float]:
    """The figures of `first_minutes` in a process over an empty cache."""
    with tempfile.TemporaryDirectory(prefix="polar-bench-", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "models").symlink_to(cache_folder() / "models")
        (Path(folder) / "tmp").mkdir()
        caches = {
            "POLAR_CACHE": folder,
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor"),
            "TMPDIR": str(Path(folder) / "tmp"),
        }
        command = [sys.executable, "-m", "benchmarks.first_answer", *(["--model", model] if model else [])]
        ended = subprocess.run(
            command, env=os.environ | caches | {"POLAR_COMPILE": "background"}, check=True, stdout=subprocess.PIPE
        )
    figures: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return figures


def first_minutes(name: str | None, limit: float) -> dict[str, float]:
    """Load a model and ask it until it runs compiled.

    Returns:
        `loaded_s` until the object is there, `first` speed of the first answer, `slowest` and `median` speeds of
        uncompiled answers, `compiled_after_s` until answers run compiled, `answers` their median speed while prompts
        and rows are still being compiled, `all_after_s` until everything is compiled (both since the object is there;
        −1 = not within the limit), and `compiled` speed after that.
    """
    from polar_sdk import PolarModel
    from polar_sdk.engine.eager import Compiled

    begin = time.perf_counter()
    model = PolarModel.from_pretrained(name, device="cpu", precision="bf16", ledger=None, speculate="off")
    loaded = time.perf_counter()
    uncompiled: list[float] = []
    answers: list[float] = []
    after = -1.0
    while not model.compiled and time.perf_counter() - loaded < limit:
        speed = _speed(model)
        if model.decoder.kernels.compiled < Compiled.ONE_ROW:
            uncompiled.append(speed)
            continue
        if after < 0:
            after = time.perf_counter() - loaded
        answers.append(speed)
    everything = time.perf_counter() - loaded if model.compiled else -1.0
    return {
        "loaded_s": loaded - begin,
        "first": uncompiled[0],
        "slowest": min(uncompiled),
        "median": statistics.median(uncompiled),
        "compiled_after_s": after,
        "answers": statistics.median(answers) if answers else float("nan"),
        "all_after_s": everything,
        "compiled": _speed(model),
    }


def _speed(model: PolarModel) -> float:
    prompt = [random.randrange(100, 40_000) for _ in range(PROMPT)]
    usage = model.generate(prompt, compute="exact", max_tokens=NEW).usage
    return (usage.tokens.output - 1) / usage.decode_ns * 1e9


if __name__ == "__main__":
    main()
