"""Peak memory of a process that loads the model and answers 4 requests of 1,024 tokens at once.

    python -m benchmarks.memory [--model NAME] [--precision bf16]

Prints one JSON object, in bytes: resident memory after the imports, its peak, weights, and keys and values of 4,096
tokens. `benchmarks/engine.py` runs it as a process of its own, since a peak never comes down again.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import transformers.modeling_utils  # noqa: F401  (what loading will import is no growth)

from benchmarks.peers import apart
from polar_sdk import PolarModel, Program

if TYPE_CHECKING:
    from collections.abc import Iterator

ROWS, TOKENS, NEW = 4, 1024, 24


def main() -> None:
    args = _arguments()
    before = psutil.Process().memory_info().rss
    model = apart(
        lambda: PolarModel.from_pretrained(
            args.model, precision=args.precision, device=args.device, compile=True, ledger=None
        )
    )
    word = model.encode(" light")
    assert len(word) == 1
    prompts = [" light" * (TOKENS - NEW)] * ROWS
    answers = model.generate_batch(prompts, template="raw", max_tokens=NEW, program=Program.identity(model.depth))
    decoder = model.loaded.decoder
    facts = {
        "after_imports": before,
        "peak": _peak(),
        "weights": sum(
            {one.data_ptr(): one.nbytes for one in _tensors([decoder.start, *decoder.layers, decoder.ends])}.values()
        ),
        "keys_and_values": ROWS * TOKENS * model.depth * decoder.pool.page_bytes // 64,
        "tokens": sum(one.usage.tokens.input + one.usage.tokens.output for one in answers),
    }
    print(json.dumps(facts))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def _tensors(found: Any) -> Iterator[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, dict | list | tuple):
        for one in found.values() if isinstance(found, dict) else found:
            yield from _tensors(one)


def _peak() -> int:
    """Most resident memory of this process; `getrusage` alone may show the parent's, from before the start."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
