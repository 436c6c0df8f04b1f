"""Peers of the engine: Hugging Face `generate` and llama.cpp, in the few calls that are timed; and runs in turn.

Every call runs in a thread that ends with it. OpenMP keeps a pool of threads per calling thread, and once the pools
together have more threads than the machine has cores, all of them sleep at every wait: two systems that are merely
loaded in one process would halve each other's speed. Of PoLar it knows how a model is exported.
"""

from __future__ import annotations

import ctypes
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from polar_sdk import Program

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polar_sdk import PolarModel

T = TypeVar("T")


def apart(run: Callable[[], T]) -> T:
    """Run a function in a thread that ends with it, so that its pool of OpenMP threads ends too."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(run()))
    thread.start()
    thread.join()
    if not results:
        raise RuntimeError("the measured code failed; see the traceback above")
    return results[0]


def timed(run: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def alternate(rounds: int, *runs: Callable[[], T], before: Callable[[], object] = lambda: None) -> list[list[T]]:
    """Results of each run, round by round, after one round to warm up, so that a slow moment affects all of them.

    Args:
        rounds: Rounds that count.
        *runs: What runs in turn.
        before: Called before each run.
    """
    results: list[list[T]] = [[] for _ in runs]
    for number in range(rounds + 1):
        for result, run in zip(results, runs, strict=True):
            before()
            value = run()
            if number:
                result.append(value)
    return results


def plain_folder(model: PolarModel) -> Path:
    """A folder of a model that transformers reads: that of a GGUF file is written, once."""
    loaded = model.loaded
    if all(file.suffix != ".gguf" for file in loaded.weights):
        return loaded.path
    folder = Path("out/plain") / loaded.path.name
    return folder if folder.is_dir() else model.export(Program.identity(model.depth), folder)


class HuggingFace:
    """The untouched transformers model, greedy."""

    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
        self._model = loaded.to(device)
        self._device = device

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> float:
        """Seconds to answer prompts as one batch, padded on the left, with `new` tokens each."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=self._device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        return apart(lambda: timed(lambda: self._model.generate(ids, attention_mask=mask.to(self._device), **options)))

    def score(self, questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> float:
        """Seconds to score every choice in its own forward pass, all padded to the longest."""
        longest = max(len(prompt) + len(choice) for prompt, choices in questions for choice in choices)
        return apart(lambda: timed(lambda: self._score(questions, longest)))

    @torch.inference_mode()
    def _score(self, questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], longest: int) -> None:
        for prompt, choices in questions:
            for choice in choices:
                ids = [*prompt, *choice]
                padded = torch.tensor([ids + [0] * (longest - len(ids))], device=self._device)
                mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids))], device=self._device)
                logits = self._model(padded, attention_mask=mask, use_cache=False).logits[0].float()
                before = torch.arange(len(prompt) - 1, len(ids) - 1, device=self._device)
                logits[before].log_softmax(-1)[range(len(choice)), list(choice)].sum().item()


def quantized(gguf: Path, kind: str) -> Path:
    """The weights of a GGUF file in another kind of numbers, such as `Q8_0`, in a file beside it.

    Raises:
        ImportError: llama.cpp is not installed.
        RuntimeError: It cannot store them so.
    """
    import llama_cpp  # type: ignore[import-not-found, unused-ignore]

    file = gguf.with_name(f"{gguf.stem}.{kind}.gguf")
    options: Any = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), True
    if llama_cpp.llama_model_quantize(str(gguf).encode(), str(file).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp cannot store {gguf} as {kind}")
    return file


class LlamaCpp:
    """llama.cpp through llama-cpp-python, greedy, on the same GGUF file."""

    def __init__(self, gguf: Path, threads: int) -> None:
        from llama_cpp import Llama  # type: ignore[import-not-found, unused-ignore]

        self._model: Any = Llama(str(gguf), n_threads=threads, n_threads_batch=threads, n_ctx=2048, verbose=False)

    def generate(self, prompt: Sequence[int], new: int) -> float:
        """Seconds to answer one prompt with `new` tokens."""
        return apart(lambda: timed(lambda: self._run(prompt, new)))

    def _run(self, prompt: Sequence[int], new: int) -> None:
        self._model.reset()
        for count, _ in enumerate(self._model.generate(list(prompt), temp=0.0, reset=False), start=1):
            if count == new:
                return
