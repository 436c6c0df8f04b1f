"""Facts of an answer besides its text: id, model, tokens, compute and money.

The same for every endpoint; only the spelling differs. Knows no HTTP.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from polar_sdk.engine import engine_version
from polar_sdk.frameworks.cost import total_cost
from polar_sdk.request.admission import DOWNGRADED_TAG
from polar_sdk.request.floors import FLOOR_TAG, RAISED_TAG
from polar_sdk.usage import FALLBACK_TAG, STOPPED_TAG

if TYPE_CHECKING:
    from polar_sdk import PolarModel, UsageRecord
    from polar_server.answers import Answer
    from polar_server.http.exchange import Exchange
    from polar_server.openai.calls import Call
    from polar_server.openai.logprobs import TokenBytes


@dataclass(frozen=True)
class Tokens:
    """Tokens of all choices. A prompt counts once however many choices it has."""

    read: int
    cached: int
    """Included in `read`."""
    written: int


@dataclass(frozen=True)
class Facts:
    """One answer, as those who write it down see it.

    Attributes:
        call: What was asked.
        answer: What is being computed.
        exchange: The HTTP exchange that it belongs to.
        engine: What computes it.
        token_bytes: The bytes of its tokens.
        created: When it began. Unit: seconds since 1970.
    """

    call: Call
    answer: Answer
    exchange: Exchange
    engine: PolarModel
    token_bytes: TokenBytes
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def request_id(self) -> str:
        """Id of the first choice in the ledger, once it is admitted."""
        return self.exchange.request_id

    @property
    def fingerprint(self) -> str:
        """Engine, weights and program of the answer."""
        offer = self.answer.choices[0].offer
        program = hashlib.sha256(b"" if offer is None else offer.program.encode()).hexdigest()[:8]
        return f"polar-{engine_version(self.engine.dtype)}-{self.engine.fingerprint[:12]}-{program}"

    def headers(self) -> dict[str, str]:
        """Headers of an admitted answer; from here on, the call has the id of its first choice."""
        offer, bound = self.answer.choices[0].offer, self.answer.choices[0].bound
        if offer is None or bound is None:
            return {}
        self.exchange.request_id = bound.request_id
        headers = {"x-polar-program": offer.program}
        if offer.tier is not None:
            headers["x-polar-tier"] = offer.tier
        if offer != bound.offers[0]:
            headers["x-polar-downgraded-from"] = bound.offers[0].tier or bound.offers[0].program
        if FLOOR_TAG in bound.tags:
            headers["x-polar-floor"] = quote(bound.tags[FLOOR_TAG])
        return headers

    def closing_headers(self) -> dict[str, str]:
        """Headers of a whole answer: times, and the price."""
        headers = {}
        if (record := self.answer.choices[0].record) is not None:
            parts = {"queue": record.queue_ns, "prefill": record.prefill_ns, "decode": record.decode_ns}
            headers["server-timing"] = ", ".join(f"{name};dur={spent / 1e6:.3f}" for name, spent in parts.items())
        price = self.bill()["cost_details"]
        if price["amount"] is not None:
            headers["x-polar-cost"] = f"{price['amount']} {price['currency'] or ''}".strip()
        return headers

    def read(self) -> int:
        """Tokens of the prompts, before there is a record."""
        bounds = [choice.bound for choice in self.answer.choices]
        prompts = bounds[:: max(len(bounds) // self.call.prompts, 1)]
        return sum(bound.tokens_input for bound in prompts if bound is not None)

    def tokens(self) -> Tokens:
        """Tokens on record, integers only: LangChain adds them up."""
        records = self._records
        prompts = records[:: max(len(records) // self.call.prompts, 1)]
        return Tokens(
            sum(record.tokens.input for record in prompts),
            sum(record.tokens.cached for record in prompts),
            sum(record.tokens.output for record in records),
        )

    def bill(self) -> dict[str, Any]:
        """Money and compute of all choices: `cost` for display, exact amounts as text."""
        records = self._records
        receipts = [choice.receipt for choice in self.answer.choices if choice.record is not None]
        total, first = total_cost(receipts), (receipts[0] if receipts else None) or {}
        flops, identity = (sum(record.flops.total for record in records), sum(r.identity_flops for r in records))
        polar = {
            "program": records[0].program if records else None,
            "tier": records[0].tier if records else None,
            "flops": flops,
            "identity_flops": identity,
            "saved": identity - flops,
            "cu": f"{Decimal(flops).scaleb(-12):f}",
            "tenant": records[0].tenant if records else None,
            "receipt": self.request_id,
            "receipts": [record.request_id for record in records],
        }
        said = {
            DOWNGRADED_TAG: "downgraded_from",
            FALLBACK_TAG: "fallback_from",
            FLOOR_TAG: "floor",
            RAISED_TAG: "raised_from",
        }
        polar |= {name: records[0].tags[tag] for tag, name in said.items() if records and tag in records[0].tags}
        if stopped := [record.tags[STOPPED_TAG] for record in records if STOPPED_TAG in record.tags]:
            polar["stopped_by"] = stopped[0]
        self.exchange.facts |= {"program": polar["program"], "tier": polar["tier"], "flops": flops}
        return {
            "cost": None if total is None else float(total),
            "cost_details": {
                "amount": None if total is None else f"{total:f}",
                "currency": first.get("currency"),
                "price_book": first.get("price_book"),
            },
            "polar": polar,
        }

    @property
    def _records(self) -> list[UsageRecord]:
        return [choice.record for choice in self.answer.choices if choice.record is not None]
