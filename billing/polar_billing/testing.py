"""Invented usage records and audits, for tests of billing and of programs built on it.

Records are consistent (parts sum to totals, visits follow the path) but nothing was executed for them.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.promises.audit import Audit
from polar_sdk.usage import FlopUsage, Outcome, TokenUsage, UsageRecord, VisitUsage, new_request_id

if TYPE_CHECKING:
    from collections.abc import Sequence


FLOPS_PER_VISITED_TOKEN: Final = 7_077_888
FLOPS_PER_HEAD: Final = 56_623_104
_FINISH: Final = {
    Outcome.COMPLETED: "stop",
    Outcome.CANCELLED: "cancelled",
    Outcome.ERROR: "error",
    Outcome.CACHED: "cached",
}


def usage_record(
    request_id: str | None = None,
    *,
    path: Sequence[int] = (0, 1, 2, 3, 4, 5),
    layers: int = 6,
    prompt: int = 10,
    output: int = 4,
    outcome: Outcome = Outcome.COMPLETED,
    router_flops: int = 0,
    drafts: tuple[int, int, int] = (0, 0, 0),
    **changes: Any,
) -> UsageRecord:
    """Create a usage record of a request that ran `path`.

    Args:
        request_id: The idempotency key; a new one by default.
        path: The layers visited, in order.
        layers: Layers the model has.
        prompt: Prompt tokens.
        output: Tokens sampled.
        outcome: How the request ended; a cached one executed nothing.
        router_flops: FLOPs of the router.
        drafts: Tokens drafted, tokens of them accepted, and FLOPs executed beyond what the answer needed.
        **changes: Any other field of the record.
    """
    executed = 0 if outcome is Outcome.CACHED else 1
    prefill = [path.count(layer) * executed for layer in range(layers)]
    decode = [visits * output for visits in prefill]
    layers_prefill = sum(prefill) * prompt * FLOPS_PER_VISITED_TOKEN
    layers_decode = sum(decode) * FLOPS_PER_VISITED_TOKEN
    head = (output + 1) * FLOPS_PER_HEAD * executed
    fields: dict[str, Any] = {
        "request_id": request_id or new_request_id(),
        "tenant": "acme",
        "model": "test-model",
        "model_fingerprint": "00" * 32,
        "router": "static",
        "router_version": "1",
        "tier": "standard",
        "program": " ".join(map(str, path)),
        "outcome": outcome,
        "finish_reason": _FINISH[outcome],
        "tokens": TokenUsage(input=prompt, output=output, drafted=drafts[0], accepted=drafts[1]),
        "visits": VisitUsage(prefill=tuple(prefill), decode=tuple(decode)),
        "flops": FlopUsage(
            layers_prefill=layers_prefill,
            layers_decode=layers_decode,
            head=head,
            router=router_flops * executed,
            total=layers_prefill + layers_decode + head + router_flops * executed,
            drafts=drafts[2],
        ),
        "identity_flops": executed * layers * (prompt + output) * FLOPS_PER_VISITED_TOKEN + head,
        "started_at": datetime(2026, 11, 15, 12, tzinfo=UTC),
        "prefill_ns": prompt * 1_000_000,
        "decode_ns": output * 5_000_000,
    }
    return UsageRecord(**{**fields, **changes})


def audit(request_id: str | None = None, *, lost: bool = False, **changes: Any) -> Audit:
    """Create an audit of an answer of 20 tokens, of which full depth would choose all or, where `lost`, half.

    Args:
        request_id: The request whose answer was judged; a new one by default.
        lost: Whether the answer counts as lost.
        **changes: Any other field of the audit.
    """
    fields: dict[str, Any] = {
        "audit_id": new_request_id(),
        "request_id": request_id or new_request_id(),
        "tenant": "acme",
        "tier": "premium",
        "promise": "ab" * 32,
        "alpha": 0.05,
        "delta": 0.1,
        "lost": lost,
        "compared": 20,
        "kept": 10 if lost else 20,
        "prompt_tokens": 10,
        "flops": 10**9,
        "audit_request_id": new_request_id(),
        "at": datetime(2026, 11, 15, 12, tzinfo=UTC),
    }
    return Audit(**{**fields, **changes})
