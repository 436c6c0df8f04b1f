"""What a benchmark asks of vLLM, in the environment that has it: `python -m benchmarks.vllm_side JOB OUT`.

A job is JSON: the options of `vllm.LLM`, and rounds of requests that run together. A request with `passes` is cut after
so many passes of its round, as one whose client leaves. Knows vLLM, and of PoLar only what the worker counts.
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
    out.write_text(json.dumps({"rounds": rounds, "preempted": preempted[0]}))


def _round(llm: Any, asked: dict[str, Any]) -> dict[str, Any]:
    if asked.get("cold"):
        llm.reset_prefix_cache()
    engine, requests = llm.llm_engine, asked["requests"]
    found: dict[str, Any] = {}
    settings = [_params(request) for request in requests]
    started = time.perf_counter()
    try:
        for name, (request, params) in enumerate(zip(requests, settings, strict=True)):
            engine.add_request(str(name), {"prompt_token_ids": request["ids"]}, params)
    except ValueError as error:
        return {"refused": str(error)}
    left, passes = {str(name): request["passes"] for name, request in enumerate(requests) if "passes" in request}, 0
    while engine.has_unfinished_requests():
        found |= {one.request_id: one for one in engine.step()}
        passes += 1
        engine.abort_request([name for name, after in left.items() if after == passes])
    seconds = time.perf_counter() - started
    while engine.engine_core.engine_core.scheduler.has_requests():  # those that ended, of which the worker is told
        engine.step()
    answers = [_answer(found.get(str(name))) for name in range(len(requests))]
    counted = llm.collective_rpc("polar_counts")[0] if llm.llm_engine.vllm_config.additional_config else None
    return {"seconds": seconds, "answers": answers, "counted": counted}


def _answer(one: Any) -> dict[str, Any]:
    if one is None:  # cut before its first token
        return {"ids": [], "cached": 0, "scores": []}
    return {"ids": list(one.outputs[0].token_ids), "cached": one.num_cached_tokens or 0, "scores": _scores(one)}


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
