"""Peak memory of one long prompt, in a process of its own, since a peak never falls again.

    python -m benchmarks.long_prompts [--model NAME] [--tokens 8000] [--system ours]

Prints one JSON object: how much resident memory was above what the loaded model takes, at worst, while the prompt ran.
`benchmarks/engine.py` measures the speed of the same prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.memory import peak_memory
from benchmarks.peers import HuggingFace, apart
from polar_sdk import PolarModel, Program

SYSTEMS = ("ours", "hf")
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--system", choices=SYSTEMS, default=SYSTEMS[0])
    args = parser.parse_args()
    print(json.dumps({"mib": growth(args.model, args.tokens, args.system) / MIB}))


def apart_growth(model: str | None, tokens: int, system: str) -> float:
    """What `growth` says in a process of its own. Unit: MiB."""
    command = [sys.executable, "-m", "benchmarks.long_prompts", "--tokens", str(tokens), "--system", system]
    command += ["--model", model] if model else []
    ended = subprocess.run(command, env=os.environ, check=True, stdout=subprocess.PIPE)
    return float(json.loads(ended.stdout.splitlines()[-1])["mib"])


def growth(name: str | None, tokens: int, system: str) -> int:
    """Bytes of resident memory that a prompt takes at its peak, keys and values included.

    A short prompt runs first, so that what is made at first use is not counted.
    """
    model = apart(lambda: PolarModel.from_pretrained(name, device="cpu", precision="bf16", ledger=None))
    (word,) = model.encode(" light")
    identity = Program.identity(model.depth)
    peer = HuggingFace(model.loaded.path, "bfloat16", "cpu") if system == "hf" else None

    def run(count: int) -> None:
        prompt = [word] * count
        if peer is None:
            model.generate(prompt, max_tokens=1, program=identity)
        else:
            peer.generate([prompt], 1)

    run(64)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    before = psutil.Process().memory_info().rss
    run(tokens)
    return max(peak_memory() - before, 0)


if __name__ == "__main__":
    main()
