"""Grammars: which tokens may come next, and how an answer that runs out of tokens is steered to its end.

A grammar is compiled once per tokenizer and tenant, so that no tenant can tell by timing whether another one used it.
Every row that follows it has its own state, which changes with each sampled token and depends on nothing else, so that
a row whose prompt runs again continues where it was. The masks are llguidance's and take some ten microseconds per
token, so they are computed when needed and not ahead. Knows token ids and logits; no JSON and no requests.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from contextlib import contextmanager
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from polar_sdk.engine.sampling import strike_out
from polar_sdk.errors import GrammarError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from polar_sdk.engine.sampling import Sampler


_Words = NDArray[np.uint32]
"""A mask of tokens, one bit per id."""
_KEPT: Final = 256
"""Compiled grammars kept per model."""
_MARGIN: Final = 16
"""Steering looks this many tokens ahead of the shortest end. Unit: tokens."""
_MAX_END_TOKENS: Final = 512
"""No search for an end goes on for longer. Unit: tokens."""
_BLIND_LOOK: Final = 64
"""After a search without result, tokens that are left when the next one begins."""
_PATIENCE: Final = 8
"""If no end that was found comes in time, the next one is looked for after as many tokens as it is late, at most
this."""
_TAKEN: Final = 4
"""A token may stand for fewer than this many of a known way to an end."""
_FEW: Final = 1024
"""Up to this number of allowed tokens are picked from the logits; beyond it, the others are masked."""
_PLACES: Final = 2048
"""A wide search for an end goes on to this many places of a grammar, some 0.1 s."""
_BRANCHES: Final = 256
"""If more tokens than this may follow, as within a text of free form, a wide search follows one of them."""
_CLOSERS: Final = ("}", "]", '"', ",")
"""Ends of a JSON value, soonest first."""
_FILLERS: Final = ("null", "0", "true", "false", *"ntf@.:/-PTZDYMHWS", *"123456789", *"abcdeghijklmopqrsuvwxyz {[")
"""Parts that a value needs before it can end, such as a digit or parts of a date; the least used one is taken."""


class GrammarCompiler:
    """Compiles grammars for one tokenizer; safe in several threads.

    Args:
        tokenizer: A fast tokenizer.
        vocab: Number of logits, V, which may be more than the tokenizer has tokens.
        end_tokens: Ids that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab: int, end_tokens: frozenset[int]) -> None:
        self._hf, self._vocab, self._end_tokens = tokenizer, vocab, end_tokens
        self.compile = lru_cache(maxsize=_KEPT)(self._compile)
        """As `_compile`, remembering the latest ones."""

    def _compile(self, text: str, tenant: str) -> Grammar:
        """Compile what `llguidance.LLMatcher.grammar_from_…` returns, for a tenant alone.

        Raises:
            GrammarError: It is not a grammar, or one that cannot be followed.
            MissingExtraError: llguidance is not installed.
        """
        guidance = import_llguidance()
        tokens = self._tokens
        with _no_panic():
            broken, messages = guidance.LLMatcher.validate_grammar_with_warnings(text, tokens.tokenizer)
            if broken:
                raise _unsupported(" ".join(messages))
            matcher = guidance.LLMatcher(tokens.tokenizer, text, log_level=0)
        if matcher.is_error():
            raise _unsupported(matcher.get_error())
        return Grammar(matcher, tokens)

    @cached_property
    def _tokens(self) -> _Tokens:
        import_llguidance()
        from llguidance.hf import from_tokenizer

        try:
            tokenizer = from_tokenizer(self._hf, n_vocab=self._vocab, eos_token=sorted(self._end_tokens))  # type: ignore[arg-type]
        except ValueError as error:
            raise GrammarError(f"this model's tokenizer cannot follow a grammar: {str(error)[:200]}.") from error
        return _Tokens(tokenizer, self._vocab, self._end_tokens)


class _Tokens:
    """A tokenizer as llguidance sees it, and the ids that steering looks for."""

    def __init__(self, tokenizer: Any, vocab: int, end_tokens: frozenset[int]) -> None:
        self.tokenizer, self.vocab = tokenizer, vocab
        self.end, self.ends = min(end_tokens), end_tokens
        self.closers = self._ids(_CLOSERS)
        self.fillers = self._ids(_FILLERS)
        self.quote, self.letters = self._ids('"'), self._ids("abxyz")

    def _ids(self, texts: Sequence[str]) -> list[int]:
        split = [self.tokenizer.tokenize_str(text) for text in texts]
        return [ids[0] for ids in split if len(ids) == 1]


class Grammar:
    """A compiled grammar. Nothing in it changes but what it remembers."""

    def __init__(self, matcher: Any, tokens: _Tokens) -> None:
        self._matcher, self._tokens = matcher, tokens
        self._wide = lru_cache(maxsize=_KEPT)(partial(_search_wide, matcher, tokens))

    def start(self, max_tokens: int | None = None) -> GrammarState:
        """A state at the beginning; with `max_tokens`, an answer is steered so that it ends within them."""
        plan = self._end.path if max_tokens is None else self._way_within(max_tokens)
        return GrammarState(self._matcher.deep_copy(), self._tokens, max_tokens, plan)

    def check_fits(self, max_tokens: int) -> None:
        """Refuse a grammar that no answer of N tokens can match, as far as that can be known beforehand.

        Raises:
            GrammarError: No answer fits.
        """
        end, way = self._end, self._way_within(max_tokens)
        if way is not None and len(way) <= max_tokens:
            return
        # Texts of free form within an answer may be shorter than on the way that was found, so they are not counted.
        least = end.forced + (0 if end.path is None else end.closed)
        if least > max_tokens or self._wide(max_tokens).all_seen:
            if (short := self._wide(_MAX_END_TOKENS).path) is not None:
                least = len([token for token in short if token != self._tokens.end])
            raise GrammarError(
                f"max_tokens={max_tokens} is too few for an answer that matches; a short one needs {least}: raise it.",
                hint="With fit_max_tokens=False the answer is cut off instead.",
            )

    def _way_within(self, max_tokens: int) -> list[int] | None:
        """The shortest way to an end that is known; a wide search is made only where it would not fit."""
        path = self._end.path
        if path is not None and len(path) <= max_tokens:
            return path
        return self._wide(max_tokens).path or path

    @cached_property
    def _end(self) -> _End:
        return _search_end(self._matcher, self._tokens, _MAX_END_TOKENS)


class GrammarState:
    """The state of one row in its grammar.

    Args:
        matcher: Its own copy.
        tokens: Of the model.
        max_tokens: Within these, the answer is steered to an end; None = it is not.
        plan: Tokens that lead from here to an end; None = unknown.
    """

    def __init__(self, matcher: Any, tokens: _Tokens, max_tokens: int | None, plan: list[int] | None = None) -> None:
        self._matcher, self._tokens = matcher, tokens
        self._left = max_tokens
        self._words = _no_words(tokens)
        """The mask of the next token, one bit per id."""
        self._masked = False
        self.cut = False
        """True once steering, and not the model, has ended the answer."""
        self._plan = plan
        self._last_way = plan
        """The way to an end found last, which often still leads there: one more letter of a text changes nothing."""
        self._look = _next_look(max_tokens or 0, plan)
        """Number of tokens left at which steering looks for an end again."""

    @property
    def accepting(self) -> bool:
        """True if the answer could end here."""
        return bool(self._matcher.is_accepting())

    @property
    def ended(self) -> bool:
        """True if nothing but the end can follow."""
        return bool(self._matcher.is_stopped())

    def sample(self, sampler: Sampler, logits: Tensor) -> int:
        """Choose the next token from logits (V,), among those that the grammar allows.

        Raises:
            GrammarError: The grammar grew beyond its limits.
        """
        if sampler.greedy and self._allows(likeliest := int(logits.argmax())):
            return self._fitting(likeliest)
        allowed = self._allowed(len(logits))
        if len(few := allowed.nonzero()[0]) > _FEW:
            token = sampler(logits, allowed)
        elif len(few) > 1:
            token = int(few[sampler(logits[torch.from_numpy(few).to(logits.device)])])
        elif len(few):
            token = int(few[0])  # a place where nothing is chosen, as most of JSON
        if not len(few) or logits[token] == -torch.inf:
            raise _nothing_left()
        return self._fitting(token)

    def restrict(self, logits: Tensor) -> Tensor:
        """Logits (V,) with −inf for what the grammar forbids, in place.

        Raises:
            GrammarError: No allowed token has a finite logit, or the grammar grew beyond its limits.
        """
        restricted = strike_out(logits, self._allowed(len(logits)))
        if restricted.max() == -torch.inf:
            raise _nothing_left()
        return restricted

    def _allowed(self, count: int) -> NDArray[np.bool_]:
        """For each of N tokens, whether it may be the next."""
        self._mask()
        return _bits(self._words)[:count]

    def accept(self, token: int) -> None:
        """Move on by a sampled token.

        Raises:
            GrammarError: The grammar grew beyond its limits.
        """
        self._masked = False
        if not self._matcher.consume_token(token):
            raise GrammarError(f"the grammar could not be followed: {self._matcher.get_error()[:300]}")
        if self._plan is not None:
            self._plan = self._plan[1:] if self._plan[:1] == [token] else None
            self._last_way = self._plan or self._last_way
        if self._left is not None:
            self._left -= 1

    def _fitting(self, token: int) -> int:
        """The token, or where after it the answer could not end in time, the next one on the way to an end."""
        if self._left is None or self._left > self._look or (self._plan or [])[:1] == [token]:
            return token
        if token in self._tokens.ends or self._matcher.validate_tokens([token, self._tokens.end]) != 1:
            return token  # it is the end, or the end may follow
        way = self._way_after(token)
        self._last_way = way or self._last_way
        if way is None or len(way) >= self._left:
            here = self._plan or self._way_from_here()
            if here is not None and len(here) <= self._left:
                self._plan = here
                self.cut = here[0] == self._tokens.end
                return here[0]
            missing = _PATIENCE if here is None else min(len(here) - self._left, _PATIENCE)
            self._plan, self._look = None, self._left - missing
            return token
        self._plan = [token, *way]
        self._look = _next_look(self._left, way)
        return token

    def _way_after(self, token: int) -> list[int] | None:
        """Tokens to an end after a token: those found last, where they still lead there, or else a new search.

        A token may be several of the way at once, such as a quotation mark with a comma, so that the rest leads there.
        """
        for taken in range(min(len(self._last_way or ()), _TAKEN)):
            way = (self._last_way or [])[taken:]
            ended = way if way[-1] == self._tokens.end else [*way, self._tokens.end]
            if self._matcher.validate_tokens([token, *ended]) == len(ended) + 1:
                return way
        after = self._matcher.deep_copy()
        after.consume_token(token)
        return _search_end(after, self._tokens, min(self._left or 0, _MAX_END_TOKENS)).path

    def _way_from_here(self) -> list[int] | None:
        if self.accepting:
            return [self._tokens.end]
        return _search_end(self._matcher, self._tokens, _MAX_END_TOKENS).path

    def _allows(self, token: int) -> bool:
        self._mask()
        return _has(self._words, token)

    def _mask(self) -> None:
        if not self._masked:
            _fill(self._matcher, self._words)
            self._masked = True


def _next_look(left: int, way: Sequence[int] | None) -> int:
    """How few tokens must be left before an end is looked for again."""
    return _BLIND_LOOK if way is None else max(len(way) + 2 * _MARGIN, left - _MARGIN)


class _End:
    """A way to an end, as far as it was followed."""

    def __init__(self) -> None:
        self.path: list[int] | None = None
        """Tokens to an end; None = none was found."""
        self.forced = 0
        """Number of tokens that the grammar forced on the way."""
        self.closed = 0
        """Number of tokens on the way that closed something."""


def _search_end(matcher: Any, tokens: _Tokens, limit: int) -> _End:
    """Follow a grammar to an end the short way: what it forces, and else whatever closes soonest.

    The way is a good one and not provably the shortest.

    Args:
        matcher: Where it begins; not changed.
        tokens: Of the model.
        limit: Give up after this many tokens.
    """
    found, follower, path = _End(), matcher.deep_copy(), list[int]()
    words = _no_words(tokens)
    used: Counter[int] = Counter()
    while not follower.is_accepting():
        if len(path) > limit:
            return found
        if step := list(follower.compute_ff_tokens()):
            found.forced += len(step)
        else:
            _fill(follower, words)
            token, closes = _closing(words, tokens, used)
            step = [] if token is None else [token]
            found.closed += closes
        if not step or not follower.consume_tokens(step):
            return found
        path += step
    found.path = path if follower.is_stopped() else [*path, tokens.end]
    return found


class _Wide(NamedTuple):
    """The result of a wide search."""

    path: list[int] | None
    """The shortest way that was seen, at most as long as asked for."""
    all_seen: bool
    """Whether every way of that length was seen."""


def _search_wide(matcher: Any, tokens: _Tokens, limit: int) -> _Wide:
    """Follow every way that a grammar allows, breadth first, and only one of them through texts of free form.

    So it is exact for one of several texts, where `_search_end` may take a long one.

    Args:
        matcher: Where it begins; not changed.
        tokens: Of the model.
        limit: Maximum tokens of a way.
    """
    words = _no_words(tokens)
    used: Counter[int] = Counter()
    places: deque[tuple[Any, list[int], bytes]] = deque([(matcher, [], b"")])
    reached, all_seen = {b""}, True
    shortest: list[int] | None = None
    while places:
        place, path, text = places.popleft()
        if shortest is not None and len(path) + 1 >= len(shortest):
            break
        if place.is_accepting():
            # An answer whose last token is the last that it may have needs no end.
            way = path if place.is_stopped() or len(path) == limit else [*path, tokens.end]
            if len(way) <= limit and (shortest is None or len(way) < len(shortest)):
                shortest = way
        if place.is_stopped() or len(path) >= limit:
            continue
        _fill(place, words)
        follow = _bits(words).nonzero()[0].tolist()
        if len(follow) > _BRANCHES or len(reached) > _PLACES:
            all_seen = False
            closing = _closing(words, tokens, used)[0]
            follow = [] if closing is None or len(reached) > _PLACES else [closing]
        for token in follow:
            longer = text + bytes(tokens.tokenizer.decode_bytes([token]))
            after = place.deep_copy()
            if longer not in reached and after.consume_token(token):
                reached.add(longer)
                places.append((after, [*path, token], longer))
    return _Wide(shortest, all_seen)


def _closing(words: _Words, tokens: _Tokens, used: Counter[int]) -> tuple[int | None, bool]:
    """The token that ends what is open soonest, and whether it closes something; None if nothing may follow."""
    within_text = sum(_has(words, letter) for letter in tokens.letters) >= 2  # brackets are text as well there
    for token in tokens.quote if within_text else tokens.closers:
        if _has(words, token):
            return token, True
    if fillers := [token for token in tokens.fillers if _has(words, token)]:
        token = min(fillers, key=lambda filler: used[filler])
        used[token] += 1
        return token, False
    allowed = _bits(words).nonzero()[0]
    return (int(allowed[0]) if len(allowed) else None), False


def _no_words(tokens: _Tokens) -> _Words:
    return np.zeros((tokens.vocab + 31) // 32, dtype=np.uint32)


def _fill(matcher: Any, words: _Words) -> None:
    matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    if matcher.is_error():
        raise GrammarError(f"the grammar could not be followed: {matcher.get_error()[:300]}")


def _has(words: _Words, token: int) -> bool:
    return bool((words.item(token >> 5) >> (token & 31)) & 1)


def _bits(words: _Words) -> NDArray[np.bool_]:
    """For each id, whether its bit is set."""
    return np.unpackbits(words.view(np.uint8), bitorder="little").view(np.bool_)


def _nothing_left() -> GrammarError:
    return GrammarError("no token that the grammar allows is left: a logits_hook forbids them all.")


@contextmanager
def _no_panic() -> Iterator[None]:
    """Refuse what makes the library panic, as its message about long texts does: a panic is no `Exception`."""
    try:
        yield
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise _unsupported(f"llguidance fails at it ({error})") from error


_SOURCE: Final = re.compile(
    r"^\s*(\d+\s*)?\|.*$|^[\s^]+$|\bat \d+\(\d+\): |failed to compile JSON schema: ", re.MULTILINE
)
"""Within a message of the library: where in the text of a grammar, which may be one that nobody wrote, it is."""


def _unsupported(reason: str) -> GrammarError:
    reason = _SOURCE.sub("", reason)
    return GrammarError(
        f"this schema, regular expression or grammar is not supported: {' '.join(reason.split())[:400].rstrip('.')}.",
        hint="Remove or rewrite that part, and check the answer yourself.",
    )


def import_llguidance() -> Any:
    """The library that follows grammars.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise MissingExtraError(
            "llguidance is not installed, which schema=, regex=, choice= and grammar= need; "
            'run: pip install "polar-llm[structured]"'
        ) from error
    return llguidance
