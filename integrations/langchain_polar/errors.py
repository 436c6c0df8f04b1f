"""PoLar's errors as members of LangChain's error family.

Code that catches `langchain_core.exceptions.ContextOverflowError` and code that catches
`polar_sdk.errors.ContextWindowError` must both work, so each PoLar error that has a counterpart in LangChain is raised
as a class that is both. The original is its `__cause__`. Knows nothing of models or requests.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from langchain_core import exceptions as langchain

from polar_sdk import errors as polar

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class QuotaUsedUpError(langchain.ModelRateLimitError, RuntimeError):
    """LangChain's form of `BudgetExceededError`: a quota that is used up, as hosted models report it.

    A RuntimeError, too: LangGraph's retry policy does not read `is_retryable`, and leaves that class alone.
    """

    is_retryable = False
    """The same call is refused until the budget's next window."""


_FAMILIES: Final[tuple[tuple[type[polar.PolarError], type[langchain.LangChainException]], ...]] = (
    (polar.ContextWindowError, langchain.ContextOverflowError),
    (polar.ModelNotFoundError, langchain.ModelNotFoundError),
    (polar.ModelFetchError, langchain.ModelConnectionError),
    (polar.RequestTimeoutError, langchain.ModelTimeoutError),
    (polar.BudgetExceededError, QuotaUsedUpError),
    (polar.QueueFullError, langchain.ModelAPIError),
    (polar.InvalidRequestError, langchain.ModelInvalidRequestError),
    (polar.ProgramError, langchain.ModelInvalidRequestError),
    (polar.IncompleteAnswerError, langchain.OutputParserException),
    (polar.PolicyError, langchain.ModelInvalidRequestError),
)
"""The first PoLar class that an error is an instance of decides its LangChain class. Errors of the store and of the
machine (SinkError, ModelDamagedError, …) have no counterpart there and are raised as they are."""

MAY_PASS: Final = (polar.RequestTimeoutError, polar.QueueFullError, polar.ModelFetchError)
"""The errors that are `retryable`: the same call may succeed later without a change."""

_TWINS: Final[dict[tuple[type, type], type[polar.PolarError]]] = {}
"""The classes that are both, created on first use."""


@contextmanager
def langchain_errors() -> Iterator[None]:
    """Raise PoLar errors from the block as LangChain errors too."""
    try:
        yield
    except polar.PolarError as error:
        twin = _as_langchain(error)
        if twin is error:
            raise
        raise twin from error


def _as_langchain(error: polar.PolarError) -> polar.PolarError:
    if isinstance(error, langchain.LangChainException):
        return error
    for mine, theirs in _FAMILIES:
        if isinstance(error, mine):
            return _rebuild(type(error), theirs, str(error), vars(error))
    return error


def _rebuild(
    mine: type[polar.PolarError], theirs: type[langchain.LangChainException], message: str, state: Mapping[str, Any]
) -> polar.PolarError:
    error = _twin_class(mine, theirs)(message)
    vars(error).update(state)  # not by the constructor: the message contains the hint already
    return error


def _twin_class(mine: type[polar.PolarError], theirs: type[langchain.LangChainException]) -> type[polar.PolarError]:
    def reduce(self: polar.PolarError) -> tuple[Any, ...]:  # a class created here has no import path to be pickled by
        return _rebuild, (mine, theirs, str(self), vars(self))

    if (mine, theirs) not in _TWINS:
        body = {"__doc__": mine.__doc__, "__module__": mine.__module__, "__reduce__": reduce}
        _TWINS[mine, theirs] = type(mine.__name__, (mine, theirs), body)
    return _TWINS[mine, theirs]
