"""The engine alone: one prompt on every tier, what each executed, and a stream that is closed early.

Run it with `python examples/quickstart.py`. The first run fetches the default model. Nothing is written to
your ledger.
"""

from __future__ import annotations

from polar_sdk import ListSink, PolarModel

PROMPT = "What is the capital of France?"


def main() -> None:
    sink = ListSink()  # usage records go here instead of a ledger
    model = PolarModel.from_pretrained(sink=sink)
    print(f"{model.name}: {model.depth} layers, {model.dtype} on {model.device}\n")

    print(PROMPT)
    for tier in ("exact", "premium", "standard", "economy"):
        answer = model.generate(PROMPT, compute=tier, max_tokens=24)
        usage = answer.usage
        print(f"  {tier:<9} {answer.text.strip()!r}")
        saved = usage.flops_saved / usage.identity_flops
        less = f"{saved:.1%} less than full depth" if saved >= 0.0005 else "full depth"
        cached = f", {usage.tokens.cached} tokens of it were there already" if usage.tokens.cached else ""
        print(f"  {'':<9} program {usage.program} · {usage.flops.total / 1e9:.2f} GFLOP, {less}{cached}")

    print("\nA program by hand, layer 15 visited twice:")
    answer = model.generate(PROMPT, program="0-14 15x2 16-29", max_tokens=24)
    print(f"  {answer.text.strip()!r} · layer 15 has {answer.usage.visits.prefill[15]} visits in the prefill")

    print("\nA stream, left after ten pieces:\n  ", end="")
    stream = model.stream("Tell me a story about a clockmaker.", max_tokens=200, stop_repeats=4)
    for count, chunk in enumerate(stream):
        print(chunk.text, end="", flush=True)
        if count == 9:
            break
    stream.close()  # compute stops here, and the record is exact
    last = sink.records[-1]
    print(f"\n  outcome {last.outcome}: {last.tokens.output} tokens, {last.flops.total / 1e9:.2f} GFLOP")


if __name__ == "__main__":
    main()
