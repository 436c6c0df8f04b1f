"""An answer that an upstream computes; the rest of the server treats it as the engine's.

The prompt goes there as the token ids that the engine would run, so both count the same tokens. FLOPs are those of the
program by the formula (`polar_sdk.programs.cost`), for the tokens that the upstream reports; if the answer was
interrupted before that, for the prompt and the tokens of the text that arrived. The tag `polar.measured_by` says which:
`upstream` or `relay`. What an upstream computed but did not send is unknown, and not billed.

Prompt tokens that an upstream does not report as cached count as run, and the tag `polar.unstated` says so: most
servers report cached tokens only in the last event of a stream, which an interrupted stream does not have.

An upstream is trusted only within the request: no answer may be longer than requested, and figures that cannot be those
of prompt and answer are not billed; the relay's own counts are. The tag `polar.disputed` says so: `length` or `usage`.
Exactly one record per request that an upstream took, however it ends.
"""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty
from typing import TYPE_CHECKING, Any, Final, cast

from pydantic import ValidationError

from polar_sdk import Chunk, Generation, Program
from polar_sdk.errors import RequestTimeoutError
from polar_sdk.programs.cost import pieces
from polar_sdk.request.admission import admit
from polar_sdk.request.record import MARK_NS, MARK_TOKENS
from polar_sdk.usage import (
    DISPUTED_TAG,
    UNSTATED_TAG,
    UPSTREAM,
    WORKER_TAG,
    FlopUsage,
    Outcome,
    TokenUsage,
    UsageRecord,
    VisitUsage,
)
from polar_server.upstream.client import Ended, Event, UpstreamError

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from polar_sdk import PolarModel
    from polar_sdk.programs.cost import CostModel
    from polar_sdk.serving.job import FinishReason
    from polar_sdk.serving.request import Request
    from polar_sdk.usage import Receipt
    from polar_server.upstream.backends import Backend, Place
    from polar_server.upstream.client import News, Stream

MEASURED_TAG: Final = "polar.measured_by"
_HALVES: Final = re.compile("[\ud800-\udfff]")
"""Halves of surrogate pairs, which JSON can express and no text can hold."""
_LOOK_S: Final = 0.05
"""How often a request that waits for its upstream looks whether it should end. Unit: seconds."""
_log: Final = logging.getLogger("polar_server")


@dataclass
class _Progress:
    """The state of an answer under way.

    Attributes:
        max_pieces: Pieces of text that it may have.
        max_characters: Characters that it may have.
    """

    max_pieces: int
    max_characters: int
    text: str = ""
    pieces: int = 0
    finish: str | None = None
    reported: TokenUsage | None = None
    """The upstream's last figures."""
    cached_stated: bool = False
    """Whether they say how many tokens of the prompt were cached."""
    disputed: str | None = None
    """The claim of the upstream that cannot be: `usage`, or `length` where its answer was cut."""
    opened_ns: int = 0
    first_ns: int = 0
    """When the first piece came, by the monotonic clock; 0 = none has."""
    lost: BaseException | None = None
    """The outside event that ended the request, such as a lost hold."""
    marked: int = 0
    """Pieces at the last mark."""
    marked_ns: int = field(default_factory=time.perf_counter_ns)

    def take(self, data: Mapping[str, Any]) -> str:
        """Note one event; returns its text, as far as the answer may have more."""
        if isinstance(usage := data.get("usage"), dict):
            self.reported, self.cached_stated = _usage(usage)
            self.disputed = self.disputed or (None if self.reported else "usage")
        choices = data.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        if (reason := choice.get("finish_reason")) is not None:
            self.finish = "length" if reason == "length" else "stop"
        text = choice.get("text")
        if not isinstance(text, str) or not text:
            return ""
        text = _HALVES.sub("\ufffd", text)
        room = self.max_characters - len(self.text) if self.pieces < self.max_pieces else 0
        if len(text) > room:
            self.finish, self.disputed = "length", "length"
            text = text[:room]
        self.text += text
        self.pieces += 1
        self.first_ns = self.first_ns or time.perf_counter_ns()
        return text


def _usage(usage: Mapping[str, Any]) -> tuple[TokenUsage | None, bool]:
    """The usage in an event, if it is one that can be, and whether it says how many tokens were cached."""
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    try:
        said = TokenUsage(
            input=usage.get("prompt_tokens"),
            cached=cached or 0,
            output=usage.get("completion_tokens"),
        )
    except ValidationError:
        return None, False
    return said, cached is not None


def stream(engine: PolarModel, backends: Mapping[str, Backend], request: Request) -> Generator[Chunk, None, None]:
    """Answer a request that was checked, by the upstream of its tier.

    Yields:
        As the engine: the last chunk carries the generation, whose record is stored by then.

    Raises:
        UpstreamError: No upstream took the request, or it was interrupted.
        PolarError: As `polar_sdk.PolarModel.stream`.
    """
    sink, cost = engine.sink, engine.decoder.cost
    sink.check()
    reserved: list[Request] = []
    answer: _Answer | None = None
    try:
        (request,) = admit([request], cost, sink, reserved.append)
        assert request.tier is not None
        answer = _Answer(engine, backends[request.tier], request)
        yield from answer.chunks()
    finally:
        if answer is None or not answer.recorded:
            for one in reserved:
                with suppress(Exception):  # any sink, any error: a hold expires by itself
                    sink.release(one.tenant, one.request_id)


class _Answer:
    """One answer of an upstream.

    Attributes:
        recorded: Whether it has a record.
    """

    def __init__(self, engine: PolarModel, backend: Backend, request: Request) -> None:
        self._engine, self._backend, self._request = engine, backend, request
        self._sink = engine.sink
        # One piece more than tokens: the last one may be what was left of a character.
        self._progress = _Progress(request.max_tokens + 1, request.max_tokens * backend.longest_token)
        self._began = self.recorded = False
        self._worker: str | None = None

    def chunks(self) -> Generator[Chunk, None, None]:
        """The pieces of the answer; its record is stored however they end."""
        progress = self._progress
        try:
            for text in self._texts():
                yield Chunk(text)
        except GeneratorExit:
            self._record(Outcome.CANCELLED)
            raise
        except RequestTimeoutError as error:
            error.usage = self._record(Outcome.CANCELLED)[0]
            raise
        except BaseException as error:
            if self._began:
                self._record(Outcome.ERROR, error)
            raise
        cut = progress.finish == "cancelled"
        record, receipt = self._record(Outcome.CANCELLED if cut else Outcome.COMPLETED)
        tokens = tuple(self._engine.encode(progress.text))
        finish = cast("FinishReason", record.finish_reason)
        yield Chunk("", Generation(progress.text, tokens, finish, record, receipt))

    def _texts(self) -> Generator[str, None, None]:
        """The text as it arrives, until the answer ends or nobody wants it any more."""
        opened = self._open()
        if opened is None:
            self._progress.finish = "cancelled"
            return
        place, stream = opened
        try:
            while (news := self._next(stream)) is not None:
                if isinstance(news, Ended):
                    if news.error is not None:
                        raise news.error
                    self._progress.finish = self._progress.finish or "stop"
                    return
                if isinstance(news, Event) and (text := self._progress.take(news.data)):
                    self._mark()
                    yield text
                if self._progress.disputed == "length":
                    return
            self._progress.finish = "cancelled"
        finally:
            stream.close()
            place.add(-1)

    def _open(self) -> tuple[Place, Stream] | None:
        """The first of the tier's upstreams that takes the request; none where nobody wants it any more.

        Raises:
            UpstreamError: None takes it.
        """
        request, failure = self._request, None
        places = self._backend.by_load()
        for place in places:
            place.add(1)
            stream, is_taken = None, False
            try:
                served = place.served()
                self._worker = served.worker
                stream = self._backend.client.complete(place.base, self._backend.body(request, served), served.worker)
                news = self._next(stream)
                if news is None:
                    self._begin()
                    return None
                if isinstance(news, Ended) and news.error is not None:
                    raise news.error
                self._begin()
                is_taken = True
                return place, stream
            except UpstreamError as error:
                failure = error
                if not self._backend.is_gone(place, error):
                    raise
                if error.code == "upstream_restarted" and places.count(place) == 1:
                    places.append(place)  # it is looked at again, and asked again if it runs the same files
            finally:
                if not is_taken:
                    place.add(-1)
                    if stream is not None:
                        stream.close()
        assert failure is not None
        raise failure

    def _begin(self) -> None:
        """From here on there will be a record."""
        self._began = True
        self._progress.opened_ns = time.perf_counter_ns()
        self._sink.watch(self._request.tenant, self._request.request_id, self._lose)

    def _lose(self, error: Exception) -> None:
        self._progress.lost = error

    def _next(self, stream: Stream) -> News | None:
        """The next news; None once the caller wants nothing more.

        Raises:
            RequestTimeoutError: The time is up.
            Exception: What the request lost.
        """
        while True:
            if self._request.cancelled:
                return None
            if self._progress.lost is not None:
                raise self._progress.lost
            if self._request.late:
                raise RequestTimeoutError(
                    f"the answer was stopped after {self._request.timeout} s, by the time limit.",
                    hint="Raise timeout, lower max_tokens, or use a cheaper tier.",
                )
            with suppress(Empty):
                return stream.news.get(timeout=_LOOK_S)

    def _mark(self) -> None:
        """Tell the sink now and then what was used so far, in case this process is killed."""
        progress, now = self._progress, time.perf_counter_ns()
        due = progress.pieces - progress.marked >= MARK_TOKENS or now - progress.marked_ns >= MARK_NS
        if due and self._sink.wants_marks:
            progress.marked, progress.marked_ns = progress.pieces, now
            try:
                self._sink.mark(self._made(Outcome.CANCELLED))
            except Exception as error:  # any sink, any error: the answer goes on, and its record counts
                _log.warning("request %r could not be marked (%s)", self._request.request_id, error)

    def _record(self, outcome: Outcome, error: BaseException | None = None) -> tuple[UsageRecord, Receipt | None]:
        record = self._made(outcome, error)
        self.recorded = True
        return record, self._sink.emit(record)

    def _tokens(self) -> tuple[TokenUsage, str]:
        """Tokens, and who counted them: the upstream, where its figures can be those of prompt and answer."""
        progress, prompt, most = self._progress, len(self._request.tokens), self._request.max_tokens
        if progress.disputed is None and (said := progress.reported) is not None:
            least = max(progress.pieces - 1, -(-len(progress.text) // self._backend.longest_token))
            if said.input == prompt and said.cached <= prompt and least <= said.output <= most:
                return said, "upstream"
            progress.disputed = "usage"
        written = len(self._engine.encode(progress.text)) if progress.text else 0
        return TokenUsage(input=prompt, output=min(written, most)), "relay"

    def _made(self, outcome: Outcome, error: BaseException | None = None) -> UsageRecord:
        request, progress, now = self._request, self._progress, time.perf_counter_ns()
        tokens, measured_by = self._tokens()
        found = {
            MEASURED_TAG: measured_by,
            DISPUTED_TAG: progress.disputed,
            UNSTATED_TAG: None if measured_by == "upstream" and progress.cached_stated else "cached",
            WORKER_TAG: self._worker,
        }
        program, cost = request.program, self._engine.decoder.cost
        flops, visits, identity = FlopUsage(), VisitUsage(), 0
        if tokens.output:
            flops = cost.request(
                program, tokens.input, tokens.output, cached=tokens.cached, router=request.router_flops
            )
            visits = _visits(cost, program, tokens)
            whole = Program.identity(cost.depth)
            identity = cost.request(whole, tokens.input, tokens.output, cached=tokens.cached).total
        finish: Any = {Outcome.CANCELLED: "cancelled", Outcome.ERROR: "error"}.get(outcome, progress.finish or "stop")
        opened = progress.opened_ns or now
        first = progress.first_ns or now
        return UsageRecord(
            request_id=request.request_id,
            tenant=request.tenant,
            tags={**request.tags, **{tag: value for tag, value in found.items() if value is not None}},
            model=self._engine.name,
            model_fingerprint=self._engine.fingerprint,
            router=request.router,
            router_version=request.router_version,
            tier=request.tier,
            program=program.text,
            outcome=outcome,
            finish_reason=finish,
            error=type(error).__name__ if outcome is Outcome.ERROR else None,
            tokens=tokens,
            visits=visits,
            flops=flops,
            identity_flops=identity,
            device=UPSTREAM,
            dtype=UPSTREAM,
            started_at=request.started_at,
            queue_ns=max(opened - request.created_ns, 0),
            prefill_ns=max(first - opened, 0),
            decode_ns=now - progress.first_ns if progress.first_ns else 0,
        )


def _visits(cost: CostModel, program: Program, tokens: TokenUsage) -> VisitUsage:
    """The visits that the engine would count for these tokens."""
    prefill: Counter[int] = Counter()
    for piece in pieces(tokens.input, tokens.cached):
        for share in cost.shares(program, piece):
            if share.parts.running or share.parts.leaving:
                prefill[share.step.first] += 1
    per_pass = Counter(program.layers)
    return VisitUsage(
        prefill=tuple(prefill[layer] for layer in range(cost.depth)),
        decode=tuple(per_pass[layer] * (tokens.output - 1) for layer in range(cost.depth)),
    )
