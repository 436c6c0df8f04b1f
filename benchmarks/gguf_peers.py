"""GGUF files that people have, here and in llama.cpp, in turn: loading, memory, reading prompts and decoding.

    python -m benchmarks.gguf_peers

Fetches two aliases, builds llama.cpp for this machine and for AVX2, and ends with one line of JSON per file and
instruction set. `_vs_llamacpp` is our speed divided by its; of loading, our seconds by its. Every measurement is a
process of its own, so that neither system has the other's threads beside it. All is at full depth. Drafts are off but
where a figure says so: there they are as the engine drafts by default, and change no answer. `callers16` are 16 prompts
at once, which llama.cpp decodes as sequences of one batch. `fill_time_over_flops` is the time to the first token of
1,000 tokens, of which upper layers are filled, over full depth's, divided by its share of the FLOPs: the worst of three
cuts.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

if __package__:  # the peer's Python runs this file alone, without our packages
    from benchmarks.drafts import KINDS
    from benchmarks.results import Machine, Recorder, arguments
    from polar_sdk.models.aliases import resolve
    from polar_sdk.models.find import obtain

_MODELS: Final = ("qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")
"""Aliases, less `-instruct`."""
_AVX2: Final = "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=OFF"
_RESTRICTED: Final = {"POLAR_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
_PARTS: Final = ("load", "prefill", "decode", "callers", "drafts", "fills")
_FIGURES: Final = {
    "decode": ("tokens/s", None, "higher"),
    "prefill512": ("tokens/s", 1.5, "higher"),
    "prefill2048": ("tokens/s", 1.5, "higher"),
    "load": ("s", 2.0, "lower"),
    "rss": ("MB", None, "lower"),
    "callers16": ("tokens/s", 2.0, "higher"),
    "chat with drafts": ("tokens/s", 1.15, "higher"),
    "notes with drafts": ("tokens/s", 1.4, "higher"),
    "summary with drafts": ("tokens/s", 1.5, "higher"),
    "code with drafts": ("tokens/s", 1.4, "higher"),
}
"""What is compared: unit, goal of the ratio, and what is better. That of decoding depends, see `_decode_goal`."""
_OVER_FILE: Final = 1.2
"""Goal for the resident memory of the process in sizes of the file."""
_FILLED: Final = (0.8, 0.667, 0.5)
"""Shares of the layers from which on prompts are filled."""
_OVER_FLOPS: Final = 1.08
"""Goal for their time over their FLOPs."""
_TURNS: Final = 3
_NEW: Final = 64
_TOKENS: Final = (512, 2048)
_LONG: Final = 1000
_CALLERS: Final = 16
_STORY: Final = "Write a long story about a sailor and the sea, number {}."


def _peer(folder: Path, flags: str) -> Path:
    """A Python with llama.cpp built by these flags."""
    python = folder / "bin" / "python"
    if not (folder / "built").is_file():
        venv.create(folder, with_pip=True)
        options = ["--quiet", "--no-cache-dir", "--no-binary", "llama-cpp-python", "llama-cpp-python", "psutil"]
        built = os.environ | {"CMAKE_ARGS": flags, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}
        subprocess.run([python, "-m", "pip", "install", *options], env=built, check=True)
        (folder / "built").touch()
    return python


class _Ours:
    def __init__(self, file: str) -> None:
        # Both libraries are imported before the clock starts, as the peer's is; what they import for a model counts.
        import torch
        import transformers  # noqa: F401

        from polar_sdk import PolarModel
        from polar_sdk.models.load import load_pretrained

        torch.set_num_threads(_cores())
        begin = time.perf_counter()
        self._model: Any = PolarModel.from_pretrained(file, ledger=None, speculate="off")
        self.load = time.perf_counter() - begin
        self._tokenizer: Any = load_pretrained(file).tokenizer  # of the model that is loaded already

    def read(self, text: str, tokens: int, skipped: int) -> float:
        prompt = self._tokenizer.decode(self._tokenizer(text)["input_ids"][skipped : skipped + tokens])
        begin = time.perf_counter()
        answer = self._model.generate(prompt, max_tokens=1, compute="exact")
        return float(answer.usage.tokens.input / (time.perf_counter() - begin))

    def decode(self, prompt: str) -> float:
        seconds = []
        for new in (8, 8 + _NEW):
            begin = time.perf_counter()
            self._model.generate(prompt, max_tokens=new, compute="exact")
            seconds.append(time.perf_counter() - begin)
        return _NEW / (seconds[1] - seconds[0])

    def draft(self, prompt: str) -> float:
        answer = self._model.generate(prompt, max_tokens=_NEW, compute="exact", speculate="auto")
        return float((len(answer.token_ids) - 1) / answer.usage.decode_ns * 1e9)

    def callers(self, prompts: list[str]) -> float:
        call = partial(self._model.generate, template="raw", max_tokens=_NEW, compute="exact")  # the tokens of the peer
        with ThreadPoolExecutor(len(prompts)) as callers:
            begin = time.perf_counter()
            answers = list(callers.map(call, prompts))
            return sum(len(answer.token_ids) for answer in answers) / (time.perf_counter() - begin)

    def over_flops(self, text: str) -> float:
        """What fills write does not change how long they take, so random ones stand for those of a cut."""
        from polar_sdk import PolarModel, Policy, Program
        from polar_sdk.testing import random_fill

        decoder = self._model.decoder
        depth, identity = decoder.depth, Program.identity(decoder.depth)
        segments = [(round(share * depth), depth - 1) for share in _FILLED]
        decoder.set_fills({**decoder.fills, **{segment: random_fill(decoder, segment) for segment in segments}})
        free = PolarModel(self._model.loaded, policy=Policy.permissive(), ledger=None)
        tokens, skipped = self._tokenizer(text)["input_ids"], count(13, 29)  # no two prompts begin alike

        def seconds(program: Program) -> float:
            first = next(skipped)
            prompt = self._tokenizer.decode(tokens[first : first + _LONG])
            begin = time.perf_counter()
            free.generate(prompt, template="raw", max_tokens=1, program=program)
            return time.perf_counter() - begin

        worst = 0.0
        for segment in segments:
            program = Program.filling(depth, [segment])
            share = decoder.cost.prefill(program, _LONG) / decoder.cost.prefill(identity, _LONG)
            ratios = [seconds(program) / seconds(identity) for _ in range(_TURNS)]
            worst = max(worst, statistics.median(ratios) / share)
        return worst


class _LlamaCpp:
    def __init__(self, file: str) -> None:
        from llama_cpp import Llama  # type: ignore[import-not-found, unused-ignore]

        threads, begin = _cores(), time.perf_counter()
        self._model: Any = Llama(file, n_threads=threads, n_threads_batch=threads, n_ctx=4096, verbose=False)
        self.load = time.perf_counter() - begin

    def read(self, text: str, tokens: int, skipped: int) -> float:
        prompt = self._model.tokenize(text.encode())[skipped : skipped + tokens]
        self._model.reset()
        begin = time.perf_counter()
        self._model.eval(prompt)
        return len(prompt) / (time.perf_counter() - begin)

    def decode(self, prompt: str) -> float:
        self._model.reset()
        self._model.eval(self._model.tokenize(prompt.encode()))
        for step in range(8 + _NEW):
            if step == 8:
                begin = time.perf_counter()
            self._model.eval([self._model.sample(temp=0.0)])
        return _NEW / (time.perf_counter() - begin)

    draft = decode

    def callers(self, prompts: list[str]) -> float:
        """Greedy answers of as many sequences of one batch, in a context of its own."""
        import llama_cpp  # type: ignore[import-not-found, unused-ignore]
        import numpy as np

        asked, weights = [self._model.tokenize(prompt.encode()) for prompt in prompts], self._model.model
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_seq_max = 256 * len(asked), 2048, len(asked)
        settings.n_threads = settings.n_threads_batch = _cores()
        settings.kv_unified = True
        context = llama_cpp.llama_init_from_model(weights, settings)
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(weights))
        batch = llama_cpp.llama_batch_init(2048, 0, 1)

        def run(entries: list[tuple[int, int, int, bool]]) -> list[int]:
            """Pass (token, position, sequence, whether its choice is wanted) each; the choices."""
            batch.n_tokens = len(entries)
            for place, (token, position, sequence, wanted) in enumerate(entries):
                batch.token[place], batch.pos[place], batch.logits[place] = token, position, wanted
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            if llama_cpp.llama_decode(context, batch):
                raise RuntimeError("llama.cpp failed to decode a batch")
            places = [place for place, entry in enumerate(entries) if entry[3]]
            found = (llama_cpp.llama_get_logits_ith(context, place) for place in places)
            return [int(np.ctypeslib.as_array(one, (vocabulary,)).argmax()) for one in found]

        begin = time.perf_counter()
        chosen = run(
            [
                (token, place, row, place == len(tokens) - 1)
                for row, tokens in enumerate(asked)
                for place, token in enumerate(tokens)
            ]
        )
        for step in range(_NEW - 1):
            chosen = run([(token, len(asked[row]) + step, row, True) for row, token in enumerate(chosen)])
        speed = len(asked) * _NEW / (time.perf_counter() - begin)
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        return speed


def _decode_goal(model: str, isa: str) -> float:
    """Goal for the ratio: what memory allows, by the model's formats, and more where arithmetic takes no time."""
    if model.endswith("0.5b"):
        return 1.15
    return 1.2 if isa == "native" and "avx512f" in Machine.here().isa.split() else 1.05


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _measure(system: str, file: str, asked: str, *parts: str) -> dict[str, float]:
    import psutil

    run: Any = _Ours(file) if system == "ours" else _LlamaCpp(file)
    text = Path(__file__).with_name("train_router.py").read_text(encoding="utf-8") * 3
    figures = dict[str, float]()
    if "load" in parts:
        figures |= {"load": run.load, "rss": psutil.Process().memory_info().rss / 1e6}
    if "prefill" in parts:
        for tokens in _TOKENS:
            figures[f"prefill{tokens}"] = statistics.median(run.read(text, tokens, 97 * turn) for turn in range(_TURNS))
    if "decode" in parts:
        figures["decode"] = statistics.median(run.decode(_STORY.format(turn)) for turn in range(_TURNS))
    if "callers" in parts:
        figures["callers16"] = run.callers([_STORY.format(turn) for turn in range(_CALLERS)])
    if "drafts" in parts:
        for kind, prompts in json.loads(Path(asked).read_text(encoding="utf-8")).items():
            figures[f"{kind} with drafts"] = statistics.median(map(run.draft, prompts))
    if "fills" in parts and system == "ours":
        figures["fill_time_over_flops"] = run.over_flops(text)
    return figures


def _child(
    python: Path, system: str, file: Path, asked: Path, parts: list[str], environment: dict[str, str]
) -> dict[str, float]:
    command = [str(python), str(Path(__file__)), "--measure", system, str(file), str(asked), *parts]
    done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measure both systems in turn, or one of them in this process."""
    if sys.argv[1:2] == ["--measure"]:  # in a process of its own
        print(json.dumps(_measure(*sys.argv[2:])))
        return
    parser = arguments(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("out/peers"), help="for builds")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each system, in turn")
    parser.add_argument("--models", nargs="*", default=_MODELS, choices=_MODELS)
    parser.add_argument("--only", nargs="*", default=[*_PARTS], choices=_PARTS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    native = _peer(options.folder / "native", "")
    sets = {"native": (native, {}), "avx2": (_peer(options.folder / "avx2", _AVX2), _RESTRICTED)}
    asked = options.folder / "prompts.json"
    asked.write_text(json.dumps({kind: prompts for kind, (_, prompts) in KINDS.items()}), encoding="utf-8")
    recorder = Recorder("gguf", options.results)
    lines = []
    for name in options.models:
        file = obtain(resolve(f"{name}-instruct")).weights[0]
        obtain(resolve(file))  # reads its header, which is done once for a file
        for isa, (peer, restricted) in sets.items():
            ours, theirs = list[dict[str, float]](), list[dict[str, float]]()
            for _ in range(options.rounds):
                ours.append(_child(Path(sys.executable), "ours", file, asked, options.only, restricted))
                theirs.append(_child(peer, "llama.cpp", file, asked, options.only, {}))
            lines.append({"isa": isa, "model": name} | _record(recorder, name, isa, file, ours, theirs))
    for line in lines:
        print(json.dumps(line))


def _record(
    recorder: Recorder, model: str, isa: str, file: Path, ours: list[dict[str, float]], theirs: list[dict[str, float]]
) -> dict[str, float]:
    """Record the figures of a file and an instruction set; returns the ratios by their names."""
    row, ratios = f"{model}, {isa}", dict[str, float]()
    for each, (unit, goal, better) in _FIGURES.items():
        if each not in ours[0]:
            continue
        values = [run[each] for run in ours], [run[each] for run in theirs]
        facts: dict[str, Any] = {"goal": _decode_goal(model, isa) if each == "decode" else goal, "better": better}
        ratio = recorder.compare(f"{row}: {each}", *values, unit, peer="llama.cpp", **facts)
        ratios[f"{each.replace(' with ', '_')}_vs_llamacpp"] = ratio
    if "rss" in ours[0]:
        ratios["rss_over_file"] = over = statistics.median(run["rss"] for run in ours) * 1e6 / file.stat().st_size
        recorder.add(f"{row}: rss over file", over, "×", goal=_OVER_FILE, better="lower")
    if "fill_time_over_flops" in ours[0]:
        ratios["fill_time_over_flops"] = slow = statistics.median(run["fill_time_over_flops"] for run in ours)
        note = f"first token of {_LONG} tokens; the worst of three cuts"
        recorder.add(f"{row}: time over FLOPs, filled", slow, "×", goal=_OVER_FLOPS, better="lower", note=note)
    return {name: round(ratio, 2) for name, ratio in ratios.items()}


if __name__ == "__main__":
    main()
