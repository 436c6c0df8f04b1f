"""An endpoint that answers: from a call to choices of the engine, and from those to one body or a stream of events.

The stream carries what the body would: the same text, tokens, usage, finish reasons and cost. Knows chat and text
completions only by their shape.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, Protocol

from polar_sdk.engine import ENGINE_VERSION
from polar_sdk.request.admission import DOWNGRADED_TAG
from polar_server import replies
from polar_server.errors import ClientLeftError, api_error, shutting_down
from polar_server.exchange import Exchange, raw_headers, read_object, send_json, watching
from polar_server.openai import fields
from polar_server.openai.logprobs import Entry, ShownTokens, all_shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from starlette.types import Receive, Scope, Send

    from polar_sdk import Chunk, Generation
    from polar_server.answers import Answer
    from polar_server.openai.calls import Call, Rules
    from polar_server.openai.fields import Body, Field
    from polar_server.server import Server

_EVENTS: Final = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
_DONE: Final = b"data: [DONE]\n\n"
_KEEP_ALIVE: Final = b": keep-alive\n\n"


class Shape(Protocol):
    """How the answers of an endpoint look."""

    prefix: str
    """Of an answer's id."""
    whole: str
    """`object` of a whole answer."""
    piece: str
    """`object` of a piece of a stream."""
    opening: bool
    """Whether a choice begins with a piece that says the role."""

    @staticmethod
    def choice(index: int, text: str, finish: str, logprobs: Sequence[Entry] | None) -> dict[str, Any]:
        """One choice of a whole answer."""
        ...

    @staticmethod
    def opened(index: int) -> dict[str, Any]:
        """The first piece of a choice."""
        ...

    @staticmethod
    def delta(index: int, text: str, logprobs: Sequence[Entry] | None) -> dict[str, Any]:
        """A piece of a choice."""
        ...

    @staticmethod
    def finished(index: int, finish: str) -> dict[str, Any]:
        """The last piece of a choice."""
        ...


class Endpoint:
    """An ASGI app for one kind of completion.

    Args:
        server: What answers.
        table: The fields of a body.
        read_call: Makes a call of a body.
        shape: How its answers look.
    """

    def __init__(
        self, server: Server, table: Mapping[str, Field], read_call: Callable[[Body, Rules], Call], shape: Shape
    ) -> None:
        self._server, self._table, self._read_call, self._shape = server, table, read_call, shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call.

        Raises:
            ApiError: It cannot be answered; nothing was sent.
        """
        server, exchange = self._server, Exchange.of(scope)
        settings = server.settings
        content = await read_object(exchange, receive, settings.max_body)
        body = fields.read(content, self._table, strict=settings.strict)
        server.metrics.unknown(len(body.unknown))
        call = self._read_call(body, server.rules(exchange))
        exchange.facts |= {"model": call.model, "stream": call.stream, "choices": len(call.asks)}
        key = replies.key_of(exchange.headers)
        if key is not None:
            fingerprint = replies.fingerprint_of(exchange.path, content)
            await self._answer_once(exchange, call, key, fingerprint, send)
            return
        answer = server.start(call, exchange)
        with watching(receive, answer.leave):
            await _Reply(server, exchange, call, answer, self._shape).send(send)

    async def _answer_once(self, exchange: Exchange, call: Call, key: str, fingerprint: str, send: Send) -> None:
        """Answer a call that may come again: by whoever claims its key first, and then from what was kept.

        All of it in a task of its own: the answer is for whoever comes back, also when this client has left, and a
        claim is always followed by an answer or given up.
        """
        work = self._claim_and_answer(exchange, call, key, fingerprint, send)
        await asyncio.shield(self._server.answers.keep(work))

    async def _claim_and_answer(self, exchange: Exchange, call: Call, key: str, fingerprint: str, send: Send) -> None:
        store = self._server.replies
        tenant = self._server.caller(exchange).tenant or self._server.engine.tenant
        state, kept = await asyncio.to_thread(store.claim, tenant, key, fingerprint)
        if state == "done" and kept is not None:
            exchange.request_id = replies.request_id_of(kept)
            await replies.send_again(kept, send)
            return
        if state != "claimed":
            raise replies.refusal(state)
        copy, whole = replies.Copy(send), False
        try:
            answer = self._server.start(call, exchange)
            whole = await _Reply(self._server, exchange, call, answer, self._shape).send(copy)
        finally:
            if whole:
                await asyncio.to_thread(store.keep, tenant, key, copy.packed(exchange.request_id))
            else:
                await asyncio.to_thread(store.give_up, tenant, key)


class _Reply:
    """The answer to one call, on its way to the client."""

    def __init__(self, server: Server, exchange: Exchange, call: Call, answer: Answer, shape: Shape) -> None:
        self._server, self._exchange, self._call = server, exchange, call
        self._answer, self._shape = answer, shape
        self._created = int(time.time())
        self._tokens = [ShownTokens(server.token_bytes) for _ in call.asks] if call.logprobs is not None else []

    async def send(self, send: Send) -> bool:
        """Send the answer; True if all of it was sent, False where a stream ended in an error.

        Raises:
            Exception: What ended it before anything was sent.
        """
        if self._call.stream:
            return await self._stream(send)
        await self._whole(send)
        return True

    # -- whole ------------------------------------------------------------------------------------------------------

    async def _whole(self, send: Send) -> None:
        """Wait for every choice, and send them as one JSON object."""
        generations: dict[int, Generation] = {}
        while arrived := await self._answer.pieces():
            for index, chunk in arrived:
                if chunk.generation is not None:
                    generations[index] = chunk.generation
        for generation in generations.values():
            self._check_finished(generation)
        headers = {**self._headers(), **_timing(self._answer)}
        choices = [self._choice(index, generations[index]) for index in sorted(generations)]
        body = {
            "id": self._id,
            "object": self._shape.whole,
            "created": self._created,
            "model": self._call.model,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
            "usage": self._usage(),
            **self._bill(),
        }
        if body["cost_details"]["amount"] is not None:
            headers["x-polar-cost"] = (
                f"{body['cost_details']['amount']} {body['cost_details']['currency'] or ''}".strip()
            )
        await send_json(send, body, headers=headers)

    def _choice(self, index: int, generation: Generation) -> dict[str, Any]:
        logprobs = None
        if self._call.logprobs is not None:
            logprobs = all_shown(self._server.token_bytes, generation.text, generation.logprobs or ())
        echoed = self._call.echo[index] if self._call.echo else ""
        return self._shape.choice(index, echoed + generation.text, generation.finish_reason, logprobs)

    # -- streamed ---------------------------------------------------------------------------------------------------

    async def _stream(self, send: Send) -> bool:
        """Send pieces as they come; an error before the first is raised, a later one is an event."""
        patience = self._server.settings.keep_alive
        early = await self._answer.pieces(patience)
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": raw_headers({**_EVENTS, **self._headers()}),
            }
        )
        left = set(range(len(self._call.asks)))
        opened: set[int] = set()
        try:
            arrived = early
            while left:
                frames = [_KEEP_ALIVE] if not arrived else []
                for index, chunk in arrived:
                    frames += self._frames(index, chunk, opened, left)
                await send({"type": "http.response.body", "body": b"".join(frames), "more_body": True})
                arrived = await self._answer.pieces(patience) if left else []
            last = [self._event({"choices": [], "usage": self._usage(), **self._bill()})]
            await _send_end(send, [*(last if self._call.include_usage else []), _DONE])
            return True
        except ClientLeftError:
            raise
        except Exception as error:  # the status is sent: what ended the stream is its last event
            self._server.log_unknown(error)
            await _send_end(send, [b"data: " + _json(api_error(error).body) + b"\n\n"])
            return False

    def _frames(self, index: int, chunk: Chunk, opened: set[int], left: set[int]) -> list[bytes]:
        """The events of one piece; takes a choice that ended out of `left`."""
        frames = []
        if index not in opened:
            opened.add(index)
            if self._shape.opening:
                frames.append(self._event({"choices": [self._shape.opened(index)]}))
            if self._call.echo:
                frames.append(self._event({"choices": [self._shape.delta(index, self._call.echo[index], None)]}))
        generation = chunk.generation
        if generation is not None:
            self._check_finished(generation)
        entries: list[Entry] | None = None
        if self._tokens:
            entries = self._tokens[index].push(chunk.text, chunk.logprobs or ())
            entries += self._tokens[index].finish() if generation is not None else []
        if chunk.text or entries:
            frames.append(self._event({"choices": [self._shape.delta(index, chunk.text, entries)]}))
        if generation is not None:
            left.discard(index)
            bill = {} if left or self._call.include_usage else self._bill()
            finished = self._shape.finished(index, generation.finish_reason)
            frames.append(self._event({"choices": [finished], **bill}))
        return frames

    def _event(self, rest: dict[str, Any]) -> bytes:
        usage = {"usage": None} if self._call.include_usage else {}
        return b"data: " + self._frame + _json({**usage, **rest})[1:] + b"\n\n"

    @property
    def _frame(self) -> bytes:
        """The beginning of every event of this stream, up to what differs."""
        if not hasattr(self, "_frame_bytes"):
            shared = {
                "id": self._id,
                "object": self._shape.piece,
                "created": self._created,
                "model": self._call.model,
                "system_fingerprint": self._fingerprint,
            }
            self._frame_bytes = _json(shared)[:-1] + b","
        return self._frame_bytes

    # -- both -------------------------------------------------------------------------------------------------------

    @property
    def _id(self) -> str:
        return f"{self._shape.prefix}-{self._exchange.request_id}"

    @property
    def _fingerprint(self) -> str:
        """What computed the answer: engine, weights and program."""
        offer = self._answer.choices[0].offer
        program = hashlib.sha256(b"" if offer is None else offer.program.encode()).hexdigest()[:8]
        return f"polar-{ENGINE_VERSION}-{self._server.engine.fingerprint[:12]}-{program}"

    def _check_finished(self, generation: Generation) -> None:
        """Raise where an answer was stopped: by the server, or because nobody reads it."""
        if generation.finish_reason == "cancelled":
            raise shutting_down() if self._answer.stopped else ClientLeftError

    def _headers(self) -> dict[str, str]:
        """What is known of an answer that is admitted; from here on, the call has the id of its first choice."""
        offer, bound = self._answer.choices[0].offer, self._answer.choices[0].bound
        if offer is None or bound is None:
            return {}
        self._exchange.request_id = bound.request_id
        headers = {"x-polar-program": offer.program}
        if offer.tier is not None:
            headers["x-polar-tier"] = offer.tier
        if offer != bound.offers[0]:
            headers["x-polar-downgraded-from"] = bound.offers[0].tier or bound.offers[0].program
        return headers

    def _usage(self) -> dict[str, Any]:
        """Tokens, integers only: LangChain adds up what stands here. A prompt counts once however many choices."""
        records = [choice.record for choice in self._answer.choices if choice.record is not None]
        prompts = records[:: max(len(records) // self._call.prompts, 1)]
        read, written = sum(record.tokens.input for record in prompts), sum(record.tokens.output for record in records)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            # All of OpenAI's, as LangChain warns of those that are missing.
            "prompt_tokens_details": {
                "cached_tokens": sum(record.tokens.cached for record in prompts),
                "cache_write_tokens": 0,
                "audio_tokens": 0,
            },
        }

    def _bill(self) -> dict[str, Any]:
        """Money and compute of all choices: `cost` for display, exact amounts as text."""
        choices = [choice for choice in self._answer.choices if choice.record is not None]
        records = [choice.record for choice in choices if choice.record is not None]
        receipts = [choice.receipt or {} for choice in choices]
        amounts = [receipt.get("cost") for receipt in receipts]
        known = bool(amounts) and all(amount is not None for amount in amounts)
        total = sum((Decimal(amount) for amount in amounts if amount is not None), Decimal()) if known else None
        first = receipts[0] if receipts else {}
        flops, identity = (sum(record.flops.total for record in records), sum(r.identity_flops for r in records))
        polar = {
            "program": records[0].program if records else None,
            "tier": records[0].tier if records else None,
            "flops": flops,
            "identity_flops": identity,
            "saved": identity - flops,
            "cu": f"{Decimal(flops).scaleb(-12):f}",
            "tenant": records[0].tenant if records else None,
            "receipt": self._exchange.request_id,
            "receipts": [record.request_id for record in records],
        }
        if records and DOWNGRADED_TAG in records[0].tags:
            polar["downgraded_from"] = records[0].tags[DOWNGRADED_TAG]
        self._exchange.facts |= {"program": polar["program"], "tier": polar["tier"], "flops": flops}
        return {
            "cost": None if total is None else float(total),
            "cost_details": {
                "amount": None if total is None else f"{total:f}",
                "currency": first.get("currency"),
                "price_book": first.get("price_book"),
            },
            "polar": polar,
        }


async def _send_end(send: Send, frames: Sequence[bytes]) -> None:
    await send({"type": "http.response.body", "body": b"".join(frames)})


def _timing(answer: Answer) -> dict[str, str]:
    record = answer.choices[0].record
    if record is None:
        return {}
    parts = {"queue": record.queue_ns, "prefill": record.prefill_ns, "decode": record.decode_ns}
    return {"server-timing": ", ".join(f"{name};dur={nanoseconds / 1e6:.3f}" for name, nanoseconds in parts.items())}


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")
