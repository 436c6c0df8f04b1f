"""Answers of programs to the problems of a suite; measured once, and kept in the cache of rewards."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Generic, NamedTuple

from polar_sdk.engine.hashes import hash_maps
from polar_sdk.lab.rewards.measure import Measurer
from polar_sdk.lab.suites.suite import P
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from polar_sdk.lab.rewards.cache import RewardCache
    from polar_sdk.lab.suites.asking import Prepared
    from polar_sdk.lab.suites.suite import Suite
    from polar_sdk.model import PolarModel
    from polar_sdk.programs.program import Program


class Answer(NamedTuple):
    """An answer, judged."""

    flaw: str
    """Empty where it is right."""
    tokens: int
    """Tokens that were written; 1 for a letter."""


@dataclass
class Answers(Generic[P]):
    """Answers of programs to prepared problems, by the problem's place and the program.

    Attributes:
        model: The model.
        suite: It judges.
        prepared: The problems.
        cache: Keeps what was measured.
        on_progress: Called with (stage, steps done, steps in all).
    """

    model: PolarModel
    suite: Suite[P]
    prepared: Sequence[Prepared[P]]
    cache: RewardCache
    on_progress: Progress = silent

    def of(self, wanted: Iterable[tuple[int, Program]]) -> dict[tuple[int, Program], Answer]:
        """The answers to some of the problems, each under some programs."""
        programs: dict[int, list[Program]] = defaultdict(list)
        for row, program in dict.fromkeys(wanted):
            programs[row].append(program)
        rows = sorted(programs)
        answers = {
            **self._chosen({row: programs[row] for row in rows if self.prepared[row].choices}),
            **self._written({row: programs[row] for row in rows if not self.prepared[row].choices}),
        }
        judged: dict[tuple[int, int | str], str] = {}
        for done, ((row, _), (answer, _)) in enumerate(answers.items()):
            if (row, answer) not in judged:
                judged[row, answer] = self.suite.judge(self.prepared[row].problem, answer)
            self.on_progress("judging", done + 1, len(answers))
        return {(row, program): Answer(judged[row, a], count) for (row, program), (a, count) in answers.items()}

    @cached_property
    def _measurer(self) -> Measurer:
        return Measurer(self.model, self.cache, self.on_progress)

    def _chosen(self, wanted: dict[int, list[Program]]) -> dict[tuple[int, Program], tuple[int | str, int]]:
        """The index of the likeliest choice; problems that want the same programs share what these have in common."""
        groups: dict[tuple[Program, ...], list[int]] = defaultdict(list)
        for row, programs in wanted.items():
            groups[tuple(programs)].append(row)
        found: dict[tuple[int, Program], tuple[int | str, int]] = {}
        for shared, rows in groups.items():
            scores = self._measurer.scores([self.prepared[row].task for row in rows], shared)
            for program, of_program in scores.items():
                found |= {(row, program): (score.best, 1) for row, score in zip(rows, of_program, strict=True)}
        return found

    def _written(self, wanted: dict[int, list[Program]]) -> dict[tuple[int, Program], tuple[int | str, int]]:
        """The text, without what stopped it, and its number of tokens, those of a stop included."""
        groups: dict[tuple[Program, tuple[str, ...], int], list[int]] = defaultdict(list)
        for row, programs in wanted.items():
            for program in programs:
                asked = self.prepared[row].asked
                groups[program, asked.stops, asked.max_tokens].append(row)
        found: dict[tuple[int, Program], tuple[int | str, int]] = {}
        for (program, stops, max_tokens), rows in groups.items():
            tokens = self._tokens(program, rows, stops, max_tokens)
            found |= {
                (row, program): (_until(self.model.decode(ids), stops), len(ids))
                for row, ids in zip(rows, tokens, strict=True)
            }
        return found

    def _tokens(
        self, program: Program, rows: Sequence[int], stops: tuple[str, ...], max_tokens: int
    ) -> list[tuple[int, ...]]:
        """Token ids that a program writes for these problems."""
        prompts = {self.prepared[row].task.key: self.prepared[row].tokens for row in rows}

        def write(keys: Sequence[str]) -> list[tuple[int, ...]]:
            asked = [prompts[key] for key in keys]
            return self.model.greedy_answers(asked, max_tokens=max_tokens, program=program, stop=stops)

        maps = hash_maps(self.model.decoder, [program])[:24]
        known = self.cache.complete(
            list(prompts),
            f"{program.text} {maps} writes {max_tokens} until {stops!r}",
            write,
            lambda done, total: self.on_progress(f"writing under {program.text}", done, total),
        )
        return [tuple(known[self.prepared[row].task.key]) for row in rows]


def _until(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops in it."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
