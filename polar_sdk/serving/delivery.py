"""Delivery: the pieces of an answer on their way from the computing thread to the caller's, and their end.

Neither thread touches what belongs to the other. They share only locks of single steps, since a signal may stop the
caller anywhere, and the thread also serves others.
"""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple, Protocol

from polar_sdk.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polar_sdk.engine.sampling import TokenLogprobs


class Piece(NamedTuple):
    """Text that a token made certain, on its way to the caller."""

    text: str
    logprobs: tuple[TokenLogprobs, ...] | None
    """Log-probabilities of that token; None if nobody asked for them."""
    last: bool


class Host(Protocol):
    """The scheduler, as seen by a caller."""

    def wake(self) -> None:
        """There is room for pieces again."""

    def runs_here(self) -> bool:
        """Whether the calling thread is the one that computes, and therefore cannot wait for it."""


class Delivery:
    """Pieces of one answer.

    Args:
        max_ahead: Maximum number of pieces computed before the caller takes them; None = any number.
    """

    def __init__(self, max_ahead: int | None) -> None:
        self._max_ahead = max_ahead
        self.host: Host | None = None
        """Computes the answer, once it was submitted."""
        self._forget: Callable[[], object] | None = None
        self.done = False
        """Whether nothing more will be computed."""
        self.reset()

    def reset(self) -> None:
        """Begin empty; in a forked child, the parent's threads may have used what was here."""
        self._pieces: SimpleQueue[Piece | None] = SimpleQueue()
        """At the end comes None."""
        self._gate = threading.Lock()
        """Held until the end: who waits takes it, and an interrupted waiter harms no other one, nor who opens it."""
        self._gate.acquire()

    def begin(self, host: Host, forget: Callable[[], object]) -> None:
        """A host computes the answer from now on, and forgets it at the end."""
        self.host, self._forget = host, forget

    @property
    def paused(self) -> bool:
        """Whether the caller must take pieces before more are computed."""
        return self._reaches_ahead(self._pieces.qsize())

    def _reaches_ahead(self, pieces: int) -> bool:
        return self._max_ahead is not None and pieces >= self._max_ahead

    def put(self, piece: Piece) -> None:
        """Hand a piece over; after the last one nothing more will be computed."""
        self._pieces.put(piece)
        if piece.last:
            if self._forget is not None:
                self._forget()
            self.done = True
            self._gate.release()
            self._pieces.put(None)

    def pieces(self) -> Iterator[Piece]:
        """One piece per token as it arrives, and one without a token where the job is cancelled, until it is done."""
        while not (self.done and self._pieces.empty()):
            if self._pieces.empty():
                self._refuse_host()
            piece = self._pieces.get()
            if piece is None:
                return
            if self.host is not None and self._reaches_ahead(self._pieces.qsize() + 1):
                self.host.wake()
            yield piece

    def wait(self) -> None:
        """Wait until nothing more will be computed."""
        if not self.done:
            self._refuse_host()
            with self._gate:
                pass

    def _refuse_host(self) -> None:
        if self.host is not None and self.host.runs_here():
            raise asked_by_engine()


def asked_by_engine() -> InvalidRequestError:
    """The error of a hook that waits for the model which waits for the hook."""
    return InvalidRequestError(
        "a logits_hook called the model that was running it, which would wait for itself forever.",
        hint="Call it before the request starts or after it ends, or call another model.",
    )
