"""Peak memory: of a process that loads the model and answers 4 requests of 1,024 tokens, and of one long prompt.

    python -m benchmarks.memory [--model NAME] [--precision bf16]

Writes the figures to `--results`: how much resident memory grew after the imports,
compared with the weights and the keys and values of 4,096 tokens. A peak never falls again, so `benchmarks/engine.py`
runs it as a process of its own, and so does `prompt_growth` with what it measures.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import transformers.modeling_utils  # noqa: F401  (what loading imports does not count as growth)

from benchmarks.peers import HuggingFace, apart, plain_folder
from benchmarks.results import Recorder, arguments
from polar_sdk import PolarModel, Program

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

ROWS, TOKENS, NEW = 4, 1024, 24
MIB = 2**20


def main() -> None:
    args = _arguments()
    recorder = Recorder("memory", args.results, model=args.model, device=args.device)
    before = psutil.Process().memory_info().rss
    model = apart(
        lambda: PolarModel.from_pretrained(args.model, precision=args.precision, device=args.device, ledger=None)
    )
    word = model.encode(" light")
    assert len(word) == 1
    prompts = [" light" * (TOKENS - NEW)] * ROWS
    model.generate_batch(prompts, template="raw", max_tokens=NEW, program=Program.identity(model.depth))
    decoder = model.loaded.decoder
    tensors = _tensors([decoder.start, *decoder.layers, decoder.ends])
    weights = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
    kept = ROWS * TOKENS * model.depth * decoder.pool.page_bytes // 64
    peak = peak_memory()
    recorder.add(
        f"growth after imports, {args.precision}, {ROWS} requests of {TOKENS:,} tokens",
        (peak - before) / MIB,
        "MiB",
        peer="weights + keys and values",
        peer_value=(weights + kept) / MIB,
        ratio=(peak - before) / (weights + kept),
        goal=1.5,
        better="lower",
        note=f"peak {peak / MIB:.0f} MiB, after imports {before / MIB:.0f} MiB, weights {weights / MIB:.0f} MiB",
    )


def prompt_growth(model: str | None, tokens: int, system: str) -> float:
    """Memory that one long prompt takes at its peak, keys and values included, in a process of its own. Unit: MiB.

    Args:
        model: Name of the model; None = the default one.
        tokens: Length of the prompt.
        system: `ours`, or `hf` for Hugging Face.
    """
    words = f"from benchmarks.memory import _grow; _grow({model!r}, {tokens}, {system!r})"
    ended = subprocess.run([sys.executable, "-c", words], check=True, stdout=subprocess.PIPE)
    return float(json.loads(ended.stdout.splitlines()[-1]))


def _grow(name: str | None, tokens: int, system: str) -> None:
    """Print the growth; a short prompt runs first, so that what is made at first use is not counted."""
    model = apart(lambda: PolarModel.from_pretrained(name, device="cpu", precision="bf16", ledger=None))
    (word,) = model.encode(" light")
    identity = Program.identity(model.depth)
    peer = HuggingFace(plain_folder(model), "bfloat16", "cpu") if system == "hf" else None

    def run(count: int) -> None:
        if peer is None:
            model.generate([word] * count, max_tokens=1, program=identity)
        else:
            peer.generate([[word] * count], 1)

    run(64)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    before = psutil.Process().memory_info().rss
    run(tokens)
    print(json.dumps(max(peak_memory() - before, 0) / MIB))


def _arguments() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def peak_memory() -> int:
    """Peak resident memory of this process; `getrusage` alone may show the parent's, from before the start."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
