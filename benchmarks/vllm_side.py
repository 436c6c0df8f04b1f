"""What a benchmark asks of vLLM, in the environment that has it: `python -m benchmarks.vllm_side JOB OUT`.

A job is JSON: the options of `vllm.LLM`, and rounds of requests that run together. Knows vLLM, and nothing of PoLar.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    job, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    from vllm import LLM

    llm: Any = LLM(**job["options"])
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted = _counted(scheduler)
    rounds = [_round(llm, each) for each in job["rounds"]]
    counts = llm.collective_rpc("polar_counts")[0] if "worker_cls" in job["options"] else {}
    out.write_text(json.dumps({"rounds": rounds, "counts": counts, "preempted": preempted[0]}))


def _round(llm: Any, asked: dict[str, Any]) -> dict[str, Any]:
    if asked.get("cold"):
        llm.reset_prefix_cache()
    prompts = [{"prompt_token_ids": request["ids"]} for request in asked["requests"]]
    settings = [_params(request) for request in asked["requests"]]
    started = time.perf_counter()
    try:
        found = llm.generate(prompts, settings, use_tqdm=False)
    except ValueError as error:
        return {"refused": str(error)}
    seconds = time.perf_counter() - started
    answers = [
        {"ids": list(one.outputs[0].token_ids), "cached": one.num_cached_tokens or 0, "scores": _scores(one)}
        for one in found
    ]
    return {"seconds": seconds, "answers": answers}


def _scores(answer: Any) -> list[float]:
    """Log-probabilities of the prompt's tokens but the first, where they were asked for."""
    pairs = zip(answer.prompt_token_ids[1:], (answer.prompt_logprobs or [])[1:], strict=False)
    return [likely[token].logprob for token, likely in pairs]


def _params(request: dict[str, Any]) -> Any:
    from vllm import SamplingParams

    extra = {"polar": request["program"]} if request.get("program") is not None else None
    scored = request.get("prompt_logprobs")
    ends = request.get("ends", False)
    return SamplingParams(
        temperature=0, max_tokens=request["tokens"], extra_args=extra, ignore_eos=not ends, prompt_logprobs=scored
    )


def _counted(scheduler: Any) -> list[int]:
    """How often a request was preempted, from here on."""
    count, stock = [0], scheduler._preempt_request

    def preempt(*args: Any, **options: Any) -> Any:
        count[0] += 1
        return stock(*args, **options)

    scheduler._preempt_request = preempt
    return count


if __name__ == "__main__":
    main()
