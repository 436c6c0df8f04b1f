"""State that the endpoints of one server share: model, sink, open answers, and the rules of a call."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from copy import copy
from typing import TYPE_CHECKING, Final

from polar_sdk.errors import PolarError
from polar_sdk.request import recorder
from polar_sdk.serving.threads import run_in_thread
from polar_server.access.keys import KeyGuard
from polar_server.access.limits import Limits
from polar_server.access.stores import MemoryReplies
from polar_server.answers import Answers
from polar_server.openai.calls import Caller, Rules
from polar_server.openai.catalog import Catalog
from polar_server.openai.logprobs import TokenBytes
from polar_server.telemetry.live import LiveEngine
from polar_server.telemetry.metrics import Metrics
from polar_server.telemetry.traces import Traces
from polar_server.upstream.tiers import Tiers
from polar_server.watched_sink import WatchedSink

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from polar_server.access.stores import ReplyStore
    from polar_server.answers import Answer
    from polar_server.http.exchange import Exchange
    from polar_server.openai.calls import Call
    from polar_server.settings import Settings

_log: Final = logging.getLogger("polar_server")


class Server:
    """One model, served.

    Attributes:
        settings: Its settings.
        engine: The model, with a sink that the server watches.
        sink: That sink.
        answers: What is being computed.
        tiers: The engine, and other servers in its place for some tiers.
        catalog: The ids that requests may name.
        token_bytes: The bytes of the model's tokens.
        guard: What finds and checks API keys.
        replies: Answers to repeated requests.
        metrics: What it did.
        limits: What each key may use per minute and at a time.
        live: What the engine does now.
    """

    def __init__(self, settings: Settings) -> None:
        given = settings.engine
        self.settings = settings
        self.sink = WatchedSink(given.sink if settings.telemetry is None else settings.telemetry.counted(given.sink))
        self._traces = Traces(settings.telemetry)
        self.engine = copy(given)
        self.engine.sink = self.sink
        default_tier = Catalog(self.engine, settings.model_ids).default_tier
        self.tiers = Tiers(self.engine, settings.backends, settings.backend_key, default_tier)
        self.tiers.check()
        self.catalog = Catalog(self.engine, settings.model_ids, self.tiers.programs())
        self.answers = Answers(self.tiers, self.sink)
        self.token_bytes = TokenBytes(given.loaded.tokenizer)
        self.guard = KeyGuard(settings.keys, settings.key_rule)
        self.replies: ReplyStore = settings.replies or MemoryReplies()
        self.limits = Limits(settings.rates)
        self.live = LiveEngine(self.engine, settings.model_id, self.answers, self.sink)
        self.metrics = Metrics(self.live, self.sink.standings)
        self.sink.on_record = self.metrics.recorded

    def caller(self, exchange: Exchange) -> Caller:
        """The caller of an exchange, with the bounds of its key."""
        given, key = exchange.client_request_id, exchange.key
        tags = {} if given is None else {"client_request_id": given}
        if key is None:
            return Caller(tags=tags)
        return Caller(
            tenant=key.tenant,
            tags={**tags, **key.tags, "key": key.key_id},
            models=tuple(key.models),
            tiers=tuple(key.tiers),
            max_tokens=key.max_tokens,
        )

    def tenant(self, exchange: Exchange) -> str:
        """The tenant that is billed for what an exchange asks."""
        return self.engine.tenant if exchange.key is None else exchange.key.tenant

    def rules(self, exchange: Exchange) -> Rules:
        """The rules for the caller of an exchange."""
        return Rules(
            catalog=self.catalog,
            caller=self.caller(exchange),
            max_choices=self.settings.max_choices,
            timeout=self.settings.timeout,
            usage_always=self.settings.usage_always,
        )

    @asynccontextmanager
    async def counted(self, exchange: Exchange) -> AsyncIterator[None]:
        """Count a call among those of its key, before any of its body is read.

        It counts until the block ends, or where an answer began in it, until that ends.

        Raises:
            ApiError: A limit is reached.
        """
        key = exchange.key
        if key is not None:
            exchange.answer_headers |= await self.limits.enter(key)
            exchange.counted = True
        try:
            yield
        finally:
            self._leave(exchange)

    def start(self, call: Call, exchange: Exchange, *, holds_back: bool = False) -> Answer:
        """Begin the answer to a call.

        Args:
            call: What was asked.
            exchange: Where.
            holds_back: As for `Answers.start`.

        Raises:
            ApiError: The server is about to end.
        """
        with self._traces.of_call(exchange, call.model, call.asks) as trace:
            answer = self.answers.start(call.asks, streamed=call.stream, holds_back=holds_back)
        answer.task.add_done_callback(lambda _: trace.ended(answer))
        if exchange.counted:  # from here on until the answer ends, whoever waits for it
            exchange.counted = False
            answer.task.add_done_callback(lambda _: self._leave(exchange, answer))
        return answer

    def _leave(self, exchange: Exchange, answer: Answer | None = None) -> None:
        """The limits count a call no more: as its answer has ended, or none began."""
        if exchange.key is not None and (answer is not None or exchange.counted):
            exchange.counted = False
            self.limits.leave(exchange.key, 0 if answer is None else answer.tokens)

    async def ready(self) -> str | None:
        """Why no request should come here now; None if one may."""
        if self.answers.draining:
            return "shutting down"
        try:
            await run_in_thread(lambda _: self.sink.check(), None)
        except PolarError as error:
            return f"usage cannot be recorded: {error}"
        return None

    def open(self) -> None:
        """Begin what goes on beside the answers."""
        if self.settings.alerts is not None:
            self.settings.alerts.start(lambda: self.live.unusual)

    async def close(self) -> None:
        """Let answers finish for a while, stop the others, and store every record; the sink's spool goes last."""
        if self.settings.alerts is not None:
            self.settings.alerts.close()
        await self.answers.drain(self.settings.drain)
        await self.limits.close()
        await run_in_thread(lambda _: self.tiers.close(), None)
        await run_in_thread(lambda _: self.replies.close(), None)
        await run_in_thread(lambda _: recorder.flush(), None)
        await run_in_thread(lambda _: self.sink.close(), None)

    def log_unknown(self, error: BaseException) -> None:
        """Log an error that nobody raised on purpose."""
        if not isinstance(error, PolarError):
            _log.error("a request failed", exc_info=error)
