"""Suites: problems in the original data set's own fields, how each is asked, and when an answer is right.

A suite knows neither models nor programs. `asking.py` turns what it asks into tokens, `answers.py` has them answered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from polar_sdk.errors import DataError, InvalidRequestError
from polar_sdk.reading import Unreadable, first_flaw, parse_object, read_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.lab.items import Item

_MAX_FILE = 512 * 2**20
"""Unit: bytes."""


class Problem(BaseModel, frozen=True):
    """One line of a data file; other fields of the line are ignored."""

    @property
    @abstractmethod
    def item(self) -> Item:
        """The text that it asks, by which a router knows whether it was trained on it."""

    @property
    def group(self) -> str | None:
        """A part of the suite that is also reported alone, such as a subject."""
        return None


P = TypeVar("P", bound=Problem)


@dataclass(frozen=True)
class Asked:
    """How one problem is put to a model.

    Attributes:
        text: A user's message, or for a model without a chat template the whole prompt.
        start: Start of the answer that is put into the model's mouth.
        choices: What may follow, of which the likeliest is the answer; empty = the model writes.
        stops: Texts that end what it writes.
        max_tokens: Of what it writes.
    """

    text: str
    start: str = ""
    choices: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    max_tokens: int = 1


class Suite(ABC, Generic[P]):
    """A set of problems of one form."""

    name: ClassVar[str]
    form: type[P]
    """The fields of a line."""
    takes_shots: ClassVar[bool] = True
    """Whether solved problems may stand before the one that is asked."""
    ships: ClassVar[bool] = False
    """Whether its problems come with the package."""
    names_choices: ClassVar[bool] = True
    """Whether a request names the choices, where a problem has some; if not, they only tell what a text would be."""
    runs_code: ClassVar[bool] = False
    """Whether to judge an answer means to run it."""

    @abstractmethod
    def ask(self, problem: P, shots: Sequence[P], *, chat: bool) -> Asked:
        """Put a problem to a model that has a chat template, or to one that has none."""

    @abstractmethod
    def judge(self, problem: P, answer: int | str) -> str:
        """Nothing where the answer is right, else what is wrong: an index of the choices, or a text."""

    def shots(self, problem: P, solved: Sequence[P], count: int) -> list[P]:
        """The solved problems that stand before this one: the first that are not itself."""
        return [other for other in solved if other != problem][:count]

    def problems(self, data: str | Path | None = None, limit: int | None = None) -> list[P]:
        """The first problems of a file, or else of those that come with the package.

        Raises:
            InvalidRequestError: No file was named, and none comes with the package.
            DataError: The file cannot be used.
        """
        if data is not None:
            return self.read(Path(data), limit)
        if not self.ships:
            raise InvalidRequestError(f"suite {self.name} takes one file (got none); name it with --data.")
        return self.own(limit)

    def own(self, limit: int | None = None) -> list[P]:
        """The first problems of those that come with the package: by default those of a file of the suite's name."""
        return self.read(Path(str(resources.files("polar_sdk"))) / "shipped" / "suites" / f"{self.name}.jsonl", limit)

    def read(self, path: Path, limit: int | None = None) -> list[P]:
        """The problems of a JSONL file.

        Args:
            path: The file.
            limit: Read only the first N; None = all.

        Raises:
            DataError: The file cannot be read, holds no problem, or a line lacks a field.
        """
        try:
            lines = read_text(path, _MAX_FILE).split("\n")
        except (OSError, Unreadable) as error:
            raise DataError(f"data file {str(path)!r} cannot be read ({error}).") from error
        rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()][:limit]
        if not rows:
            raise DataError(f"data file {str(path)!r} holds no problem; {self._form_named}")
        return [self._problem(line, f"{path}:{number}") for number, line in rows]

    def _problem(self, line: str, where: str) -> P:
        try:
            return self.form.model_validate(parse_object(line))
        except Unreadable as error:
            raise DataError(f"{where}: {error}; {self._form_named}") from error
        except ValidationError as error:
            raise DataError(f"{where}: {first_flaw(error)}; {self._form_named}") from error

    @property
    def _form_named(self) -> str:
        fields = ", ".join(self.form.model_fields)
        return f"a line of suite {self.name} is a JSON object with {fields}."


def check_index(answer: int, choices: Sequence[str]) -> None:
    """Check, for a problem's validator, that the right answer is one of the choices.

    Raises:
        ValueError: It is not.
    """
    if answer >= len(choices):
        raise ValueError(f"answer {answer} is not an index of {len(choices)} choices")


def check_shots(suite: Suite[Any], count: int, file: Path | None) -> None:
    """Check that the solved problems that are asked for can be had.

    Raises:
        InvalidRequestError: The suite takes none, or no file holds them.
    """
    if count and not suite.takes_shots:
        raise InvalidRequestError(f"suite {suite.name} takes no examples (got {count} shots); use 0.")
    if count and file is None:
        raise InvalidRequestError(
            f"{count} shots need solved problems; name a file of them, in the same form, with --shots-from."
        )
