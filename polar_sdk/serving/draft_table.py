"""A draft table: which token usually follows the last few in a model's answers, and how often it does.

One table serves all requests to a model, from the first one on; it is counted once, from answers to questions that
nobody asked (`polar_sdk.lab.drafting`), and stored as one safetensors file beside the fingerprint of the model. What it
proposes is only a guess: a wrong table costs time and never changes an answer. Knows tokens; no model and no request.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from polar_sdk.errors import DraftTableDamagedError, DraftTableError
from polar_sdk.reading import Unreadable, parse_json
from polar_sdk.writing import replacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CONTEXT: Final = 3
"""Number of tokens that a guess is made by, at most."""
_BITS: Final = 20
MAX_VOCABULARY: Final = 2**_BITS - 1
"""Number of different tokens of which three fit one key."""
_STEPS: Final = 255
"""Chances are stored in so many steps."""
_MIN_CHANCE: Final = 0.15
"""What is less likely is not worth a place in the table."""
_MIN_PATH: Final = 0.05
"""Guesses end where all of them being right is less likely."""
_TYPES: Final = {"keys": "uint64", "tokens": "uint32", "chances": "uint8"}
_FORMAT: Final = "polar-drafts-1"
_HINT: Final = "Make it again with `polar drafts`."


class DraftTableFacts(BaseModel):
    """What is known of a table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = _FORMAT
    model: str
    fingerprint: str
    answers: int
    """Number of answers that were counted."""
    tokens: int
    """Of these answers, in all."""
    data: str
    """Hash of the questions."""
    right: float | None = None
    """Share of the tokens of held-out answers that a table of the others guessed; None without such answers."""


class Guess(NamedTuple):
    """A token, and how likely it is to follow."""

    token: int
    chance: float


@dataclass(frozen=True, eq=False)
class DraftTable:
    """The token that follows each context most often.

    Attributes:
        keys: The contexts, one to three tokens each in one number, in rising order.
        tokens: The token that followed each most often.
        chances: How likely that is. Unit: 1/255.
        facts: Where it comes from.
    """

    keys: array[int]
    tokens: array[int]
    chances: array[int]
    facts: DraftTableFacts

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def bytes(self) -> int:
        """Size in memory. Unit: bytes."""
        return sum(len(part) * part.itemsize for part in (self.keys, self.tokens, self.chances))

    def guess(self, last: Sequence[int]) -> Guess | None:
        """The token most likely to follow, by as many of the last tokens as the table has."""
        key = _key(last[-CONTEXT:])
        for length in range(min(CONTEXT, len(last)), 0, -1):
            own = key & ((1 << _BITS * length) - 1)
            place = bisect_left(self.keys, own)
            if place < len(self.keys) and self.keys[place] == own:
                return Guess(self.tokens[place], self.chances[place] / _STEPS)
        return None

    def following(self, last: Sequence[int], count: int) -> list[Guess]:
        """The tokens most likely to follow one after another, at most `count`, as far as that is likely at all."""
        guesses: list[Guess] = []
        context, path = list(last[-CONTEXT:]), 1.0
        while len(guesses) < count and (guess := self.guess(context)) is not None:
            path *= guess.chance
            if path < _MIN_PATH:
                break
            guesses.append(guess)
            context = [*context, guess.token][-CONTEXT:]
        return guesses

    @classmethod
    def count(cls, answers: Iterable[Sequence[int]], facts: DraftTableFacts) -> Self:
        """Count what follows what.

        A token that followed m times out of t is given the chance (m - d) / t, where d is the absolute discount of Ney,
        Essen and Kneser 1994, n₁ / (n₁ + 2 n₂), for contexts of the same length: of what was seen once, most will not
        be seen again. n₁ and n₂ count the pairs of context and token that were seen once and twice.

        Args:
            answers: Token ids of each answer, from 0 to `MAX_VOCABULARY` - 1, with the last tokens before it, so that
                its first one is guessed, too.
            facts: What is known of them.
        """
        pairs: list[np.ndarray[Any, np.dtype[np.uint64]]] = []
        for answer in answers:
            tokens = np.asarray(answer, dtype=np.uint64)
            for length in range(1, CONTEXT + 1):
                if len(tokens) > length:
                    keys = np.zeros(len(tokens) - length, dtype=np.uint64)
                    for place in range(length):
                        keys = (keys << np.uint64(_BITS)) | (tokens[place : place - length] + np.uint64(1))
                    pairs.append(np.stack([keys, tokens[length:]]))
        if not pairs:
            return cls(array("Q"), array("I"), array("B"), facts)
        (keys, following), times = np.unique(np.concatenate(pairs, axis=1), axis=1, return_counts=True)
        order = np.lexsort((following, -times, keys))  # of each context, the most frequent token first
        keys, following, times = keys[order], following[order], times[order]
        contexts, first, number = np.unique(keys, return_index=True, return_inverse=True)
        total = np.bincount(number, weights=times)
        discounts = np.array([_discount(times[_lengths(keys) == length]) for length in range(1, CONTEXT + 1)])
        chances = (times[first] - discounts[_lengths(contexts) - 1]) / total
        kept = chances >= _MIN_CHANCE
        return cls(
            array("Q", contexts[kept].astype(np.uint64).tobytes()),
            array("I", following[first][kept].astype(np.uint32).tobytes()),
            array("B", np.round(chances[kept] * _STEPS).astype(np.uint8).tobytes()),
            facts,
        )

    def save(self, path: str | Path) -> Path:
        """Write the table in one step; the folder is created if needed. Returns the path."""
        target = Path(path)
        columns = zip(_TYPES.items(), (self.keys, self.tokens, self.chances), strict=True)
        arrays = {name: np.frombuffer(column, dtype=kind) for (name, kind), column in columns}
        data = save(arrays, metadata={"facts": self.facts.model_dump_json()})
        with replacing(target) as draft:
            draft.write_bytes(data)
        return target

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a table.

        Raises:
            DraftTableDamagedError: The file is missing, cut short or malformed.
        """
        source = Path(path)
        try:
            with safe_open(source, framework="np") as file:
                facts = DraftTableFacts.model_validate(parse_json((file.metadata() or {}).get("facts", "")))
                arrays = [file.get_tensor(name) for name in _TYPES]
        except (SafetensorError, OSError, Unreadable) as error:
            raise _damaged(source, str(error)) from error
        except ValidationError as error:
            first = error.errors()[0]
            raise _damaged(source, f"facts: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        if facts.format != _FORMAT:
            raise _damaged(source, f"its format is {facts.format!r}, not {_FORMAT!r}")
        if [(each.dtype.name, each.shape) for each in arrays] != [
            (kind, (len(arrays[0]),)) for kind in _TYPES.values()
        ] or not (arrays[0][1:] > arrays[0][:-1]).all():
            raise _damaged(source, "its columns do not form a table")
        keys, tokens, chances = arrays
        return cls(array("Q", keys.tobytes()), array("I", tokens.tobytes()), array("B", chances.tobytes()), facts)

    def check_model(self, fingerprint: str, vocabulary: int) -> None:
        """Refuse a model whose answers these are not.

        Args:
            fingerprint: Of the model.
            vocabulary: Number of its tokens.

        Raises:
            DraftTableError: The fingerprints differ, or a token is not the model's.
        """
        if self.facts.fingerprint != fingerprint:
            raise DraftTableError(
                f"the draft table was made for model {self.facts.model} ({self.facts.fingerprint[:12]}…), but this "
                f"model is {fingerprint[:12]}….",
                hint="Make one for it with `polar drafts`.",
            )
        if (highest := int(np.frombuffer(self.tokens, dtype=_TYPES["tokens"]).max(initial=0))) >= vocabulary:
            raise DraftTableError(
                f"the draft table proposes token {highest}, but ids of this model are 0 to {vocabulary - 1}.",
                hint=_HINT,
            )


def _discount(times: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    """What is taken off how often something was seen."""
    once, twice = int((times == 1).sum()), int((times == 2).sum())
    return once / max(once + 2 * twice, 1)


def _lengths(keys: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Number of tokens in each key."""
    lengths = np.zeros(len(keys), dtype=np.int64)
    for shorter in range(CONTEXT):
        lengths += keys >= np.uint64(1 << _BITS * shorter)
    return lengths


def _key(tokens: Sequence[int]) -> int:
    key = 0
    for token in tokens:
        key = key << _BITS | token + 1
    return key


def _damaged(path: Path, what: str) -> DraftTableDamagedError:
    return DraftTableDamagedError(f"draft table {str(path)!r} is damaged: {what}.", hint=_HINT)
